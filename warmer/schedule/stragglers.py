"""Nodes that hold up the others: what they delay goes on without them. Pure; the third part of a schedule."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from warmer.schedule.batch import Flight, Lot
from warmer.schedule.dispatch import PARTS, Dispatch
from warmer.schedule.tasks import Fetch, Receive, total_bytes

if TYPE_CHECKING:
    from warmer.schedule.cohort import Convoy, Lane, Seat

_LATE: Final = 4.0
"""A fetch is slow when it takes so many times what one of its size usually takes."""

_FADING: Final = 3.0
"""How many times its patience a schedule remembers who held up the others."""

_SLOW: Final = 2.0
"""Nodes that take so many times as long as most are slow; others are waited for: a run is as fast as its slowest node."""

_SLOW_PATIENCE: Final = 6.0
"""How many times more patience there is with those that are slow already: beyond it they cost the Hub a copy each."""


class Laggards(Dispatch):
    """Looks for nodes that fetch or receive so slowly that others wait for them."""

    def _look(self, since: float) -> None:
        super()._look(since)
        self._look_for_late_fetches()
        for convoy in self._convoys:
            if convoy.blocked_since is not None:
                self._blame(convoy, self._now - max(convoy.blocked_since, since))

    def _look_for_late_fetches(self) -> None:
        """Give those that take much longer than usual to others, unless it is the Hub that is slow."""
        fetches = [flight for flight in self._flights.values() if isinstance(flight.order, Fetch)]
        late = [flight for flight in fetches if self._is_late(flight)]
        # More requests help only where the Hub is not slow itself: a fetch that was given no sooner has ended in time
        # meanwhile, or one node alone fetches, and the last one to end did so in time.
        one = len({flight.order.node for flight in fetches}) == 1 and self._last_in_time
        for flight in late:
            lot = flight.lot
            if lot is None or lot.handed_over or not lot.pending:
                continue
            if lot.source == flight.order.number and (one or self._well_since >= flight.since):
                self._go_on_without(flight, lot)

    def _is_late(self, flight: Flight) -> bool:
        """Whether a fetch takes much longer than one of its size usually does."""
        pace = self._pace.secs_per_byte
        if pace is None:
            return False
        usual = total_bytes(flight.order.chunks) * pace
        return self._now - flight.since > max(self._window.patience_secs, _LATE * usual)

    def _go_on_without(self, flight: Flight, lot: Lot) -> None:
        """One fetches so slowly that another one is asked; what it fetches is for itself."""
        node = flight.order.node
        self.counts.slow_fetches += 1
        self.counts.refetched += len(lot.chunks)
        if node in lot.reserved:
            lot.reserved.discard(node)
            flight.hold = lot.size
        flight.lot, flight.was_of, lot.handed_over = None, lot, True
        lot.ready_again()
        self._ready.append(lot)

    def _blame(self, convoy: Convoy, secs: float) -> None:
        """Note for how long some nodes alone held up the others, and leave out those that do it often and are slow.

        What is noted fades: often is more than a third of the time.
        """
        lots = [lot for lot in self._stored.values() if lot.convoy is convoy]
        few = [lot for lot in lots[: max(1, len(lots) // PARTS)] if self._awaited_by_few(lot)]
        slow: list[Seat] = []
        patience = self._window.patience_secs * (1.0 if convoy.behind is not None else _SLOW_PATIENCE)
        for name in dict.fromkeys(name for lot in few for name in (*lot.pending, *lot.receiving)):
            seat = self._lanes[name].seats[convoy.part]
            much = seat.blame(secs, self._now, _FADING * patience) > patience
            if much and seat.convoy is convoy and self._is_slow(seat.lane):
                slow.append(seat)
        if slow:
            self._leave_behind(convoy, slow)

    def _is_slow(self, lane: Lane) -> bool:
        """Whether a node receives much more slowly than most; or nothing at all."""
        if not lane.started:
            return True
        flights = [flight for flight in self._flights.values() if flight.order.node == lane.name]
        typical = self._receive_pace.secs_per_byte
        if typical is None:  # nobody has received anything: there may be nobody else to receive
            begun = (flight.since for flight in flights if isinstance(flight.order, Receive))
            return self._now - min(begun, default=self._now) > _SLOW_PATIENCE * self._window.patience_secs
        waits = ((self._now - flight.since) / max(1, total_bytes(flight.order.chunks)) for flight in flights)
        return max(lane.receive_pace.secs_per_byte or 0.0, *waits, 0.0) > _SLOW * typical

    def _awaited_by_few(self, lot: Lot) -> bool:
        """Whether a lot lies in the store for a few that most others are ahead of."""
        waiting = [*lot.pending, *lot.receiving]
        return len(waiting) <= lot.done + 1 and not all(map(self._left_behind(lot), waiting))

    def _leave_behind(self, convoy: Convoy, slow: list[Seat]) -> None:
        """Have nodes go on together in the second convoy; those that hold up that one too, each by itself."""
        second = convoy.behind
        self.counts.lags += len(slow)
        for seat in slow:
            seat.forgive()
            seat.entry = max(seat.entry, convoy.position)
            if second is None:
                self._detach(seat, seat.entry)
            else:
                second.begin(seat.entry)
                seat.convoy = second
                self._alone(seat.lane).add_stretch(seat.part, seat.entry, second.position)
        self._changed()
        for lot in [lot for lot in self._lots.values() if lot.convoy is convoy]:
            left = [seat.lane for seat in slow if seat.lane.name in lot.pending]
            for lane in left:
                del lot.pending[lane.name]
            if second is None or len(left) == 1:
                for lane in left:
                    self._alone(lane).add(lot.chunks)
                    self._stock.free(lot, lane.name)
            elif left:
                self._part(lot, [lane.name for lane in left], second)
            self._settle(lot)

    def _part(self, lot: Lot, nodes: list[str], second: Convoy) -> None:
        """Some go on to wait for a lot in the second convoy: one of them fetches it for all of them."""
        child = Lot(next(self._numbers), lot.chunks, nodes, second)
        child.reserved = lot.reserved.intersection(nodes)
        lot.reserved -= child.reserved
        self._lots[child.number] = child
        self._ready.append(child)
        second.lots += 1
        self.counts.refetched += len(lot.chunks)
