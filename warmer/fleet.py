"""One Ray actor on each node, fed by the schedule. Knows nothing of chunks' format or of what a report looks like."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

import ray
import ray.exceptions

from hfbucket_plugin.errors import HFBucketError
from warmer.outcomes import INTERNAL, NODE_LOST, NODE_START, Failed
from warmer.tiers import Place

if TYPE_CHECKING:
    from collections.abc import Sequence

    from warmer.cluster import Node
    from warmer.outcomes import Outcome
    from warmer.plan import PlannedChunk
    from warmer.schedule import Batch, Schedule

_BATCHES_AT_ONCE: Final = 2
_TICK_SECS: Final = 0.25
"""How late an order to stop is noticed at most."""

_STOP_SECS: Final = 1.5
"""What is under way has this long to end: `ray job stop` kills 3 s after SIGTERM."""

_CLOSE_SECS: Final = 5.0


class Witness(Protocol):
    """Is told what happens."""

    def ended(self, node: str, outcome: Outcome) -> None:
        """A chunk has ended on a node."""

    def lost(self, node: str, kind: str, message: str) -> None:
        """A node takes no part any more; its other chunks end as `Failed` at once."""

    def tick(self) -> None:
        """Time has passed: called a few times a second."""


class Stop(Protocol):
    """Says whether the run is to stop."""

    @property
    def requested(self) -> bool:
        """Whether it is."""


class Worker(Protocol):
    """What works on a node: a `NodeWarmer`, or a `NodeChecker`."""

    def copy(self, chunks: Sequence[PlannedChunk]) -> list[Outcome]:
        """Do what there is to do with some chunks; nothing raises for a single one."""

    def stop(self) -> None:
        """End what is under way at once."""

    def close(self) -> None:
        """Leave nothing behind."""


class Config(Protocol):
    """What a node is told. It crosses to the nodes."""

    def open(self, place: Place) -> Worker:
        """Begin, on the node.

        Raises:
            HFBucketError: This node cannot take part.
        """


class _NodeActor:
    """What runs on a node: a worker, made in its own method so that its errors come back as they are."""

    def __init__(self) -> None:
        self._warmer: Worker | None = None

    def start(self, config: Config, place: Place) -> HFBucketError | None:
        try:
            self._warmer = config.open(place)
        except HFBucketError as error:
            return error
        return None

    def copy(self, chunks: Sequence[PlannedChunk]) -> list[Outcome]:
        if self._warmer is None:
            raise RuntimeError("this node was not started")
        return self._warmer.copy(chunks)

    def stop(self) -> None:
        if self._warmer is not None:
            self._warmer.stop()

    def close(self) -> None:
        if self._warmer is not None:
            self._warmer.close()


@dataclass(slots=True)
class _Crew:
    """One node's actor."""

    node: Node
    actor: Any
    deadline: float
    started: bool = False


class Fleet:
    """The actors of a run.

    Args:
        nodes: Where to run.
        config: What each is told.
        witness: Is told what happens.
        stop: Says whether to stop.
        start_secs: Most seconds that a node may take to take part.
    """

    def __init__(self, nodes: Sequence[Node], config: Config, witness: Witness, stop: Stop, start_secs: float) -> None:
        self._nodes = nodes
        self._config = config
        self._witness = witness
        self._stop = stop
        self._start_secs = start_secs
        self._crews: dict[str, _Crew] = {}
        # The window of the schedule bounds it, whatever the plan's length.
        self._flying: dict[Any, tuple[str, Batch | None]] = {}

    def run(self, schedule: Schedule) -> None:
        """Carry out a schedule, whose nodes are this fleet's ids; returns when it is done or told to stop."""
        try:
            self._launch()
            while not schedule.done and not self._stop.requested:
                self._feed(schedule)
                for ref in self._landed():
                    self._take(schedule, ref)
                self._give_up_late_starters(schedule)
                self._witness.tick()
            if self._stop.requested:
                self._wind_down(schedule)
        finally:
            self._dismiss()

    def _launch(self) -> None:
        actor_class: Any = ray.remote(_NodeActor)
        for node in self._nodes:
            # No CPU: nodes full of engines must take it too. Room for `stop` beside the batches.
            actor = actor_class.options(
                num_cpus=0, max_concurrency=_BATCHES_AT_ONCE + 1, label_selector={"ray.io/node-id": node.id}
            ).remote()
            self._crews[node.id] = _Crew(node, actor, time.monotonic() + self._start_secs)
            place = Place(node.name, node.id, node.labels)
            self._flying[actor.start.remote(self._config, place)] = (node.id, None)

    def _feed(self, schedule: Schedule) -> None:
        for name in schedule.nodes:
            crew = self._crews[name]
            while crew.started and (batch := schedule.next_batch(name)) is not None:
                self._flying[crew.actor.copy.remote(batch.chunks)] = (name, batch)

    def _landed(self) -> list[Any]:
        """What has ended; waits for a tick at most."""
        flying = list(self._flying)
        if not flying:
            return []
        landed, _ = ray.wait(flying, num_returns=1, timeout=_TICK_SECS, fetch_local=False)
        if landed:
            landed, _ = ray.wait(flying, num_returns=len(flying), timeout=0, fetch_local=False)
        return list(landed)

    def _take(self, schedule: Schedule, ref: Any) -> None:
        if ref not in self._flying:  # its node was lost a moment ago
            return
        name, batch = self._flying.pop(ref)
        try:
            result = ray.get(ref)
        except ray.exceptions.RayTaskError as error:
            self._broken(schedule, name, batch, error)
        except ray.exceptions.RayError as error:
            # Unavailable counts as lost too: its work is done again by the next run, never waited for without end.
            self._lose(schedule, name, NODE_LOST, f"lost in mid-run: {_short(error)}")
        else:
            if batch is None:
                self._started(schedule, name, result)
            else:
                schedule.finished(batch)
                for outcome in result:
                    self._witness.ended(name, outcome)

    def _started(self, schedule: Schedule, name: str, error: HFBucketError | None) -> None:
        if error is None:
            self._crews[name].started = True
        else:
            self._lose(schedule, name, error.kind, str(error))

    def _broken(self, schedule: Schedule, name: str, batch: Batch | None, error: Exception) -> None:
        """Something raised that nobody foresaw."""
        message = _short(error)
        if batch is None:
            self._lose(schedule, name, NODE_START, message)
            return
        schedule.finished(batch)
        for chunk in batch.chunks:
            self._witness.ended(name, Failed(chunk.key, chunk.size, INTERNAL, f"{chunk.key}: {message}"))

    def _give_up_late_starters(self, schedule: Schedule) -> None:
        now = time.monotonic()
        for name in schedule.nodes:
            crew = self._crews[name]
            if not crew.started and now > crew.deadline:
                self._lose(schedule, name, NODE_START, f"took no part within {self._start_secs:g} s; is it overloaded?")

    def _lose(self, schedule: Schedule, name: str, kind: str, message: str) -> None:
        self._flying = {ref: entry for ref, entry in self._flying.items() if entry[0] != name}
        self._kill(self._crews[name].actor)
        self._witness.lost(name, kind, message)
        for chunk in schedule.lost(name):
            self._witness.ended(name, Failed(chunk.key, chunk.size, kind, f"{chunk.key}: not copied: {message}"))

    def _wind_down(self, schedule: Schedule) -> None:
        """Have what is under way ended, and note how."""
        for name in schedule.nodes:
            self._crews[name].actor.stop.remote()
        end = time.monotonic() + _STOP_SECS
        while self._flying and time.monotonic() < end:
            for ref in self._landed():
                self._take(schedule, ref)

    def _dismiss(self) -> None:
        """Let the actors clean up after themselves, then end them."""
        secs = _STOP_SECS / 2 if self._stop.requested else _CLOSE_SECS
        closing = [crew.actor.close.remote() for crew in self._crews.values() if crew.started]
        with contextlib.suppress(ray.exceptions.RayError):
            ray.wait(closing, num_returns=len(closing), timeout=secs, fetch_local=False) if closing else None
        for crew in self._crews.values():
            self._kill(crew.actor)

    @staticmethod
    def _kill(actor: Any) -> None:
        with contextlib.suppress(Exception):  # it is dead already, or the cluster is
            ray.kill(actor)


def _short(error: BaseException) -> str:
    """The error's own words, without Ray's page about actors."""
    if isinstance(error, ray.exceptions.RayTaskError):
        error = error.cause
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
