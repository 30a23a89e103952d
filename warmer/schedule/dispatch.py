"""What nodes are to do next: the half of a schedule that makes decisions. Pure; `warmer.schedule.scheduler` tells it what happens."""

from __future__ import annotations

import itertools
import math
from collections import deque
from typing import TYPE_CHECKING, Final

from warmer.schedule.batch import Flight, Lot, Stage, Stock
from warmer.schedule.cohort import Backlog, Convoy, Lane, Seat
from warmer.schedule.rate import Pace, TokenBucket
from warmer.schedule.tasks import Counts, Fetch, Receive, Window, total_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from warmer.plan.plan_file import PlannedChunk
    from warmer.schedule.cohort import Part
    from warmer.schedule.rate import Caps
    from warmer.schedule.tasks import Order

_SCAN: Final = 16
"""How many nodes are looked at for an order: the best of them is nearly the best of all."""

_LOOK_SECS: Final = 0.25
"""How often slow nodes are looked for."""

PARTS: Final = 4
"""A store has room for so many lots at least, so that one is fetched while others are received."""

_LEAST_LOTS: Final = 16
"""Each convoy may have so many batches under way, into however many parts the plan falls."""

_TYPICAL_SECS_PER_BYTE: Final = 1e-8


class Dispatch:
    """Keeps what is under way, and decides what comes next. See `warmer.schedule.scheduler.Schedule` for the arguments."""

    def __init__(
        self,
        nodes: Mapping[str, int],
        parts: Sequence[Part],
        window: Window,
        caps: Caps,
        *,
        direct: bool,
        now: float,
    ) -> None:
        self.counts = Counts()
        self._window, self._caps = window, caps
        self._most_lots = max(min(window.lots, _LEAST_LOTS), window.lots // max(1, len(parts)))
        self._direct = direct
        self._now = self._looked = now
        self._most_bytes = int(
            max(1, min(window.batch_bytes, *filter(None, (window.bytes, window.run_bytes, caps.run, caps.node))))
        )
        self._bucket = TokenBucket(caps.run, now)
        self._asking = 1.0  # how many times the bytes of a chunk nodes have to ask for, of late
        self._stock = Stock(nodes)
        self._pace, self._receive_pace = Pace(), Pace()
        self._numbers = itertools.count(1)
        self._lots: dict[int, Lot] = {}
        self._stored: dict[int, Lot] = {}
        self._ready: deque[Lot] = deque()
        self._flights: dict[int, Flight] = {}
        self._fetching_bytes = 0
        self._well_since = -math.inf  # when the latest fetch was given that ended in time
        self._last_in_time = True  # whether the last one to end did
        self._out: list[Order] = []
        self._released: list[int] = []
        # Of each part, most nodes are in the first; those that cannot keep up with it go on together in the second.
        self._leading = [Convoy(part, Convoy(part)) for part in parts]
        self._convoys = [convoy for first in self._leading for convoy in (first, first.behind) if convoy is not None]
        self._lanes: dict[str, Lane] = {}
        self._astray: dict[str, Lane] = {}  # those that have something to fetch for themselves
        for name in nodes:
            self._add_lane(name, name)

    def _add_lane(self, name: str, role: str) -> Lane:
        lane = self._lanes[name] = Lane(name, role, self._window, self._caps.node, self._now)
        for convoy in self._leading:
            if convoy.part.is_for(role):
                seat = lane.seats[convoy.part] = Seat(lane, convoy, self._now)
                if self._direct:
                    self._detach(seat, 0)
        self._changed()
        return lane

    def _changed(self) -> None:
        """Something has come or gone: decide anew."""
        for convoy in self._convoys:
            convoy.full = False
            convoy.changed()

    def _room(self) -> None:
        for convoy in self._convoys:
            convoy.full = False

    def _decide(self) -> None:
        """Give all orders that can be given now."""
        if self._now >= self._looked + _LOOK_SECS or not self._flights:
            since, self._looked = self._looked, self._now
            self._look(since)
        for _ in range(min(len(self._ready), _SCAN)):
            lot = self._ready.popleft()
            if lot.number in self._lots and lot.stage is Stage.READY and lot.pending and not self._assign(lot):
                self._ready.append(lot)
        # Who takes part in several is given the chunks of those that are less far first.
        for convoy in sorted(self._convoys, key=lambda convoy: convoy.position):
            self._move_on(convoy)
        for lane in list(self._astray.values()):
            self._feed(lane)
            if not lane.backlog:
                del self._astray[lane.name]

    # From the plan into lots, and from the Hub to one node.

    def _needers(self, convoy: Convoy) -> list[str]:
        """Those in a convoy that are to have its next chunk from it."""
        return [seat.lane.name for seat in self._members(convoy) if seat.entry <= convoy.position]

    def _members(self, convoy: Convoy) -> list[Seat]:
        return convoy.members(self._lanes.values())

    def _move_on(self, convoy: Convoy) -> None:
        """Make lots, and have them fetched, as far as there is room."""
        while not convoy.full and self._members(convoy) and (chunk := convoy.peek()) is not None:
            if not self._may_fetch(chunk.size):
                return
            needers = self._needers(convoy)
            if not needers:
                convoy.advance()
                continue
            shared = len(needers) > 1
            if shared and not self._stock.can_ever(needers, chunk.size):
                self._each_alone(convoy)
                continue
            if convoy.lots >= self._most_lots or (shared and not self._stock.fits(needers, chunk.size)):
                convoy.block(self._now)
                return
            turn = convoy.turn % len(needers)
            convoy.turn += 1
            order = needers[turn:] + needers[:turn]
            if not any(self._lanes[name].may_fetch(chunk.size, self._now) for name in order[:_SCAN]):
                return
            self._begin_lot(convoy, order, self._cut(convoy, needers), shared=shared)

    def _each_alone(self, convoy: Convoy) -> None:
        """The next chunk fits into no store: each node fetches it for itself, and all go on together behind it."""
        start = convoy.position
        for seat in [seat for seat in self._members(convoy) if seat.entry <= start]:
            backlog = self._alone(seat.lane)
            if backlog.full:
                self._detach(seat, start)
            else:
                backlog.add_stretch(seat.part, start, start + 1)
        convoy.advance()

    def _cut(self, convoy: Convoy, needers: list[str]) -> tuple[PlannedChunk, ...]:
        """The next chunks of a convoy that the same nodes lack."""
        shared = len(needers) > 1
        most = max(1, min(self._most_bytes, self._stock.least(needers) // PARTS)) if shared else self._most_bytes
        chunks: list[PlannedChunk] = []
        size = 0
        entries = {seat.entry for seat in self._members(convoy)}
        while (chunk := convoy.peek()) is not None and len(chunks) < self._window.batch_chunks:
            together = size + chunk.size
            if chunks and (together > most or (shared and not self._stock.fits(needers, together))):
                break
            if chunks and convoy.position in entries:
                break  # from here on one more lacks them
            if chunks and not self._may_fetch(together):
                break
            chunks.append(chunk)
            size = together
            convoy.advance()
        return tuple(chunks)

    def _begin_lot(self, convoy: Convoy, needers: list[str], chunks: tuple[PlannedChunk, ...], *, shared: bool) -> None:
        lot = Lot(next(self._numbers), chunks, needers, convoy)
        self._lots[lot.number] = lot
        convoy.lots += 1
        if shared:
            self._stock.reserve(lot, needers)
        convoy.blocked_since = None
        if not self._assign(lot):
            self._ready.append(lot)

    def _assign(self, lot: Lot) -> bool:
        """Have a lot fetched by the best of some nodes that lack it; whether one was free."""
        if not self._may_fetch(lot.size):
            return False
        typical = self._pace.secs_per_byte or _TYPICAL_SECS_PER_BYTE
        best: tuple[float, Lane] | None = None
        rotate = len(lot.pending) > _SCAN
        willing = lot.avoid.issuperset(lot.pending)
        for name in list(itertools.islice(lot.pending, _SCAN)):
            lane = self._lanes[name]
            if rotate:  # to the end, so that others are looked at next time
                lot.to_the_end(name)
            if (willing or name not in lot.avoid) and lane.may_fetch(lot.size, self._now):
                load = lane.load(lot.size, typical)
                if best is None or load < best[0]:
                    best = (load, lane)
        if best is None:
            return False
        lane = best[1]
        del lot.pending[lane.name]
        order = self._fetch(lane, lot.chunks, lot, share=bool(lot.pending))
        lot.stage, lot.holder, lot.source = Stage.FETCHING, lane.name, order.number
        return True

    def _may_fetch(self, size: int) -> bool:
        most = self._window.run_bytes
        if most is not None and self._fetching_bytes and self._fetching_bytes + size > most:
            return False
        return self._bucket.ready(self._now)

    def _fetch(self, lane: Lane, chunks: tuple[PlannedChunk, ...], lot: Lot | None, *, share: bool) -> Fetch:
        order = Fetch(next(self._numbers), lane.name, chunks, share)
        size = total_bytes(chunks)
        spent = int(size * self._asking)
        self._fly(order, lot, spent)
        self._bucket.spend(spent)
        self._fetching_bytes += size
        return order

    def _fly(self, order: Order, lot: Lot | None, spent: int = 0) -> None:
        self._flights[order.number] = Flight(order, lot, self._now, spent=spent)
        self._lanes[order.node].begin(order.chunks, fetch=isinstance(order, Fetch))
        self._out.append(order)

    def _feed(self, lane: Lane) -> None:
        """Have a node fetch for itself what it missed."""
        while lane.may_fetch(0, self._now) and self._may_fetch(0) and lane.backlog:
            chunks = lane.backlog.cut(
                self._window.batch_chunks,
                self._most_bytes,
                lambda size: lane.may_fetch(size, self._now) and self._may_fetch(size),
            )
            if not chunks:
                return
            self.counts.own += 0 if self._direct else len(chunks)
            self._fetch(lane, chunks, None, share=False)

    # From the store to the others.

    def _offer(self, lot: Lot) -> None:
        """Have those that lack a stored lot take it, as many as may at a time."""
        left = lot.allowance(self._window.fan)
        for name in list(itertools.islice(lot.pending, _SCAN)):
            if left < 1:
                return
            if self._lanes[name].may_receive(lot.size, self._now):
                self._receive(self._lanes[name], lot)
                left -= 1
            else:
                lot.to_the_end(name)

    def _ask(self, lane: Lane) -> None:
        """Have a node take what it lacks from the store, the oldest first."""
        if not lane.may_receive(0, self._now):
            return
        for lot in self._stored.values():
            if lane.name in lot.pending and lot.allowance(self._window.fan) > 0:
                if not lane.may_receive(lot.size, self._now):
                    return
                self._receive(lane, lot)

    def _receive(self, lane: Lane, lot: Lot) -> None:
        del lot.pending[lane.name]
        lot.receiving.add(lane.name)
        self._fly(Receive(next(self._numbers), lane.name, lot.chunks, lot.source), lot)

    def _settle(self, lot: Lot) -> None:
        """See whether a lot is at its end, or nearly."""
        if lot.number not in self._lots or lot.stage is Stage.FETCHING:
            return
        if not lot.pending and not lot.receiving:
            if lot.stage is Stage.STORED:
                self._stored.pop(lot.number, None)
                if lot.source:
                    self._released.append(lot.source)
            self._stock.free_all(lot)
            del self._lots[lot.number]
            lot.convoy.lots -= 1
            self._room()
        elif lot.stage is Stage.READY and lot.pending:
            if lot not in self._ready:
                self._ready.append(lot)
        elif lot.stage is Stage.STORED and not lot.pending and all(map(self._left_behind(lot), lot.receiving)):
            # Copies elsewhere may be thrown away by their stores: nobody that matters takes them from there.
            self._stock.free_all(lot, but=(lot.holder, *lot.receiving))
            self._room()

    def _look(self, since: float) -> None:  # noqa: ARG002 - for those who look for more
        """Look for what was missed; it was done before at `since`."""
        self._room()
        for lane in self._lanes.values():
            self._ask(lane)

    @staticmethod
    def _in(lane: Lane, convoy: Convoy) -> bool:
        return lane.seats[convoy.part].convoy is convoy

    def _left_behind(self, lot: Lot) -> Callable[[str], bool]:
        """Tells whether a node waits for a lot of a convoy that it is in no longer."""
        return lambda name: not self._in(self._lanes[name], lot.convoy)

    def _alone(self, lane: Lane) -> Backlog:
        """What a node fetches for itself, to be added to."""
        self._astray[lane.name] = lane
        return lane.backlog

    def _detach(self, seat: Seat, start: int) -> None:
        """From a chunk of a part on, a node goes on by itself."""
        seat.convoy = None
        self._alone(seat.lane).add_stretch(seat.part, start, None)
        self._changed()
