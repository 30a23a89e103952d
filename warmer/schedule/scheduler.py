"""Scheduling of a run: which node fetches which chunks, and which nodes receive them from the object store and when.

Pure: events and the time go in, tasks come out; nothing here depends on Ray. The plan is split into *parts*, each for one
set of nodes, and each part is processed in *batches*: one node fetches a batch from the Hub, and the other nodes that need
it receive it from the object store. A node that cannot keep up is left out of later batches and fetches the missed chunks
by itself. Each chunk ends exactly once for each node: in the result of an event, or in that of `lost` or `abandon`.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeGuard

from warmer.report.outcomes import INTERRUPTED, MISSING, TIER_KINDS, UNMOVED_KINDS, Copied, Failed, Present
from warmer.schedule import stragglers
from warmer.schedule.batch import Batch, InFlight, InFlightTable, StoreBudget
from warmer.schedule.cohort import Backlog, Cohort, Membership, NodeState
from warmer.schedule.rate import Caps, MovingAverage, TokenBucket
from warmer.schedule.stragglers import StragglerView, Waited
from warmer.schedule.tasks import Counts, FetchTask, ReceiveTask, TaskLimits, total_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from hfbucket_plugin.tools.selection import ChunkRef
    from warmer.report.outcomes import Outcome
    from warmer.schedule.cohort import PlanSection
    from warmer.schedule.tasks import Task

    Ended = tuple[str, Outcome]

_TRIES: Final = 2
"""Number of nodes that try to fetch a chunk before it fails for all nodes."""

_HEED: Final = 0.5
"""Weight of the latest fetch in the average number of tries a chunk, which estimates the requests of the next fetches."""

_OWN_KINDS: Final = TIER_KINDS | {INTERRUPTED}
"""Failures that concern one node and say nothing about the others."""


_SCAN: Final = 16
"""Number of nodes considered for a task: the best of a sample is nearly as good as the best of all."""

_LOOK_SECS: Final = 0.25
"""Seconds between two checks for slow nodes."""

PARTS: Final = 4
"""Minimum number of batches that a store must hold, so that one is fetched while others are received."""

_MIN_BATCHES: Final = 16
"""Batches that each cohort may have in progress, however many parts the plan has."""

_TYPICAL_SECS_PER_BYTE: Final = 1e-8


@dataclass(frozen=True, slots=True)
class _Vacancy:
    """Work that a lost node leaves behind.

    Attributes:
        state: State of the node when it was lost.
        named: Chunks of the node's tasks, and of the batches in which the node was pending.
        starts: For each part, the index of the first chunk that the node's cohort had not reached; None if the node was in
            no cohort.
    """

    state: NodeState
    named: list[tuple[ChunkRef, ...]]
    starts: dict[PlanSection, int | None]

    def rest(self) -> Iterator[ChunkRef]:
        """Yield all chunks that did not end on the node."""
        for chunks in self.named:
            yield from chunks
        yield from self.state.backlog.rest()
        for part, start in self.starts.items():
            if start is not None:
                yield from part.left(start)


class Scheduler:
    """State of a run.

    Args:
        nodes: Bytes that batches may take in the object store of each node, by node name.
        parts: The plan: which nodes need which chunks. No chunk is in two parts.
        window: Limits on the work in progress; the defaults of `TaskLimits` if None.
        caps: Bandwidth limits, in bytes a second.
        direct: Whether every node fetches all its chunks from the Hub by itself.
        now: Current time, in seconds of a monotonic clock.

    Attributes:
        counts: Counters of the work done.
    """

    def __init__(
        self,
        nodes: Mapping[str, int],
        parts: Sequence[PlanSection],
        window: TaskLimits | None = None,
        *,
        caps: Caps = Caps(),  # noqa: B008 - frozen
        direct: bool = False,
        now: float = 0.0,
    ) -> None:
        self.counts = Counts()
        self._window = window = window or TaskLimits()
        self._caps = caps
        self._max_batches = max(min(window.batches, _MIN_BATCHES), window.batches // max(1, len(parts)))
        self._direct = direct
        self._now = self._looked = now
        self._most_bytes = int(
            max(1, min(window.batch_bytes, *filter(None, (window.bytes, window.run_bytes, caps.run, caps.node))))
        )
        self._bucket = TokenBucket(caps.run, now)
        self._asking = 1.0  # recent average of bytes requested per byte of a chunk, retries included
        self._budget = StoreBudget(nodes)
        self._pace, self._receive_pace = MovingAverage(), MovingAverage()
        self._numbers = itertools.count(1)
        self._batches: dict[int, Batch] = {}
        self._ready: deque[Batch] = deque()
        self._tasks = InFlightTable()
        self._well_since = -math.inf  # start of the latest fetch that ended in time
        self._last_in_time = True  # whether the most recently ended fetch ended in time
        self._released: list[int] = []
        # Each part starts with most nodes in its first cohort; nodes that cannot keep up continue together in the second.
        self._leading = [Cohort(part, Cohort(part)) for part in parts]
        self._cohorts = [cohort for first in self._leading for cohort in (first, first.behind) if cohort is not None]
        self._states: dict[str, NodeState] = {}
        self._with_backlog: dict[str, NodeState] = {}  # nodes with chunks to fetch by themselves
        self._vacant: dict[str, _Vacancy] = {}
        for name in nodes:
            self._add_node(name, name)

    @property
    def nodes(self) -> list[str]:
        """Names of the nodes that are not lost."""
        return list(self._states)

    @property
    def done(self) -> bool:
        """Whether no work is in progress or left to assign, and no place of a lost node is kept."""
        return not self._vacant and self.exhausted

    @property
    def exhausted(self) -> bool:
        """Whether no work is in progress or left to assign to the present nodes."""
        if self._tasks or self._batches:
            return False
        if any(state.backlog for state in self._with_backlog.values()):
            return False
        return all(not self._members(cohort) or cohort.peek() is None for cohort in self._cohorts)

    @property
    def in_progress(self) -> dict[str, tuple[int, int]]:
        """Number of chunks and bytes in progress, by node; idle nodes are omitted."""
        found: dict[str, tuple[int, int]] = {}
        for running in self._tasks:
            chunks, size = found.get(running.task.node, (0, 0))
            found[running.task.node] = (chunks + len(running.task.chunks), size + running.size)
        return found

    @property
    def store_bytes(self) -> dict[str, int]:
        """Bytes reserved in the object store of each node."""
        return dict(self._budget.used)

    def released(self) -> list[int]:
        """Return the numbers of fetches whose chunks no node waits for any more; each number is returned once."""
        released, self._released = self._released, []
        return released

    def started(self, node: str) -> None:
        """Allow a node to get tasks from now on.

        Raises:
            KeyError: The node is unknown or lost.
        """
        self._states[node].started = True

    def tasks(self, now: float) -> list[Task]:
        """Return the tasks that nodes must start now, and count each as in flight.

        Args:
            now: Current time, in seconds.
        """
        self._now = max(self._now, now)
        self._decide()
        return self._tasks.take_new()

    def fetched(self, number: int, outcomes: Sequence[Outcome], *, shared: bool, now: float) -> list[Ended]:
        """Record the end of a fetch.

        Args:
            number: Number of the fetch task.
            outcomes: Outcome of each chunk, in the order of the task.
            shared: Whether the copied chunks are in the object store.
            now: Current time, in seconds.

        Returns:
            The chunks that ended by this event, each as a node name and an outcome.

        Raises:
            KeyError: The task is not in progress, or its node is lost.
        """
        running = self._finish(number, now)
        task, batch = running.task, running.batch
        self._pay(running, outcomes)
        copied = [outcome.size for outcome in outcomes if _has_moved(outcome)]
        size = sum(copied)
        self.counts.fetched += len(copied)
        self.counts.fetched_bytes += size
        if size:
            self._last_in_time = not self._is_slow_fetch(running)
            if self._last_in_time:
                self._well_since = max(self._well_since, running.since)
            self._states[task.node].pace.add(size, now - running.since)
            self._pace.add(size, now - running.since)
        if running.hold:
            self._budget.give_back(task.node, running.hold)
        if batch is None:
            if shared:
                self._released.append(number)
            return self._end_own_fetch(running, outcomes)
        return self._sort(batch, task, outcomes, shared=shared)

    def _end_own_fetch(self, running: InFlight, outcomes: Sequence[Outcome]) -> list[Ended]:
        """End a fetch that serves only its own node. If the node fetched alone only because it was slow, others retry once."""
        node, batch = running.task.node, running.was_of
        if batch is None:
            return [(node, outcome) for outcome in outcomes]
        ended: list[Ended] = []
        failed: list[ChunkRef] = []
        for chunk, outcome in zip(running.task.chunks, outcomes, strict=True):
            if isinstance(outcome, Failed) and outcome.kind not in _OWN_KINDS and outcome.kind != MISSING:
                failed.append(chunk)
            else:
                ended.append((node, outcome))
        state = self._states[node]
        lives = (
            batch.number in self._batches and self._in(state, batch.cohort) and self._budget.fits([node], batch.size)
        )
        if failed and lives and batch.chunks == tuple(failed):
            batch.pending[node] = None
            batch.avoid |= {node}
            self._budget.reserve_too(batch, node)
            self._settle(batch)
            if batch.stored:
                self._offer(batch)
        elif failed:
            self._backlog_of(state).add(tuple(failed))
        return ended

    def _pay(self, running: InFlight, outcomes: Sequence[Outcome]) -> None:
        """Charge the bandwidth caps with the bytes that a fetch requested from the Hub, retries included.

        Chunks that were requested several times put the caps into debt; bytes that used no network are given back.
        """
        size = total_bytes(running.task.chunks)
        asked = sum(_asked(outcome) for outcome in outcomes)
        self._bucket.give_back(running.spent - asked)
        self._states[running.task.node].bucket.give_back(size - asked)
        if size:
            # Estimate the same number of tries for the next fetches; otherwise many would start at once while chunks fail.
            self._asking += _HEED * (max(1.0, asked / size) - self._asking)

    def _give_back(self, task: Task, outcomes: Sequence[Outcome | None], *, lost: bool) -> None:
        """Give back the bytes that a node's cap was charged for chunks that did not move, for example because present."""
        moved = sum(
            0 if outcome is None and lost else chunk.size if outcome is None else _asked(outcome)
            for chunk, outcome in zip(task.chunks, outcomes, strict=True)
        )
        self._states[task.node].bucket.give_back(total_bytes(task.chunks) - moved)

    def _sort(self, batch: Batch, task: Task, outcomes: Sequence[Outcome], *, shared: bool) -> list[Ended]:
        """Sort the chunks of a fetched batch: stored, to be fetched by another node, or failed for all nodes."""
        node, others = task.node, tuple(batch.pending)
        ended: list[Ended] = []
        stored, again, retry = [], [], []
        for chunk, outcome in zip(task.chunks, outcomes, strict=True):
            if isinstance(outcome, Failed) and outcome.kind not in _OWN_KINDS:
                if outcome.kind != MISSING and others and batch.attempts + 1 < _TRIES:
                    retry.append(chunk)
                    continue
                ended += [(other, outcome) for other in others]
            elif isinstance(outcome, Copied) and shared:
                stored.append(chunk)
            else:
                again.append(chunk)
            ended.append((node, outcome))
        if others:
            self._split(batch, again, others)
            self._split(batch, retry, (*others, node), failed_on=node)
        if not stored:
            batch.pending.clear()
            batch.source = 0
            if shared:
                self._released.append(task.number)
        batch.chunks, batch.stored = tuple(stored), True
        self._budget.shrink(batch, total_bytes(batch.chunks))
        self._settle(batch)
        if batch.number in self._batches:
            self._offer(batch)
        self._unblock()
        return ended

    def _split(
        self, batch: Batch, chunks: Sequence[ChunkRef], nodes: tuple[str, ...], *, failed_on: str | None = None
    ) -> None:
        """Move some chunks of a batch into a new batch."""
        if not chunks:
            return
        child = Batch(next(self._numbers), tuple(chunks), nodes, batch.cohort)
        child.cohort.batches += 1
        child.avoid, child.attempts, child.handed_over = batch.avoid, batch.attempts, batch.handed_over
        if failed_on is not None:
            child.avoid, child.attempts = frozenset({failed_on}), batch.attempts + 1
            self.counts.refetched += len(chunks)
        self._budget.hand_on(batch, child, nodes)
        batch.size -= child.size
        self._batches[child.number] = child
        self._ready.append(child)

    def received(
        self, number: int, outcomes: Sequence[Outcome | None], *, now: float, holder_lost: bool = False
    ) -> list[Ended]:
        """Record the end of a receive.

        Args:
            number: Number of the receive task.
            outcomes: Outcome of each chunk, in the order of the task; None for a chunk that did not arrive or is corrupt.
            now: Current time, in seconds.
            holder_lost: Whether chunks did not arrive because the node that stored them is lost.

        Returns:
            The chunks that ended by this event, each as a node name and an outcome.

        Raises:
            KeyError: The task is not in progress, or its node is lost.
        """
        running = self._finish(number, now)
        task, state = running.task, self._states[running.task.node]
        self._give_back(task, outcomes, lost=holder_lost)
        batch = running.batch if running.batch is not None and running.batch.number in self._batches else None
        missed = tuple(chunk for chunk, outcome in zip(task.chunks, outcomes, strict=True) if outcome is None)
        size = sum(chunk.size for chunk, outcome in zip(task.chunks, outcomes, strict=True) if _has_moved(outcome))
        if size:
            state.receive_pace.add(size, now - running.since)
            self._receive_pace.add(size, now - running.since)
        if batch is not None:
            batch.done += not missed and size > 0  # a node that had all chunks in another tier serves no copy to others
        if missed:
            self._undelivered(state, batch, task, missed, holder_lost=holder_lost)
        if batch is not None:
            self._settle(batch)
            if batch.stored and batch.number in self._batches:
                self._offer(batch)
        self._ask(state)
        return [(state.name, outcome) for outcome in outcomes if outcome is not None]

    def _undelivered(
        self, state: NodeState, batch: Batch | None, task: Task, missed: tuple[ChunkRef, ...], *, holder_lost: bool
    ) -> None:
        source = task.source if isinstance(task, ReceiveTask) else 0
        whole = batch is not None and batch.chunks is task.chunks and len(missed) == len(task.chunks)
        if (
            batch is None
            or not whole
            or not self._in(state, batch.cohort)
            or (batch.source == source and not holder_lost)
        ):
            self._backlog_of(state).add(missed)
            return
        # Other nodes lack the batch too, so fetch it again once for all of them.
        batch.pending[state.name] = None
        if batch.source == source:
            self._fetch_again(batch)

    def _fetch_again(self, batch: Batch) -> None:
        """Fetch a batch again whose stored chunks are lost, and end receives of it that were not handed out yet."""
        source = batch.source
        self._released.append(source)
        batch.ready_again()
        for task in self._tasks.new_receivers(source):
            self.received(task.number, [None] * len(task.chunks), now=self._now, holder_lost=True)
        if batch.pending:
            self.counts.refetched += len(batch.chunks)

    def lost(self, node: str, *, keep_place: bool = False) -> Iterator[ChunkRef]:
        """Remove a lost node.

        Args:
            node: Name of the node.
            keep_place: Whether the node may return or be replaced; its chunks are then kept for `replace`, `resume` or
                `abandon`.

        Returns:
            The chunks that did not end on the node; none if its place is kept.

        Raises:
            KeyError: The node is unknown or already lost.
        """
        state = self._states.pop(node)
        self._with_backlog.pop(node, None)
        self._changed()
        named = [running.task.chunks for running in self._tasks.pop_all(node)]
        for batch in list(self._batches.values()):
            if node in batch.pending:
                named.append(batch.chunks)
                del batch.pending[node]
            self._budget.free(batch, node)
            if batch.holder == node:
                if batch.stored:
                    self._fetch_again(batch)
                else:
                    self.counts.refetched += len(batch.chunks) if batch.pending else 0
                    batch.ready_again()
            self._settle(batch)
        self._budget.drop(node)
        vacancy = _Vacancy(state, named, {part: membership.start for part, membership in state.memberships.items()})
        if keep_place:
            self._vacant[node] = vacancy
            return iter(())
        return vacancy.rest()

    def abandon(self, node: str) -> Iterator[ChunkRef]:
        """Give up the kept place of a lost node.

        Returns:
            The chunks that did not end on the node.

        Raises:
            KeyError: No place is kept for the node.
        """
        return self._vacant.pop(node).rest()

    def replace(self, lost: str, node: str, store_bytes: int) -> None:
        """Replace a lost node with a new node, which gets all chunks of the lost node.

        Args:
            lost: Name of the lost node.
            node: Name of the new node.
            store_bytes: Bytes that batches may take in the object store of the new node.

        Raises:
            KeyError: No place is kept for the lost node.
        """
        role = self._vacant.pop(lost).state.role
        self._budget.admit(node, store_bytes)
        state = self._add_node(node, role)
        for membership in state.memberships.values():
            if membership.cohort is not None:
                self._backlog_of(state).add_range(membership.part, 0, membership.cohort.position)

    def resume(self, node: str, store_bytes: int) -> None:
        """Let a lost node continue with the chunks that did not end on it.

        Args:
            node: Name of the node.
            store_bytes: Bytes that batches may take in the object store of the node.

        Raises:
            KeyError: No place is kept for the node.
        """
        vacancy = self._vacant.pop(node)
        before = vacancy.state
        self._budget.admit(node, store_bytes)
        state = self._states[node] = NodeState(node, before.role, self._caps.node, self._now)
        state.bucket, state.backlog = before.bucket, before.backlog
        for chunks in vacancy.named:
            state.backlog.add(chunks)
        for cohort in self._leading:
            if (old := before.memberships.get(cohort.part)) is None:
                continue
            membership = state.memberships[cohort.part] = Membership(state, old.cohort or cohort, self._now)
            start = vacancy.starts[cohort.part]
            if old.cohort is None or start is None:
                membership.cohort = None
            else:  # the node fetches by itself what its cohort passed in the meantime
                membership.entry = max(start, old.cohort.position)
                state.backlog.add_range(cohort.part, start, membership.entry)
        self._backlog_of(state)
        self._changed()

    def _finish(self, number: int, now: float) -> InFlight:
        self._now = max(self._now, now)
        return self._tasks.pop(number)

    # Choice of the next tasks.

    def _add_node(self, name: str, role: str) -> NodeState:
        state = self._states[name] = NodeState(name, role, self._caps.node, self._now)
        for cohort in self._leading:
            if cohort.part.is_for(role):
                membership = state.memberships[cohort.part] = Membership(state, cohort, self._now)
                if self._direct:
                    self._detach(membership, 0)
        self._changed()
        return state

    def _changed(self) -> None:
        """Reset cached decisions of all cohorts because a node joined or left."""
        for cohort in self._cohorts:
            cohort.full = False
            cohort.changed()

    def _unblock(self) -> None:
        for cohort in self._cohorts:
            cohort.full = False

    def _decide(self) -> None:
        """Create all tasks that can start now."""
        if self._now >= self._looked + _LOOK_SECS or not self._tasks:
            since, self._looked = self._looked, self._now
            self._look(since)
        for _ in range(min(len(self._ready), _SCAN)):
            batch = self._ready.popleft()
            ready = batch.number in self._batches and batch.holder is None and batch.pending
            if ready and not self._assign(batch):
                self._ready.append(batch)
        # Cohorts that are least far come first, so that a node in several of them works on these first.
        for cohort in sorted(self._cohorts, key=lambda cohort: cohort.position):
            self._move_on(cohort)
        for state in list(self._with_backlog.values()):
            self._fetch_backlog(state)
            if not state.backlog:
                del self._with_backlog[state.name]

    # From the plan into batches, and from the Hub to one node.

    def _lacking(self, cohort: Cohort) -> list[str]:
        """Return the members of a cohort that need the cohort's next chunk from it."""
        return [membership.state.name for membership in self._members(cohort) if membership.entry <= cohort.position]

    def _members(self, cohort: Cohort) -> list[Membership]:
        return cohort.members(self._states.values())

    def _move_on(self, cohort: Cohort) -> None:
        """Create and assign batches of a cohort as far as the limits allow."""
        while not cohort.full and self._members(cohort) and (chunk := cohort.peek()) is not None:
            if not self._may_fetch(chunk.size):
                return
            needers = self._lacking(cohort)
            if not needers:
                cohort.advance()
                continue
            shared = len(needers) > 1
            if shared and not self._budget.can_ever(needers, chunk.size):
                self._fetch_separately(cohort)
                continue
            if cohort.batches >= self._max_batches or (shared and not self._budget.fits(needers, chunk.size)):
                cohort.block(self._now)
                return
            turn = cohort.turn % len(needers)
            cohort.turn += 1
            rotated = needers[turn:] + needers[:turn]
            if not any(self._may_give(self._states[name], chunk.size, fetch=True) for name in rotated[:_SCAN]):
                return
            self._begin_batch(cohort, rotated, self._cut(cohort, needers), shared=shared)

    def _fetch_separately(self, cohort: Cohort) -> None:
        """Skip the next chunk, which fits into no store: each node fetches it by itself, and the cohort continues after it."""
        start = cohort.position
        for membership in [membership for membership in self._members(cohort) if membership.entry <= start]:
            backlog = self._backlog_of(membership.state)
            if backlog.full:
                self._detach(membership, start)
            else:
                backlog.add_range(membership.part, start, start + 1)
        cohort.advance()

    def _cut(self, cohort: Cohort, needers: list[str]) -> tuple[ChunkRef, ...]:
        """Take the next chunks of a cohort that the same nodes lack."""
        shared = len(needers) > 1
        most = max(1, min(self._most_bytes, self._budget.least(needers) // PARTS)) if shared else self._most_bytes
        chunks: list[ChunkRef] = []
        size = 0
        entries = {membership.entry for membership in self._members(cohort)}
        while (chunk := cohort.peek()) is not None and len(chunks) < self._window.batch_chunks:
            together = size + chunk.size
            if chunks and (together > most or (shared and not self._budget.fits(needers, together))):
                break
            if chunks and cohort.position in entries:
                break  # one more node lacks the chunks from here on
            if chunks and not self._may_fetch(together):
                break
            chunks.append(chunk)
            size = together
            cohort.advance()
        return tuple(chunks)

    def _begin_batch(self, cohort: Cohort, needers: list[str], chunks: tuple[ChunkRef, ...], *, shared: bool) -> None:
        batch = Batch(next(self._numbers), chunks, needers, cohort)
        self._batches[batch.number] = batch
        cohort.batches += 1
        if shared:
            self._budget.reserve(batch, needers)
        cohort.blocked_since = None
        if not self._assign(batch):
            self._ready.append(batch)

    def _assign(self, batch: Batch) -> bool:
        """Assign the fetch of a batch to the best candidate among the nodes that lack it; return whether one was free."""
        if not self._may_fetch(batch.size):
            return False
        typical = self._pace.secs_per_byte or _TYPICAL_SECS_PER_BYTE
        best: tuple[float, NodeState] | None = None
        rotate = len(batch.pending) > _SCAN
        willing = batch.avoid.issuperset(batch.pending)
        for name in list(itertools.islice(batch.pending, _SCAN)):
            state = self._states[name]
            if rotate:  # move to the end, so that the next call considers other nodes
                batch.to_the_end(name)
            if (willing or name not in batch.avoid) and self._may_give(state, batch.size, fetch=True):
                busy = self._tasks.of(name).bytes
                load = (busy + batch.size) * (state.pace.secs_per_byte or typical)
                if best is None or load < best[0]:
                    best = (load, state)
        if best is None:
            return False
        state = best[1]
        del batch.pending[state.name]
        task = self._fetch(state, batch.chunks, batch, share=bool(batch.pending))
        batch.holder, batch.source = state.name, task.number
        return True

    def _may_fetch(self, size: int) -> bool:
        most = self._window.run_bytes
        fetching = self._tasks.fetching_bytes
        if most is not None and fetching and fetching + size > most:
            return False
        return self._bucket.ready(self._now)

    def _may_give(self, state: NodeState, size: int, *, fetch: bool) -> bool:
        """Return whether a node may start to fetch, or to receive, `size` bytes now."""
        if not state.started:
            return False
        own = self._tasks.of(state.name)
        if own.fetches >= self._window.fetches if fetch else own.receives >= self._window.receives:
            return False
        return (not own.bytes or own.bytes + size <= self._window.bytes) and state.bucket.ready(self._now)

    def _fetch(self, state: NodeState, chunks: tuple[ChunkRef, ...], batch: Batch | None, *, share: bool) -> FetchTask:
        task = FetchTask(next(self._numbers), state.name, chunks, share)
        spent = int(total_bytes(chunks) * self._asking)
        self._start(task, batch, spent)
        self._bucket.spend(spent)
        return task

    def _start(self, task: Task, batch: Batch | None, spent: int = 0) -> None:
        size = total_bytes(task.chunks)
        self._tasks.add(InFlight(task, batch, self._now, size, spent=spent))
        self._states[task.node].bucket.spend(size)

    def _fetch_backlog(self, state: NodeState) -> None:
        """Start fetches of the chunks that a node missed."""
        while self._may_give(state, 0, fetch=True) and self._may_fetch(0) and state.backlog:
            chunks = state.backlog.cut(
                self._window.batch_chunks,
                self._most_bytes,
                lambda size: self._may_give(state, size, fetch=True) and self._may_fetch(size),
            )
            if not chunks:
                return
            self.counts.own += 0 if self._direct else len(chunks)
            self._fetch(state, chunks, None, share=False)

    # From the object store to the other nodes.

    def _offer(self, batch: Batch) -> None:
        """Start receives of a stored batch on nodes that lack it, as many as the fan-out allows."""
        left = batch.allowance(self._window.fan_out)
        for name in list(itertools.islice(batch.pending, _SCAN)):
            if left < 1:
                return
            if self._may_give(self._states[name], batch.size, fetch=False):
                self._receive(self._states[name], batch)
                left -= 1
            else:
                batch.to_the_end(name)

    def _ask(self, state: NodeState) -> None:
        """Start receives on a node of the stored batches that it lacks, oldest first."""
        if not self._may_give(state, 0, fetch=False):
            return
        for batch in self._batches.values():
            if batch.stored and state.name in batch.pending and batch.allowance(self._window.fan_out) > 0:
                if not self._may_give(state, batch.size, fetch=False):
                    return
                self._receive(state, batch)

    def _receive(self, state: NodeState, batch: Batch) -> None:
        del batch.pending[state.name]
        self._start(ReceiveTask(next(self._numbers), state.name, batch.chunks, batch.source), batch)

    def _settle(self, batch: Batch) -> None:
        """Update a batch after a change: end it, queue it to be fetched again, or free store space that is not needed."""
        if batch.number not in self._batches or batch.fetching:
            return
        if not batch.pending and not batch.receiving:
            if batch.stored and batch.source:
                self._released.append(batch.source)
            self._budget.free_all(batch)
            del self._batches[batch.number]
            batch.cohort.batches -= 1
            self._unblock()
        elif not batch.stored:
            if batch.pending and batch not in self._ready:
                self._ready.append(batch)
        elif not batch.pending and all(map(self._left_behind(batch), batch.receiving)):
            # Stores may drop the other copies: only nodes that left the cohort still wait, and the holder serves them.
            self._budget.free_all(batch, but=(batch.holder, *batch.receiving))
            self._unblock()

    # Nodes that delay the others.

    def _look(self, since: float) -> None:
        """Retry blocked work and look for stragglers; `since` is the time of the previous check."""
        self._unblock()
        for state in self._states.values():
            self._ask(state)
        self._find_slow_fetches()
        for cohort in self._cohorts:
            if cohort.blocked_since is not None:
                self._leave_stragglers(cohort, self._now - max(cohort.blocked_since, since))

    def _find_slow_fetches(self) -> None:
        """Give fetches that take much longer than usual to other nodes, unless the Hub itself is slow."""
        fetches = [running for running in self._tasks if running.fetches]
        # More requests help only if the Hub itself is not slow: either a fetch that started no earlier has ended in time,
        # or only one node is fetching and the most recently ended fetch was in time.
        alone = len({running.task.node for running in fetches}) == 1 and self._last_in_time
        for running in fetches:
            batch = running.batch
            if batch is None or batch.handed_over or not batch.pending or not self._is_slow_fetch(running):
                continue
            if batch.source == running.task.number and (alone or self._well_since >= running.since):
                self._refetch_elsewhere(running, batch)

    def _is_slow_fetch(self, running: InFlight) -> bool:
        waited = self._now - running.since
        return stragglers.is_slow_fetch(waited, running.size, self._pace.secs_per_byte, self._window.patience_secs)

    def _refetch_elsewhere(self, running: InFlight, batch: Batch) -> None:
        """Let another node fetch the batch of a slow fetch; the slow node continues only for itself."""
        node = running.task.node
        self.counts.slow_fetches += 1
        self.counts.refetched += len(batch.chunks)
        if node in batch.reserved:
            batch.reserved.discard(node)
            running.hold = batch.size
        running.batch, running.was_of, batch.handed_over = None, batch, True
        batch.ready_again()
        self._ready.append(batch)

    def _leave_stragglers(self, cohort: Cohort, secs: float) -> None:
        """Add the time for which a few nodes delayed their cohort, and drop those that do so often and are slow."""
        stored = [batch for batch in self._batches.values() if batch.stored and batch.cohort is cohort]
        few = [batch for batch in stored[: max(1, len(stored) // PARTS)] if self._few_wait_for(batch)]
        patience = stragglers.patience(self._window.patience_secs, last=cohort.behind is None)
        waited_for: dict[str, Waited] = {}
        for name in dict.fromkeys(name for batch in few for name in (*batch.pending, *batch.receiving)):
            state = self._states[name]
            membership = state.memberships[cohort.part]
            blame = membership.blame(secs, self._now, stragglers.FADING * patience)
            if membership.cohort is cohort:
                waits = [
                    (self._now - running.since, running.size, not running.fetches)
                    for running in self._tasks.of(name).tasks.values()
                ]
                waited_for[name] = Waited(blame, state.started, state.receive_pace.secs_per_byte, waits)
        view = StragglerView(self._window.patience_secs, patience, self._receive_pace.secs_per_byte, waited_for)
        if slow := stragglers.stragglers(view):
            self._move_to_second(cohort, [self._states[name].memberships[cohort.part] for name in slow])

    def _few_wait_for(self, batch: Batch) -> bool:
        """Return whether a stored batch waits for only a few nodes of the cohort while most others have received it."""
        waiting = [*batch.pending, *batch.receiving]
        return len(waiting) <= batch.done + 1 and not all(map(self._left_behind(batch), waiting))

    def _move_to_second(self, cohort: Cohort, slow: list[Membership]) -> None:
        """Move slow nodes to the second cohort; nodes that delay the second cohort too continue each by itself."""
        second = cohort.behind
        self.counts.lags += len(slow)
        for membership in slow:
            membership.forgive()
            membership.entry = max(membership.entry, cohort.position)
            if second is None:
                self._detach(membership, membership.entry)
            else:
                second.begin(membership.entry)
                membership.cohort = second
                self._backlog_of(membership.state).add_range(membership.part, membership.entry, second.position)
        self._changed()
        for batch in [batch for batch in self._batches.values() if batch.cohort is cohort]:
            left = [membership.state for membership in slow if membership.state.name in batch.pending]
            for state in left:
                del batch.pending[state.name]
            if second is None or len(left) == 1:
                for state in left:
                    self._backlog_of(state).add(batch.chunks)
                    self._budget.free(batch, state.name)
            elif left:
                self._part(batch, [state.name for state in left], second)
            self._settle(batch)

    def _part(self, batch: Batch, nodes: list[str], second: Cohort) -> None:
        """Create a batch in the second cohort for nodes that left the first; one of them fetches it for all of them."""
        child = Batch(next(self._numbers), batch.chunks, nodes, second)
        child.reserved = batch.reserved.intersection(nodes)
        batch.reserved -= child.reserved
        self._batches[child.number] = child
        self._ready.append(child)
        second.batches += 1
        self.counts.refetched += len(batch.chunks)

    @staticmethod
    def _in(state: NodeState, cohort: Cohort) -> bool:
        return state.memberships[cohort.part].cohort is cohort

    def _left_behind(self, batch: Batch) -> Callable[[str], bool]:
        """Return a predicate: whether a node that waits for the batch has left the batch's cohort."""
        return lambda name: not self._in(self._states[name], batch.cohort)

    def _backlog_of(self, state: NodeState) -> Backlog:
        """Return the backlog of a node, and mark the node as having one."""
        self._with_backlog[state.name] = state
        return state.backlog

    def _detach(self, membership: Membership, start: int) -> None:
        """Remove a node from its cohort: it fetches the chunks of the part from `start` on by itself."""
        membership.cohort = None
        self._backlog_of(membership.state).add_range(membership.part, start, None)
        self._changed()


def _asked(outcome: Outcome) -> int:
    """Return the bytes that a chunk moved over a network, retries included; its size if not measured but possibly moved."""
    if isinstance(outcome, Present) or (isinstance(outcome, Copied) and outcome.reused):
        return 0
    if isinstance(outcome, (Copied, Failed)) and outcome.asked is not None:
        return outcome.asked
    return 0 if isinstance(outcome, Failed) and outcome.kind in UNMOVED_KINDS else outcome.size


def _has_moved(outcome: Outcome | None) -> TypeGuard[Copied]:
    """Return whether a chunk came over a network; a copy from another tier of its node says nothing about its speed."""
    return isinstance(outcome, Copied) and not outcome.reused
