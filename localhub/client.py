"""A client of a Hub's control routes, for tests and benchmarks. Its only dependencies are pydantic and regex."""

import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

from localhub.faults.rules import Fault
from localhub.state.counters import RouteCounters

_TIMEOUT_SECONDS = 30.0


class ControlError(RuntimeError):
    """The Hub refused a request; the message holds its response."""


@dataclass(frozen=True)
class CountersView:
    """Counters of a Hub process since its start or the last reset.

    Attributes:
        routes: counters by name of the route; routes without requests are missing.
        total: sums over all routes.
    """

    routes: dict[str, RouteCounters]
    total: RouteCounters

    def route(self, name: str) -> RouteCounters:
        """Return the counters of a route, all zero if it had no request."""
        return self.routes.get(name, RouteCounters())


class HubControl:
    """Adds faults to a Hub and reads its counters.

    Args:
        endpoint: URL of the Hub, such as `http://127.0.0.1:4321`. Faults require a Hub that was started with `--faults`.
    """

    def __init__(self, endpoint: str) -> None:
        self._base = endpoint.rstrip("/") + "/_control"

    def add_fault(self, fault: Fault) -> int:
        """Add a fault; return the number that `clear_fault` and `hits` take.

        Raises:
            ControlError: the Hub was started without faults.
            OSError: the Hub cannot be reached.
        """
        return int(self._call("POST", "/faults", [fault.model_dump(exclude_defaults=True)])[0]["id"])

    def hits(self, number: int) -> int:
        """Return how many requests a fault affected.

        Raises:
            ControlError: there is no fault of that number.
            OSError: the Hub cannot be reached.
        """
        for rule in self._call("GET", "/faults"):
            if rule["id"] == number:
                return int(rule["hits"])
        raise ControlError(f"there is no fault {number}")

    def clear_fault(self, number: int) -> None:
        """Clear one fault; requests that hang because of it are served.

        Raises:
            ControlError: there is no fault of that number.
            OSError: the Hub cannot be reached.
        """
        self._call("DELETE", f"/faults/{number}")

    def clear_faults(self) -> None:
        """Clear all faults.

        Raises:
            ControlError: the Hub was started without faults.
            OSError: the Hub cannot be reached.
        """
        self._call("DELETE", "/faults")

    def counters(self) -> CountersView:
        """Return the counters.

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
