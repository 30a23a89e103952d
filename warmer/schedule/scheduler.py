"""Which node fetches which chunks, who takes them from the object store and when, and what a lost node means.

Pure: told what happened and what time it is, it says what to do; knows nothing of Ray. The plan falls into *parts*, each of
which the same nodes are to have, and each part moves on in *lots*: one node fetches a lot from the Hub, and every other
node that is to have it and lacks it takes it from the object store. A node that cannot
keep up is left out of the lots that come, and fetches for itself what it missed. Each chunk ends exactly once for each
node: among what an event returns, or among what `lost` or `abandon` yields.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeGuard

from warmer.report.outcomes import INTERRUPTED, MISSING, TIER_KINDS, UNMOVED_KINDS, Copied, Failed, Present
from warmer.schedule.batch import Lot, Stage
from warmer.schedule.cohort import Lane, Seat
from warmer.schedule.rate import Caps
from warmer.schedule.stragglers import Laggards
from warmer.schedule.tasks import Fetch, Receive, Window, total_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from warmer.plan.plan_file import PlannedChunk
    from warmer.report.outcomes import Outcome
    from warmer.schedule.batch import Flight
    from warmer.schedule.cohort import Part
    from warmer.schedule.tasks import Order

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
        lane: The node as it was.
        named: Chunks that it had been told to take, or was about to be told.
        starts: Of each part the number of the first chunk that its convoy had not come to; None where it was in none.
    """

    lane: Lane
    named: list[tuple[PlannedChunk, ...]]
    starts: dict[Part, int | None]

    def rest(self) -> Iterator[PlannedChunk]:
        """All of it."""
        for chunks in self.named:
            yield from chunks
        yield from self.lane.backlog.rest()
        for part, start in self.starts.items():
            if start is not None:
                yield from part.left(start)


class Schedule(Laggards):
    """The state of a run.

    Args:
        nodes: Names of the nodes, and the bytes that lots may take in the object store of each.
        parts: The plan: which chunks which nodes are to have. No chunk is in two of them.
        window: How much is under way at a time; by default as `Window` has it.
        caps: Most bytes a second.
        direct: Every node fetches everything for itself.
        now: The time, in seconds of any clock that goes forwards.

    Attributes:
        counts: What it had to do.
    """

    def __init__(
        self,
        nodes: Mapping[str, int],
        parts: Sequence[Part],
        window: Window | None = None,
        *,
        caps: Caps = Caps(),  # noqa: B008 - frozen
        direct: bool = False,
        now: float = 0.0,
    ) -> None:
        super().__init__(nodes, parts, window or Window(), caps, direct=direct, now=now)
        self._vacant: dict[str, _Vacancy] = {}

    @property
    def nodes(self) -> list[str]:
        """The nodes that are not lost."""
        return list(self._lanes)

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
        if self._flights or self._lots:
            return False
        if any(lane.backlog for lane in self._astray.values()):
            return False
        return all(not self._members(convoy) or convoy.peek() is None for convoy in self._convoys)

    @property
    def under_way(self) -> dict[str, tuple[int, int]]:
        """The chunks that nodes are busy with, and their bytes; nodes with nothing to do are left out."""
        found: dict[str, tuple[int, int]] = {}
        for flight in self._flights.values():
            chunks, size = found.get(flight.order.node, (0, 0))
            own = flight.order.chunks
            found[flight.order.node] = (chunks + len(own), size + total_bytes(own))
        return found

    @property
    def store_bytes(self) -> dict[str, int]:
        """The bytes that are counted on the object store of each node."""
        return dict(self._stock.used)

    def released(self) -> list[int]:
        """The numbers of orders to fetch whose chunks nobody waits for any more; each is told once."""
        released, self._released = self._released, []
        return released

    def started(self, node: str) -> None:
        """A node takes part from now on.

        Raises:
            KeyError: There is no such node, or it is lost.
        """
        self._lanes[node].started = True

    def orders(self, now: float) -> list[Order]:
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
        flight = self._land(number, now)
        order, lot = flight.order, flight.lot
        self._pay(flight, outcomes)
        copied = [outcome.size for outcome in outcomes if _has_moved(outcome)]
        size = sum(copied)
        self.counts.fetched += len(copied)
        self.counts.fetched_bytes += size
        if size:
            self._last_in_time = not self._is_late(flight)
            if self._last_in_time:
                self._well_since = max(self._well_since, flight.since)
            self._lanes[order.node].pace.add(size, now - flight.since)
            self._pace.add(size, now - flight.since)
        if flight.hold:
            self._stock.give_back(order.node, flight.hold)
        if lot is None:
            if shared:
                self._released.append(number)
            return self._end_alone(flight, outcomes)
        return self._sort(lot, order, outcomes, shared=shared)

    def _end_alone(self, flight: Flight, outcomes: Sequence[Outcome]) -> list[Ended]:
        """What a node fetched for itself has ended. Where it did so only because it was slow, others help it once."""
        node, lot = flight.order.node, flight.was_of
        if lot is None:
            return [(node, outcome) for outcome in outcomes]
        ended: list[Ended] = []
        failed: list[PlannedChunk] = []
        for chunk, outcome in zip(flight.order.chunks, outcomes, strict=True):
            if isinstance(outcome, Failed) and outcome.kind not in _OWN_KINDS and outcome.kind != MISSING:
                failed.append(chunk)
            else:
                ended.append((node, outcome))
        lane = self._lanes[node]
        lives = lot.number in self._lots and self._in(lane, lot.convoy) and self._stock.fits([node], lot.size)
        if failed and lives and lot.chunks == tuple(failed):
            lot.pending[node] = None
            lot.avoid |= {node}
            self._stock.reserve_too(lot, node)
            self._settle(lot)
            if lot.stage is Stage.STORED:
                self._offer(lot)
        elif failed:
            self._alone(lane).add(tuple(failed))
        return ended

    def _pay(self, flight: Flight, outcomes: Sequence[Outcome]) -> None:
        """Settle what an order to fetch asked the Hub for, tries included, with what the caps let go for it.

        Chunks that were asked for several times put the caps into debt; those that passed no network are given back.
        """
        size = total_bytes(flight.order.chunks)
        asked = sum(_asked(outcome) for outcome in outcomes)
        self._bucket.give_back(flight.spent - asked)
        self._lanes[flight.order.node].bucket.give_back(size - asked)
        if size:
            # The next orders reckon with as many tries: the first ones to fail would else all be let go at once.
            self._asking += _HEED * (max(1.0, asked / size) - self._asking)

    def _give_back(self, order: Order, outcomes: Sequence[Outcome | None], *, lost: bool) -> None:
        """Give a node back what it let go to receive chunks that did not move, such as those that were there."""
        moved = sum(
            0 if outcome is None and lost else chunk.size if outcome is None else _asked(outcome)
            for chunk, outcome in zip(order.chunks, outcomes, strict=True)
        )
        self._lanes[order.node].bucket.give_back(total_bytes(order.chunks) - moved)

    def _sort(self, lot: Lot, order: Order, outcomes: Sequence[Outcome], *, shared: bool) -> list[Ended]:
        """Tell apart what is in the store, what others have to fetch, and what failed for all."""
        node, others = order.node, tuple(lot.pending)
        ended: list[Ended] = []
        stored, again, retry = [], [], []
        for chunk, outcome in zip(order.chunks, outcomes, strict=True):
            if isinstance(outcome, Failed) and outcome.kind not in _OWN_KINDS:
                if outcome.kind != MISSING and others and lot.attempts + 1 < _TRIES:
                    retry.append(chunk)
                    continue
                ended += [(other, outcome) for other in others]
            elif isinstance(outcome, Copied) and shared:
                stored.append(chunk)
            else:
                again.append(chunk)
            ended.append((node, outcome))
        if others:
            self._split(lot, again, others)
            self._split(lot, retry, (*others, node), failed_on=node)
        if not stored:
            lot.pending.clear()
            lot.source = 0
            if shared:
                self._released.append(order.number)
        lot.chunks, lot.stage = tuple(stored), Stage.STORED
        self._stock.shrink(lot, total_bytes(lot.chunks))
        self._stored[lot.number] = lot
        self._settle(lot)
        if lot.number in self._lots:
            self._offer(lot)
        self._room()
        return ended

    def _split(
        self, lot: Lot, chunks: Sequence[PlannedChunk], nodes: tuple[str, ...], *, failed_on: str | None = None
    ) -> None:
        """Some chunks of a lot go on as a lot of their own."""
        if not chunks:
            return
        child = Lot(next(self._numbers), tuple(chunks), nodes, lot.convoy)
        child.convoy.lots += 1
        child.avoid, child.attempts, child.handed_over = lot.avoid, lot.attempts, lot.handed_over
        if failed_on is not None:
            child.avoid, child.attempts = frozenset({failed_on}), lot.attempts + 1
            self.counts.refetched += len(chunks)
        self._stock.hand_on(lot, child, nodes)
        lot.size -= child.size
        self._lots[child.number] = child
        self._ready.append(child)

    def received(
        self, number: int, outcomes: Sequence[Outcome | None], *, now: float, holder_lost: bool = False
    ) -> list[Ended]:
        """An order to receive has ended.

        Args:
            number: Of the order.
            outcomes: How each of its chunks ended, in their order; None for one that did not arrive, or not rightly.
            now: The time.
            holder_lost: Whether they did not arrive because whoever left them in the store is lost.

        Returns:
            What has ended for which node by this.

        Raises:
            KeyError: The order is not under way, or its node is lost.
        """
        flight = self._land(number, now)
        order, lane = flight.order, self._lanes[flight.order.node]
        self._give_back(order, outcomes, lost=holder_lost)
        lot = flight.lot if flight.lot is not None and flight.lot.number in self._lots else None
        missed = tuple(chunk for chunk, outcome in zip(order.chunks, outcomes, strict=True) if outcome is None)
        size = sum(chunk.size for chunk, outcome in zip(order.chunks, outcomes, strict=True) if _has_moved(outcome))
        if size:
            lane.receive_pace.add(size, now - flight.since)
            self._receive_pace.add(size, now - flight.since)
        if lot is not None:
            lot.receiving.discard(lane.name)
            lot.done += not missed and size > 0  # who had it all elsewhere serves it to nobody
        if missed:
            self._undelivered(lane, lot, order, missed, holder_lost=holder_lost)
        if lot is not None:
            self._settle(lot)
            if lot.stage is Stage.STORED and lot.number in self._lots:
                self._offer(lot)
        self._ask(lane)
        return [(lane.name, outcome) for outcome in outcomes if outcome is not None]

    def _undelivered(
        self, lane: Lane, lot: Lot | None, order: Order, missed: tuple[PlannedChunk, ...], *, holder_lost: bool
    ) -> None:
        source = order.source if isinstance(order, Receive) else 0
        whole = lot is not None and lot.chunks is order.chunks and len(missed) == len(order.chunks)
        if lot is None or not whole or not self._in(lane, lot.convoy) or (lot.source == source and not holder_lost):
            self._alone(lane).add(missed)
            return
        # Others lack it too: it is fetched again for all of them together.
        lot.pending[lane.name] = None
        if lot.source == source:
            self._fetch_again(lot)

    def _fetch_again(self, lot: Lot) -> None:
        """What was stored of a lot is gone, also for those that were about to be told to take it."""
        self._stored.pop(lot.number, None)
        source = lot.source
        self._released.append(source)
        lot.ready_again()
        untold = [order for order in self._out if isinstance(order, Receive) and order.source == source]
        self._out = [order for order in self._out if order not in untold]
        for order in untold:
            self.received(order.number, [None] * len(order.chunks), now=self._now, holder_lost=True)
        if lot.pending:
            self.counts.refetched += len(lot.chunks)

    def lost(self, node: str, *, keep_place: bool = False) -> Iterator[PlannedChunk]:
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
        lane = self._lanes.pop(node)
        self._astray.pop(node, None)
        self._changed()
        self._out = [order for order in self._out if order.node != node]
        named: list[tuple[PlannedChunk, ...]] = []
        for number in [number for number, flight in self._flights.items() if flight.order.node == node]:
            order = self._flights.pop(number).order
            named.append(order.chunks)
            self._fetching_bytes -= total_bytes(order.chunks) if isinstance(order, Fetch) else 0
        for lot in list(self._lots.values()):
            if node in lot.pending:
                named.append(lot.chunks)
                del lot.pending[node]
            lot.receiving.discard(node)
            self._stock.free(lot, node)
            if lot.holder == node:
                if lot.stage is Stage.STORED:
                    self._fetch_again(lot)
                else:
                    self.counts.refetched += len(lot.chunks) if lot.pending else 0
                    lot.ready_again()
            self._settle(lot)
        self._stock.drop(node)
        vacancy = _Vacancy(lane, named, {part: seat.start for part, seat in lane.seats.items()})
        if keep_place:
            self._vacant[node] = vacancy
            return iter(())
        return vacancy.rest()

    def abandon(self, node: str) -> Iterator[PlannedChunk]:
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
        role = self._vacant.pop(lost).lane.role
        self._stock.admit(node, store_bytes)
        lane = self._add_lane(node, role)
        for seat in lane.seats.values():
            if seat.convoy is not None:
                self._alone(lane).add_stretch(seat.part, 0, seat.convoy.position)

    def resume(self, node: str, store_bytes: int) -> None:
        """A lost node goes on: what ended on it is there, and it is to have what did not.

        Args:
            node: Its name.
            store_bytes: The bytes that lots may take in its object store.

        Raises:
            KeyError: Its place is not kept.
        """
        vacancy = self._vacant.pop(node)
        before = vacancy.lane
        self._stock.admit(node, store_bytes)
        lane = self._lanes[node] = Lane(node, before.role, self._window, self._caps.node, self._now)
        lane.bucket, lane.backlog = before.bucket, before.backlog
        for chunks in vacancy.named:
            lane.backlog.add(chunks)
        for convoy in self._leading:
            if (old := before.seats.get(convoy.part)) is None:
                continue
            seat = lane.seats[convoy.part] = Seat(lane, old.convoy or convoy, self._now)
            start = vacancy.starts[convoy.part]
            if old.convoy is None or start is None:
                seat.convoy = None
            else:  # what its convoy passed meanwhile it fetches for itself
                seat.entry = max(start, old.convoy.position)
                lane.backlog.add_stretch(convoy.part, start, seat.entry)
        self._alone(lane)
        self._changed()

    def _land(self, number: int, now: float) -> Flight:
        self._now = max(self._now, now)
        flight = self._flights.pop(number)
        order = flight.order
        fetch = isinstance(order, Fetch)
        self._lanes[order.node].end(order.chunks, fetch=fetch)
        if fetch:
            self._fetching_bytes -= total_bytes(order.chunks)
        return flight


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
