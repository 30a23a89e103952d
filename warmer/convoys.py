"""How far nodes that keep pace with each other are in the plan. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from warmer.lanes import Lane, Reader
    from warmer.plan import PlannedChunk


class Convoy:
    """One reading of the plan, whose chunks go into lots for all its members.

    Args:
        plan: Reads the plan from its n-th chunk on.

    Attributes:
        position: The number of the next chunk.
        lots: How many of its lots are under way.
        full: Whether there was no room for another lot when it was last tried, and nothing has changed since.
        blocked_since: When there first was no room since a lot was begun; None when there was.
        turn: Rotates who is asked first.
    """

    def __init__(self, plan: Reader) -> None:
        self._plan = plan
        self._source: Iterator[PlannedChunk] | None = None
        self._peeked: PlannedChunk | None = None
        self._over = False
        self._begun = False
        self._members: list[Lane] | None = None
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
        """The next chunk; None at the end of the plan."""
        if self._peeked is None and not self._over:
            if self._source is None:
                self._source = self._plan(self.position)
            self._peeked = next(self._source, None)
            self._over = self._peeked is None
        return self._peeked

    def advance(self) -> None:
        """Go past the next chunk."""
        self._peeked = None
        self.position += 1

    def members(self, lanes: Iterable[Lane]) -> list[Lane]:
        """Those among all nodes that are in it."""
        if self._members is None:
            self._members = [lane for lane in lanes if lane.convoy is self and not lane.detached]
        return self._members

    def changed(self) -> None:
        """Some node has come or gone."""
        self._members = None

    def block(self, now: float) -> None:
        """There is no room for another lot."""
        self.full = True
        self.blocked_since = now if self.blocked_since is None else self.blocked_since
