"""One Ray actor on each node that speaks with the engine there, given one piece of work after the other.

Unlike a `warmer.cluster.driver`, whose nodes share chunks, each node goes its own way here; the driver reads what they are given
once for those that keep pace.
"""

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
from warmer.report.outcomes import NODE_LOST, NODE_START
from warmer.tiers import NodeInfo

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from hfbucket_plugin.tools.signals import Stop
    from warmer.cluster.ray import Node

_log = logging.getLogger(__name__)

_RESTARTS: Final = 3
"""How often the process of a node that lives is started again after it died."""

_DEATHS: Final = (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError)
"""What is said of an actor whose process is gone, or cannot be reached."""

_ROLL_SECS: Final = 1.0
"""How often the driver looks whether a node lives whose process is started again."""

_TICK_SECS: Final = 0.25
"""How late an order to stop is noticed at most."""

_WINDOW: Final = 2
"""Pieces under way on a node: one that is worked on, and the next."""

_SHARED: Final = 16
"""Pieces that lie in the driver's object store for nodes that are a little slower."""

_ANSWER_SECS: Final = 1.0
"""How long the driver waits for an answer that is there, but on another node; then it asks again later."""


class ActorTask(Protocol):
    """What a node is to do. It crosses to the nodes."""

    def begin(self, place: NodeInfo) -> tuple[Any, Any]:
        """Begin, on the node.

        Returns:
            What was found, and what works on pieces there: a function of one piece.

        Raises:
            HFBucketError: This node cannot take part.
        """


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a node takes no part any more.

    Attributes:
        kind: Of the error, or one of `warmer.report.outcomes`.
        message: In words.
    """

    kind: str
    message: str


class TaskActor:
    """What runs on a node."""

    def __init__(self) -> None:
        self._work: Callable[[Any], Any] | None = None

    def begin(self, task: ActorTask, place: NodeInfo) -> Any:
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


@dataclass(frozen=True, slots=True)
class _Call:
    """A call under way.

    Attributes:
        node: Whose it is.
        piece: The number of the piece; None for the start of a node.
        deadline: When the node counts as hung.
        again: Whether it starts a node that had begun before: nobody is told what it finds.
    """

    node: str
    piece: int | None
    deadline: float
    again: bool = False


class ActorPool:
    """The nodes of an actor task. Use it as a context manager: its actors end with it.

    Args:
        tasks: By node.
        stop: Says whether to stop.
        tick: Called a few times a second.
    """

    def __init__(self, tasks: Mapping[Node, ActorTask], stop: Stop, tick: Callable[[], None] = lambda: None) -> None:
        self._tasks = {node.id: (node, task) for node, task in tasks.items()}
        self._stop = stop
        self._tick = tick
        self._actors: dict[str, Any] = {}
        self._restarts: Counter[str] = Counter()
        self._begin_secs = self._next_roll = 0.0
        self._give: Callable[[str, int], None] = lambda _name, _number: None
        self._calls: dict[Any, _Call] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self._actors):
            self._leave(name)

    @property
    def nodes(self) -> list[str]:
        """The ids of those that take part."""
        return list(self._actors)

    def begin(self, secs: float) -> dict[str, Any]:
        """Have all nodes begin.

        Args:
            secs: Most seconds that each may take.

        Returns:
            What each found, or the `Failure` by which it takes no part; of those that ended before a stop.
        """
        self._begin_secs = secs
        for name in self._tasks:
            self._launch(name)
        found: dict[str, Any] = {}
        while self._calls and not self._stop.requested:
            self._step(lambda call, result: found.__setitem__(call.node, result), NODE_START)
        return found

    def _launch(self, name: str, *, again: bool = False) -> None:
        node, task = self._tasks[name]
        actor_class: Any = ray.remote(TaskActor)
        # No CPU: nodes full of engines must take it too.
        actor = actor_class.options(num_cpus=0, label_selector={"ray.io/node-id": node.id}).remote()
        self._actors[name] = actor
        ref = actor.begin.remote(task, NodeInfo(node.name, node.id, node.labels))
        self._calls[ref] = _Call(name, None, time.monotonic() + self._begin_secs, again)

    def work(self, piece: Callable[[int], Any], count: int, take: Callable[[str, int, Any], None], secs: float) -> None:
        """Have each node work on all pieces, in their order; returns when it is done or told to stop.

        Args:
            piece: The piece of a number. It is asked again for nodes that fell behind.
            count: How many there are.
            take: Is told the node, the number of the piece and what came of it; a `Failure` is the last of a node.
            secs: Most seconds that a piece may take.
        """
        shared: OrderedDict[int, Any] = OrderedDict()
        given = dict.fromkeys(self._actors, 0)

        def give(name: str, number: int) -> None:
            ref = self._actors[name].work.remote(_in_store(shared, number, piece))
            # The one before it has its own time, and so has the start of a node.
            wait = sum(
                call.deadline - time.monotonic() for call in self._calls.values() if call.again and call.node == name
            )
            self._calls[ref] = _Call(name, number, time.monotonic() + max(0.0, wait) + secs * _WINDOW)

        self._give = give
        while not self._stop.requested:
            busy = Counter(call.node for call in self._calls.values())
            for name in self._actors:
                under_way = busy[name]
                for _ in range(under_way, min(_WINDOW, under_way + count - given[name])):
                    number = given[name]
                    given[name] += 1
                    give(name, number)
            if not self._calls:
                return
            self._step(lambda call, result: take(call.node, call.piece or 0, result), NODE_LOST)

    def _step(self, take: Callable[[_Call, Any], None], late: str) -> None:
        """Take what has ended; waits for a tick at most."""
        landed, _ = ray.wait(list(self._calls), num_returns=1, timeout=_TICK_SECS, fetch_local=False)
        if landed:
            landed, _ = ray.wait(list(self._calls), num_returns=len(self._calls), timeout=0, fetch_local=False)
        for ref in sorted(landed, key=lambda ref: self._calls[ref].piece or 0):
            if ref in self._calls:  # its node was lost a moment ago
                self._land(ref, take)
        now = time.monotonic()
        self._lose_dead_nodes(now, take)
        for call in [call for call in self._calls.values() if now > call.deadline]:
            if call.node in self._actors:
                self._end(call, Failure(late, "answered nothing for too long; is the node overloaded?"), take)
        self._tick()

    def _lose_dead_nodes(self, now: float, take: Callable[[_Call, Any], None]) -> None:
        """A node that was taken for alive when its process died may have died with it."""
        starting = [call for call in self._calls.values() if call.piece is None and self._restarts[call.node]]
        if not starting or now < self._next_roll:
            return
        self._next_roll = now + _ROLL_SECS
        alive = {node.id for node in alive_nodes()}
        for call in starting:
            if call.node not in alive and call.node in self._actors:
                self._end(call, Failure(NODE_LOST, "lost in mid-run: the node died"), take)

    def _land(self, ref: Any, take: Callable[[_Call, Any], None]) -> None:
        call = self._calls[ref]
        try:
            result = ray.get(ref, timeout=_ANSWER_SECS)
        except ray.exceptions.GetTimeoutError:
            return
        except ray.exceptions.RayTaskError as error:
            result = Failure("internal", f"{type(error.cause).__name__}: {error.cause}"[:300])
        except _DEATHS as error:
            if self._restarted(call.node, error):
                return
            result = Failure(NODE_LOST, f"lost in mid-run: {type(error).__name__}")
        except ray.exceptions.RayError as error:
            result = Failure(NODE_LOST, f"lost in mid-run: {type(error).__name__}")
        del self._calls[ref]
        if isinstance(result, Failure):
            self._end(call, result, take)
        elif not call.again:
            take(call, result)

    def _restarted(self, name: str, error: Exception) -> bool:
        """Whether another process goes on where one died: its node lives, and it has not happened too often."""
        if self._restarts[name] >= _RESTARTS or name not in {node.id for node in alive_nodes()}:
            return False
        self._restarts[name] += 1
        _log.warning(
            "node %s: its process died and is started again: %s", self._tasks[name][0].name, type(error).__name__
        )
        calls = [call for call in self._calls.values() if call.node == name]
        pieces = sorted(call.piece for call in calls if call.piece is not None)
        self._leave(name)
        self._launch(name, again=all(call.piece is not None or call.again for call in calls))
        for piece in pieces:
            self._give(name, piece)
        return True

    def _end(self, call: _Call, failure: Failure, take: Callable[[_Call, Any], None]) -> None:
        self._leave(call.node)
        take(call, failure)

    def _leave(self, name: str) -> None:
        self._calls = {ref: call for ref, call in self._calls.items() if call.node != name}
        with contextlib.suppress(Exception):  # it is dead already, or the cluster is
            ray.kill(self._actors.pop(name))


def _in_store(shared: OrderedDict[int, Any], number: int, piece: Callable[[int], Any]) -> Any:
    """One copy of a piece for all nodes that keep pace."""
    found = shared.get(number)
    if found is None:
        found = shared[number] = ray.put(piece(number))
        if len(shared) > _SHARED:
            shared.popitem(last=False)
    return found
