"""The faults of the matrix, and the routes on which each is tried."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from localhub.faults import Fault

if TYPE_CHECKING:
    from collections.abc import Mapping

OPERATIONS: Final = ("lookup", "get", "put", "delete", "list")

HUB: Final = frozenset({"paths-info", "xet-read-token", "xet-write-token", "batch", "tree"})
"""Routes of the Hub's API; the others are the store's."""

WHOLE_HUB: Final = "*"

_ROUTES: Final[Mapping[str, tuple[str, ...]]] = {
    "lookup": ("paths-info",),
    "get": ("paths-info", "xet-read-token", "reconstruction", "xorb-data"),
    "put": ("paths-info", "xet-write-token", "xorb-upload", "shard-upload", "batch"),
    "delete": ("paths-info", "batch"),
    "list": ("tree",),
}

_RETRY_AFTER_SECS: Final = 1
_LONG_SECS: Final = 120
_JSON: Final = {"content-type": "application/json"}

_ACTIONS: Final[Mapping[str, dict[str, Any]]] = {
    "401": {"status": 401, "headers": _JSON, "body": '{"error": "injected"}'},
    "403": {"status": 403, "headers": _JSON, "body": '{"error": "injected"}'},
    "bucket-gone": {"status": 404, "headers": {"X-Error-Code": "RepoNotFound"}},
    "object-gone": {"status": 404},
    "429-after": {"status": 429, "headers": {"Retry-After": str(_RETRY_AFTER_SECS)}},
    "429-long": {"status": 429, "headers": {"Retry-After": str(_LONG_SECS)}},
    "429": {"status": 429},
    "500-once": {"status": 500, "times": 1},
    "500": {"status": 500},
    "truncated": {"truncate_at": 1},
    "trickled": {"trickle_bytes": 1, "trickle_interval_s": 3.0},
    "flipped": {"flip_every": 1},
    "hang": {"hang": True},
    "reset": {"reset": True},
}

# What an answer of some kilobytes needs in order to suffer the same.
_ON_DATA: Final[Mapping[str, dict[str, Any]]] = {
    "truncated": {"truncate_at": 20_000},
    "trickled": {"trickle_bytes": 1024, "trickle_interval_s": 0.5},
    "flipped": {"flip_at": (5000,)},
}
_ON_LISTINGS: Final[Mapping[str, dict[str, Any]]] = {
    "truncated": {"truncate_at": 200},
    "trickled": {"trickle_bytes": 512, "trickle_interval_s": 0.1},
}

FAULTS: Final = (*_ACTIONS, "partial", "hub-gone")


def routes(surface: str, fault: str, operation: str) -> tuple[str, ...]:
    """The routes of an operation on which a fault can be; none where there is no such thing."""
    if fault == "hub-gone":
        return (WHOLE_HUB,)
    used = _ROUTES[operation]
    if (surface, operation) == ("classic", "delete"):  # it does not look first
        used = ("batch",)
    if fault == "partial":  # of a get it is one chunk that cannot be read
        return tuple(route for route in used if route == ("reconstruction" if operation == "get" else "batch"))
    if fault == "bucket-gone":
        return tuple(route for route in used if route in HUB)
    if fault == "429-long":  # one pause is for all calls to the Hub, whatever route began it
        return used[:1]
    if fault == "object-gone":  # nobody but a read can notice
        return ("reconstruction", "xorb-data") if operation == "get" else ("reconstruction",)
    return used


def injected(fault: str, route: str, item: str = "") -> Fault:
    """What the local Hub is told to do.

    Args:
        fault: One of `FAULTS` but ``hub-gone``.
        route: Where.
        item: For ``partial``: the path or, for reads, the Xet hash of what fails.
    """
    if fault == "partial":
        return Fault(route=route, items=item) if route == "batch" else Fault(route=route, path=item, status=500)
    special = _ON_DATA if route == "xorb-data" else _ON_LISTINGS if route == "tree" else {}
    return Fault(route=route, **(special.get(fault) or _ACTIONS[fault]))
