"""Which node fetches which chunks, who takes them from the object store and when, and what a lost node means.

Pure: told what happened and what time it is, it says what to do; knows nothing of Ray. The plan falls into *parts*, each of
which the same nodes are to have, and each part moves on in *batches*: one node fetches a batch from the Hub, and every other
node that is to have it and lacks it takes it from the object store. A node that cannot
keep up is left out of the batches that come, and fetches for itself what it missed. Each chunk ends exactly once for each
node: among what an event returns, or among what `lost` or `abandon` yields.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeGuard

from warmer.report.outcomes import INTERRUPTED, MISSING, TIER_KINDS, UNMOVED_KINDS, Copied, Failed, Present
from warmer.schedule.batch import Batch, BatchStage
from warmer.schedule.cohort import Membership, NodeState
from warmer.schedule.rate import Caps
from warmer.schedule.stragglers import Stragglers
from warmer.schedule.tasks import FetchTask, ReceiveTask, TaskLimits, total_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from hfbucket_plugin.tools.selection import ChunkRef
    from warmer.report.outcomes import Outcome
    from warmer.schedule.batch import InFlight
    from warmer.schedule.cohort import PlanSection
    from warmer.schedule.tasks import Task

    Ended = tuple[str, Outcome]

_TRIES: Final = 2
"""How many nodes try to fetch a chunk before it has failed for all of them."""

_HEED: Final = 0.5
"""How much the latest order counts in how many tries the next ones are reckoned with."""

_OWN_KINDS: Final = TIER_KINDS | {INTERRUPTED}
"""Failures that say nothing about other nodes."""


@dataclass(frozen=True, slots=True)
class _Vacancy:
    """What a lost node was to have still.

    Attributes:
        state: The node as it was.
        named: Chunks that it had been told to take, or was about to be told.
        starts: Of each part the number of the first chunk that its cohort had not come to; None where it was in none.
    """

    state: NodeState
    named: list[tuple[ChunkRef, ...]]
    starts: dict[PlanSection, int | None]

    def rest(self) -> Iterator[ChunkRef]:
        """All of it."""
        for chunks in self.named:
            yield from chunks
        yield from self.state.backlog.rest()
        for part, start in self.starts.items():
            if start is not None:
                yield from part.left(start)


class Scheduler(Stragglers):
    """The state of a run.

    Args:
        nodes: Names of the nodes, and the bytes that batches may take in the object store of each.
        parts: The plan: which chunks which nodes are to have. No chunk is in two of them.
        window: How much is under way at a time; by default as `TaskLimits` has it.
        caps: Most bytes a second.
        direct: Every node fetches everything for itself.
        now: The time, in seconds of any clock that goes forwards.

    Attributes:
        counts: What it had to do.
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
        super().__init__(nodes, parts, window or TaskLimits(), caps, direct=direct, now=now)
        self._vacant: dict[str, _Vacancy] = {}

    @property
    def nodes(self) -> list[str]:
        """The nodes that are not lost."""
        return list(self._states)

    @property
    def vacant(self) -> list[str]:
        """The lost nodes whose place is kept for others."""
        return list(self._vacant)

    @property
    def done(self) -> bool:
        """Whether nothing is under way or left to give, and no place is kept."""
        return not self._vacant and self.exhausted

    @property
    def exhausted(self) -> bool:
        """Whether nothing is under way or left to give to the nodes that there are."""
        if self._in_flight or self._batches:
            return False
        if any(state.backlog for state in self._with_backlog.values()):
            return False
        return all(not self._members(cohort) or cohort.peek() is None for cohort in self._cohorts)

    @property
    def under_way(self) -> dict[str, tuple[int, int]]:
        """The chunks that nodes are busy with, and their bytes; nodes with nothing to do are left out."""
        found: dict[str, tuple[int, int]] = {}
        for running in self._in_flight.values():
            chunks, size = found.get(running.task.node, (0, 0))
            own = running.task.chunks
            found[running.task.node] = (chunks + len(own), size + total_bytes(own))
        return found

    @property
    def store_bytes(self) -> dict[str, int]:
        """The bytes that are counted on the object store of each node."""
        return dict(self._budget.used)

    def released(self) -> list[int]:
        """The numbers of orders to fetch whose chunks nobody waits for any more; each is told once."""
        released, self._released = self._released, []
        return released

    def started(self, node: str) -> None:
        """A node takes part from now on.

        Raises:
            KeyError: There is no such node, or it is lost.
        """
        self._states[node].started = True

    def tasks(self, now: float) -> list[Task]:
        """What nodes are to be told now; each order counts as under way from now on."""
        self._now = max(self._now, now)
        self._decide()
        out, self._out = self._out, []
        return out

    def fetched(self, number: int, outcomes: Sequence[Outcome], *, shared: bool, now: float) -> list[Ended]:
        """An order to fetch has ended.

        Args:
            number: Of the order.
            outcomes: How each of its chunks ended, in their order.
            shared: Whether those that were copied lie in the object store.
            now: The time.

        Returns:
            What has ended for which node by this.

        Raises:
            KeyError: The order is not under way, or its node is lost.
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
        """What a node fetched for itself has ended. Where it did so only because it was slow, others help it once."""
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
            if batch.stage is BatchStage.STORED:
                self._offer(batch)
        elif failed:
            self._backlog_of(state).add(tuple(failed))
        return ended

    def _pay(self, running: InFlight, outcomes: Sequence[Outcome]) -> None:
        """Settle what an order to fetch asked the Hub for, tries included, with what the caps let go for it.

        Chunks that were asked for several times put the caps into debt; those that passed no network are given back.
        """
        size = total_bytes(running.task.chunks)
        asked = sum(_asked(outcome) for outcome in outcomes)
        self._bucket.give_back(running.spent - asked)
        self._states[running.task.node].bucket.give_back(size - asked)
        if size:
            # The next orders reckon with as many tries: the first ones to fail would else all be let go at once.
            self._asking += _HEED * (max(1.0, asked / size) - self._asking)

    def _give_back(self, task: Task, outcomes: Sequence[Outcome | None], *, lost: bool) -> None:
        """Give a node back what it let go to receive chunks that did not move, such as those that were there."""
        moved = sum(
            0 if outcome is None and lost else chunk.size if outcome is None else _asked(outcome)
            for chunk, outcome in zip(task.chunks, outcomes, strict=True)
        )
        self._states[task.node].bucket.give_back(total_bytes(task.chunks) - moved)

    def _sort(self, batch: Batch, task: Task, outcomes: Sequence[Outcome], *, shared: bool) -> list[Ended]:
        """Tell apart what is in the store, what others have to fetch, and what failed for all."""
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
        batch.chunks, batch.stage = tuple(stored), BatchStage.STORED
        self._budget.shrink(batch, total_bytes(batch.chunks))
        self._stored[batch.number] = batch
        self._settle(batch)
        if batch.number in self._batches:
            self._offer(batch)
        self._unblock()
        return ended

    def _split(
        self, batch: Batch, chunks: Sequence[ChunkRef], nodes: tuple[str, ...], *, failed_on: str | None = None
    ) -> None:
        """Some chunks of a batch go on as a batch of their own."""
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
        """An order to receive has ended.

        Args:
            number: Of the order.
            outcomes: How each of its chunks ended, in their order; None for one that did not arrive, or not rightly.
            now: The time.
            holder_lost: Whether they did not arrive because the node that left them in the store is lost.

        Returns:
            What has ended for which node by this.

        Raises:
            KeyError: The order is not under way, or its node is lost.
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
            batch.receiving.discard(state.name)
            batch.done += not missed and size > 0  # who had it all elsewhere serves it to nobody
        if missed:
            self._undelivered(state, batch, task, missed, holder_lost=holder_lost)
        if batch is not None:
            self._settle(batch)
            if batch.stage is BatchStage.STORED and batch.number in self._batches:
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
        # Others lack it too: it is fetched again for all of them together.
        batch.pending[state.name] = None
        if batch.source == source:
            self._fetch_again(batch)

    def _fetch_again(self, batch: Batch) -> None:
        """What was stored of a batch is gone, also for those that were about to be told to take it."""
        self._stored.pop(batch.number, None)
        source = batch.source
        self._released.append(source)
        batch.ready_again()
        untold = [task for task in self._out if isinstance(task, ReceiveTask) and task.source == source]
        self._out = [task for task in self._out if task not in untold]
        for task in untold:
            self.received(task.number, [None] * len(task.chunks), now=self._now, holder_lost=True)
        if batch.pending:
            self.counts.refetched += len(batch.chunks)

    def lost(self, node: str, *, keep_place: bool = False) -> Iterator[ChunkRef]:
        """A node is given nothing any more.

        Args:
            node: Its name.
            keep_place: Whether another node may take its place, or it goes on itself: then its chunks are kept for `replace`,
                `resume` or `abandon`.

        Returns:
            The chunks that did not end on it; none when its place is kept.

        Raises:
            KeyError: There is no such node, or it was lost before.
        """
        state = self._states.pop(node)
        self._with_backlog.pop(node, None)
        self._changed()
        self._out = [task for task in self._out if task.node != node]
        named: list[tuple[ChunkRef, ...]] = []
        for number in [number for number, running in self._in_flight.items() if running.task.node == node]:
            task = self._in_flight.pop(number).task
            named.append(task.chunks)
            self._fetching_bytes -= total_bytes(task.chunks) if isinstance(task, FetchTask) else 0
        for batch in list(self._batches.values()):
            if node in batch.pending:
                named.append(batch.chunks)
                del batch.pending[node]
            batch.receiving.discard(node)
            self._budget.free(batch, node)
            if batch.holder == node:
                if batch.stage is BatchStage.STORED:
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
        """Nobody takes the place of a lost node.

        Returns:
            The chunks that did not end on it.

        Raises:
            KeyError: Its place is not kept.
        """
        return self._vacant.pop(node).rest()

    def replace(self, lost: str, node: str, store_bytes: int) -> None:
        """A node takes the place of a lost one, and is to have all the chunks that the other was to have.

        Raises:
            KeyError: The place is not kept.
        """
        role = self._vacant.pop(lost).state.role
        self._budget.admit(node, store_bytes)
        state = self._add_node(node, role)
        for membership in state.memberships.values():
            if membership.cohort is not None:
                self._backlog_of(state).add_range(membership.part, 0, membership.cohort.position)

    def resume(self, node: str, store_bytes: int) -> None:
        """A lost node goes on: what ended on it is there, and it is to have what did not.

        Args:
            node: Its name.
            store_bytes: The bytes that batches may take in its object store.

        Raises:
            KeyError: Its place is not kept.
        """
        vacancy = self._vacant.pop(node)
        before = vacancy.state
        self._budget.admit(node, store_bytes)
        state = self._states[node] = NodeState(node, before.role, self._window, self._caps.node, self._now)
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
            else:  # what its cohort passed meanwhile it fetches for itself
                membership.entry = max(start, old.cohort.position)
                state.backlog.add_range(cohort.part, start, membership.entry)
        self._backlog_of(state)
        self._changed()

    def _finish(self, number: int, now: float) -> InFlight:
        self._now = max(self._now, now)
        running = self._in_flight.pop(number)
        task = running.task
        fetch = isinstance(task, FetchTask)
        self._states[task.node].end(task.chunks, fetch=fetch)
        if fetch:
            self._fetching_bytes -= total_bytes(task.chunks)
        return running


def _asked(outcome: Outcome) -> int:
    """Bytes that a chunk moved through a network, each try counted; where nobody counted them, its size if it may have moved."""
    if isinstance(outcome, Present) or (isinstance(outcome, Copied) and outcome.reused):
        return 0
    if isinstance(outcome, (Copied, Failed)) and outcome.asked is not None:
        return outcome.asked
    return 0 if isinstance(outcome, Failed) and outcome.kind in UNMOVED_KINDS else outcome.size


def _has_moved(outcome: Outcome | None) -> TypeGuard[Copied]:
    """Whether a chunk came through a network; what came from another tier of its node tells nothing of how fast that is."""
    return isinstance(outcome, Copied) and not outcome.reused
