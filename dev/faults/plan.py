"""Every trial of the matrix, those that last longest first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from dev.faults.injections import FAULTS, OPERATIONS, WHOLE_HUB, routes
from dev.faults.trial import Trial

if TYPE_CHECKING:
    from collections.abc import Iterator

SURFACES: Final = ("classic", "mp")

_CALLS: Final = 4
"""One more than the failures that open a breaker."""

_STORM: Final = 12
"""Gets that fail, more than LMCache's health monitor bears by default (10 within 30 s)."""

_SLOW: Final = frozenset({"hang", "trickled"})
_HASHED: Final = frozenset({"truncated", "flipped"})
_STORE: Final = frozenset({"reconstruction", "xorb-data"})


def trials() -> list[Trial]:
    """All of them."""
    found = list(_all())
    return sorted(found, key=_seconds, reverse=True)


def _all() -> Iterator[Trial]:
    for surface in SURFACES:
        for fault in FAULTS:
            for operation in OPERATIONS:
                on = routes(surface, fault, operation)
                for route in on:
                    last = route == on[-1]
                    yield Trial(surface, fault, operation, route, calls=_calls(surface, fault, operation, last=last))
                    if operation == "get" and fault in _HASHED and route in _STORE:
                        yield Trial(surface, fault, operation, route, verify="hash", calls=_CALLS)
        # Long enough for probes and pauses to have become as rare as they ever do.
        yield Trial(surface, "hub-gone", "get", WHOLE_HUB, calls=_CALLS, outage_secs=25)
        yield Trial(surface, "429", "lookup", "paths-info", calls=_CALLS, outage_secs=40)


def _calls(surface: str, fault: str, operation: str, *, last: bool) -> int:
    if operation == "list" or ((surface, operation) == ("mp", "delete") and fault in _SLOW):
        return 1  # each may take 10 s and more
    return _STORM if (surface, operation) == ("classic", "get") and last else _CALLS


def _seconds(trial: Trial) -> float:
    """About how long it takes."""
    if trial.outage_secs:
        return trial.outage_secs + 20
    if trial.fault == "429-long" or (trial.fault == "429" and trial.operation in ("list", "delete")):
        return 25
    if trial.fault in _SLOW:
        return 12 if trial.operation == "delete" else 8
    if trial.operation == "get" and (trial.fault in ("object-gone", "partial") or trial.verify == "hash"):
        return 17
    return 3
