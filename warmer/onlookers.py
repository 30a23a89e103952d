"""Who looks on while a run goes on: a display, metrics, what a page is drawn from. None of them has a say in it."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from warmer.outcomes import Outcome
    from warmer.report import RunReport


class Onlooker(Protocol):
    """Is told how the run of one tier goes; of several tiers, one after the other. Called in the driver's thread only."""

    def begin(self, report: RunReport) -> None:
        """A tier is about to be filled; the report is the one that the other calls bring, and goes on changing."""

    def ended(self, report: RunReport, node: str, outcome: Outcome) -> None:
        """A chunk has ended on a node; the report counts it already. Called for every chunk: it has to be cheap."""

    def lost(self, report: RunReport, node: str, kind: str) -> None:
        """A node takes no part any more; the report says why."""

    def look(self, report: RunReport, under_way: Mapping[str, tuple[int, int]]) -> None:
        """Time has passed: called about once a second.

        Args:
            report: Of the tier.
            under_way: The chunks that nodes are busy with, and their bytes; by the nodes' ids.
        """

    def close(self, report: RunReport) -> None:
        """The tier is over."""


@contextlib.contextmanager
def looking_on(onlookers: Sequence[Onlooker], report: RunReport) -> Iterator[None]:
    """Let onlookers see a tier from its beginning to its end, however that comes."""
    for one in onlookers:
        one.begin(report)
    try:
        yield
    finally:
        for one in onlookers:
            one.close(report)
