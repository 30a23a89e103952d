"""Runs a Hub under uvicorn: one socket, one announcement, a clean end."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import Iterator
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from localhub.app import Options, make_app
from localhub.faults.injection import TRANSPORT

_KEEP_ALIVE_SECONDS = 120
"""Longer than the clients keep idle connections, so that it is never this side that closes one they just chose."""

_GRACE_SECONDS = 3
_BACKLOG = 2048


class _WithTransport:
    """An application that is told the transport of its connection: faults cut and reset it."""

    def __init__(self, app: ASGIApp, transport: asyncio.Transport) -> None:
        self._app = app
        self._transport = transport

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope[TRANSPORT] = self._transport
        await self._app(scope, receive, send)


class _Protocol(AutoHTTPProtocol):  # type: ignore[misc,valid-type] # uvicorn chooses the base when it is imported
    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.app: Any = _WithTransport(self.app, transport)


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, announcement: dict[str, object], *, until_stdin_closes: bool) -> None:
        super().__init__(config)
        self._announcement = announcement
        self._until_stdin_closes = until_stdin_closes

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # uvicorn raises the signal again at its end, which would make a clean end look like a death.
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)
        if self._until_stdin_closes:
            loop.add_reader(sys.stdin.fileno(), self._read_stdin)
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        # Not before: a signal that follows the announcement must find its handler.
        sys.stdout.write(json.dumps(self._announcement) + "\n")
        sys.stdout.flush()

    def _stop(self) -> None:
        self.should_exit = True

    def _read_stdin(self) -> None:
        if not os.read(sys.stdin.fileno(), 4096):
            asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
            self._stop()


def serve(options: Options, host: str, port: int, *, until_stdin_closes: bool = False) -> None:
    """Serve until SIGTERM or SIGINT.

    Prints one line of JSON on stdout when the port is open: `endpoint`, `pid`, `root`.

    Args:
        options: what to serve.
        host: address to listen on.
        port: port to listen on; 0 for any that is free.
        until_stdin_closes: whether to end as well when stdin, a pipe, is closed: so a Hub does not outlive a parent
            that was killed.

    Raises:
        OSError: the address cannot be listened on.
        RuntimeError: the root was made by another version of this package.
    """
    with _listen(host, port) as listener:
        app = make_app(options)
        config = uvicorn.Config(
            app,
            http=_Protocol,
            ws="none",
            lifespan="on",
            access_log=False,
            log_level="warning",
            proxy_headers=False,
            server_header=False,
            date_header=False,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=_GRACE_SECONDS,
        )
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        announcement: dict[str, object] = {
            "endpoint": f"http://{shown}:{port}",
            "pid": os.getpid(),
            "root": str(options.root),
        }
        _Server(config, announcement, until_stdin_closes=until_stdin_closes).run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's algorithm off only where the protocol is named; with it, every answer takes 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener
