"""Driver of a run: one Ray actor on each node, which executes the tasks of the schedule. Independent of formats and reports."""

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
"""Seconds between two checks for nodes that joined."""

_STOP_SECS: Final = 1.5
"""Seconds that work in progress has to end after a stop: `ray job stop` kills 3 s after SIGTERM."""

_CLOSE_SECS: Final = 5.0

_NAMED_AT_ONCE: Final = 1000
"""Chunks of lost nodes reported at a time, so that the driver is not blocked by millions of them."""

_HUNG_SECS: Final = 60.0
_HUNG_TIMEOUTS: Final = 2.0
_HUNG_BYTES_PER_SEC: Final = 1024 * 1024
"""Rate below which a node counts as hung: after a minute, plus twice the time of a chunk and its batch, plus the time to write
or hash the task's bytes at 1 MiB/s. A node that is merely slow ends its tasks earlier, if need be with failures."""

TASKS_AT_ONCE: Final = 6
"""Tasks that an actor executes at a time: four fetches and two receives, the limits of `TaskLimits`."""


class RunListener(Protocol):
    """Listener for the events of a run."""

    def ended(self, node: str, outcome: Outcome) -> None:
        """Handle the end of a chunk on a node."""

    def started(self, node: str, start_secs: float, open_secs: float) -> None:
        """Handle the start of a node: the seconds until its process ran, and then until its tier and bucket were open."""

    def lost(self, node: str, kind: str, message: str) -> None:
        """Handle the loss of a node; its remaining chunks end as `Failed`, unless another node replaces it."""

    def replaced(self, node: str, by: Node) -> None:
        """Handle the replacement of a lost node by one that joined, which gets all chunks of the lost node."""

    def tick(self) -> None:
        """Handle the passage of time: called a few times a second."""


@dataclass(frozen=True, slots=True)
class Replacing:
    """Policy for replacing lost nodes.

    Attributes:
        candidates: Returns the nodes that are alive and may take part.
        fits: Whether a node may replace the lost node with a given id.
        store_bytes: Returns the bytes that chunks may take in a node's object store.
    """

    candidates: Callable[[], Sequence[Node]]
    fits: Callable[[str, Node], bool]
    store_bytes: Callable[[Node], int]


class Driver:
    """Executes the tasks of a schedule with one actor on each node.

    Args:
        nodes: Nodes of the run.
        config: Configuration of each node.
        listener: Listener for the events.
        stop: Whether to stop.
        start_secs: Maximum seconds until a node takes part, and for which a lost node's place is kept while there is nothing
            else to do.
        chunk_secs: Maximum seconds that a node may take for a chunk, with its batch and retries.
        replacing: Policy for replacing lost nodes; None to replace none.
        store_bytes: Returns the bytes that chunks may take in a node's object store; None to use that of `replacing`.
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
        # One more than the tasks, so that `stop` can run beside them.
        self._actors = NodeActors(NodeActor, TASKS_AT_ONCE + 1)
        self._objects: dict[int, Any] = {}
        self._vacant: dict[str, tuple[str, str, float]] = {}
        self._failing: deque[Iterator[tuple[str, Failed]]] = deque()
        self._next_look = 0.0

    def run(self, schedule: Scheduler) -> None:
        """Execute a schedule whose nodes are the ids of this driver's nodes; return when it is done or stopped.

        Raises:
            RefusedError: The plan was changed in the meantime. Work in progress was ended and recorded.
            PlanLostError: The plan can no longer be read. Work in progress was ended and recorded.
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
        except HFBucketError:  # the rest of the plan cannot be read
            self._wind_down(schedule)
            raise
        finally:
            self._dismiss()

    def _over(self, schedule: Scheduler) -> bool:
        """Return whether all work is done by nodes that are still alive: a node may have died after its last task."""
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
        if self._stop.requested:  # a stop was requested while chunks were looked up
            return
        for task in tasks:
            actor = self._actors.by_node[task.node].handle
            if isinstance(task, FetchTask):
                ref = actor.fetch.remote(task.chunks, share=task.share)
            else:
                # In a list, so that Ray does not transfer it before the actor checks whether it already has the chunks.
                ref = actor.receive.remote(task.chunks, [self._objects[task.source]])
            self._actors.expect(ref, task.node, task, self._patience(task))
        self._release(schedule)

    def _patience(self, task: Task) -> float:
        """Return the maximum seconds of a task: its chunks share one deadline on the node, and do not queue there."""
        return _HUNG_SECS + _HUNG_TIMEOUTS * self._chunk_secs + total_bytes(task.chunks) / _HUNG_BYTES_PER_SEC

    def _release(self, schedule: Scheduler) -> None:
        """Drop references to objects that no node needs, so that their owners free them everywhere."""
        for number in schedule.released():
            self._objects.pop(number, None)

    def _take_answers(self, schedule: Scheduler) -> None:
        """Process the calls that have ended; wait for one tick at most."""
        if not self._actors:
            if not self._failing:
                time.sleep(_IDLE_SECS)  # until bandwidth is available, or a node joins
            return
        for call, result in self._actors.answers(0 if self._failing else TICK_SECS):
            if isinstance(result, Failure):
                self._failed(schedule, call, result)
            elif call.work is None:
                self._started(schedule, call.node, *result)
            else:
                self._ended(schedule, call.work, result)

    def _failed(self, schedule: Scheduler, call: Call, failure: Failure) -> None:
        """Handle a failed call: the process is dead or unreachable, or an unexpected error was raised."""
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
        """Queue the chunks that a node will not get, to be reported in small groups: there may be millions."""
        self._failing.append(
            (name, Failed(chunk.key, chunk.size, kind, f"{chunk.key}: not copied: {message}")) for chunk in rest
        )

    def _name_failed(self) -> None:
        """Report a group of the queued chunks as failed."""
        if self._failing:
            some = list(itertools.islice(self._failing[0], _NAMED_AT_ONCE))
            self._note(some)
            if len(some) < _NAMED_AT_ONCE:
                self._failing.popleft()

    def _fill_vacancies(self, schedule: Scheduler) -> None:
        """Let nodes that joined replace lost ones; give up places that no node takes in time."""
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
        """Stop the work in progress, and record its outcomes."""
        for name in schedule.nodes:
            self._actors.by_node[name].handle.stop.remote()
        end = time.monotonic() + _STOP_SECS
        while self._actors and time.monotonic() < end:
            self._take_answers(schedule)

    def _dismiss(self) -> None:
        """Let the actors close their workers, then kill the actors."""
        self._objects.clear()
        secs = _STOP_SECS / 2 if self._stop.requested else _CLOSE_SECS
        started = [actor.handle for actor in self._actors.by_node.values() if actor.live and actor.started]
        closing = [handle.close.remote() for handle in started]
        with contextlib.suppress(ray.exceptions.RayError):
            ray.wait(closing, num_returns=len(closing), timeout=secs, fetch_local=False) if closing else None
        self._actors.close()
