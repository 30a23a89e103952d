"""Medians of runs, and what is printed of them."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dev.benchmarks.gauges import HUB_ROUTES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

Row = dict[str, Any]


@dataclass(frozen=True)
class Verdict:
    """One figure against its target.

    Attributes:
        what: What was compared.
        value: The figure.
        target: It is to be this at most.
        unit: `x`, `MiB`, `s`, `ms`, or none for a count.
    """

    what: str
    value: float
    target: float
    unit: str = "x"

    def __str__(self) -> str:
        word = "met" if self.value <= self.target else "MISSED"
        digits = {"x": 2, "s": 1, "ms": 2}.get(self.unit, 0)
        return f"{self.what:42} {self.value:7.{digits}f} {self.unit:3}  at most {self.target:5.{digits}f}   {word}"


def summarise(runs: Sequence[Row]) -> Row:
    """Medians over the runs; the largest memory; requests as the last run made them."""
    row: Row = {}
    for field in ("seconds", "hot_seconds", "p99_ms", "max_ms", "others"):
        values = [run[field] for run in runs if run.get(field) is not None]
        row[field] = statistics.median(values) if values else None
    row["extra_mib"] = max(run["extra_mib"] for run in runs)
    row["slow_callbacks"] = [text for run in runs for text in run.get("slow_callbacks", [])]
    row["wire"] = runs[-1]["wire"]
    row["runs"] = [{key: run[key] for key in ("seconds", "hot_seconds", "extra_mib", "others")} for run in runs]
    return row


def print_scenario(title: str, sides: Mapping[str, Row]) -> None:
    """Print one batch of both sides: seconds, memory, punctuality, requests."""
    print(title)
    for side, row in sides.items():
        hot = f"   hot {row['hot_seconds']:6.3f} s" if row["hot_seconds"] is not None else ""
        beat = f"   heartbeat p99 {row['p99_ms']:4.1f} max {row['max_ms']:5.1f} ms" if row["p99_ms"] is not None else ""
        print(
            f"  {side:9} cold {row['seconds']:6.3f} s{hot}   memory {row['extra_mib']:+7.1f} MiB{beat}"
            f"   other work {row['others']:.1f} cores"
        )
    for side, row in sides.items():
        for phase, requests in row["wire"].items():
            if requests:
                print(f"  {side:9} {phase:10} {_requests(requests)}")
    if len(late := sides["ours"]["slow_callbacks"]):
        print(f"  ours      callbacks over 5 ms: {late[0]}" + (f" and {late[1:]} more" if late[1:] else ""))
    print(flush=True)


def _requests(requests: Mapping[str, int]) -> str:
    parts = []
    for kind, of_hub in (("Hub", True), ("store", False)):
        routes = {name: count for name, count in requests.items() if (name in HUB_ROUTES) is of_hub}
        detail = " (" + ", ".join(f"{name} {count}" for name, count in routes.items()) + ")" if routes else ""
        parts.append(f"{kind} {sum(routes.values())}{detail}")
    return "   ".join(parts)


def print_verdicts(verdicts: Iterable[Verdict], title: str) -> None:
    """Print all figures against their targets."""
    print(title)
    for verdict in verdicts:
        print(f"  {verdict}")
