"""How a run went, in memory that does not grow with the number of chunks: what its page is drawn from. Pure but for the clock."""

from __future__ import annotations

import time
from array import array
from bisect import bisect_left
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from warmer.outcomes import Copied

if TYPE_CHECKING:
    from collections.abc import Mapping

    from warmer.outcomes import Outcome
    from warmer.report import RunReport

BINS: Final = 120
"""Stretches of time of a run, however long it is: as many as a plot on a phone can tell apart."""

_FIRST_WIDTH_SECS: Final = 0.1


class TimeBins:
    """Sums over time by name: a fixed number of bins, which become twice as wide when the time runs past the last one.

    Memory is that of names times bins: 1 MiB for 1,000 nodes.

    Args:
        bins: How many; even.
        width_secs: How wide they are at first.

    Attributes:
        width_secs: How wide they are by now.
        series: What fell into each bin; by name.
    """

    def __init__(self, bins: int = BINS, width_secs: float = _FIRST_WIDTH_SECS) -> None:
        self._bins = bins
        self.width_secs = width_secs
        self.series: dict[str, array[int]] = {}

    def add(self, name: str, at_secs: float, amount: int) -> None:
        """Add to the bin of a time, which counts from the first bin's start."""
        while (place := int(at_secs / self.width_secs)) >= self._bins:
            self._widen()
        series = self.series.get(name)
        if series is None:
            series = self.series[name] = array("q", bytes(8 * self._bins))
        series[place] += amount

    def _widen(self) -> None:
        self.width_secs *= 2
        for name, series in self.series.items():
            halves = [one + other for one, other in zip(series[::2], series[1::2], strict=True)]
            self.series[name] = array("q", halves + [0] * (self._bins - len(halves)))


class Latencies:
    """How long things took: counts in fixed buckets, four to each power of ten from 1 ms to 1000 s.

    Attributes:
        counts: One for each bucket; the last is for what took longer than all bounds.
    """

    BOUNDS: Final = tuple(10 ** (step / 4) for step in range(-12, 13))
    """The upper end of each bucket but the last, in seconds."""

    def __init__(self) -> None:
        self.counts = [0] * (len(self.BOUNDS) + 1)

    def add(self, seconds: float) -> None:
        """Count one."""
        self.counts[bisect_left(self.BOUNDS, seconds)] += 1

    @property
    def total(self) -> int:
        """How many were counted."""
        return sum(self.counts)

    def quantile(self, share: float) -> float:
        """The upper end of the bucket that holds this share of all, in seconds; 0 of none, infinite beyond the last bound."""
        wanted, seen = share * self.total, 0
        for bound, count in zip(self.BOUNDS, self.counts, strict=False):
            seen += count
            if seen >= wanted:
                return bound if self.total else 0.0
        return float("inf")


class History:
    """An onlooker that remembers.

    Attributes:
        began: When.
        reports: Of the tiers, in their order.
        bytes: What was copied over time, by the node's id; over all tiers.
        from_hub: How long chunks took that came from the Hub.
        from_nodes: How long chunks took that came from other nodes.
    """

    def __init__(self) -> None:
        self.began = datetime.now(UTC)
        self.reports: list[RunReport] = []
        self.bytes = TimeBins()
        self.from_hub = Latencies()
        self.from_nodes = Latencies()
        self._since: float | None = None

    def begin(self, report: RunReport) -> None:
        """A tier is about to be filled; time counts from the first one's beginning."""
        self.reports.append(report)
        if self._since is None:
            self._since = time.monotonic()

    def ended(self, _report: RunReport, node: str, outcome: Outcome) -> None:
        """Remember a chunk that was copied."""
        if isinstance(outcome, Copied) and self._since is not None:
            self.bytes.add(node, time.monotonic() - self._since, outcome.size)
            if not outcome.reused:
                (self.from_nodes if outcome.received else self.from_hub).add(outcome.seconds)

    def loaded(self, _report: RunReport, node: str, size: int) -> None:
        """Remember chunks that an engine loaded; how long each took, it does not tell."""
        if size and self._since is not None:
            self.bytes.add(node, time.monotonic() - self._since, size)

    def lacking(self, report: RunReport, node: str, chunks: int, kind: str) -> None:
        """The report says it."""

    def lost(self, report: RunReport, node: str, kind: str) -> None:
        """The report says it."""

    def look(self, report: RunReport, under_way: Mapping[str, tuple[int, int]]) -> None:
        """Nothing but chunks is remembered."""

    def close(self, report: RunReport) -> None:
        """The report says how it ended."""

    def names(self) -> dict[str, str]:
        """The names of the nodes, by id."""
        return {node.id: node.name for report in self.reports for node in report.nodes.values()}
