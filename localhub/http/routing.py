"""Endpoints of routes: requests are counted and open to faults, and refusals become responses."""

import logging
import re
from collections.abc import Awaitable, Callable

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from localhub.errors import HubError
from localhub.faults.injection import inject
from localhub.faults.rules import FaultBook
from localhub.http.wire import Json
from localhub.state.counters import Counters, RouteCounters

Handler = Callable[[Request], Awaitable[Response]]
"""Serves one request; raises `HubError` to refuse it."""

RouteSpec = tuple[str, str, str, Handler]
"""Name, HTTP method, path and handler of a route."""

_NOT_PRINTABLE = re.compile(r"[^ -~]")
_log = logging.getLogger("localhub")


class Endpoint:
    """ASGI application of one route, neither counted nor open to faults.

    Args:
        handler: serves the requests.
    """

    def __init__(self, handler: Handler) -> None:
        self._handler = handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        try:
            response = await self._handler(Request(scope, receive))
        except HubError as error:
            response = _refusal(error)
        except ClientDisconnect:
            return
        except Exception:  # noqa: BLE001 - a defect of this Hub must appear as a 500, not as a closed connection
            _log.exception("%s %s failed", scope["method"], scope["path"])
            response = Json({"error": "internal error: see this Hub's stderr"}, 500)
        await response(scope, receive, send)


class ObservedEndpoint(Endpoint):
    """ASGI application of one route that is counted and open to faults.

    Args:
        handler: serves the requests.
        name: name of the route in counters and faults.
        counters: where requests are counted.
        faults: the rules for faults.
    """

    def __init__(self, handler: Handler, name: str, counters: Counters, faults: FaultBook) -> None:
        super().__init__(handler)
        self._name = name
        self._counters = counters
        self._faults = faults

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        counters = self._counters.route(self._name)
        counters.requests += 1
        receive, send = _counted(counters, receive, send, with_body=scope["method"] != "HEAD")
        injection = self._faults.choose(self._name, scope["method"], scope["path"])
        if injection:
            await inject(injection, super().__call__, scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


def _refusal(error: HubError) -> Response:
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
            # The server omits the body of a response to HEAD.
            counters.bytes_out += len(message.get("body", b"")) if with_body else 0
        else:
            status = str(message["status"])
            counters.statuses[status] = counters.statuses.get(status, 0) + 1
        await send(message)

    return counted_receive, counted_send
