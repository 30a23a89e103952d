"""Nodes that hold up the others: what they delay goes on without them. Pure; the third part of a schedule."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from warmer.schedule.batch import Batch, InFlight
from warmer.schedule.dispatch import PARTS, Dispatch
from warmer.schedule.tasks import FetchTask, ReceiveTask, total_bytes

if TYPE_CHECKING:
    from warmer.schedule.cohort import Cohort, Membership, NodeState

_LATE: Final = 4.0
"""A fetch is slow when it takes so many times what one of its size usually takes."""

_FADING: Final = 3.0
"""How many times its patience a schedule remembers who held up the others."""

_SLOW: Final = 2.0
"""Nodes that take so many times as long as most are slow; others are waited for: a run is as fast as its slowest node."""

_SLOW_PATIENCE: Final = 6.0
"""How many times more patience there is with those that are slow already: beyond it they cost the Hub a copy each."""


class Stragglers(Dispatch):
    """Looks for nodes that fetch or receive so slowly that others wait for them."""

    def _look(self, since: float) -> None:
        super()._look(since)
        self._find_slow_fetches()
        for cohort in self._cohorts:
            if cohort.blocked_since is not None:
                self._blame(cohort, self._now - max(cohort.blocked_since, since))

    def _find_slow_fetches(self) -> None:
        """Give those that take much longer than usual to others, unless it is the Hub that is slow."""
        fetches = [running for running in self._in_flight.values() if isinstance(running.task, FetchTask)]
        late = [running for running in fetches if self._is_slow_fetch(running)]
        # More requests help only where the Hub is not slow itself: a fetch that was given no sooner has ended in time
        # meanwhile, or one node alone fetches, and the last one to end did so in time.
        one = len({running.task.node for running in fetches}) == 1 and self._last_in_time
        for running in late:
            batch = running.batch
            if batch is None or batch.handed_over or not batch.pending:
                continue
            if batch.source == running.task.number and (one or self._well_since >= running.since):
                self._refetch_elsewhere(running, batch)

    def _is_slow_fetch(self, running: InFlight) -> bool:
        """Whether a fetch takes much longer than one of its size usually does."""
        pace = self._pace.secs_per_byte
        if pace is None:
            return False
        usual = total_bytes(running.task.chunks) * pace
        return self._now - running.since > max(self._window.patience_secs, _LATE * usual)

    def _refetch_elsewhere(self, running: InFlight, batch: Batch) -> None:
        """One fetches so slowly that another one is asked; what it fetches is for itself."""
        node = running.task.node
        self.counts.slow_fetches += 1
        self.counts.refetched += len(batch.chunks)
        if node in batch.reserved:
            batch.reserved.discard(node)
            running.hold = batch.size
        running.batch, running.was_of, batch.handed_over = None, batch, True
        batch.ready_again()
        self._ready.append(batch)

    def _blame(self, cohort: Cohort, secs: float) -> None:
        """Note for how long some nodes alone held up the others, and leave out those that do it often and are slow.

        What is noted fades: often is more than a third of the time.
        """
        batches = [batch for batch in self._stored.values() if batch.cohort is cohort]
        few = [batch for batch in batches[: max(1, len(batches) // PARTS)] if self._few_wait_for(batch)]
        slow: list[Membership] = []
        patience = self._window.patience_secs * (1.0 if cohort.behind is not None else _SLOW_PATIENCE)
        for name in dict.fromkeys(name for batch in few for name in (*batch.pending, *batch.receiving)):
            membership = self._states[name].memberships[cohort.part]
            much = membership.blame(secs, self._now, _FADING * patience) > patience
            if much and membership.cohort is cohort and self._is_slow(membership.state):
                slow.append(membership)
        if slow:
            self._move_to_second(cohort, slow)

    def _is_slow(self, state: NodeState) -> bool:
        """Whether a node receives much more slowly than most; or nothing at all."""
        if not state.started:
            return True
        own = [running for running in self._in_flight.values() if running.task.node == state.name]
        typical = self._receive_pace.secs_per_byte
        if typical is None:  # nobody has received anything: there may be nobody else to receive
            begun = (running.since for running in own if isinstance(running.task, ReceiveTask))
            return self._now - min(begun, default=self._now) > _SLOW_PATIENCE * self._window.patience_secs
        waits = ((self._now - running.since) / max(1, total_bytes(running.task.chunks)) for running in own)
        return max(state.receive_pace.secs_per_byte or 0.0, *waits, 0.0) > _SLOW * typical

    def _few_wait_for(self, batch: Batch) -> bool:
        """Whether a batch lies in the store for a few that most others are ahead of."""
        waiting = [*batch.pending, *batch.receiving]
        return len(waiting) <= batch.done + 1 and not all(map(self._left_behind(batch), waiting))

    def _move_to_second(self, cohort: Cohort, slow: list[Membership]) -> None:
        """Have nodes go on together in the second cohort; those that hold up that one too, each by itself."""
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
        """Some go on to wait for a batch in the second cohort: one of them fetches it for all of them."""
        child = Batch(next(self._numbers), batch.chunks, nodes, second)
        child.reserved = batch.reserved.intersection(nodes)
        batch.reserved -= child.reserved
        self._batches[child.number] = child
        self._ready.append(child)
        second.batches += 1
        self.counts.refetched += len(batch.chunks)
