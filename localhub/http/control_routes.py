"""Control routes for tests and benchmarks: faults and counters."""

from pydantic import TypeAdapter, ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from localhub.errors import HubError, bad_request, problems
from localhub.faults.rules import Fault, FaultBook
from localhub.http.routing import Endpoint
from localhub.http.wire import Json, read_body
from localhub.state.counters import Counters

_FAULTS: TypeAdapter[list[Fault]] = TypeAdapter(list[Fault])


class ControlRoutes:
    """Serves `/_control`.

    Args:
        counters: the counters of this process.
        faults: the rules for faults.
    """

    def __init__(self, counters: Counters, faults: FaultBook) -> None:
        self._counters = counters
        self._faults = faults

    def routes(self, *, faults: bool) -> list[Route]:
        """Return the routes; those of faults only if `faults` is set."""
        handlers = [
            ("GET", "/counters", self._show_counters),
            ("DELETE", "/counters", self._reset_counters),
            ("GET", "/faults", self._show),
            ("POST", "/faults", self._add),
            ("PUT", "/faults", self._add),
            ("DELETE", "/faults", self._clear),
            ("DELETE", "/faults/{number:int}", self._clear),
        ]
        return [
            Route("/_control" + path, Endpoint(handler), methods=[method])
            for method, path, handler in handlers
            if faults or not path.startswith("/faults")
        ]

    async def _show_counters(self, _request: Request) -> Response:
        return Json(self._counters.snapshot())

    async def _reset_counters(self, _request: Request) -> Response:
        self._counters.reset()
        return Response(status_code=204)

    async def _show(self, _request: Request) -> Response:
        return Json([rule.describe() for rule in self._faults.rules()])

    async def _add(self, request: Request) -> Response:
        faults = await _read_faults(request)
        if request.method == "PUT":
            self._faults.clear()
        return Json([self._faults.add(fault).describe() for fault in faults], 201)

    async def _clear(self, request: Request) -> Response:
        number = request.path_params.get("number")
        cleared = self._faults.clear(number)
        if number is not None and not cleared:
            raise HubError(404, f"there is no fault {number}")
        return Json({"cleared": cleared})


async def _read_faults(request: Request) -> list[Fault]:
    """Return the faults of a body: one object, or a list of them."""
    body = (await read_body(request)).strip()
    try:
        return _FAULTS.validate_json(body if body.startswith(b"[") else b"[" + body + b"]")
    except ValidationError as error:
        raise bad_request(problems(error)[0]) from error
