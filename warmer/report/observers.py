"""Who looks on while a run goes on: a display, metrics, what a page is drawn from. None of them has a say in it."""

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
    """Is told how the run of one tier goes; of several tiers, one after the other. Called in the driver's thread only."""

    def begin(self, report: RunReport) -> None:
        """A tier is about to be filled; the report is the one that the other calls bring, and goes on changing."""

    def ended(self, report: RunReport, node: str, outcome: Outcome) -> None:
        """A chunk has ended on a node; the report counts it already. Called for every chunk: it has to be cheap."""

    def loaded(self, report: RunReport, node: str, size: int) -> None:
        """An engine has loaded chunks of so many bytes by itself; the report counts them already."""

    def lacking(self, report: RunReport, node: str, chunks: int, kind: str) -> None:
        """So many chunks were not loaded by an engine, all for one reason; the report counts them already."""

    def lost(self, report: RunReport, node: str, kind: str) -> None:
        """A node takes no part any more; the report says why."""

    def look(self, report: RunReport, in_progress: Mapping[str, tuple[int, int]]) -> None:
        """Time has passed: called about once a second.

        Args:
            report: Of the tier.
            in_progress: The chunks that nodes are busy with, and their bytes; by the nodes' ids.
        """

    def close(self, report: RunReport) -> None:
        """The tier is over."""


@contextlib.contextmanager
def observing(observers: Sequence[Observer], report: RunReport) -> Iterator[None]:
    """Let observers see a tier from its beginning to its end, however that comes."""
    for one in observers:
        one.begin(report)
    try:
        yield
    finally:
        for one in observers:
            one.close(report)


@dataclass(slots=True)
class EventDispatcher:
    """Tells the report of a tier what happens, and lets a display and observers see it; called a few times a second.

    Args:
        report: Of the tier.
        display: Shows it.
        observers: Look at it about once a second.
        in_progress: What nodes are busy with.
        take_place: Is told when a node takes the place of a lost one.
    """

    report: RunReport
    display: Display
    observers: Sequence[Observer]
    in_progress: Callable[[], Mapping[str, tuple[int, int]]] = dict
    take_place: Callable[[str, Node], None] = lambda _lost, _by: None
    _next: float = field(default=0.0, init=False)

    def ended(self, node: str, outcome: Outcome) -> None:
        """A chunk has ended on a node."""
        self.report.ended(node, outcome)
        for one in self.observers:
            one.ended(self.report, node, outcome)

    def started(self, node: str, start_secs: float, open_secs: float) -> None:
        """A node takes part, see `RunReport.started`."""
        self.report.started(node, start_secs, open_secs)

    def replaced(self, node: str, by: Node) -> None:
        """A node took the place of a lost one."""
        _log.warning("node %s: %s takes its place", self.report.nodes[node].name, by.name)
        self.report.replaced(node, by)
        self.take_place(node, by)

    def loaded(self, node: str, *, copied: int, present: int, size: int) -> None:
        """An engine has loaded chunks by itself, see `RunReport.loaded`."""
        self.report.loaded(node, copied=copied, present=present, size=size)
        for one in self.observers:
            one.loaded(self.report, node, size)

    def lacking(self, node: str, chunks: int, kind: str, message: str) -> None:
        """An engine did not load chunks, see `RunReport.lacking`."""
        if chunks:
            self.report.lacking(node, chunks, kind, message)
            for one in self.observers:
                one.lacking(self.report, node, chunks, kind)

    def lost(self, node: str, kind: str, message: str) -> None:
        """A node takes no part any more."""
        _log.warning("node %s: %s: %s", self.report.nodes[node].name, kind, message)
        self.report.lost(node, kind, message)
        for one in self.observers:
            one.lost(self.report, node, kind)

    def tick(self) -> None:
        """Time has passed."""
        self.display.show(self.report)
        now = time.monotonic()
        if now >= self._next:
            self._next = now + _LOOK_SECS
            in_progress = self.in_progress()
            for one in self.observers:
                one.look(self.report, in_progress)
