"""Which node gets which chunks next, and what a lost node means. Pure: driven by events, knows nothing of Ray.

Every node gets every chunk that is for it, in the order of the plan and at its own pace, a bounded window of it at a
time. Each such chunk ends exactly once for each node: in a batch that was finished, or among those that `lost` yields.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from warmer.plan import PlannedChunk

_MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Window:
    """How much one node is given at a time.

    Attributes:
        batch_chunks: Most chunks of a batch. 64 share one call of the hasher, which is slow with few small files.
        batch_bytes: Most bytes of a batch; a larger chunk goes alone. 64 MiB are a fraction of a second of work, so
            that little is lost with a node.
        chunks: Most chunks given and not yet finished: two batches, so that one is fetched while another is hashed.
        bytes: Most bytes given and not yet finished; a larger chunk goes when nothing else is under way.
        batches: Most batches given and not yet finished: an actor has a slot for each, and one more for the order to
            stop, which must not queue behind copies.
    """

    batch_chunks: int = 64
    batch_bytes: int = 64 * _MIB
    chunks: int = 128
    bytes: int = 128 * _MIB
    batches: int = 2

    def __post_init__(self) -> None:
        if min(self.batch_chunks, self.batch_bytes, self.chunks, self.bytes, self.batches) < 1:
            raise ValueError("a window has room for at least one chunk and one byte")


@dataclass(frozen=True, slots=True)
class Batch:
    """Chunks that one node is given together.

    Attributes:
        number: Names the batch among all of a schedule.
        node: Whose it is.
        chunks: In the order of the plan; never empty.
    """

    number: int
    node: str
    chunks: tuple[PlannedChunk, ...]

    @property
    def bytes(self) -> int:
        """The sum of the chunks' sizes."""
        return sum(chunk.size for chunk in self.chunks)


class _Lane:
    """One node's way through the plan.

    Attributes:
        given: How much of the plan lies behind it, the chunks that are not for it included.
    """

    def __init__(self, chunks: Iterator[PlannedChunk], takes: Callable[[PlannedChunk], bool]) -> None:
        self.chunks = chunks
        self.takes = takes
        self.batches: dict[int, Batch] = {}
        self.flying_chunks = 0
        self.flying_bytes = 0
        self.given = 0
        self._peeked: PlannedChunk | None = None
        self._ended = False

    def peek(self) -> PlannedChunk | None:
        while self._peeked is None and not self._ended:
            chunk = next(self.chunks, None)
            self._ended = chunk is None
            if chunk is None or self.takes(chunk):
                self._peeked = chunk
            else:
                self.given += 1
        return self._peeked

    def take(self) -> Iterator[PlannedChunk]:
        while (chunk := self.peek()) is not None:
            self._peeked = None
            self.given += 1
            yield chunk

    def add(self, batch: Batch) -> None:
        self.batches[batch.number] = batch
        self.flying_chunks += len(batch.chunks)
        self.flying_bytes += batch.bytes

    def remove(self, batch: Batch) -> None:
        del self.batches[batch.number]
        self.flying_chunks -= len(batch.chunks)
        self.flying_bytes -= batch.bytes


class Schedule:
    """The state of a run.

    Args:
        nodes: Names of the nodes.
        chunks: Gives the plan from its start, for each node anew.
        window: How much a node is given at a time; by default as `Window` has it.
        rest: Gives the plan from its n-th chunk on, for a lost node, where that costs less than going on with
            `chunks`; by default it does not.
        takes: Whether a chunk is for a node; by default each is.
    """

    def __init__(
        self,
        nodes: Iterable[str],
        chunks: Callable[[], Iterator[PlannedChunk]],
        window: Window | None = None,
        rest: Callable[[int], Iterator[PlannedChunk]] | None = None,
        takes: Callable[[str, PlannedChunk], bool] = lambda _node, _chunk: True,
    ) -> None:
        self._lanes = {node: _Lane(chunks(), functools.partial(takes, node)) for node in nodes}
        self._window = window or Window()
        self._rest = rest
        self._numbers = itertools.count(1)

    @property
    def nodes(self) -> list[str]:
        """The nodes that are not lost."""
        return list(self._lanes)

    @property
    def done(self) -> bool:
        """Whether nothing is under way or left to give, on any node that is not lost."""
        return all(not lane.batches and lane.peek() is None for lane in self._lanes.values())

    def next_batch(self, node: str) -> Batch | None:
        """What the node is to be given now; None when its window is full or the plan is at its end.

        The batch counts as under way from now on.

        Raises:
            KeyError: There is no such node, or it is lost.
        """
        lane = self._lanes[node]
        chunks: list[PlannedChunk] = []
        size = 0
        while (chunk := lane.peek()) is not None and self._fits(lane, chunk.size, len(chunks), size):
            chunks.append(next(lane.take()))
            size += chunk.size
        if not chunks:
            return None
        batch = Batch(next(self._numbers), node, tuple(chunks))
        lane.add(batch)
        return batch

    def _fits(self, lane: _Lane, size: int, batch_chunks: int, batch_bytes: int) -> bool:
        window = self._window
        if batch_chunks == lane.flying_chunks == 0:
            return True  # however large it is, it must go some time
        if len(lane.batches) >= window.batches or lane.flying_chunks + batch_chunks >= window.chunks:
            return False
        if lane.flying_bytes + batch_bytes + size > window.bytes:
            return False
        return batch_chunks == 0 or (batch_chunks < window.batch_chunks and batch_bytes + size <= window.batch_bytes)

    def finished(self, batch: Batch) -> None:
        """A batch has ended on its node, well or not.

        Raises:
            KeyError: The batch is not under way: it was finished before, or its node is lost.
        """
        self._lanes[batch.node].remove(batch)

    def lost(self, node: str) -> Iterator[PlannedChunk]:
        """A node is given nothing any more.

        Returns:
            The chunks that did not end on it: those under way, then those that it was never given.

        Raises:
            KeyError: There is no such node, or it was lost before.
        """
        lane = self._lanes.pop(node)
        flying = (chunk for batch in lane.batches.values() for chunk in batch.chunks)
        rest = filter(lane.takes, self._rest(lane.given)) if self._rest else lane.take()
        return itertools.chain(flying, rest)
