"""The chunks of a plan that are for certain workers, read as a plan of their own. Pure but for the plan's file."""

from __future__ import annotations

import bisect
import itertools
from typing import TYPE_CHECKING

from warmer.plan import SEGMENT_CHUNKS, chunks_from

if TYPE_CHECKING:
    from collections.abc import Iterator
    from collections.abc import Set as AbstractSet

    from warmer.plan import PlanFile, PlannedChunk


class PlanPart:
    """The chunks of a plan that are for certain workers, in its order.

    Args:
        plan: The plan.
        workers: Their ranks; None among them stands for the chunks that are for all workers.
    """

    def __init__(self, plan: PlanFile, workers: AbstractSet[int | None]) -> None:
        self._plan = plan
        self._workers = frozenset(workers)
        counts = (sum(counted[worker] for worker in self._workers) for counted in plan.workers)
        # How many come before each segment of the plan, and in all.
        self._before = list(itertools.accumulate(counts, initial=0))

    @property
    def chunks(self) -> int:
        """How many there are."""
        return self._before[-1]

    @property
    def segments(self) -> int:
        """How many segments they make; not those of the plan."""
        return -(-self.chunks // SEGMENT_CHUNKS)

    def segment(self, index: int) -> list[PlannedChunk]:
        """The chunks of one segment, at most `SEGMENT_CHUNKS`.

        Raises:
            RefusedError: The file was changed since it was read first.
            PlanLostError: The file cannot be read any more.
        """
        start = index * SEGMENT_CHUNKS
        return list(itertools.islice(self._read(start), min(SEGMENT_CHUNKS, self.chunks - start)))

    def _read(self, start: int) -> Iterator[PlannedChunk]:
        first = bisect.bisect_right(self._before, start) - 1
        left = start - self._before[first]
        for index in range(first, self._plan.segments):
            if self._before[index + 1] == self._before[index]:
                continue  # nothing of it
            own = (chunk for chunk in self._plan.segment(index) if chunk.worker in self._workers)
            yield from itertools.islice(own, left, None)
            left = 0

    def chunks_from(self, start: int) -> Iterator[PlannedChunk]:
        """The part from its chunk number `start` on, counted from 0.

        Raises:
            RefusedError: The file was changed since it was read first.
            PlanLostError: The file cannot be read any more.
        """
        return chunks_from(self, start)
