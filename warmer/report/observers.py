"""Observers of a run, such as a display, metrics and the HTML page; they cannot influence the run."""

from __future__ import annotations

import contextlib
import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from warmer.cluster.ray import Node
    from warmer.report.outcomes import Outcome
    from warmer.report.progress import Display
    from warmer.report.summary import RunReport


_log = logging.getLogger(__name__)

_LOOK_SECS: Final = 1.0


class Observer:
    """Observer of the tiers of a run, one after the other. Called in the driver's thread only."""

    def begin(self, report: RunReport) -> None:
        """Handle the start of a tier; all later calls pass the same report, which keeps changing."""

    def ended(self, report: RunReport, node: str, outcome: Outcome) -> None:
        """Handle the end of a chunk, already counted in the report. Must be cheap, as it is called for every chunk."""

    def loaded(self, report: RunReport, node: str, size: int) -> None:
        """Handle chunks of `size` bytes that an engine loaded by itself, already counted in the report."""

    def lacking(self, report: RunReport, node: str, chunks: int, kind: str) -> None:
        """Handle a number of chunks that an engine did not load, for one reason, already counted in the report."""

    def lost(self, report: RunReport, node: str, kind: str) -> None:
        """Handle the loss of a node; the report contains the reason."""

    def look(self, report: RunReport, in_progress: Mapping[str, tuple[int, int]]) -> None:
        """Handle the passage of time: called about once a second.

        Args:
            report: Report of the tier.
            in_progress: Number of chunks and bytes in progress, by node id.
        """

    def close(self, report: RunReport) -> None:
        """Handle the end of the tier."""


@contextlib.contextmanager
def observing(observers: Sequence[Observer], report: RunReport) -> Iterator[None]:
    """Start observers for a tier, and close them when the block ends, also after an error."""
    for one in observers:
        one.begin(report)
    try:
        yield
    finally:
        for one in observers:
            one.close(report)


@dataclass(slots=True)
class EventDispatcher:
    """Forwards the events of a tier to its report, a display and observers; the latter are updated at intervals.

    Args:
        report: Report of the tier.
        display: Display, updated a few times a second.
        observers: Observers, updated about once a second.
        in_progress: Returns the chunks and bytes in progress, by node id.
        take_place: Called when a node replaces a lost one.
    """

    report: RunReport
    display: Display
    observers: Sequence[Observer]
    in_progress: Callable[[], Mapping[str, tuple[int, int]]] = dict
    take_place: Callable[[str, Node], None] = lambda _lost, _by: None
    _next: float = field(default=0.0, init=False)

    def ended(self, node: str, outcome: Outcome) -> None:
        """Handle the end of a chunk on a node."""
        self.report.ended(node, outcome)
        for one in self.observers:
            one.ended(self.report, node, outcome)

    def started(self, node: str, start_secs: float, open_secs: float) -> None:
        """Handle the start of a node; see `RunReport.started`."""
        self.report.started(node, start_secs, open_secs)

    def replaced(self, node: str, by: Node) -> None:
        """Handle the replacement of a lost node."""
        _log.warning("node %s: %s takes its place", self.report.nodes[node].name, by.name)
        self.report.replaced(node, by)
        self.take_place(node, by)

    def loaded(self, node: str, *, copied: int, present: int, size: int) -> None:
        """Handle chunks that an engine loaded by itself; see `RunReport.loaded`."""
        self.report.loaded(node, copied=copied, present=present, size=size)
        for one in self.observers:
            one.loaded(self.report, node, size)

    def lacking(self, node: str, chunks: int, kind: str, message: str) -> None:
        """Handle chunks that an engine did not load; see `RunReport.lacking`."""
        if chunks:
            self.report.lacking(node, chunks, kind, message)
            for one in self.observers:
                one.lacking(self.report, node, chunks, kind)

    def lost(self, node: str, kind: str, message: str) -> None:
        """Handle the loss of a node."""
        _log.warning("node %s: %s: %s", self.report.nodes[node].name, kind, message)
        self.report.lost(node, kind, message)
        for one in self.observers:
            one.lost(self.report, node, kind)

    def tick(self) -> None:
        """Update the display and the observers."""
        self.display.show(self.report)
        now = time.monotonic()
        if now >= self._next:
            self._next = now + _LOOK_SECS
            in_progress = self.in_progress()
            for one in self.observers:
                one.look(self.report, in_progress)
