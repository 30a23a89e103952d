"""Batches on their way to all nodes that lack them, tasks in flight, and the room in the object stores. Pure."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from warmer.schedule.tasks import FetchTask, ReceiveTask, total_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from hfbucket_plugin.tools.selection import ChunkRef
    from warmer.schedule.cohort import Cohort
    from warmer.schedule.tasks import Task


class Batch:
    """Chunks that the same nodes lack, and that move together.

    Attributes:
        number: Names it, in the order of their making.
        chunks: Never empty.
        size: Their bytes.
        cohort: For whose members it was made.
        pending: Nodes that lack them and have no task for them yet, in the order in which they get one.
        receiving: Nodes with a task to receive them; kept by `InFlightTable`.
        reserved: On whose store its bytes are counted.
        holder: The node that fetches it, or has left it in the store; None until a node has a task to fetch it.
        source: The number of the task to fetch it; 0 where nothing of it came into the store.
        stored: Whether it lies in the object store.
        done: How many have received it.
        attempts: How often fetching it has failed.
        avoid: Who failed to fetch it, and fetches it again only when nobody else can.
        handed_over: Whether another node was asked for it because the first took so long; that is done once.
    """

    def __init__(self, number: int, chunks: tuple[ChunkRef, ...], pending: Iterable[str], cohort: Cohort) -> None:
        self.number = number
        self.chunks = chunks
        self.size = total_bytes(chunks)
        self.pending = dict.fromkeys(pending)
        self.receiving: set[str] = set()
        self.reserved: set[str] = set()
        self.holder: str | None = None
        self.source = 0
        self.stored = False
        self.done = 0
        self.cohort = cohort
        self.attempts = 0
        self.avoid: frozenset[str] = frozenset()
        self.handed_over = False

    @property
    def fetching(self) -> bool:
        """Whether a node fetches it now."""
        return self.holder is not None and not self.stored

    def allowance(self, fan_out: int) -> int:
        """How many more may take it now: those that have it serve the others."""
        return fan_out * (1 + self.done) - len(self.receiving)

    def to_the_end(self, node: str) -> None:
        """Move a pending node to the end of the order."""
        del self.pending[node]
        self.pending[node] = None

    def ready_again(self) -> None:
        """What was fetched of it, or was to be, is of no use to the others any more."""
        self.holder, self.source, self.stored, self.done = None, 0, False, 0


@dataclass(slots=True)
class InFlight:
    """A task in flight.

    Attributes:
        task: The task.
        batch: Whose chunks they are; None for those that a node fetches for itself.
        since: When it was given.
        size: Bytes of its chunks.
        hold: Bytes that it may leave in its node's store though no batch counts them.
        was_of: The batch that went on without it, because it took so long; None where none did.
        spent: Bytes that the cap of the run let go for it.
    """

    task: Task
    batch: Batch | None
    since: float
    size: int
    hold: int = 0
    was_of: Batch | None = None
    spent: int = 0

    @property
    def fetches(self) -> bool:
        """Whether it asks the Hub, and not the object store."""
        return isinstance(self.task, FetchTask)


@dataclass(slots=True)
class NodeTasks:
    """The tasks in flight on one node, and their sums.

    Attributes:
        tasks: By number.
        fetches, receives: How many there are of each kind.
        bytes: Of all of them.
    """

    tasks: dict[int, InFlight] = field(default_factory=dict)
    fetches: int = 0
    receives: int = 0
    bytes: int = 0


class InFlightTable:
    """The tasks in flight, each of them once: whatever a node, a batch or the run has in flight follows from it.

    Attributes:
        fetching_bytes: Bytes of all fetches.
    """

    def __init__(self) -> None:
        self._tasks: dict[int, InFlight] = {}
        self._by_node: defaultdict[str, NodeTasks] = defaultdict(NodeTasks)
        self._new: list[InFlight] = []
        self.fetching_bytes = 0

    def __bool__(self) -> bool:
        return bool(self._tasks)

    def __iter__(self) -> Iterator[InFlight]:
        return iter(self._tasks.values())

    def of(self, node: str) -> NodeTasks:
        """The tasks of a node."""
        return self._by_node[node]

    def add(self, running: InFlight) -> None:
        """Add a task."""
        task = running.task
        self._tasks[task.number] = self._by_node[task.node].tasks[task.number] = running
        self._new.append(running)
        self._count(running, 1)
        if not running.fetches and running.batch is not None:
            running.batch.receiving.add(task.node)

    def _count(self, running: InFlight, sign: int) -> None:
        node, size = self._by_node[running.task.node], sign * running.size
        node.bytes += size
        if running.fetches:
            node.fetches += sign
            self.fetching_bytes += size
        else:
            node.receives += sign

    def pop(self, number: int) -> InFlight:
        """Remove a task that has ended.

        Raises:
            KeyError: It is not in flight.
        """
        running = self._tasks.pop(number)
        node = running.task.node
        del self._by_node[node].tasks[number]
        self._count(running, -1)
        if not running.fetches and running.batch is not None:
            running.batch.receiving.discard(node)
        return running

    def pop_all(self, node: str) -> list[InFlight]:
        """Remove the tasks of a lost node."""
        lost = [self.pop(number) for number in list(self._by_node[node].tasks)]
        del self._by_node[node]
        return lost

    def new(self) -> list[InFlight]:
        """The tasks that were not handed out yet."""
        self._new = [running for running in self._new if running.task.number in self._tasks]
        return self._new

    def take_new(self) -> list[Task]:
        """The tasks that were not handed out yet; they are from now on."""
        new, self._new = self.new(), []
        return [running.task for running in new]

    def new_receivers(self, source: int) -> list[Task]:
        """The tasks to receive what a fetch left in the store, as far as they were not handed out yet."""
        tasks = [running.task for running in self.new()]
        return [task for task in tasks if isinstance(task, ReceiveTask) and task.source == source]


class StoreBudget:
    """How many bytes of batches may lie in the object store of each node.

    A batch's bytes count on every node that is to have it, from before it is fetched until nobody waits for it: a node
    that has received a batch keeps a copy, from which others take it, until then.

    Args:
        bounds: Bytes by node.
    """

    def __init__(self, bounds: Mapping[str, int]) -> None:
        self._bounds = dict(bounds)
        self.used = dict.fromkeys(bounds, 0)

    def admit(self, node: str, bound: int) -> None:
        """Add a node."""
        self._bounds[node] = bound
        self.used[node] = 0

    def can_ever(self, nodes: Iterable[str], size: int) -> bool:
        """Whether so much would fit into the stores of those nodes if they were empty."""
        return size <= self.least(nodes)

    def least(self, nodes: Iterable[str]) -> int:
        """The bound of the smallest store among those of some nodes, one at least."""
        return min(map(self._bounds.__getitem__, nodes))

    def fits(self, nodes: Iterable[str], size: int) -> bool:
        """Whether there is room on all those nodes."""
        used, bounds = self.used, self._bounds
        return all(used[node] + size <= bounds[node] for node in nodes)

    def reserve(self, batch: Batch, nodes: Iterable[str]) -> None:
        """Count a batch on nodes."""
        batch.reserved = set(nodes)
        for node in batch.reserved:
            self.used[node] += batch.size

    def reserve_too(self, batch: Batch, node: str) -> None:
        """Count a batch on one more node."""
        batch.reserved.add(node)
        self.used[node] += batch.size

    def free(self, batch: Batch, node: str) -> None:
        """Stop counting a batch on a node."""
        if node in batch.reserved:
            batch.reserved.discard(node)
            self.give_back(node, batch.size)

    def give_back(self, node: str, size: int) -> None:
        """Stop counting some bytes on a node."""
        if node in self.used:
            self.used[node] -= size

    def free_all(self, batch: Batch, but: Iterable[str | None] = ()) -> None:
        """Stop counting a batch on all nodes but some."""
        for node in batch.reserved.difference(but):
            self.free(batch, node)

    def hand_on(self, batch: Batch, child: Batch, nodes: Iterable[str]) -> None:
        """Part of a batch goes on as one of its own, for some of the nodes; call before the batch shrinks."""
        child.reserved = batch.reserved.intersection(nodes)
        for node in batch.reserved - child.reserved:
            self.give_back(node, child.size)

    def shrink(self, batch: Batch, size: int) -> None:
        """Reduce a batch to a number of bytes."""
        for node in batch.reserved:
            self.give_back(node, batch.size - size)
        batch.size = size

    def drop(self, node: str) -> None:
        """Remove a lost node."""
        self._bounds.pop(node, None)
        self.used.pop(node, None)
