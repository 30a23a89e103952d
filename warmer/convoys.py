"""How far nodes that keep pace with each other are in a part of the plan. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from warmer.lanes import Lane
    from warmer.plan import PlannedChunk

    Reader = Callable[[int], Iterator[PlannedChunk]]


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Chunks of the plan that the same nodes are to have.

    Attributes:
        plan: Reads them from the n-th of them on.
        nodes: Who is to have them; None for all.
        rest: The same as `plan`, for a lost node, where that costs less.
    """

    plan: Reader
    nodes: frozenset[str] | None = None
    rest: Reader | None = None

    def is_for(self, node: str) -> bool:
        """Whether a node is to have them."""
        return self.nodes is None or node in self.nodes

    def left(self, start: int) -> Iterator[PlannedChunk]:
        """What a lost node will not get."""
        return (self.rest or self.plan)(start)


class Convoy:
    """One reading of a part of the plan, whose chunks go into lots for all its members.

    Args:
        part: The part.
        behind: The convoy of those that cannot keep up with this one; None where each of them goes on by itself.

    Attributes:
        position: The number of the next chunk, in the part.
        lots: How many of its lots are under way.
        full: Whether there was no room for another lot when it was last tried, and nothing has changed since.
        blocked_since: When there first was no room since a lot was begun; None when there was.
        turn: Rotates who is asked first.
    """

    def __init__(self, part: Part, behind: Convoy | None = None) -> None:
        self.part = part
        self.behind = behind
        self._source: Iterator[PlannedChunk] | None = None
        self._peeked: PlannedChunk | None = None
        self._over = False
        self._begun = False
        self._members: list[Seat] | None = None
        self.position = 0
        self.lots = 0
        self.full = False
        self.blocked_since: float | None = None
        self.turn = 0

    def begin(self, position: int) -> None:
        """Read from here on; once it has begun, this does nothing."""
        if not self._begun:
            self._begun = True
            self.position = position

    def peek(self) -> PlannedChunk | None:
        """The next chunk; None at the end of the part."""
        if self._peeked is None and not self._over:
            if self._source is None:
                self._source = self.part.plan(self.position)
            self._peeked = next(self._source, None)
            self._over = self._peeked is None
        return self._peeked

    def advance(self) -> None:
        """Go past the next chunk."""
        self._peeked = None
        self.position += 1

    def members(self, lanes: Iterable[Lane]) -> list[Seat]:
        """The seats in it, among those of all nodes."""
        if self._members is None:
            seats = (lane.seats.get(self.part) for lane in lanes)
            self._members = [seat for seat in seats if seat is not None and seat.convoy is self]
        return self._members

    def changed(self) -> None:
        """Some node has come or gone."""
        self._members = None

    def block(self, now: float) -> None:
        """There is no room for another lot."""
        self.full = True
        self.blocked_since = now if self.blocked_since is None else self.blocked_since


class Seat:
    """Where a node is in one part of the plan.

    Args:
        lane: The node.
        convoy: With whom it is to keep pace.
        now: The time.

    Attributes:
        convoy: With whom it keeps pace; None when it fetches all that is left for itself.
        entry: The number of the first chunk of the part that it takes from its convoy.
    """

    def __init__(self, lane: Lane, convoy: Convoy, now: float) -> None:
        self.lane = lane
        self.part = convoy.part
        self.convoy: Convoy | None = convoy
        self.entry = 0
        self._blame = 0.0
        self._blamed_at = now

    @property
    def start(self) -> int | None:
        """The number of the first chunk that it has not been given by its convoy; None when it is in none."""
        return None if self.convoy is None else max(self.entry, self.convoy.position)

    def blame(self, secs: float, now: float, memory_secs: float) -> float:
        """Note that it held up the others for so long; returns what is remembered of all such times."""
        self._blame = self._blame * math.exp((self._blamed_at - now) / memory_secs) + secs
        self._blamed_at = now
        return self._blame

    def forgive(self) -> None:
        """Remember none of it."""
        self._blame = 0.0
