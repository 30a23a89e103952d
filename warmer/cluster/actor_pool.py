"""Ray actors, one on each node: calls to them, and handling of actors that die or hang."""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter, OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol, Self

import ray
import ray.exceptions

from hfbucket_plugin.errors import HFBucketError
from warmer.cluster.ray import alive_nodes
from warmer.report.outcomes import INTERNAL, NODE_LOST, NODE_START
from warmer.tiers import NodeInfo

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from hfbucket_plugin.tools.signals import Stop
    from warmer.cluster.ray import Node

_log = logging.getLogger(__name__)

RESTARTS: Final = 3
"""Maximum restarts of a process on a live node: if it dies more often, the node is considered the cause."""

DEATHS: Final = (
    ray.exceptions.RayActorError,
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.OutOfMemoryError,
)
"""Ray errors that mean that the process of an actor is dead or unreachable."""

_ROLL_SECS: Final = 1.0
"""Seconds between two checks whether the nodes of restarted processes are alive."""

TICK_SECS: Final = 0.25
"""Maximum seconds until a stop is noticed."""

_WINDOW: Final = 2
"""Pieces in progress on a node: the present one and the next."""

_SHARED: Final = 16
"""Pieces kept in the driver's object store for nodes that are a little slower."""

_ANSWER_SECS: Final = 1.0
"""Seconds to wait for a result that is stored on another node, before the driver tries again later."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a node takes no part any more, or a call failed.

    Attributes:
        kind: Kind of the error, or one of `warmer.report.outcomes`.
        message: Reason in words.
        died: Whether the process of the actor is dead, so that a new one may replace it.
    """

    kind: str
    message: str
    died: bool = False


@dataclass(frozen=True, slots=True)
class Call:
    """A call in progress.

    Attributes:
        node: Id of the node.
        work: Work of the call; None for the start of a node.
        deadline: Time from which the node is considered hung.
    """

    node: str
    work: Any
    deadline: float


@dataclass(slots=True)
class ActorHandle:
    """Actor of one node.

    Attributes:
        node: Node of the actor.
        handle: Ray's handle.
        launched: Time of the launch.
        deadline: Time by which the actor must have started.
        restarts: Number of restarts of the process.
        started: Whether the actor has reported that it takes part.
        live: Whether the actor was not given up.
    """

    node: Node
    handle: Any
    launched: float
    deadline: float
    restarts: int = 0
    started: bool = False
    live: bool = True


class NodeActors:
    """Actors of one class, at most one on each node.

    Args:
        actor_class: Class of the actors; its `start` is called first.
        at_once: Maximum concurrent calls of an actor.

    Attributes:
        by_node: Actors by node id, including those that were given up.
    """

    def __init__(self, actor_class: type, at_once: int = 1) -> None:
        self._class = actor_class
        self._at_once = at_once
        self._next_roll = 0.0
        self.by_node: dict[str, ActorHandle] = {}
        # Bounded by the limits of the caller, however much work there is.
        self._calls: dict[Any, Call] = {}

    def __bool__(self) -> bool:
        """Return whether calls are in progress."""
        return bool(self._calls)

    def calls(self) -> list[Call]:
        """Return the calls in progress."""
        return list(self._calls.values())

    def launch(self, node: Node, task: Any, secs: float) -> None:
        """Start the actor of a node, or a new one in place of a dead one.

        Args:
            node: Node of the actor.
            task: Argument of the actor's `start`.
            secs: Maximum seconds until the actor takes part.
        """
        remote: Any = ray.remote(self._class)
        # No CPU is requested, so that the actor also fits on nodes that engines occupy fully.
        handle = remote.options(
            num_cpus=0, max_concurrency=self._at_once, label_selector={"ray.io/node-id": node.id}
        ).remote()
        now, before = time.monotonic(), self.by_node.get(node.id)
        self.by_node[node.id] = ActorHandle(node, handle, now, now + secs, 0 if before is None else before.restarts + 1)
        ref = handle.start.remote(task, NodeInfo(node.name, node.id, node.labels))
        self._calls[ref] = Call(node.id, None, now + secs)

    def expect(self, ref: Any, node: str, work: Any, secs: float) -> None:
        """Register a call whose result is awaited, with a maximum duration in seconds."""
        self._calls[ref] = Call(node, work, time.monotonic() + secs)

    def answers(self, secs: float) -> Iterator[tuple[Call, Any]]:
        """Yield the calls that have ended, with their results or a `Failure`.

        Args:
            secs: Maximum seconds to wait for the first call.
        """
        refs = list(self._calls)
        ended: set[Any] = set(ray.wait(refs, num_returns=1, timeout=secs, fetch_local=False)[0])
        if ended:
            ended.update(ray.wait(refs, num_returns=len(refs), timeout=0, fetch_local=False)[0])
        for ref in refs:  # in the order of the calls
            if ref in ended and ref in self._calls:  # false if the node was lost since
                try:
                    result = ray.get(ref, timeout=_ANSWER_SECS)
                except ray.exceptions.GetTimeoutError:
                    continue
                except ray.exceptions.RayTaskError as error:
                    result = Failure(INTERNAL, short(error))
                except ray.exceptions.RayError as error:
                    # An unreachable actor counts as lost too: the next run repeats its work, and nothing waits for it forever.
                    died = isinstance(error, DEATHS)
                    result = Failure(
                        NODE_LOST, f"lost in mid-run: {self._often(self._calls[ref].node, died)}{short(error)}", died
                    )
                yield self._calls.pop(ref), result

    def _often(self, node: str, died: bool) -> str:
        restarts = self.by_node[node].restarts
        return f"its process died {restarts + 1} times, at last: " if died and restarts else ""

    def overdue(self) -> list[Call]:
        """Return the calls past their deadline."""
        now = time.monotonic()
        return [call for call in self._calls.values() if now > call.deadline]

    def may_restart(self, name: str) -> bool:
        """Return whether a new process may replace a dead one: its node is alive, and restarts were not too many."""
        actor = self.by_node[name]
        if actor.restarts >= RESTARTS or name not in {node.id for node in alive_nodes()}:
            return False
        _log.warning("node %s: its process died and is started again", actor.node.name)
        return True

    def dead_nodes(self) -> list[str]:
        """Return nodes that seemed alive when their process died, but have died since; checked once a second."""
        now = time.monotonic()
        again = [name for name, one in self.by_node.items() if one.live and one.restarts and not one.started]
        if not again or now < self._next_roll:
            return []
        self._next_roll = now + _ROLL_SECS
        alive = {node.id for node in alive_nodes()}
        return [name for name in again if name not in alive]

    def give_up(self, name: str) -> None:
        """Kill an actor, and drop its calls."""
        self._calls = {ref: call for ref, call in self._calls.items() if call.node != name}
        actor = self.by_node[name]
        actor.live = False
        with contextlib.suppress(Exception):  # the actor or the cluster is already dead
            ray.kill(actor.handle)

    def close(self) -> None:
        """Kill all actors."""
        for name in self.by_node:
            self.give_up(name)


def short(error: BaseException) -> str:
    """Return an error's own message, without Ray's long explanation about actors."""
    if isinstance(error, ray.exceptions.RayTaskError):
        error = error.cause
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


class ActorTask(Protocol):
    """Task of a node, which is sent to the node."""

    def begin(self, place: NodeInfo) -> tuple[Any, Any]:
        """Start the task; runs on the node.

        Returns:
            A finding, and a function that processes one piece.

        Raises:
            HFBucketError: This node cannot take part.
        """


class TaskActor:
    """Ray actor that executes a task on a node."""

    def __init__(self) -> None:
        self._work: Callable[[Any], Any] | None = None

    def start(self, task: ActorTask, place: NodeInfo) -> Any:
        """Start the task; return its finding, or the error if the node cannot take part."""
        try:
            found, self._work = task.begin(place)
        except HFBucketError as error:
            return Failure(error.kind, str(error))
        return found

    def work(self, piece: Any) -> Any:
        """Process one piece; return the result, or the error after which the node processes no more."""
        if self._work is None:
            raise RuntimeError("this node was not started")
        try:
            return self._work(piece)
        except HFBucketError as error:
            return Failure(error.kind, str(error))


class ActorPool:
    """Nodes that process pieces of work one after the other, each at its own pace. A context manager that ends its actors.

    Args:
        tasks: Tasks by node.
        stop: Whether to stop.
        tick: Called a few times a second.
    """

    def __init__(self, tasks: Mapping[Node, ActorTask], stop: Stop, tick: Callable[[], None] = lambda: None) -> None:
        self._tasks = {node.id: (node, task) for node, task in tasks.items()}
        self._stop = stop
        self._tick = tick
        self._actors = NodeActors(TaskActor)
        self._begin_secs = 0.0
        self._begun: set[str] = set()
        self._give: Callable[[str, int], None] = lambda _name, _number: None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._actors.close()

    @property
    def nodes(self) -> list[str]:
        """Return the ids of the nodes that take part."""
        return [name for name, actor in self._actors.by_node.items() if actor.live]

    def begin(self, secs: float) -> dict[str, Any]:
        """Start all tasks.

        Args:
            secs: Maximum seconds of each start.

        Returns:
            The finding of each node, or the `Failure` for which it takes no part; only of nodes that answered before a stop.
        """
        self._begin_secs = secs
        for node, task in self._tasks.values():
            self._actors.launch(node, task, secs)
        found: dict[str, Any] = {}
        while self._actors and not self._stop.requested:
            self._step(lambda call, result: found.__setitem__(call.node, result), NODE_START)
        return found

    def work(self, piece: Callable[[int], Any], count: int, take: Callable[[str, int, Any], None], secs: float) -> None:
        """Process all pieces on each node, in order; return when all are done or the run is stopped.

        Args:
            piece: Returns the piece of a number; called again for nodes that fell behind.
            count: Number of pieces.
            take: Called with the node, the number of the piece and its result; a `Failure` is the last result of a node.
            secs: Maximum seconds of a piece.
        """
        shared: OrderedDict[int, Any] = OrderedDict()
        given = dict.fromkeys(self.nodes, 0)

        def give(name: str, number: int) -> None:
            actor = self._actors.by_node[name]
            ref = actor.handle.work.remote(_in_store(shared, number, piece))
            # The deadline includes the time of the previous piece and of the node's start.
            wait = 0.0 if actor.started else max(0.0, actor.deadline - time.monotonic())
            self._actors.expect(ref, name, number, wait + secs * _WINDOW)

        self._give = give
        while not self._stop.requested:
            busy = Counter(call.node for call in self._actors.calls())
            for name in self.nodes:
                for _ in range(busy[name], min(_WINDOW, busy[name] + count - given[name])):
                    number = given[name]
                    given[name] += 1
                    give(name, number)
            if not self._actors:
                return
            self._step(lambda call, result: take(call.node, call.work or 0, result), NODE_LOST)

    def _step(self, take: Callable[[Call, Any], None], late: str) -> None:
        """Process the calls that have ended; wait for one tick at most."""
        for call, result in self._actors.answers(TICK_SECS):
            if isinstance(result, Failure):
                if not (result.died and self._restarted(call)):
                    self._end(call, result, take)
            elif call.work is not None:
                take(call, result)
            else:
                self._actors.by_node[call.node].started = True
                if call.node not in self._begun:
                    self._begun.add(call.node)
                    take(call, result)
        for name in self._actors.dead_nodes():
            self._end(Call(name, None, 0.0), Failure(NODE_LOST, "lost in mid-run: the node died"), take)
        for call in self._actors.overdue():
            if self._actors.by_node[call.node].live:
                self._end(call, Failure(late, "answered nothing for too long; is the node overloaded?"), take)
        self._tick()

    def _restarted(self, died: Call) -> bool:
        """Return whether a new process takes over the calls of one that died."""
        name = died.node
        if not self._actors.may_restart(name):
            return False
        calls = [call for call in [died, *self._actors.calls()] if call.node == name]
        self._actors.give_up(name)
        self._actors.launch(*self._tasks[name], self._begin_secs)
        for number in sorted(call.work for call in calls if call.work is not None):
            self._give(name, number)
        return True

    def _end(self, call: Call, failure: Failure, take: Callable[[Call, Any], None]) -> None:
        self._actors.give_up(call.node)
        take(call, failure)


def _in_store(shared: OrderedDict[int, Any], number: int, piece: Callable[[int], Any]) -> Any:
    """Return the one stored copy of a piece for all nodes that keep pace."""
    found = shared.get(number)
    if found is None:
        found = shared[number] = ray.put(piece(number))
        if len(shared) > _SHARED:
            shared.popitem(last=False)
    return found
