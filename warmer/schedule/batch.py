"""Batches in progress, tasks in flight, and the bytes reserved in the object stores. Pure."""

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
    """Chunks that the same nodes lack and that move together.

    Attributes:
        number: Identifies the batch; numbers increase in the order of creation.
        chunks: Chunks of the batch.
        size: Bytes of the chunks.
        cohort: Cohort for whose members the batch was created.
        pending: Nodes that lack the chunks and have no task for them yet, in the order in which they will get one.
        receiving: Nodes with a task to receive the batch; maintained by `InFlightTable`.
        reserved: Nodes on whose object store the bytes are reserved.
        holder: Node that fetches the batch or has stored it; None until a node has a task to fetch it.
        source: Number of the fetch task; 0 if no chunk of it came into the store.
        stored: Whether the batch is in the object store.
        done: Number of nodes that have received the batch.
        attempts: Number of failed fetches.
        avoid: Nodes that failed to fetch the batch; they retry only if no other node can.
        handed_over: Whether another node got the fetch because the first was slow; this happens at most once.
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
        """Whether a node is fetching the batch now."""
        return self.holder is not None and not self.stored

    def allowance(self, fan_out: int) -> int:
        """Return how many more nodes may start to receive the batch: each node that has it serves `fan_out` others."""
        return fan_out * (1 + self.done) - len(self.receiving)

    def to_the_end(self, node: str) -> None:
        """Move a pending node to the end of the order."""
        del self.pending[node]
        self.pending[node] = None

    def ready_again(self) -> None:
        """Reset the batch to be fetched again, because the data of its previous fetch will not be available to others."""
        self.holder, self.source, self.stored, self.done = None, 0, False, 0


@dataclass(slots=True)
class InFlight:
    """A task in flight.

    Attributes:
        task: The task.
        batch: Batch of the chunks; None if the node fetches them by itself.
        since: Time at which the task was created, in seconds.
        size: Bytes of the chunks.
        hold: Bytes that the task may leave in its node's store without a batch that reserves them.
        was_of: Batch that was given to another node because this task was slow; None if there is none.
        spent: Bytes that were charged to the run's cap for the task.
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
        """Whether the task requests from the Hub, not from the object store."""
        return isinstance(self.task, FetchTask)


@dataclass(slots=True)
class NodeTasks:
    """Tasks in flight on one node, and their sums.

    Attributes:
        tasks: Tasks by number.
        fetches, receives: Number of tasks of each kind.
        bytes: Bytes of all tasks.
    """

    tasks: dict[int, InFlight] = field(default_factory=dict)
    fetches: int = 0
    receives: int = 0
    bytes: int = 0


class InFlightTable:
    """Table of the tasks in flight, from which the totals of nodes, batches and the run derive.

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
        """Return the tasks of a node."""
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
            KeyError: The task is not in flight.
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
        """Return the tasks that were not handed out yet."""
        self._new = [running for running in self._new if running.task.number in self._tasks]
        return self._new

    def take_new(self) -> list[Task]:
        """Return the tasks that were not handed out yet, and mark them as handed out."""
        new, self._new = self.new(), []
        return [running.task for running in new]

    def new_receivers(self, source: int) -> list[Task]:
        """Return the tasks, not handed out yet, that receive what the fetch `source` left in the store."""
        tasks = [running.task for running in self.new()]
        return [task for task in tasks if isinstance(task, ReceiveTask) and task.source == source]


class StoreBudget:
    """Limits on the bytes of batches in the object store of each node.

    The bytes of a batch are reserved on every node that needs it, from before the fetch until no node waits for it: a node
    that has received the batch keeps a copy until then, and serves it to others.

    Args:
        bounds: Maximum bytes, by node.
    """

    def __init__(self, bounds: Mapping[str, int]) -> None:
        self._bounds = dict(bounds)
        self.used = dict.fromkeys(bounds, 0)

    def admit(self, node: str, bound: int) -> None:
        """Add a node with its maximum bytes."""
        self._bounds[node] = bound
        self.used[node] = 0

    def can_ever(self, nodes: Iterable[str], size: int) -> bool:
        """Return whether `size` bytes would fit into the empty stores of the nodes."""
        return size <= self.least(nodes)

    def least(self, nodes: Iterable[str]) -> int:
        """Return the limit of the smallest store among at least one node, in bytes."""
        return min(map(self._bounds.__getitem__, nodes))

    def fits(self, nodes: Iterable[str], size: int) -> bool:
        """Return whether `size` bytes fit into the stores of all the nodes now."""
        used, bounds = self.used, self._bounds
        return all(used[node] + size <= bounds[node] for node in nodes)

    def reserve(self, batch: Batch, nodes: Iterable[str]) -> None:
        """Reserve the bytes of a batch on nodes."""
        batch.reserved = set(nodes)
        for node in batch.reserved:
            self.used[node] += batch.size

    def reserve_too(self, batch: Batch, node: str) -> None:
        """Reserve the bytes of a batch on one more node."""
        batch.reserved.add(node)
        self.used[node] += batch.size

    def free(self, batch: Batch, node: str) -> None:
        """Release the bytes of a batch on a node."""
        if node in batch.reserved:
            batch.reserved.discard(node)
            self.give_back(node, batch.size)

    def give_back(self, node: str, size: int) -> None:
        """Release some bytes on a node."""
        if node in self.used:
            self.used[node] -= size

    def free_all(self, batch: Batch, but: Iterable[str | None] = ()) -> None:
        """Release the bytes of a batch on all nodes except some."""
        for node in batch.reserved.difference(but):
            self.free(batch, node)

    def hand_on(self, batch: Batch, child: Batch, nodes: Iterable[str]) -> None:
        """Transfer the reservation of part of a batch to a child batch, for some nodes; call before the batch shrinks."""
        child.reserved = batch.reserved.intersection(nodes)
        for node in batch.reserved - child.reserved:
            self.give_back(node, child.size)

    def shrink(self, batch: Batch, size: int) -> None:
        """Reduce the reservation of a batch to a number of bytes."""
        for node in batch.reserved:
            self.give_back(node, batch.size - size)
        batch.size = size

    def drop(self, node: str) -> None:
        """Remove a lost node."""
        self._bounds.pop(node, None)
        self.used.pop(node, None)
