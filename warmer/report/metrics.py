"""Metrics of a run, for Ray and Prometheus."""

from __future__ import annotations

from collections import Counter as Sums
from dataclasses import asdict
from typing import TYPE_CHECKING, Final

from ray.util.metrics import Counter, Gauge

from warmer.report.observers import Observer
from warmer.report.outcomes import INTERRUPTED, Copied, Failed
from warmer.schedule.tasks import Counts

if TYPE_CHECKING:
    from collections.abc import Mapping

    from warmer.report.outcomes import Outcome
    from warmer.report.summary import NodeReport, RunReport


PREFIX: Final = "ray_"
"""Prefix that Ray adds to each name; it also appends `_total` to those of counters."""


class CountedBytes:
    """Two counters with the same tags: the number of things, and their bytes.

    Args:
        things: Name of the counter of things.
        bytes_name: Name of the counter of bytes.
        what: Description of the things.
        tags: Names of the tags.
    """

    def __init__(self, things: str, bytes_name: str, what: str, tags: tuple[str, ...]) -> None:
        self._things = Counter(things, what, tags)
        self._bytes = Counter(bytes_name, f"{what}, in bytes", tags)

    def add(self, count: int, size: int, tags: Mapping[str, str]) -> None:
        """Add to both counters; adding zero things and zero bytes has no effect.

        Args:
            count: Number of things.
            size: Bytes of the things.
            tags: Value of each tag.
        """
        if count:
            self._things.inc(count, dict(tags))
        if size:
            self._bytes.inc(size, dict(tags))


_RUN: Final = ("instance", "tier")
_NODE: Final = (*_RUN, "node", "node_id")

FETCHED: Final = "fetched"
RECEIVED: Final = "received"
REUSED: Final = "reused"
PRESENT: Final = "present"
FAILED: Final = "failed"

_OF_COUNTS: Final = {
    "fetched": ("warmer_fetched_chunks", "Chunks fetched from the Hub, repeats included"),
    "fetched_bytes": ("warmer_fetched_bytes", "Bytes fetched from the Hub, repeats included"),
    "refetched": ("warmer_refetched_chunks", "Chunks fetched from the Hub again"),
    "own": ("warmer_fetched_alone_chunks", "Chunks that a node fetched from the Hub by itself"),
}


class RunMetrics(Observer):
    """Observer that updates metrics. Chunks are counted once a second, not one by one, because there may be millions.

    Tags name node and tier; `node_id` is Ray's id, as names need not be unique. The number of series is that of nodes times
    tiers times outcomes, independent of the number of chunks.
    """

    def __init__(self) -> None:
        self._chunks = CountedBytes(
            "warmer_chunks", "warmer_bytes", "Chunks finished on a node, by outcome", (*_NODE, "outcome")
        )
        self._failures = Counter("warmer_failures", "Chunks that failed on a node, by kind", (*_NODE, "kind"))
        self._lost = Counter("warmer_lost_nodes", "Nodes that took no part or were lost, by kind", (*_NODE, "kind"))
        self._of_counts = {field: Counter(name, words, _RUN) for field, (name, words) in _OF_COUNTS.items()}
        self._busy = Gauge("warmer_in_flight_chunks", "Chunks in progress on a node", _NODE)
        self._busy_bytes = Gauge("warmer_in_flight_bytes", "Bytes of the chunks in progress on a node", _NODE)
        self._coverage = Gauge(
            "warmer_coverage_ratio", "Share of the chunks for a tier of a node that are there", _NODE
        )
        self._forget()

    def _forget(self) -> None:
        self._received_bytes: Sums[str] = Sums()
        self._reused_bytes: Sums[str] = Sums()
        self._kinds: Sums[tuple[str, str]] = Sums()
        self._reported: dict[str, dict[str, tuple[int, int]]] = {}
        self._reported_counts = Counts()
        self._reported_busy: dict[str, tuple[int, int]] = {}
        self._reported_coverage: dict[str, float] = {}

    def begin(self, report: RunReport) -> None:
        """Start over, because each tier has its own series."""
        self._forget()
        self._report_coverage(report)

    def ended(self, _report: RunReport, node: str, outcome: Outcome) -> None:
        """Record details that the report does not contain by node."""
        if isinstance(outcome, Copied) and outcome.received:
            self._received_bytes[node] += outcome.size
        elif isinstance(outcome, Copied) and outcome.reused:
            self._reused_bytes[node] += outcome.size
        elif isinstance(outcome, Failed) and outcome.kind != INTERRUPTED:
            self._kinds[node, outcome.kind] += 1

    def lacking(self, _report: RunReport, node: str, chunks: int, kind: str) -> None:
        """Record details that the report does not contain by node."""
        self._kinds[node, kind] += chunks

    def lost(self, report: RunReport, node: str, kind: str) -> None:
        """Count a lost node."""
        self._lost.inc(1, _tags(report, node) | {"kind": kind})

    def look(self, report: RunReport, in_progress: Mapping[str, tuple[int, int]]) -> None:
        """Update the metrics with what has changed."""
        for node in report.nodes.values():
            self._report_chunks(report, node)
        for (name, kind), count in self._kinds.items():
            self._failures.inc(count, _tags(report, name) | {"kind": kind})
        self._kinds.clear()
        self._report_counts(report)
        self._report_busy(report, in_progress)
        self._report_coverage(report)

    def close(self, report: RunReport) -> None:
        """Update the metrics for the last time; nothing is in progress any more."""
        self.look(report, {})

    def _report_chunks(self, report: RunReport, node: NodeReport) -> None:
        received, reused = self._received_bytes[node.id], self._reused_bytes[node.id]
        now = {
            FETCHED: (node.copied - node.received - node.reused, node.bytes - received - reused),
            RECEIVED: (node.received, received),
            REUSED: (node.reused, reused),
            PRESENT: (node.present, node.present_bytes),
            FAILED: (node.failed, 0),
        }
        reported = self._reported.get(node.id, {})
        if reported != now:
            for outcome, (count, size) in now.items():
                before, bytes_before = reported.get(outcome, (0, 0))
                self._chunks.add(count - before, size - bytes_before, _tags(report, node.id) | {"outcome": outcome})
            self._reported[node.id] = now

    def _report_counts(self, report: RunReport) -> None:
        reported, now = asdict(self._reported_counts), asdict(report.counts)
        for field, counter in self._of_counts.items():
            if now[field] > reported[field]:
                counter.inc(now[field] - reported[field], _run_tags(report))
        self._reported_counts = Counts(**now)

    def _report_busy(self, report: RunReport, in_progress: Mapping[str, tuple[int, int]]) -> None:
        for node in report.nodes:
            busy = in_progress.get(node, (0, 0))
            if self._reported_busy.get(node) != busy:
                self._reported_busy[node] = busy
                self._busy.set(busy[0], _tags(report, node))
                self._busy_bytes.set(busy[1], _tags(report, node))

    def _report_coverage(self, report: RunReport) -> None:
        for node, one in report.nodes.items():
            share = (one.copied + one.present) / one.selected if one.selected else 1.0
            if self._reported_coverage.get(node) != share:
                self._reported_coverage[node] = share
                self._coverage.set(share, _tags(report, node))


def _run_tags(report: RunReport) -> dict[str, str]:
    return {"instance": report.task.instance, "tier": report.task.tier}


def _tags(report: RunReport, node: str) -> dict[str, str]:
    return _run_tags(report) | {"node": report.nodes[node].name, "node_id": node}
