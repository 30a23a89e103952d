"""Counters of requests and bytes by route, since the start or the last reset."""

from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class RouteCounters:
    """Counters of one route.

    Attributes:
        requests: number of requests received.
        bytes_in: bytes of request bodies that were read.
        bytes_out: bytes of response bodies that were sent.
        statuses: number of responses by status, as text.
    """

    requests: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    statuses: dict[str, int] = field(default_factory=dict)

    def __add__(self, other: "RouteCounters") -> "RouteCounters":
        """Return the sums."""
        return RouteCounters(
            self.requests + other.requests,
            self.bytes_in + other.bytes_in,
            self.bytes_out + other.bytes_out,
            dict(Counter(self.statuses) + Counter(other.statuses)),
        )


class Counters:
    """The counters of one server process."""

    def __init__(self) -> None:
        self._routes: defaultdict[str, RouteCounters] = defaultdict(RouteCounters)

    def route(self, name: str) -> RouteCounters:
        """Return the counters of a route."""
        return self._routes[name]

    def reset(self) -> None:
        """Set all counters to zero."""
        self._routes.clear()

    def snapshot(self) -> dict[str, Any]:
        """Return all counters as JSON: `routes` by name, and `total` over all of them."""
        return {
            "routes": {name: asdict(route) for name, route in sorted(self._routes.items())},
            "total": asdict(sum(self._routes.values(), RouteCounters())),
        }
