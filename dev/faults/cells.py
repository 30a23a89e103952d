"""Trials folded into cells: the worst of an operation's routes is what the cell shows."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from dev.faults.guarantees import NOTHING, SERVED, TITLES, guarantee
from dev.faults.injections import OPERATIONS
from dev.faults.plan import SURFACES
from dev.faults.verdict import breaches

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from dev.faults.guarantees import Guarantee
    from dev.faults.trial import Report

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
    text = f"{'' if kept else '**✗** '}{what}{kinds} · {slowest:.1f} s · back {_seconds(reports)}"
    same = max((report.same_secs or 0.0 for report in reports), default=0.0)
    back = max((report.back_secs or 0.0 for report in reports), default=0.0)
    return f"{text}, the same chunks {same:.0f} s" if same > back + _NEAR_SECS else text


def _seconds(reports: Sequence[Report]) -> str:
    times = [report.back_secs for report in reports]
    known = [seconds for seconds in times if seconds is not None]
    return f"{max(known):.1f} s" if len(known) == len(times) else "never"
