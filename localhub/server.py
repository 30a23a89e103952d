"""Runs a Hub under uvicorn: one socket, one announcement on stdout, a clean exit."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from localhub.app import Options, make_app
from localhub.faults.injection import TRANSPORT

_KEEP_ALIVE_SECONDS = 120
"""Longer than the clients keep idle connections: this side must not close one that a client is about to use."""

_GRACE_SECONDS = 3
_BACKLOG = 2048


class _Protocol(AutoHTTPProtocol):  # type: ignore[misc,valid-type] # uvicorn chooses the base class when it is imported
    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        app: ASGIApp = self.app  # type: ignore[has-type] # the same

        async def with_transport(scope: Scope, receive: Receive, send: Send) -> None:
            scope[TRANSPORT] = transport  # for faults that close or reset the connection
            await app(scope, receive, send)

        self.app = with_transport


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, announcement: dict[str, object], *, until_stdin_closes: bool) -> None:
        super().__init__(config)
        self._announcement = announcement
        self._until_stdin_closes = until_stdin_closes

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # uvicorn raises the signal again when it ends, so that a clean exit would look like a kill.
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)
        if self._until_stdin_closes:
            loop.add_reader(sys.stdin.fileno(), self._read_stdin)
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        # Not earlier: a signal that follows the announcement must find its handler.
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
        port: port to listen on; 0 for any free port.
        until_stdin_closes: whether to exit when stdin, a pipe, is closed, so that a Hub does not outlive a parent that
            is killed.

    Raises:
        OSError: listening on the address fails.
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
    family, dualstack = (socket.AF_INET6, socket.has_dualstack_ipv6()) if ":" in host else (socket.AF_INET, False)
    listener = socket.create_server((host, port), family=family, backlog=_BACKLOG, dualstack_ipv6=dualstack)
    # A socket made from the descriptor knows its protocol. asyncio disables Nagle's algorithm, which delays every response by
    # 40 ms, only for sockets that do.
    return socket.socket(fileno=listener.detach())
