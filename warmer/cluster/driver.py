"""One Ray actor on each node, fed by the schedule. Knows nothing of chunks' format or of what a report looks like."""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

import ray
import ray.exceptions

from hfbucket_plugin.errors import HFBucketError
from warmer.cluster.actor import NodeActor
from warmer.cluster.actor_pool import TICK_SECS, Failure, NodeActors
from warmer.cluster.ray import alive_nodes
from warmer.node.worker import CHUNK_TIMEOUT_SECS
from warmer.report.outcomes import INTERNAL, NODE_LOST, NODE_START, Failed
from warmer.schedule.tasks import FetchTask, total_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from hfbucket_plugin.tools.signals import Stop
    from warmer.cluster.actor import Config
    from warmer.cluster.actor_pool import Call
    from warmer.cluster.ray import Node
    from warmer.report.outcomes import Outcome
    from warmer.schedule.scheduler import Ended, Scheduler
    from warmer.schedule.tasks import Task

_log = logging.getLogger(__name__)

_IDLE_SECS: Final = 0.05
_JOIN_SECS: Final = 1.0
"""How often nodes that joined are looked for."""

_STOP_SECS: Final = 1.5
"""What is in progress has this long to end: `ray job stop` kills 3 s after SIGTERM."""

_CLOSE_SECS: Final = 5.0

_NAMED_AT_ONCE: Final = 1000
"""How many chunks of lost nodes are named before the driver looks at what else there is to do."""

_HUNG_SECS: Final = 60.0
_HUNG_TIMEOUTS: Final = 2.0
_HUNG_BYTES_PER_SEC: Final = 1024 * 1024
"""A node answers nothing when an order takes longer than a minute, twice what a chunk and its batch may take, and the time
to write or hash its bytes at 1 MiB a second: a node that is merely slow ends its orders before, with failures if need be."""

TASKS_AT_ONCE: Final = 6
"""Orders that an actor carries out at one time: four to fetch and two to receive, as `TaskLimits` has it."""


class RunListener(Protocol):
    """Receives the events of a run."""

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
        fits: Whether a node may take the place of a lost one, given by its id.
        store_bytes: The bytes that chunks may take in a node's object store.
    """

    candidates: Callable[[], Sequence[Node]]
    fits: Callable[[str, Node], bool]
    store_bytes: Callable[[Node], int]


class Driver:
    """The actors of a run.

    Args:
        nodes: Where to run.
        config: The configuration of each node.
        listener: Receives the events.
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
        listener: RunListener,
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
        self._listener = listener
        self._stop = stop
        self._start_secs = start_secs
        self._chunk_secs = chunk_secs
        self._replacing = replacing
        # Room for `stop` beside the tasks.
        self._actors = NodeActors(NodeActor, TASKS_AT_ONCE + 1)
        self._objects: dict[int, Any] = {}
        self._vacant: dict[str, tuple[str, str, float]] = {}
        self._failing: deque[Iterator[tuple[str, Failed]]] = deque()
        self._next_look = 0.0

    def run(self, schedule: Scheduler) -> None:
        """Carry out a schedule, whose nodes are this fleet's ids; returns when it is done or stopped.

        Raises:
            RefusedError: The plan was changed meanwhile. What was in progress has been ended and noted.
            PlanLostError: The plan cannot be read any more; the same.
        """
        try:
            for node in self._nodes:
                self._launch(node)
            while not self._stop.requested and not self._over(schedule):
                self._give(schedule)
                self._take_answers(schedule)
                self._lose_slow_starters(schedule)
                self._lose_hung_nodes(schedule)
                self._fill_vacancies(schedule)
                self._name_failed()
                self._listener.tick()
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

    def _launch(self, node: Node) -> None:
        self._actors.launch(node, self._config, self._start_secs)

    def _give(self, schedule: Scheduler) -> None:
        tasks = schedule.tasks(time.monotonic())
        if self._stop.requested:  # the order came while chunks were looked up
            return
        for task in tasks:
            actor = self._actors.by_node[task.node].handle
            if isinstance(task, FetchTask):
                ref = actor.fetch.remote(task.chunks, share=task.share)
            else:
                # In a list: Ray would else fetch it before the actor can say that it holds the chunks already.
                ref = actor.receive.remote(task.chunks, [self._objects[task.source]])
            self._actors.expect(ref, task.node, task, self._patience(task))
        self._release(schedule)

    def _patience(self, task: Task) -> float:
        """How many seconds an order may take. Its chunks have one deadline on the node, and none wait for others there."""
        return _HUNG_SECS + _HUNG_TIMEOUTS * self._chunk_secs + total_bytes(task.chunks) / _HUNG_BYTES_PER_SEC

    def _release(self, schedule: Scheduler) -> None:
        """Forget objects, which has their owners throw them away everywhere."""
        for number in schedule.released():
            self._objects.pop(number, None)

    def _take_answers(self, schedule: Scheduler) -> None:
        """Take what has ended; waits for a tick at most."""
        if not self._actors:
            if not self._failing:
                time.sleep(_IDLE_SECS)  # for bandwidth, or for a node to join
            return
        for call, result in self._actors.answers(0 if self._failing else TICK_SECS):
            if isinstance(result, Failure):
                self._failed(schedule, call, result)
            elif call.work is None:
                self._started(schedule, call.node, *result)
            else:
                self._ended(schedule, call.work, result)

    def _failed(self, schedule: Scheduler, call: Call, failure: Failure) -> None:
        """A process is gone, or cannot be reached; or something raised that nobody foresaw."""
        name, task = call.node, call.work
        if failure.kind == INTERNAL and task is not None:
            failed = [
                Failed(chunk.key, chunk.size, INTERNAL, f"{chunk.key}: {failure.message}") for chunk in task.chunks
            ]
            self._ended(schedule, task, (failed, None) if isinstance(task, FetchTask) else (failed, False))
        elif failure.died and self._actors.may_restart(name):
            node = self._actors.by_node[name].node
            self._actors.give_up(name)
            for _ in schedule.lost(name, keep_place=True):
                pass  # nothing: the place is kept
            self._release(schedule)
            schedule.resume(name, self._store_bytes(node))
            self._launch(node)
        else:
            self._lose(schedule, name, NODE_START if failure.kind == INTERNAL else failure.kind, failure.message)

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
            self._listener.ended(node, outcome)

    def _started(self, schedule: Scheduler, name: str, error: HFBucketError | None, open_secs: float) -> None:
        if error is None:
            actor = self._actors.by_node[name]
            actor.started = True
            schedule.started(name)
            self._listener.started(name, time.monotonic() - actor.launched - open_secs, open_secs)
        else:
            self._lose(schedule, name, error.kind, str(error))

    def _lose_slow_starters(self, schedule: Scheduler) -> None:
        for name in self._actors.dead_nodes():
            self._lose(schedule, name, NODE_LOST, "lost in mid-run: the node died")
        now = time.monotonic()
        for name in schedule.nodes:
            actor = self._actors.by_node[name]
            if not actor.started and now > actor.deadline:
                self._lose(schedule, name, NODE_START, f"took no part within {self._start_secs:g} s; is it overloaded?")

    def _lose_hung_nodes(self, schedule: Scheduler) -> None:
        for call in self._actors.overdue():
            if call.work is not None and call.node in schedule.nodes:
                self._lose(schedule, call.node, NODE_LOST, f"answered nothing for {self._patience(call.work):.0f} s")

    def _lose(self, schedule: Scheduler, name: str, kind: str, message: str) -> None:
        self._actors.give_up(name)
        self._listener.lost(name, kind, message)
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
        for node in [node for node in self._replacing.candidates() if node.id not in self._actors.by_node]:
            name = next((name for name in self._vacant if self._replacing.fits(name, node)), None)
            if name is None:
                continue
            del self._vacant[name]
            schedule.replace(name, node.id, self._replacing.store_bytes(node))
            self._listener.replaced(name, node)
            self._launch(node)
        for name, (kind, message, deadline) in list(self._vacant.items()):
            if now > deadline and schedule.exhausted:
                del self._vacant[name]
                self._fail(name, schedule.abandon(name), kind, f"{message}; no node took its place")

    def _wind_down(self, schedule: Scheduler) -> None:
        """Have what is in progress ended, and note how."""
        for name in schedule.nodes:
            self._actors.by_node[name].handle.stop.remote()
        end = time.monotonic() + _STOP_SECS
        while self._actors and time.monotonic() < end:
            self._take_answers(schedule)

    def _dismiss(self) -> None:
        """Let the actors clean up after themselves, then end them."""
        self._objects.clear()
        secs = _STOP_SECS / 2 if self._stop.requested else _CLOSE_SECS
        started = [actor.handle for actor in self._actors.by_node.values() if actor.live and actor.started]
        closing = [handle.close.remote() for handle in started]
        with contextlib.suppress(ray.exceptions.RayError):
            ray.wait(closing, num_returns=len(closing), timeout=secs, fetch_local=False) if closing else None
        self._actors.close()
