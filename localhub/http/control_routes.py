"""Routes of this Hub's own, for tests and benchmarks: faults and counters. Neither counted nor open to faults."""

from collections.abc import Sequence

from pydantic import TypeAdapter, ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from localhub.errors import HubError, bad_request
from localhub.faults.rules import Fault, FaultBook
from localhub.http.routing import Handler, refusal
from localhub.http.wire import Json, first_problem, read_body
from localhub.state.counters import Counters

_FAULTS: TypeAdapter[list[Fault]] = TypeAdapter(list[Fault])


class ControlRoutes:
    """Serves `/_control`.

    Args:
        counters: what passed over the wire.
        faults: the faults on order, or None where there can be none: then their routes are not there.
    """

    def __init__(self, counters: Counters, faults: FaultBook | None) -> None:
        self._counters = counters
        self._faults = faults

    def routes(self) -> Sequence[BaseRoute]:
        """Return the routes."""
        routes = [
            _route("GET", "/_control/counters", self._show_counters),
            _route("DELETE", "/_control/counters", self._reset_counters),
        ]
        if self._faults is not None:
            routes += FaultRoutes(self._faults).routes()
        return routes

    async def _show_counters(self, _request: Request) -> Response:
        return Json(self._counters.snapshot())

    async def _reset_counters(self, _request: Request) -> Response:
        self._counters.reset()
        return Response(status_code=204)


class FaultRoutes:
    """Serves `/_control/faults`: GET shows the rules, POST adds some, PUT replaces all, DELETE takes back.

    Args:
        book: the faults on order.
    """

    def __init__(self, book: FaultBook) -> None:
        self._book = book

    def routes(self) -> list[Route]:
        """Return the routes."""
        return [
            _route("GET", "/_control/faults", self._show),
            _route("POST", "/_control/faults", self._add),
            _route("PUT", "/_control/faults", self._replace),
            _route("DELETE", "/_control/faults", self._clear),
            _route("DELETE", "/_control/faults/{number:int}", self._clear_one),
        ]

    async def _show(self, _request: Request) -> Response:
        return Json([rule.describe() for rule in self._book.rules()])

    async def _add(self, request: Request) -> Response:
        return Json([self._book.add(fault).describe() for fault in await _faults(request)], 201)

    async def _replace(self, request: Request) -> Response:
        faults = await _faults(request)
        self._book.clear()
        return Json([self._book.add(fault).describe() for fault in faults], 201)

    async def _clear(self, _request: Request) -> Response:
        return Json({"cleared": self._book.clear()})

    async def _clear_one(self, request: Request) -> Response:
        number = request.path_params["number"]
        if not self._book.clear(number):
            raise HubError(404, f"there is no fault {number}")
        return Json({"cleared": 1})


async def _faults(request: Request) -> list[Fault]:
    """Return the faults of a body: one, or a list."""
    body = (await read_body(request)).strip()
    try:
        return _FAULTS.validate_json(body if body.startswith(b"[") else b"[" + body + b"]")
    except ValidationError as error:
        raise bad_request(first_problem(error)) from error


def _route(method: str, path: str, handler: Handler) -> Route:
    async def endpoint(request: Request) -> Response:
        try:
            return await handler(request)
        except HubError as error:
            return refusal(error)

    return Route(path, endpoint, methods=[method])
