"""What passed over the wire since the start or the last reset, by route."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class RouteCounters:
    """What passed over one route.

    Attributes:
        requests: number of requests that came in.
        bytes_in: bytes of their bodies as far as they were read.
        bytes_out: bytes of the answers' bodies as far as they were sent.
        statuses: number of answers by status, as text.
    """

    requests: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    statuses: dict[str, int] = field(default_factory=dict)


class Counters:
    """The counters of one server process."""

    def __init__(self) -> None:
        self._routes: dict[str, RouteCounters] = {}

    def route(self, name: str) -> RouteCounters:
        """Return the counters of a route, made when first asked for."""
        counters = self._routes.get(name)
        if counters is None:
            counters = self._routes[name] = RouteCounters()
        return counters

    def reset(self) -> None:
        """Start over from zero."""
        self._routes.clear()

    def snapshot(self) -> dict[str, Any]:
        """Return everything as JSON: `routes` by name, and `total` over all of them."""
        total = RouteCounters()
        for route in self._routes.values():
            total.requests += route.requests
            total.bytes_in += route.bytes_in
            total.bytes_out += route.bytes_out
            for status, count in route.statuses.items():
                total.statuses[status] = total.statuses.get(status, 0) + count
        return {
            "routes": {name: asdict(route) for name, route in sorted(self._routes.items())},
            "total": asdict(total),
        }
