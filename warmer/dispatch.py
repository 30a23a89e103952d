"""What nodes are to do next: the half of a schedule that makes decisions. Pure; `warmer.schedule` tells it what happens."""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from warmer.lanes import Backlog, Lane
from warmer.lots import Lot, Stage, Stock
from warmer.orders import Counts, Fetch, Receive, Window, total_bytes
from warmer.pace import Pace, TokenBucket

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from warmer.lanes import Reader
    from warmer.orders import Order
    from warmer.plan import PlannedChunk

    Takers = Callable[[PlannedChunk], frozenset[str] | None]

_SCAN: Final = 16
"""How many nodes are looked at for an order: the best of them is nearly the best of all."""

_LOOK_SECS: Final = 0.25
"""How often slow nodes are looked for."""

_LATE: Final = 4.0
"""A fetch is slow when it takes so many times what one of its size usually takes."""

_PARTS: Final = 4
"""A store has room for so many lots at least, so that one is fetched while others are received."""

_TYPICAL_SECS_PER_BYTE: Final = 1e-8


@dataclass(frozen=True, slots=True)
class Caps:
    """Most bytes a second.

    Attributes:
        run: That the Hub is asked for, in the whole run; None for no cap.
        node: That reach a node, from the Hub or from others; None for no cap.
    """

    run: float | None = None
    node: float | None = None


@dataclass(slots=True)
class Flight:
    """An order under way.

    Attributes:
        order: The order.
        lot: Whose chunks they are; None for those that a node fetches for itself.
        since: When it was given.
        hold: Bytes that it may leave in its node's store though no lot counts them.
    """

    order: Order
    lot: Lot | None
    since: float
    hold: int = 0


class Dispatch:
    """Keeps what is under way, and decides what comes next. See `warmer.schedule.Schedule` for the arguments."""

    def __init__(
        self,
        nodes: Mapping[str, int],
        plan: Reader,
        window: Window,
        takers: Takers | None,
        caps: Caps,
        *,
        direct: bool,
        now: float,
    ) -> None:
        self.counts = Counts()
        self._plan, self._takers, self._window, self._caps = plan, takers, window, caps
        self._direct = direct
        self._now = self._looked = now
        self._most_bytes = int(
            max(1, min(window.batch_bytes, *filter(None, (window.bytes, window.run_bytes, caps.run, caps.node))))
        )
        self._bucket = TokenBucket(caps.run, now)
        self._stock = Stock(nodes)
        self._pace = Pace()
        self._numbers = itertools.count(1)
        self._lots: dict[int, Lot] = {}
        self._stored: dict[int, Lot] = {}
        self._ready: deque[Lot] = deque()
        self._flights: dict[int, Flight] = {}
        self._fetching_bytes = 0
        self._out: list[Order] = []
        self._released: list[int] = []
        # The convoy: the plan's chunks that go into lots.
        self._source: Iterator[PlannedChunk] | None = None
        self._peeked: PlannedChunk | None = None
        self._position = 0
        self._over = False
        self._turn = 0
        self._full = False
        self._blocked_since: float | None = None
        self._members: list[str] | None = None
        self._lanes: dict[str, Lane] = {}
        self._astray: dict[str, Lane] = {}  # those that lag, or have something to fetch for themselves
        for name in nodes:
            self._add_lane(name, name)

    def _add_lane(self, name: str, role: str) -> Lane:
        backlog = Backlog(self._plan, self._wanted(role))
        lane = self._lanes[name] = Lane(name, role, backlog, window=self._window, rate=self._caps.node, now=self._now)
        self._members = None
        if self._direct:
            self._detach(lane, 0)
        return lane

    def _wanted(self, role: str) -> Callable[[PlannedChunk], bool]:
        takers = self._takers
        return lambda chunk: takers is None or (of := takers(chunk)) is None or role in of

    def _decide(self) -> None:
        """Give all orders that can be given now."""
        if self._now >= self._looked + _LOOK_SECS or not self._flights:
            self._looked = self._now
            self._look()
        for _ in range(min(len(self._ready), _SCAN)):
            lot = self._ready.popleft()
            if lot.number in self._lots and lot.stage is Stage.READY and lot.pending and not self._assign(lot):
                self._ready.append(lot)
        self._move_on()
        for lane in list(self._astray.values()):
            if lane.lagging and not lane.detached and lane.idle and lane.started:
                self._rejoin(lane)
            self._feed(lane)
            if not lane.lagging and not lane.backlog:
                del self._astray[lane.name]

    # From the plan into lots, and from the Hub to one node.

    def _peek(self) -> PlannedChunk | None:
        """The next chunk of the plan that goes into a lot."""
        if self._peeked is None and not self._over:
            if self._source is None:
                self._source = self._plan(self._position)
            self._peeked = next(self._source, None)
            self._over = self._peeked is None
        return self._peeked

    def _advance(self) -> None:
        self._peeked = None
        self._position += 1

    def _member_names(self) -> list[str]:
        if self._members is None:
            self._members = [name for name, lane in self._lanes.items() if not lane.lagging]
        return self._members

    def _needers(self, chunk: PlannedChunk) -> list[str]:
        members = self._member_names()
        of = self._takers(chunk) if self._takers else None
        return members if of is None else [name for name in members if self._lanes[name].role in of]

    def _move_on(self) -> None:
        """Make lots, and have them fetched, as far as there is room."""
        while not self._full and self._member_names() and (chunk := self._peek()) is not None:
            needers = self._needers(chunk)
            if not needers:
                self._advance()
                continue
            shared = len(needers) > 1
            if shared and not self._stock.can_ever(chunk.size):
                # No store takes it: from here on each node goes on by itself.
                for name in list(self._member_names()):
                    self._detach(self._lanes[name], self._position)
                return
            if len(self._lots) >= self._window.lots or (shared and not self._stock.fits(needers, chunk.size)):
                self._full = True
                self._blocked_since = self._now if self._blocked_since is None else self._blocked_since
                return
            turn = self._turn % len(needers)
            self._turn += 1
            order = needers[turn:] + needers[:turn]
            lanes = (self._lanes[name] for name in order[:_SCAN])
            if not self._may_fetch(chunk.size) or not any(lane.may_fetch(chunk.size, self._now) for lane in lanes):
                return
            self._begin_lot(order, self._cut(chunk, needers, shared=shared), shared=shared)

    def _cut(self, first: PlannedChunk, needers: list[str], *, shared: bool) -> tuple[PlannedChunk, ...]:
        """The next chunks of the plan that the same nodes lack."""
        least = self._stock.least if shared else None
        most = self._most_bytes if least is None else max(1, min(self._most_bytes, least // _PARTS))
        takers = self._takers(first) if self._takers else None
        chunks: list[PlannedChunk] = []
        size = 0
        while (chunk := self._peek()) is not None and len(chunks) < self._window.batch_chunks:
            together = size + chunk.size
            if chunks and (together > most or (shared and not self._stock.fits(needers, together))):
                break
            if chunks and (not self._may_fetch(together) or (self._takers and self._takers(chunk) != takers)):
                break
            chunks.append(chunk)
            size = together
            self._advance()
        return tuple(chunks)

    def _begin_lot(self, needers: list[str], chunks: tuple[PlannedChunk, ...], *, shared: bool) -> None:
        lot = Lot(next(self._numbers), chunks, needers)
        self._lots[lot.number] = lot
        if shared:
            self._stock.reserve(lot, needers)
        self._blocked_since = None
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
        self._fly(order, lot)
        size = total_bytes(chunks)
        self._bucket.spend(size)
        self._fetching_bytes += size
        return order

    def _fly(self, order: Order, lot: Lot | None) -> None:
        self._flights[order.number] = Flight(order, lot, self._now)
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
            self._full = False
        elif lot.stage is Stage.READY and lot.pending:
            if lot not in self._ready:
                self._ready.append(lot)
        elif lot.stage is Stage.STORED and not lot.pending and all(self._lanes[name].lagging for name in lot.receiving):
            # Copies elsewhere may be thrown away by their stores: nobody that matters takes them from there.
            self._stock.free_all(lot, but=(lot.holder, *lot.receiving))
            self._full = False

    # Nodes that hold up the others.

    def _look(self) -> None:
        self._full = False
        for lane in self._lanes.values():
            self._ask(lane)
        patience, pace = self._window.patience_secs, self._pace.secs_per_byte
        for flight in list(self._flights.values()) if pace is not None else ():
            lot = flight.lot
            if lot is None or lot.stage is not Stage.FETCHING or lot.source != flight.order.number or not lot.pending:
                continue
            if self._now - flight.since > max(patience, _LATE * lot.size * (pace or 0.0)):
                self._go_on_without(flight, lot)
        if self._blocked_since is not None and self._now - self._blocked_since > patience:
            self._leave_behind()
            self._blocked_since = self._now

    def _go_on_without(self, flight: Flight, lot: Lot) -> None:
        """One fetches so slowly that another one is asked; what it fetches is for itself."""
        node = flight.order.node
        self.counts.slow_fetches += 1
        self.counts.refetched += len(lot.chunks)
        if node in lot.reserved:
            lot.reserved.discard(node)
            flight.hold = lot.size
        flight.lot = None
        lot.ready_again()
        self._ready.append(lot)

    def _leave_behind(self) -> None:
        """Leave out those for whom alone the oldest lot lies in the store."""
        for lot in self._stored.values():
            waiting = [*lot.pending, *lot.receiving]
            slow = [name for name in waiting if not self._lanes[name].lagging]
            if slow and len(waiting) <= lot.done + 1:
                for name in slow:
                    self._lag(self._lanes[name])
                return

    def _lag(self, lane: Lane) -> None:
        self.counts.lags += 1
        lane.lags += 1
        lane.lagging = True
        lane.lag_from = self._position
        self._members = None
        self._astray[lane.name] = lane
        for lot in list(self._lots.values()):
            if lane.name in lot.pending:
                del lot.pending[lane.name]
                lane.backlog.add(lot.chunks)
                self._stock.free(lot, lane.name)
            self._settle(lot)
        if lane.lags > self._window.lags:
            self._detach(lane, lane.lag_from)
        self._full = False

    def _rejoin(self, lane: Lane) -> None:
        lane.lagging = False
        lane.backlog.add_stretch(lane.lag_from, self._position)
        self._members = None

    def _detach(self, lane: Lane, start: int) -> None:
        """Have a node go on by itself from a chunk of the plan to its end."""
        lane.lagging = lane.detached = True
        lane.backlog.add_stretch(start, None)
        self._astray[lane.name] = lane
        self._members = None
