"""What is promised for each fault and operation: the one place. Trials are judged by it, and docs/reliability.md shows it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from dev.faults.injections import HUB, OPERATIONS, WHOLE_HUB

if TYPE_CHECKING:
    from collections.abc import Mapping

BACK_SECS: Final = 30.0
"""Within which full service is back after a fault's end, by itself."""

LATE_SECS: Final = 0.5
"""By which a call may outlast its deadline: what a busy machine takes to wake a thread."""

TITLES: Final[Mapping[str, str]] = {
    "401": "401",
    "403": "403",
    "bucket-gone": "404: the bucket is gone",
    "object-gone": "404: an object is gone at the store, though the Hub lists it",
    "429-after": "429 with `Retry-After: 1`",
    "429-long": "429 with `Retry-After: 120`, taken back early",
    "429": "429 without",
    "500-once": "500, once",
    "500": "500, always",
    "truncated": "truncated body",
    "trickled": "trickled body",
    "flipped": "flipped bytes",
    "hang": "no answer",
    "reset": "connection reset",
    "partial": "one item of a batch fails",
    "hub-gone": "Hub and store gone, and back",
}

SERVED: Final[Mapping[str, tuple[str, str]]] = {
    "lookup": ("hit", "hit"),
    "get": ("hit", "hit"),
    "put": ("stored", "stored"),
    "delete": ("deleted", "deleted"),
    "list": ("listed", "ok"),
}
"""Of each operation, what success is called, and what the metrics count it as."""

FAILED: Final[Mapping[str, str]] = {
    "lookup": "miss",
    "get": "miss",
    "put": "not stored",
    "delete": "not deleted",
    "list": "error",
}

NOTHING: Final = "n/a"
"""Where there is no such fault."""

SILENT: Final = "told nothing"
"""What the classic surface tells an engine of a put, however it ends."""

_OPENS: Final[Mapping[str, frozenset[str]]] = {
    "lookup": frozenset({"transport", "deadline"}),
    "get": frozenset({"transport", "deadline", "throttled", "denied"}),
    "put": frozenset({"transport", "deadline"}),
    "delete": frozenset({"transport", "deadline"}),
    "list": frozenset(),
}
"""What opens a breaker, so that later calls are counted as `breaker` and fail at once."""


@dataclass(frozen=True)
class Guarantee:
    """What becomes of an operation.

    Attributes:
        word: What the engine is told.
        kinds: What the metrics count it as; the first is the usual one.
        wrong_bytes: Whether wrong bytes may be served.
        some: Whether this holds for some chunks of the calls only, and the others are served.
        note: What else a reader should know.
    """

    word: str
    kinds: tuple[str, ...]
    wrong_bytes: bool = False
    some: bool = False
    note: str = ""

    def allowed(self, operation: str) -> frozenset[str]:
        """All outcomes that the metrics may show."""
        kinds = frozenset(self.kinds)
        if kinds & _OPENS[operation]:
            kinds |= {"breaker"}
        return kinds | {SERVED[operation][1]} if self.some else kinds


def _served(operation: str, note: str = "") -> Guarantee:
    word, kind = SERVED[operation]
    return Guarantee(word, (kind,), note=note)


def _failed(operation: str, *kinds: str, note: str = "") -> Guarantee:
    return Guarantee(FAILED[operation], kinds, note=note)


# Alike for all operations.
_KINDS: Final[Mapping[str, str]] = {
    "401": "denied",
    "403": "denied",
    "bucket-gone": "bucket_missing",
    "429-after": "throttled",
    "429-long": "throttled",
    "429": "throttled",
    "500": "transport",
    "truncated": "transport",
    "trickled": "deadline",
    "flipped": "transport",
    "hang": "deadline",
    "reset": "transport",
    "hub-gone": "transport",
}

_LOST: Final = "transport"
"""hf_xet 1.8 does not always say why a stream from the store failed: then it counts as this."""


def guarantee(fault: str, operation: str, route: str, verify: str = "size") -> Guarantee:
    """What is promised.

    Args:
        fault: One of `dev.faults.injections.FAULTS`.
        operation: One of `dev.faults.injections.OPERATIONS`.
        route: Where the fault is.
        verify: The instance's setting.
    """
    return _special(fault, operation, route, verify) or _failed(operation, *_kinds(fault, operation, route))


def _special(fault: str, operation: str, route: str, verify: str) -> Guarantee | None:
    if fault == "500-once":
        return _served(operation, "tried again")
    if fault == "object-gone":
        return _failed("get", "missing", _LOST) if operation == "get" else _served(operation)
    if fault == "partial":
        kinds = (_LOST,) if operation == "get" else ("hub",)
        return Guarantee(FAILED[operation], kinds, some=True, note="the others are done")
    if operation == "list" and fault in ("trickled", "hang"):
        return _served(operation, "late; an error, `deadline`, past the page's time")
    if (fault, operation, route) == ("flipped", "get", "xorb-data"):
        by_hash = _failed(operation, "integrity")
        return by_hash if verify == "hash" else Guarantee("wrong", ("hit",), wrong_bytes=True)
    return None


def _kinds(fault: str, operation: str, route: str) -> tuple[str, ...]:
    kinds = [_KINDS[fault]]
    at_store = route not in HUB and route != WHOLE_HUB
    if fault.startswith("429") and operation == "put":
        kinds.append("deadline")  # it waits for the pause as far as its time goes
    if at_store and operation == "get":
        kinds.append(_LOST)
    if at_store and fault == "hang":
        kinds.append("transport")  # hf_xet's own timeouts come first
    return tuple(dict.fromkeys(kinds))


def table() -> str:
    """The promises as a table for readers."""
    rows = ["| fault | " + " | ".join(OPERATIONS) + " |", "|---" * (len(OPERATIONS) + 1) + "|"]
    rows += [
        f"| {title} | " + " | ".join(_words(fault, operation) for operation in OPERATIONS) + " |"
        for fault, title in TITLES.items()
    ]
    return "\n".join(rows)


def _words(fault: str, operation: str) -> str:
    if fault == "partial" and operation in ("lookup", "list"):
        return NOTHING
    one = guarantee(fault, operation, "reconstruction" if fault == "object-gone" else WHOLE_HUB)
    text = one.word if one.kinds[0] in (one.word, "ok") else f"{one.word}, `{one.kinds[0]}`"
    return f"{text}; {one.note}" if one.note else text
