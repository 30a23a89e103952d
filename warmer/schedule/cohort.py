"""Cohorts: nodes that share a list of chunks, and the state of each node."""

from __future__ import annotations

import itertools
import math
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from warmer.schedule.rate import MovingAverage, TokenBucket

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from hfbucket_plugin.tools.selection import ChunkRef

    Reader = Callable[[int], Iterator[ChunkRef]]


@dataclass(frozen=True, slots=True, eq=False)
class PlanSection:
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

    def left(self, start: int) -> Iterator[ChunkRef]:
        """What a lost node will not get."""
        return (self.rest or self.plan)(start)


class Cohort:
    """One reading of a part of the plan, whose chunks go into batches for all its members.

    Args:
        part: The part.
        behind: The cohort of those that cannot keep up with this one; None where each of them goes on by itself.

    Attributes:
        position: The number of the next chunk, in the part.
        batches: How many of its batches are in progress.
        full: Whether there was no room for another batch when it was last tried, and nothing has changed since.
        blocked_since: When there first was no room since a batch was begun; None when there was.
        turn: Rotates who is asked first.
    """

    def __init__(self, part: PlanSection, behind: Cohort | None = None) -> None:
        self.part = part
        self.behind = behind
        self._source: Iterator[ChunkRef] | None = None
        self._peeked: ChunkRef | None = None
        self._over = False
        self._begun = False
        self._members: list[Membership] | None = None
        self.position = 0
        self.batches = 0
        self.full = False
        self.blocked_since: float | None = None
        self.turn = 0

    def begin(self, position: int) -> None:
        """Read from here on; once it has begun, this does nothing."""
        if not self._begun:
            self._begun = True
            self.position = position

    def peek(self) -> ChunkRef | None:
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

    def members(self, states: Iterable[NodeState]) -> list[Membership]:
        """The memberships in it, among those of all nodes."""
        if self._members is None:
            memberships = (state.memberships.get(self.part) for state in states)
            self._members = [
                membership for membership in memberships if membership is not None and membership.cohort is self
            ]
        return self._members

    def changed(self) -> None:
        """Forget the members: a node joined or left."""
        self._members = None

    def block(self, now: float) -> None:
        """Note that there is no room for another batch."""
        self.full = True
        self.blocked_since = now if self.blocked_since is None else self.blocked_since


class Membership:
    """Where a node is in one part of the plan.

    Args:
        state: The node.
        cohort: With whom it is to keep pace.
        now: The time.

    Attributes:
        cohort: With whom it keeps pace; None when it fetches all that is left for itself.
        entry: The number of the first chunk of the part that it takes from its cohort.
    """

    def __init__(self, state: NodeState, cohort: Cohort, now: float) -> None:
        self.state = state
        self.part = cohort.part
        self.cohort: Cohort | None = cohort
        self.entry = 0
        self._blame = 0.0
        self._blamed_at = now

    @property
    def start(self) -> int | None:
        """The number of the first chunk that it has not been given by its cohort; None when it is in none."""
        return None if self.cohort is None else max(self.entry, self.cohort.position)

    def blame(self, secs: float, now: float, memory_secs: float) -> float:
        """Note that it held up the others for so long; returns what is remembered of all such times."""
        self._blame = self._blame * math.exp((self._blamed_at - now) / memory_secs) + secs
        self._blamed_at = now
        return self._blame

    def forgive(self) -> None:
        """Remember none of it."""
        self._blame = 0.0


MAX_RANGES: Final = 64
"""A node with more ranges of the plan to fetch for itself takes all that follows for itself, too, as one."""


@dataclass(frozen=True, slots=True)
class PlanRange:
    """The chunks of a part of the plan from number `start` up to `end`, or to its end."""

    part: PlanSection
    start: int
    end: int | None


class Backlog:
    """What a node fetches for itself: chunks that are named, and ranges of the plan that are read when it comes to them."""

    def __init__(self) -> None:
        self._named: deque[tuple[ChunkRef, ...]] = deque()
        self._ranges: deque[PlanRange] = deque()
        self._reading: Iterator[ChunkRef] | None = None
        self._at = 0
        self._peeked: ChunkRef | None = None

    def add(self, chunks: tuple[ChunkRef, ...]) -> None:
        """Name chunks."""
        if chunks:
            self._named.append(chunks)

    def add_range(self, part: PlanSection, start: int, end: int | None) -> None:
        """Add the chunks of a part of the plan from number `start` up to `end`, or to its end; none where `end` is no later."""
        if end is not None and end <= start:
            return
        last = self._ranges[-1] if self._ranges else None
        if last is not None and last.part is part and last.end == start:
            self._ranges[-1] = PlanRange(part, last.start, end)
        else:
            self._ranges.append(PlanRange(part, start, end))

    @property
    def full(self) -> bool:
        """Whether there are as many ranges as are kept."""
        return len(self._ranges) >= MAX_RANGES

    def __bool__(self) -> bool:
        """Whether anything is left."""
        return bool(self._named) or self._peek() is not None

    def _peek(self) -> ChunkRef | None:
        """The next chunk of the ranges."""
        while self._peeked is None and self._ranges:
            plan_range = self._ranges[0]
            if self._reading is None:
                self._at = plan_range.start
                self._reading = plan_range.part.plan(plan_range.start)
            self._peeked = next(self._reading, None) if plan_range.end is None or self._at < plan_range.end else None
            self._at += 1
            if self._peeked is None:
                self._ranges.popleft()
                self._reading = None
        return self._peeked

    def cut(self, most_chunks: int, most_bytes: int, fits: Callable[[int], bool]) -> tuple[ChunkRef, ...]:
        """Take what makes the next order; nothing where the first chunk does not fit.

        Args:
            most_chunks: Of the order.
            most_bytes: Of the order; a larger chunk goes alone.
            fits: Whether a number of bytes may be ordered now.
        """
        taken: list[ChunkRef] = []
        size = 0
        while len(taken) < most_chunks and (chunk := self._next()) is not None:
            if (taken and size + chunk.size > most_bytes) or not fits(size + chunk.size):
                break
            self._take()
            taken.append(chunk)
            size += chunk.size
        return tuple(taken)

    def _next(self) -> ChunkRef | None:
        return self._named[0][0] if self._named else self._peek()

    def _take(self) -> None:
        if not self._named:
            self._peeked = None
            return
        rest = self._named.popleft()[1:]
        if rest:
            self._named.appendleft(rest)

    def rest(self) -> Iterator[ChunkRef]:
        """What is left of a lost node's; nothing is to be taken any more."""
        yield from itertools.chain.from_iterable(self._named)
        if self._peeked is not None:
            yield self._peeked
        for number, plan_range in enumerate(self._ranges):
            first = self._at if number == 0 and self._reading is not None else plan_range.start
            yield from itertools.islice(
                plan_range.part.left(first), None if plan_range.end is None else plan_range.end - first
            )


class NodeState:
    """What is known of one node, beside the tasks that it has in flight.

    Args:
        name: Its name.
        role: Whose chunks it is to have: its own, or those of the node that it replaces.
        rate: Most bytes a second that reach it; None for no cap.
        now: The time.

    Attributes:
        started: Whether it may be given tasks.
        backlog: What it fetches for itself.
        memberships: Where it is in each part of the plan that it is to have.
        pace, receive_pace: How fast it fetches, and receives.
    """

    def __init__(self, name: str, role: str, rate: float | None, now: float) -> None:
        self.name = name
        self.role = role
        self.backlog = Backlog()
        self.memberships: dict[PlanSection, Membership] = {}
        self.bucket = TokenBucket(rate, now)
        self.started = False
        self.pace = MovingAverage()
        self.receive_pace = MovingAverage()
