"""One route of this Hub: counted, open to faults, its refusals turned into answers."""

import logging
import re
from collections.abc import Awaitable, Callable

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from localhub.errors import HubError
from localhub.faults.injection import inject
from localhub.faults.rules import FaultBook
from localhub.http.wire import Json
from localhub.state.counters import Counters, RouteCounters

Handler = Callable[[Request], Awaitable[Response]]
"""Serves one request; raises `HubError` to refuse it."""

_NOT_PRINTABLE = re.compile(r"[^ -~]")
_log = logging.getLogger("localhub")


class Routes:
    """Makes the routes of one server.

    Args:
        counters: where requests are counted.
        faults: the faults on order, or None when there can be none.
    """

    def __init__(self, counters: Counters, faults: FaultBook | None) -> None:
        self._counters = counters
        self._faults = faults

    def route(self, name: str, method: str, path: str, handler: Handler) -> Route:
        """Return a route. `name` is what counters and faults call it."""
        return Route(path, self.app(name, handler), methods=[method], name=name)

    def app(self, name: str, handler: Handler) -> "Endpoint":
        """Return what serves a request of the route `name`."""
        return Endpoint(name, handler, self._counters, self._faults)


class Endpoint:
    """The ASGI application of one route."""

    def __init__(self, name: str, handler: Handler, counters: Counters, faults: FaultBook | None) -> None:
        self._name = name
        self._handler = handler
        self._counters = counters
        self._faults = faults

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        counters = self._counters.route(self._name)
        counters.requests += 1
        receive, send = _counted(counters, receive, send, with_body=scope["method"] != "HEAD")
        injection = self._faults and self._faults.choose(self._name, scope["method"], scope["path"])
        if injection:
            await inject(injection, self._serve, scope, receive, send)
        else:
            await self._serve(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            response = await self._handler(Request(scope, receive))
        except HubError as error:
            response = refusal(error)
        except ClientDisconnect:
            return
        except Exception:  # noqa: BLE001 - a mistake of ours must be seen as a 500, not as a dead connection
            _log.exception("%s %s failed", scope["method"], scope["path"])
            response = Json({"error": "internal error: see this Hub's stderr"}, 500)
        await response(scope, receive, send)


def refusal(error: HubError) -> Response:
    """Return the answer that tells of a refusal."""
    # A header takes neither control characters nor other alphabets; the body has the text as it is.
    headers = {"X-Error-Message": _NOT_PRINTABLE.sub("?", error.message)}
    if error.code is not None:
        headers["X-Error-Code"] = error.code
    return Json({"error": error.message, **error.extra}, error.status, headers)


def _counted(counters: RouteCounters, receive: Receive, send: Send, *, with_body: bool) -> tuple[Receive, Send]:
    async def counted_receive() -> Message:
        message = await receive()
        if message["type"] == "http.request":
            counters.bytes_in += len(message.get("body", b""))
        return message

    async def counted_send(message: Message) -> None:
        if message["type"] == "http.response.body":
            # The server leaves the body of an answer to HEAD out.
            counters.bytes_out += len(message.get("body", b"")) if with_body else 0
        else:
            status = str(message["status"])
            counters.statuses[status] = counters.statuses.get(status, 0) + 1
        await send(message)

    return counted_receive, counted_send
