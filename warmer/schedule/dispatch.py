"""What nodes are to do next: the half of a schedule that makes decisions. Pure; `warmer.schedule.scheduler` tells it what happens."""

from __future__ import annotations

import itertools
import math
from collections import deque
from typing import TYPE_CHECKING, Final

from warmer.schedule.batch import Batch, BatchStage, InFlight, StoreBudget
from warmer.schedule.cohort import Backlog, Cohort, Membership, NodeState
from warmer.schedule.rate import MovingAverage, TokenBucket
from warmer.schedule.tasks import Counts, FetchTask, ReceiveTask, TaskLimits, total_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from hfbucket_plugin.tools.selection import ChunkRef
    from warmer.schedule.cohort import PlanSection
    from warmer.schedule.rate import Caps
    from warmer.schedule.tasks import Task

_SCAN: Final = 16
"""How many nodes are looked at for an order: the best of them is nearly the best of all."""

_LOOK_SECS: Final = 0.25
"""How often slow nodes are looked for."""

PARTS: Final = 4
"""A store has room for so many batches at least, so that one is fetched while others are received."""

_MIN_BATCHES: Final = 16
"""Each cohort may have so many batches under way, into however many parts the plan falls."""

_TYPICAL_SECS_PER_BYTE: Final = 1e-8


class Dispatch:
    """Keeps what is under way, and decides what comes next. See `warmer.schedule.scheduler.Scheduler` for the arguments."""

    def __init__(
        self,
        nodes: Mapping[str, int],
        parts: Sequence[PlanSection],
        window: TaskLimits,
        caps: Caps,
        *,
        direct: bool,
        now: float,
    ) -> None:
        self.counts = Counts()
        self._window, self._caps = window, caps
        self._max_batches = max(min(window.batches, _MIN_BATCHES), window.batches // max(1, len(parts)))
        self._direct = direct
        self._now = self._looked = now
        self._most_bytes = int(
            max(1, min(window.batch_bytes, *filter(None, (window.bytes, window.run_bytes, caps.run, caps.node))))
        )
        self._bucket = TokenBucket(caps.run, now)
        self._asking = 1.0  # how many times the bytes of a chunk nodes have to ask for, recently
        self._budget = StoreBudget(nodes)
        self._pace, self._receive_pace = MovingAverage(), MovingAverage()
        self._numbers = itertools.count(1)
        self._batches: dict[int, Batch] = {}
        self._stored: dict[int, Batch] = {}
        self._ready: deque[Batch] = deque()
        self._in_flight: dict[int, InFlight] = {}
        self._fetching_bytes = 0
        self._well_since = -math.inf  # when the latest fetch was given that ended in time
        self._last_in_time = True  # whether the last one to end did
        self._out: list[Task] = []
        self._released: list[int] = []
        # Of each part, most nodes are in the first; those that cannot keep up with it go on together in the second.
        self._leading = [Cohort(part, Cohort(part)) for part in parts]
        self._cohorts = [cohort for first in self._leading for cohort in (first, first.behind) if cohort is not None]
        self._states: dict[str, NodeState] = {}
        self._with_backlog: dict[str, NodeState] = {}  # those that have something to fetch for themselves
        for name in nodes:
            self._add_node(name, name)

    def _add_node(self, name: str, role: str) -> NodeState:
        state = self._states[name] = NodeState(name, role, self._window, self._caps.node, self._now)
        for cohort in self._leading:
            if cohort.part.is_for(role):
                membership = state.memberships[cohort.part] = Membership(state, cohort, self._now)
                if self._direct:
                    self._detach(membership, 0)
        self._changed()
        return state

    def _changed(self) -> None:
        """Something has come or gone: decide again."""
        for cohort in self._cohorts:
            cohort.full = False
            cohort.changed()

    def _unblock(self) -> None:
        for cohort in self._cohorts:
            cohort.full = False

    def _decide(self) -> None:
        """Give all orders that can be given now."""
        if self._now >= self._looked + _LOOK_SECS or not self._in_flight:
            since, self._looked = self._looked, self._now
            self._look(since)
        for _ in range(min(len(self._ready), _SCAN)):
            batch = self._ready.popleft()
            if (
                batch.number in self._batches
                and batch.stage is BatchStage.READY
                and batch.pending
                and not self._assign(batch)
            ):
                self._ready.append(batch)
        # Who takes part in several is given the chunks of those that are less far first.
        for cohort in sorted(self._cohorts, key=lambda cohort: cohort.position):
            self._move_on(cohort)
        for state in list(self._with_backlog.values()):
            self._fetch_backlog(state)
            if not state.backlog:
                del self._with_backlog[state.name]

    # From the plan into batches, and from the Hub to one node.

    def _lacking(self, cohort: Cohort) -> list[str]:
        """Those in a cohort that are to have its next chunk from it."""
        return [membership.state.name for membership in self._members(cohort) if membership.entry <= cohort.position]

    def _members(self, cohort: Cohort) -> list[Membership]:
        return cohort.members(self._states.values())

    def _move_on(self, cohort: Cohort) -> None:
        """Make batches, and have them fetched, as far as there is room."""
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
            if not any(self._states[name].may_fetch(chunk.size, self._now) for name in rotated[:_SCAN]):
                return
            self._begin_batch(cohort, rotated, self._cut(cohort, needers), shared=shared)

    def _fetch_separately(self, cohort: Cohort) -> None:
        """The next chunk fits into no store: each node fetches it for itself, and all go on together behind it."""
        start = cohort.position
        for membership in [membership for membership in self._members(cohort) if membership.entry <= start]:
            backlog = self._backlog_of(membership.state)
            if backlog.full:
                self._detach(membership, start)
            else:
                backlog.add_range(membership.part, start, start + 1)
        cohort.advance()

    def _cut(self, cohort: Cohort, needers: list[str]) -> tuple[ChunkRef, ...]:
        """The next chunks of a cohort that the same nodes lack."""
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
                break  # from here on one more lacks them
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
        """Have a batch fetched by the best of some nodes that lack it; whether one was free."""
        if not self._may_fetch(batch.size):
            return False
        typical = self._pace.secs_per_byte or _TYPICAL_SECS_PER_BYTE
        best: tuple[float, NodeState] | None = None
        rotate = len(batch.pending) > _SCAN
        willing = batch.avoid.issuperset(batch.pending)
        for name in list(itertools.islice(batch.pending, _SCAN)):
            state = self._states[name]
            if rotate:  # to the end, so that others are looked at next time
                batch.to_the_end(name)
            if (willing or name not in batch.avoid) and state.may_fetch(batch.size, self._now):
                load = state.load(batch.size, typical)
                if best is None or load < best[0]:
                    best = (load, state)
        if best is None:
            return False
        state = best[1]
        del batch.pending[state.name]
        task = self._fetch(state, batch.chunks, batch, share=bool(batch.pending))
        batch.stage, batch.holder, batch.source = BatchStage.FETCHING, state.name, task.number
        return True

    def _may_fetch(self, size: int) -> bool:
        most = self._window.run_bytes
        if most is not None and self._fetching_bytes and self._fetching_bytes + size > most:
            return False
        return self._bucket.ready(self._now)

    def _fetch(self, state: NodeState, chunks: tuple[ChunkRef, ...], batch: Batch | None, *, share: bool) -> FetchTask:
        task = FetchTask(next(self._numbers), state.name, chunks, share)
        size = total_bytes(chunks)
        spent = int(size * self._asking)
        self._start(task, batch, spent)
        self._bucket.spend(spent)
        self._fetching_bytes += size
        return task

    def _start(self, task: Task, batch: Batch | None, spent: int = 0) -> None:
        self._in_flight[task.number] = InFlight(task, batch, self._now, spent=spent)
        self._states[task.node].begin(task.chunks, fetch=isinstance(task, FetchTask))
        self._out.append(task)

    def _fetch_backlog(self, state: NodeState) -> None:
        """Have a node fetch for itself what it missed."""
        while state.may_fetch(0, self._now) and self._may_fetch(0) and state.backlog:
            chunks = state.backlog.cut(
                self._window.batch_chunks,
                self._most_bytes,
                lambda size: state.may_fetch(size, self._now) and self._may_fetch(size),
            )
            if not chunks:
                return
            self.counts.own += 0 if self._direct else len(chunks)
            self._fetch(state, chunks, None, share=False)

    # From the store to the others.

    def _offer(self, batch: Batch) -> None:
        """Have those that lack a stored batch take it, as many as may at a time."""
        left = batch.allowance(self._window.fan_out)
        for name in list(itertools.islice(batch.pending, _SCAN)):
            if left < 1:
                return
            if self._states[name].may_receive(batch.size, self._now):
                self._receive(self._states[name], batch)
                left -= 1
            else:
                batch.to_the_end(name)

    def _ask(self, state: NodeState) -> None:
        """Have a node take what it lacks from the store, the oldest first."""
        if not state.may_receive(0, self._now):
            return
        for batch in self._stored.values():
            if state.name in batch.pending and batch.allowance(self._window.fan_out) > 0:
                if not state.may_receive(batch.size, self._now):
                    return
                self._receive(state, batch)

    def _receive(self, state: NodeState, batch: Batch) -> None:
        del batch.pending[state.name]
        batch.receiving.add(state.name)
        self._start(ReceiveTask(next(self._numbers), state.name, batch.chunks, batch.source), batch)

    def _settle(self, batch: Batch) -> None:
        """See whether a batch is at its end, or nearly."""
        if batch.number not in self._batches or batch.stage is BatchStage.FETCHING:
            return
        if not batch.pending and not batch.receiving:
            if batch.stage is BatchStage.STORED:
                self._stored.pop(batch.number, None)
                if batch.source:
                    self._released.append(batch.source)
            self._budget.free_all(batch)
            del self._batches[batch.number]
            batch.cohort.batches -= 1
            self._unblock()
        elif batch.stage is BatchStage.READY and batch.pending:
            if batch not in self._ready:
                self._ready.append(batch)
        elif (
            batch.stage is BatchStage.STORED
            and not batch.pending
            and all(map(self._left_behind(batch), batch.receiving))
        ):
            # Copies elsewhere may be thrown away by their stores: nobody that matters takes them from there.
            self._budget.free_all(batch, but=(batch.holder, *batch.receiving))
            self._unblock()

    def _look(self, since: float) -> None:  # noqa: ARG002 - for those who look for more
        """Look for what was missed; it was done before at `since`."""
        self._unblock()
        for state in self._states.values():
            self._ask(state)

    @staticmethod
    def _in(state: NodeState, cohort: Cohort) -> bool:
        return state.memberships[cohort.part].cohort is cohort

    def _left_behind(self, batch: Batch) -> Callable[[str], bool]:
        """Tells whether a node waits for a batch of a cohort that it is in no longer."""
        return lambda name: not self._in(self._states[name], batch.cohort)

    def _backlog_of(self, state: NodeState) -> Backlog:
        """What a node fetches for itself, to be added to."""
        self._with_backlog[state.name] = state
        return state.backlog

    def _detach(self, membership: Membership, start: int) -> None:
        """From a chunk of a part on, a node goes on by itself."""
        membership.cohort = None
        self._backlog_of(membership.state).add_range(membership.part, start, None)
        self._changed()
