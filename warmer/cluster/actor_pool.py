"""Ray actors, one on each node: their calls, and what becomes of those that die or hang."""

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
"""How often the process of a node that lives is started again after it died: once more is what the node does to it."""

DEATHS: Final = (
    ray.exceptions.RayActorError,
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.OutOfMemoryError,
)
"""What is said of an actor whose process is gone, or cannot be reached."""

_ROLL_SECS: Final = 1.0
"""How often the driver looks whether a node lives whose process is started again."""

TICK_SECS: Final = 0.25
"""How late an order to stop is noticed at most."""

_WINDOW: Final = 2
"""Pieces in progress on a node: one that is worked on, and the next."""

_SHARED: Final = 16
"""Pieces that lie in the driver's object store for nodes that are a little slower."""

_ANSWER_SECS: Final = 1.0
"""How long the driver waits for an answer that is there, but on another node; then it asks again later."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a node takes no part any more, or a call came to nothing.

    Attributes:
        kind: Of the error, or one of `warmer.report.outcomes`.
        message: In words.
        died: Whether the process of the actor is gone: another one may go on in its place.
    """

    kind: str
    message: str
    died: bool = False


@dataclass(frozen=True, slots=True)
class Call:
    """A call in progress.

    Attributes:
        node: Whose it is.
        work: What it carries out; None for the start of a node.
        deadline: When the node counts as hung.
    """

    node: str
    work: Any
    deadline: float


@dataclass(slots=True)
class ActorHandle:
    """The actor of one node.

    Attributes:
        node: Which.
        handle: Ray's.
        launched: When.
        deadline: When it has to have started.
        restarts: How often its process was started again.
        started: Whether it has answered that it takes part.
        live: Whether it was not given up.
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
        actor_class: Whose `start` is called first.
        at_once: Calls that an actor carries out at one time.

    Attributes:
        by_node: The actors, by the ids of their nodes; those that were given up, too.
    """

    def __init__(self, actor_class: type, at_once: int = 1) -> None:
        self._class = actor_class
        self._at_once = at_once
        self._next_roll = 0.0
        self.by_node: dict[str, ActorHandle] = {}
        # The windows of the caller bound them, whatever the length of the work.
        self._calls: dict[Any, Call] = {}

    def __bool__(self) -> bool:
        """Whether calls are in progress."""
        return bool(self._calls)

    def calls(self) -> list[Call]:
        """The calls in progress."""
        return list(self._calls.values())

    def launch(self, node: Node, task: Any, secs: float) -> None:
        """Start the actor of a node, or another one where it died.

        Args:
            node: Which.
            task: The argument of its `start`.
            secs: Most seconds until it takes part.
        """
        remote: Any = ray.remote(self._class)
        # No CPU: nodes full of engines must take it too.
        handle = remote.options(
            num_cpus=0, max_concurrency=self._at_once, label_selector={"ray.io/node-id": node.id}
        ).remote()
        now, before = time.monotonic(), self.by_node.get(node.id)
        self.by_node[node.id] = ActorHandle(node, handle, now, now + secs, 0 if before is None else before.restarts + 1)
        ref = handle.start.remote(task, NodeInfo(node.name, node.id, node.labels))
        self._calls[ref] = Call(node.id, None, now + secs)

    def expect(self, ref: Any, node: str, work: Any, secs: float) -> None:
        """A call was made: its answer is waited for."""
        self._calls[ref] = Call(node, work, time.monotonic() + secs)

    def answers(self, secs: float) -> Iterator[tuple[Call, Any]]:
        """Yield the calls that have ended, with their results, or a `Failure`.

        Args:
            secs: How long to wait for the first.
        """
        refs = list(self._calls)
        ended: set[Any] = set(ray.wait(refs, num_returns=1, timeout=secs, fetch_local=False)[0])
        if ended:
            ended.update(ray.wait(refs, num_returns=len(refs), timeout=0, fetch_local=False)[0])
        for ref in refs:  # in the order of the calls
            if ref in ended and ref in self._calls:  # else its node was lost a moment ago
                try:
                    result = ray.get(ref, timeout=_ANSWER_SECS)
                except ray.exceptions.GetTimeoutError:
                    continue
                except ray.exceptions.RayTaskError as error:
                    result = Failure(INTERNAL, short(error))
                except ray.exceptions.RayError as error:
                    # Unavailable counts as lost too: its work is done again by the next run, never waited for without end.
                    died = isinstance(error, DEATHS)
                    result = Failure(
                        NODE_LOST, f"lost in mid-run: {self._often(self._calls[ref].node, died)}{short(error)}", died
                    )
                yield self._calls.pop(ref), result

    def _often(self, node: str, died: bool) -> str:
        restarts = self.by_node[node].restarts
        return f"its process died {restarts + 1} times, at last: " if died and restarts else ""

    def overdue(self) -> list[Call]:
        """The calls whose time is up."""
        now = time.monotonic()
        return [call for call in self._calls.values() if now > call.deadline]

    def may_restart(self, name: str) -> bool:
        """Whether another process may go on where one died: its node lives, and it has not happened too often."""
        actor = self.by_node[name]
        if actor.restarts >= RESTARTS or name not in {node.id for node in alive_nodes()}:
            return False
        _log.warning("node %s: its process died and is started again", actor.node.name)
        return True

    def dead_nodes(self) -> list[str]:
        """Nodes that were taken for alive when their process died, and have died with it; looked for once a second."""
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
        with contextlib.suppress(Exception):  # it is dead already, or the cluster is
            ray.kill(actor.handle)

    def close(self) -> None:
        """End all actors."""
        for name in self.by_node:
            self.give_up(name)


def short(error: BaseException) -> str:
    """The error's own words, without Ray's page about actors."""
    if isinstance(error, ray.exceptions.RayTaskError):
        error = error.cause
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


class ActorTask(Protocol):
    """What a node is to do. It crosses to the nodes."""

    def begin(self, place: NodeInfo) -> tuple[Any, Any]:
        """Begin, on the node.

        Returns:
            What was found, and what works on pieces there: a function of one piece.

        Raises:
            HFBucketError: This node cannot take part.
        """


class TaskActor:
    """What runs on a node."""

    def __init__(self) -> None:
        self._work: Callable[[Any], Any] | None = None

    def start(self, task: ActorTask, place: NodeInfo) -> Any:
        """Take part; returns what was found, or why not."""
        try:
            found, self._work = task.begin(place)
        except HFBucketError as error:
            return Failure(error.kind, str(error))
        return found

    def work(self, piece: Any) -> Any:
        """Work on one piece; returns what came of it, or why there will be no more."""
        if self._work is None:
            raise RuntimeError("this node was not started")
        try:
            return self._work(piece)
        except HFBucketError as error:
            return Failure(error.kind, str(error))


class ActorPool:
    """Nodes that are given one piece of work after the other, each at its own pace. Use it as a context manager: its actors end with it.

    Args:
        tasks: By node.
        stop: Says whether to stop.
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
        """The ids of those that take part."""
        return [name for name, actor in self._actors.by_node.items() if actor.live]

    def begin(self, secs: float) -> dict[str, Any]:
        """Have all nodes begin.

        Args:
            secs: Most seconds that each may take.

        Returns:
            What each found, or the `Failure` by which it takes no part; of those that ended before a stop.
        """
        self._begin_secs = secs
        for node, task in self._tasks.values():
            self._actors.launch(node, task, secs)
        found: dict[str, Any] = {}
        while self._actors and not self._stop.requested:
            self._step(lambda call, result: found.__setitem__(call.node, result), NODE_START)
        return found

    def work(self, piece: Callable[[int], Any], count: int, take: Callable[[str, int, Any], None], secs: float) -> None:
        """Have each node work on all pieces, in their order; returns when it is done or stopped.

        Args:
            piece: The piece of a number. It is asked again for nodes that fell behind.
            count: How many there are.
            take: Called with the node, the number of the piece and its result; a `Failure` is the last of a node.
            secs: Most seconds that a piece may take.
        """
        shared: OrderedDict[int, Any] = OrderedDict()
        given = dict.fromkeys(self.nodes, 0)

        def give(name: str, number: int) -> None:
            actor = self._actors.by_node[name]
            ref = actor.handle.work.remote(_in_store(shared, number, piece))
            # The one before it has its own time, and so has the start of a node.
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
        """Take what has ended; waits for a tick at most."""
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
        """Whether another process goes on with what one that died was given."""
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
    """One copy of a piece for all nodes that keep pace."""
    found = shared.get(number)
    if found is None:
        found = shared[number] = ray.put(piece(number))
        if len(shared) > _SHARED:
            shared.popitem(last=False)
    return found
