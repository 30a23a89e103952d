"""A client of a Hub's control routes, for tests and benchmarks. It needs nothing beyond pydantic."""

import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

from localhub.faults.rules import Fault
from localhub.state.counters import RouteCounters

_TIMEOUT_SECONDS = 30.0


class ControlError(RuntimeError):
    """The Hub refused an order; the message is its answer."""


@dataclass(frozen=True)
class CountersView:
    """What passed over the wire since the start or the last reset.

    Attributes:
        routes: by name of the route; routes that nobody asked are missing.
        total: over all routes.
    """

    routes: dict[str, RouteCounters]
    total: RouteCounters

    def route(self, name: str) -> RouteCounters:
        """Return the counters of a route, all zero when nobody asked it."""
        return self.routes.get(name, RouteCounters())


class HubControl:
    """Orders faults from a Hub and reads its counters.

    Args:
        endpoint: its address, such as `http://127.0.0.1:4321`. Faults need a Hub that was started with `--faults`.
    """

    def __init__(self, endpoint: str) -> None:
        self._base = endpoint.rstrip("/") + "/_control"

    def add_fault(self, fault: Fault) -> int:
        """Order a fault; return the number that `clear_fault` and `hits` take.

        Raises:
            ControlError: the Hub was started without faults.
            OSError: it cannot be reached.
        """
        return int(self._call("POST", "/faults", [fault.model_dump(exclude_defaults=True)])[0]["id"])

    def hits(self, number: int) -> int:
        """Return how many requests a fault met.

        Raises:
            ControlError: there is no fault of that number.
            OSError: the Hub cannot be reached.
        """
        for rule in self._call("GET", "/faults"):
            if rule["id"] == number:
                return int(rule["hits"])
        raise ControlError(f"there is no fault {number}")

    def clear_fault(self, number: int) -> None:
        """Take one fault back; requests that hang in it are served.

        Raises:
            ControlError: there is no fault of that number.
            OSError: the Hub cannot be reached.
        """
        self._call("DELETE", f"/faults/{number}")

    def clear_faults(self) -> None:
        """Take every fault back.

        Raises:
            ControlError: the Hub was started without faults.
            OSError: it cannot be reached.
        """
        self._call("DELETE", "/faults")

    def counters(self) -> CountersView:
        """Return what passed over the wire.

        Raises:
            OSError: the Hub cannot be reached.
        """
        answer = self._call("GET", "/counters")
        routes = {name: RouteCounters(**values) for name, values in answer["routes"].items()}
        return CountersView(routes, RouteCounters(**answer["total"]))

    def reset_counters(self) -> None:
        """Set every counter to zero.

        Raises:
            OSError: the Hub cannot be reached.
        """
        self._call("DELETE", "/counters")

    def _call(self, method: str, path: str, body: object = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._base + path, data=data, method=method)  # noqa: S310 - the caller's own Hub
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as response:  # noqa: S310 - same
                answer = response.read()
        except urllib.error.HTTPError as error:
            with error:
                raise ControlError(f"{method} {path}: {error.code} {error.read().decode(errors='replace')}") from None
        return json.loads(answer) if answer else None
