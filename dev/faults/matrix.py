"""Every trial of the matrix, those that last longest first, and its table: a cell shows the worst of an operation's routes."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Final

from dev.faults.guarantees import NOTHING, SERVED, TITLES, guarantee
from dev.faults.injections import FAULTS, OPERATIONS, WHOLE_HUB, routes
from dev.faults.report import breaches
from dev.faults.trial import Trial

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from dev.faults.guarantees import Guarantee
    from dev.faults.trial import Report


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


_NAMES = {"classic": "Classic engine", "mp": "MP mode"}
_NEAR_SECS = 1.0


def tables(reports: Iterable[Report]) -> str:
    """A table for each surface."""
    cells: dict[tuple[str, str, str], list[Report]] = defaultdict(list)
    for report in reports:
        cells[report.trial.surface, report.trial.fault, report.trial.operation].append(report)
    parts = []
    for surface in SURFACES:
        rows = [f"**{_NAMES[surface]}**", "", "| fault | " + " | ".join(OPERATIONS) + " |", "|---" * 6 + "|"]
        for fault, title in TITLES.items():
            texts = [_cell(cells[surface, fault, operation]) for operation in OPERATIONS]
            if set(texts) != {NOTHING}:
                rows.append(f"| {title} | " + " | ".join(texts) + " |")
        parts.append("\n".join(rows))
    return "\n\n".join(parts)


def _cell(reports: Sequence[Report]) -> str:
    if not reports:
        return NOTHING
    by_word: dict[str, list[Report]] = defaultdict(list)
    for report in reports:
        by_word[_guaranteed(report).word].append(report)
    # Two only where `verify` makes the difference.
    texts = [_text(word, by_word[word]) for word in sorted(by_word)]
    return "<br>".join(texts)


def _guaranteed(report: Report) -> Guarantee:
    trial = report.trial
    return guarantee(trial.fault, trial.operation, trial.route, trial.verify)


def _text(word: str, reports: Sequence[Report]) -> str:
    kept = not any(breaches(report) for report in reports)
    operation = reports[0].trial.operation
    counted = {
        kind
        for report in reports
        for kind in (report.operations if operation == "list" else report.chunks)
        if kind != SERVED[operation][1]
    }
    what = "`verify: size`, data flipped: wrong bytes" if word == "wrong" else word
    kinds = f": {', '.join(sorted(counted))}" if counted else ""
    slowest = max((call.seconds for report in reports for call in report.calls), default=0.0)
    text = f"{'' if kept else '**✗** '}{what}{kinds} · {slowest:.1f} s · back {_back(reports)}"
    same = max((report.same_secs or 0.0 for report in reports), default=0.0)
    back = max((report.back_secs or 0.0 for report in reports), default=0.0)
    return f"{text}, the same chunks {same:.0f} s" if same > back + _NEAR_SECS else text


def _back(reports: Sequence[Report]) -> str:
    times = [report.back_secs for report in reports]
    known = [seconds for seconds in times if seconds is not None]
    return f"{max(known):.1f} s" if len(known) == len(times) else "never"
