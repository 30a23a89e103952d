"""A choice and two ends, turned into a plan: what is to be copied, and what is there already. Bounded by pages."""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from hfbucket_plugin.content import Content
from hfbucket_plugin.deadlines import Deadline
from jobs.export_plan import Move, Totals
from jobs.guards import Extent, GuardError
from jobs.rename import Names

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from jobs.choosing import Wanted
    from jobs.ends import Destination, Held, Source
    from jobs.export_plan import Header, PlanWriter
    from warmer.plan import PlannedChunk

PAGE: Final = 1000
"""Keys that are looked up at one time: as many as the Hub takes."""

_LOOK_UP_SECS: Final = 330.0
"""A look-up waits out the longest pause that the Hub asks for; that of a directory hashes up to a thousand files."""


class OnConflict(StrEnum):
    """What becomes of a chunk under whose key the destination has something else."""

    SKIP = "skip"
    NEWER = "newer"
    OVERWRITE = "overwrite"


class ExportPlanning:
    """Compares the two ends, page by page.

    Args:
        header: Of the plan.
        source: Where chunks come from.
        destination: Where they go.
        on_conflict: What becomes of conflicts.
        writer: Of the plan.
        tick: Called for every page: whether to go on.
    """

    def __init__(
        self,
        header: Header,
        source: Source,
        destination: Destination,
        *,
        on_conflict: OnConflict,
        writer: PlanWriter,
        tick: Callable[[], None],
    ) -> None:
        self._header = header
        self._source = source
        self._destination = destination
        self._on_conflict = on_conflict
        self._writer = writer
        self._tick = tick
        self._chosen = self._same = self._conflicts = Extent()

    def run(self, wanted: Wanted, scratch: Path) -> None:
        """Write the plan.

        Raises:
            RenameError: A copy would have no name, or that of another.
            GuardError: Nothing was chosen.
            HFBucketError: One of the ends did not tell what it holds.
            OSError: There is no room for it.
        """
        skipped: Counter[str] = Counter()
        with contextlib.ExitStack() as stack:
            names = stack.enter_context(Names()) if self._header.renames.rules else None
            for page in _pages(wanted.of(self._source, scratch, skipped)):
                self._tick()
                self._compare({self._named(chunk, names): chunk for chunk in page})
        if not self._chosen.objects:
            passed_by = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()))
            raise GuardError(
                f"{self._source.name} has no chunk that was chosen{f' ({passed_by})' if passed_by else ''}: nothing is "
                "copied. Is that the right end, and the right choice?"
            )
        self._writer.finish(
            Totals(self._chosen, dict(self._writer.planned), self._same, self._conflicts, dict(skipped))
        )

    def _named(self, chunk: PlannedChunk, names: Names | None) -> str:
        to = self._header.renames(chunk.key)
        if names is not None:
            names.give(to, chunk.key)
        return to

    def _compare(self, page: dict[str, PlannedChunk]) -> None:
        held = self._destination.look_up(list(page), Deadline.patient(_LOOK_UP_SECS))
        for to, chunk in page.items():
            self._chosen = self._chosen.plus(chunk.size)
            there = held.get(to)
            move = Move(chunk.key, to, Content(chunk.xet_hash, chunk.size), chunk.uploaded_at, there)
            if there is None or (there.content != move.content and self._replaces(move, there)):
                self._writer.add(move)
            elif there.content == move.content:
                self._same = self._same.plus(chunk.size)
            else:
                self._conflicts = self._conflicts.plus(chunk.size)
                self._writer.name_conflict(move)

    def _replaces(self, move: Move, there: Held) -> bool:
        if self._on_conflict is OnConflict.NEWER:
            return (
                move.uploaded_at is not None and there.uploaded_at is not None and move.uploaded_at > there.uploaded_at
            )
        return self._on_conflict is OnConflict.OVERWRITE


def _pages(chunks: Iterable[PlannedChunk]) -> Iterator[list[PlannedChunk]]:
    chunks = iter(chunks)
    while page := list(itertools.islice(chunks, PAGE)):
        yield page
