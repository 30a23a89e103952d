"""One Ray actor on each node, fed by the schedule. Knows nothing of chunks' format or of what a report looks like."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

import ray
import ray.exceptions

from hfbucket_plugin.errors import HFBucketError
from warmer.cluster.actor import NodeActor
from warmer.cluster.ray import alive_nodes
from warmer.node.worker import CHUNK_TIMEOUT_SECS
from warmer.report.outcomes import INTERNAL, NODE_LOST, NODE_START, Failed
from warmer.schedule.tasks import FetchTask, total_bytes
from warmer.tiers import NodeInfo

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from hfbucket_plugin.tools.signals import Stop
    from warmer.cluster.actor import Config
    from warmer.cluster.ray import Node
    from warmer.report.outcomes import Outcome
    from warmer.schedule.scheduler import Ended, Scheduler
    from warmer.schedule.tasks import Task

_log = logging.getLogger(__name__)

_TICK_SECS: Final = 0.25
"""How late an order to stop is noticed at most."""

_IDLE_SECS: Final = 0.05
_JOIN_SECS: Final = 1.0
"""How often nodes that joined are looked for."""

_STOP_SECS: Final = 1.5
"""What is under way has this long to end: `ray job stop` kills 3 s after SIGTERM."""

_CLOSE_SECS: Final = 5.0

_RESTARTS: Final = 3
"""How often the process of a node that lives is started again after it died: once more is what the node does to it."""

_DEATHS: Final = (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError)
"""What is said of an actor whose process is gone, or cannot be reached."""

_NAMED_AT_ONCE: Final = 1000
"""How many chunks of lost nodes are named before the driver looks at what else there is to do."""

_ANSWER_SECS: Final = 1.0
"""How long the driver waits for an answer that is there, but on another node; then it asks again later."""

_HUNG_SECS: Final = 60.0
_HUNG_TIMEOUTS: Final = 2.0
_HUNG_BYTES_PER_SEC: Final = 1024 * 1024
"""A node answers nothing when an order takes longer than a minute, twice what a chunk and its batch may take, and the time
to write or hash its bytes at 1 MiB a second: a node that is merely slow ends its orders before, with failures if need be."""

ORDERS_AT_ONCE: Final = 6
"""Orders that an actor carries out at one time: four to fetch and two to receive, as `TaskLimits` has it."""


class RunListener(Protocol):
    """Is told what happens."""

    def ended(self, node: str, outcome: Outcome) -> None:
        """A chunk has ended on a node."""

    def started(self, node: str, start_secs: float, open_secs: float) -> None:
        """A node takes part: it took so long to have a process there, and then to open its tier and reach the bucket."""

    def lost(self, node: str, kind: str, message: str) -> None:
        """A node takes no part any more; its other chunks end as `Failed`, unless another takes its place."""

    def replaced(self, node: str, by: Node) -> None:
        """A node that joined takes the place of a lost one: what it was to have, the new one is to have."""

    def tick(self) -> None:
        """Time has passed: called a few times a second."""


@dataclass(frozen=True, slots=True)
class Replacing:
    """How lost nodes are replaced.

    Attributes:
        candidates: The nodes that are alive and may take part.
        fits: Whether one may take the place of a lost one, which is told by its id.
        store_bytes: The bytes that chunks may take in a node's object store.
    """

    candidates: Callable[[], Sequence[Node]]
    fits: Callable[[str, Node], bool]
    store_bytes: Callable[[Node], int]


@dataclass(slots=True)
class _ActorState:
    """One node's actor."""

    node: Node
    actor: Any
    deadline: float
    launched: float
    started: bool = False
    restarts: int = 0


@dataclass(frozen=True, slots=True)
class _Call:
    """A call under way.

    Attributes:
        node: Whose it is.
        task: What it carries out; None for the start of a node.
        deadline: When the node counts as hung.
    """

    node: str
    task: Task | None
    deadline: float


class Driver:
    """The actors of a run.

    Args:
        nodes: Where to run.
        config: What each is told.
        witness: Is told what happens.
        stop: Says whether to stop.
        start_secs: Most seconds that a node may take to take part, and that a lost one's place is kept when there is
            nothing else to do.
        chunk_secs: Most seconds that a node may take for a chunk, with its batch and retries.
        replacing: How lost nodes are replaced; None when they are not.
        store_bytes: The bytes that chunks may take in a node's object store; those of `Replacing` where it is left out.
    """

    def __init__(
        self,
        nodes: Sequence[Node],
        config: Config,
        witness: RunListener,
        stop: Stop,
        start_secs: float,
        *,
        chunk_secs: float = CHUNK_TIMEOUT_SECS,
        replacing: Replacing | None = None,
        store_bytes: Callable[[Node], int] | None = None,
    ) -> None:
        self._store_bytes = store_bytes or (replacing.store_bytes if replacing is not None else lambda _: 0)
        self._nodes = nodes
        self._config = config
        self._witness = witness
        self._stop = stop
        self._start_secs = start_secs
        self._chunk_secs = chunk_secs
        self._replacing = replacing
        self._actors: dict[str, _ActorState] = {}
        # The windows of the schedule bound both, whatever the plan's length.
        self._calls: dict[Any, _Call] = {}
        self._objects: dict[int, Any] = {}
        self._vacant: dict[str, tuple[str, str, float]] = {}
        self._failing: deque[Iterator[tuple[str, Failed]]] = deque()
        self._next_look = self._next_roll = 0.0

    def run(self, schedule: Scheduler) -> None:
        """Carry out a schedule, whose nodes are this fleet's ids; returns when it is done or told to stop.

        Raises:
            RefusedError: The plan was changed meanwhile. What was under way has been ended and noted.
            PlanLostError: The plan cannot be read any more; the same.
        """
        try:
            for node in self._nodes:
                self._launch(node)
            while not self._stop.requested and not self._over(schedule):
                self._give(schedule)
                for ref in self._landed():
                    self._take(schedule, ref)
                self._lose_slow_starters(schedule)
                self._lose_hung_nodes(schedule)
                self._fill_vacancies(schedule)
                self._name_failed()
                self._witness.tick()
            if self._stop.requested:
                self._wind_down(schedule)
        except HFBucketError:  # the plan cannot be read to its end
            self._wind_down(schedule)
            raise
        finally:
            self._dismiss()

    def _over(self, schedule: Scheduler) -> bool:
        """Whether everything is done, by nodes that are still there: one that ended its part may have died since."""
        if not schedule.done:
            return False
        alive = {node.id for node in alive_nodes()}
        gone = [name for name in schedule.nodes if name not in alive]
        for name in gone:
            self._lose(schedule, name, NODE_LOST, "lost after it had ended its part")
        return not gone and not self._failing

    def _launch(self, node: Node, restarts: int = 0) -> None:
        now = time.monotonic()
        actor_class: Any = ray.remote(NodeActor)
        # No CPU: nodes full of engines must take it too. Room for `stop` beside the orders.
        actor = actor_class.options(
            num_cpus=0, max_concurrency=ORDERS_AT_ONCE + 1, label_selector={"ray.io/node-id": node.id}
        ).remote()
        self._actors[node.id] = _ActorState(node, actor, now + self._start_secs, now, restarts=restarts)
        place = NodeInfo(node.name, node.id, node.labels)
        self._calls[actor.start.remote(self._config, place)] = _Call(node.id, None, math.inf)

    def _give(self, schedule: Scheduler) -> None:
        tasks = schedule.tasks(time.monotonic())
        if self._stop.requested:  # told so while chunks were looked up
            return
        for task in tasks:
            actor = self._actors[task.node].actor
            if isinstance(task, FetchTask):
                ref = actor.fetch.remote(task.chunks, share=task.share)
            else:
                # In a list: Ray would else fetch it before the actor can say that it holds the chunks already.
                ref = actor.receive.remote(task.chunks, [self._objects[task.source]])
            self._calls[ref] = _Call(task.node, task, time.monotonic() + self._patience(task))
        self._release(schedule)

    def _patience(self, task: Task) -> float:
        """How many seconds an order may take. Its chunks have one deadline on the node, and none wait for others there."""
        return _HUNG_SECS + _HUNG_TIMEOUTS * self._chunk_secs + total_bytes(task.chunks) / _HUNG_BYTES_PER_SEC

    def _release(self, schedule: Scheduler) -> None:
        """Forget objects, which has their owners throw them away everywhere."""
        for number in schedule.released():
            self._objects.pop(number, None)

    def _landed(self) -> list[Any]:
        """What has ended; waits for a tick at most."""
        calls = list(self._calls)
        if not calls:
            if not self._failing:
                time.sleep(_IDLE_SECS)  # for bandwidth, or for a node to join
            return []
        landed, _ = ray.wait(calls, num_returns=1, timeout=0 if self._failing else _TICK_SECS, fetch_local=False)
        if landed:
            landed, _ = ray.wait(calls, num_returns=len(calls), timeout=0, fetch_local=False)
        return list(landed)

    def _take(self, schedule: Scheduler, ref: Any) -> None:
        if ref not in self._calls:  # its node was lost a moment ago
            return
        call = self._calls.pop(ref)
        name, task = call.node, call.task
        try:
            result = ray.get(ref, timeout=_ANSWER_SECS)
        except ray.exceptions.GetTimeoutError:
            self._calls[ref] = call
        except ray.exceptions.RayTaskError as error:
            self._broken(schedule, name, task, error)
        except _DEATHS as error:
            self._died(schedule, name, error)
        except ray.exceptions.RayError as error:
            # Unavailable counts as lost too: its work is done again by the next run, never waited for without end.
            self._lose(schedule, name, NODE_LOST, f"lost in mid-run: {_short(error)}")
        else:
            if task is None:
                self._started(schedule, name, *result)
            else:
                self._ended(schedule, task, result)

    def _died(self, schedule: Scheduler, name: str, error: Exception) -> None:
        """The process of a node is gone. Where the node lives, another one goes on with what is left."""
        state = self._actors[name]
        if state.restarts >= _RESTARTS or name not in {node.id for node in alive_nodes()}:
            died = f"its process died {state.restarts + 1} times, at last: " if state.restarts else ""
            self._lose(schedule, name, NODE_LOST, f"lost in mid-run: {died}{_short(error)}")
            return
        _log.warning("node %s: its process died and is started again: %s", state.node.name, _short(error))
        self._forget(name)
        for _ in schedule.lost(name, keep_place=True):
            pass  # nothing: the place is kept
        self._release(schedule)
        schedule.resume(name, self._store_bytes(state.node))
        self._launch(state.node, restarts=state.restarts + 1)

    def _forget(self, name: str) -> None:
        """Wait for nothing any more that an actor was told, and end it."""
        self._calls = {ref: call for ref, call in self._calls.items() if call.node != name}
        self._kill(self._actors[name].actor)

    def _ended(self, schedule: Scheduler, task: Task, result: Any) -> None:
        now = time.monotonic()
        if isinstance(task, FetchTask):
            outcomes, objects = result
            if objects:
                self._objects[task.number] = objects[0]
            self._note(schedule.fetched(task.number, outcomes, shared=bool(objects), now=now))
        else:
            outcomes, holder_lost = result
            self._note(schedule.received(task.number, outcomes, now=now, holder_lost=holder_lost))
        self._release(schedule)

    def _note(self, ended: Iterable[Ended]) -> None:
        for node, outcome in ended:
            self._witness.ended(node, outcome)

    def _started(self, schedule: Scheduler, name: str, error: HFBucketError | None, open_secs: float) -> None:
        if error is None:
            state = self._actors[name]
            state.started = True
            schedule.started(name)
            self._witness.started(name, time.monotonic() - state.launched - open_secs, open_secs)
        else:
            self._lose(schedule, name, error.kind, str(error))

    def _broken(self, schedule: Scheduler, name: str, task: Task | None, error: Exception) -> None:
        """Something raised that nobody foresaw."""
        message = _short(error)
        if task is None:
            self._lose(schedule, name, NODE_START, message)
            return
        failed = [Failed(chunk.key, chunk.size, INTERNAL, f"{chunk.key}: {message}") for chunk in task.chunks]
        self._ended(schedule, task, (failed, None) if isinstance(task, FetchTask) else (failed, False))

    def _lose_slow_starters(self, schedule: Scheduler) -> None:
        now = time.monotonic()
        self._lose_dead_nodes(schedule, now)
        for name in schedule.nodes:
            state = self._actors[name]
            if not state.started and now > state.deadline:
                self._lose(schedule, name, NODE_START, f"took no part within {self._start_secs:g} s; is it overloaded?")

    def _lose_dead_nodes(self, schedule: Scheduler, now: float) -> None:
        """A node that was taken for alive when its process died may have died with it."""
        again = [name for name in schedule.nodes if self._actors[name].restarts and not self._actors[name].started]
        if not again or now < self._next_roll:
            return
        self._next_roll = now + _JOIN_SECS
        alive = {node.id for node in alive_nodes()}
        for name in again:
            if name not in alive:
                self._lose(schedule, name, NODE_LOST, "lost in mid-run: the node died")

    def _lose_hung_nodes(self, schedule: Scheduler) -> None:
        now = time.monotonic()
        for name, task in [(call.node, call.task) for call in self._calls.values() if now > call.deadline]:
            if task is not None and name in schedule.nodes:
                self._lose(schedule, name, NODE_LOST, f"answered nothing for {self._patience(task):.0f} s")

    def _lose(self, schedule: Scheduler, name: str, kind: str, message: str) -> None:
        self._forget(name)
        self._witness.lost(name, kind, message)
        keep = self._replacing is not None and kind in {NODE_LOST, NODE_START}
        rest = schedule.lost(name, keep_place=keep)
        self._release(schedule)
        if keep:
            self._vacant[name] = (kind, message, time.monotonic() + self._start_secs)
        self._fail(name, rest, kind, message)

    def _fail(self, name: str, rest: Iterable[Any], kind: str, message: str) -> None:
        """Have chunks named that a node will not get, by and by: there may be millions."""
        self._failing.append(
            (name, Failed(chunk.key, chunk.size, kind, f"{chunk.key}: not copied: {message}")) for chunk in rest
        )

    def _name_failed(self) -> None:
        """Name some of them."""
        if self._failing:
            some = list(itertools.islice(self._failing[0], _NAMED_AT_ONCE))
            self._note(some)
            if len(some) < _NAMED_AT_ONCE:
                self._failing.popleft()

    def _fill_vacancies(self, schedule: Scheduler) -> None:
        """Have nodes that joined take the places of lost ones; give up those that nobody takes."""
        now = time.monotonic()
        if self._replacing is None or not self._vacant or now < self._next_look:
            return
        self._next_look = now + _JOIN_SECS
        for node in [node for node in self._replacing.candidates() if node.id not in self._actors]:
            name = next((name for name in self._vacant if self._replacing.fits(name, node)), None)
            if name is None:
                continue
            del self._vacant[name]
            schedule.replace(name, node.id, self._replacing.store_bytes(node))
            self._witness.replaced(name, node)
            self._launch(node)
        for name, (kind, message, deadline) in list(self._vacant.items()):
            if now > deadline and schedule.exhausted:
                del self._vacant[name]
                self._fail(name, schedule.abandon(name), kind, f"{message}; no node took its place")

    def _wind_down(self, schedule: Scheduler) -> None:
        """Have what is under way ended, and note how."""
        for name in schedule.nodes:
            self._actors[name].actor.stop.remote()
        end = time.monotonic() + _STOP_SECS
        while self._calls and time.monotonic() < end:
            for ref in self._landed():
                self._take(schedule, ref)

    def _dismiss(self) -> None:
        """Let the actors clean up after themselves, then end them."""
        self._objects.clear()
        secs = _STOP_SECS / 2 if self._stop.requested else _CLOSE_SECS
        closing = [state.actor.close.remote() for state in self._actors.values() if state.started]
        with contextlib.suppress(ray.exceptions.RayError):
            ray.wait(closing, num_returns=len(closing), timeout=secs, fetch_local=False) if closing else None
        for state in self._actors.values():
            self._kill(state.actor)

    @staticmethod
    def _kill(actor: Any) -> None:
        with contextlib.suppress(Exception):  # it is dead already, or the cluster is
            ray.kill(actor)


def _short(error: BaseException) -> str:
    """The error's own words, without Ray's page about actors."""
    if isinstance(error, ray.exceptions.RayTaskError):
        error = error.cause
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
