"""Cohorts, which are nodes that process a list of chunks together, and the state of each node. Pure."""

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
    """Chunks of the plan that the same nodes need.

    Attributes:
        plan: Iterates over the chunks from a given index on.
        nodes: Names of the nodes that need them; None for all nodes.
        rest: Cheaper alternative to `plan` for the remainder of a lost node; None if there is none.
    """

    plan: Reader
    nodes: frozenset[str] | None = None
    rest: Reader | None = None

    def is_for(self, node: str) -> bool:
        """Return whether a node needs these chunks."""
        return self.nodes is None or node in self.nodes

    def left(self, start: int) -> Iterator[ChunkRef]:
        """Iterate over the chunks from index `start` on that a lost node will not get."""
        return (self.rest or self.plan)(start)


class Cohort:
    """One pass over a part of the plan, whose chunks go into batches for all members.

    Args:
        part: Part of the plan.
        behind: Cohort of the nodes that cannot keep up with this one; None if each of these continues by itself.

    Attributes:
        position: Index of the next chunk in the part.
        batches: Number of the cohort's batches in progress.
        full: Whether the last attempt found no room for another batch and nothing has changed since.
        blocked_since: Time since which there has been no room for another batch; None if there is room.
        turn: Counter that rotates which node is considered first.
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
        """Start the pass at a position; no effect once it has started."""
        if not self._begun:
            self._begun = True
            self.position = position

    def peek(self) -> ChunkRef | None:
        """Return the next chunk; None at the end of the part."""
        if self._peeked is None and not self._over:
            if self._source is None:
                self._source = self.part.plan(self.position)
            self._peeked = next(self._source, None)
            self._over = self._peeked is None
        return self._peeked

    def advance(self) -> None:
        """Skip the next chunk."""
        self._peeked = None
        self.position += 1

    def members(self, states: Iterable[NodeState]) -> list[Membership]:
        """Return the memberships in the cohort, given the states of all nodes."""
        if self._members is None:
            memberships = (state.memberships.get(self.part) for state in states)
            self._members = [
                membership for membership in memberships if membership is not None and membership.cohort is self
            ]
        return self._members

    def changed(self) -> None:
        """Forget the cached members because a node joined or left."""
        self._members = None

    def block(self, now: float) -> None:
        """Record that there is no room for another batch."""
        self.full = True
        self.blocked_since = now if self.blocked_since is None else self.blocked_since


class Membership:
    """Progress of a node in one part of the plan.

    Args:
        state: State of the node.
        cohort: Cohort that the node joins.
        now: Current time, in seconds.

    Attributes:
        cohort: Cohort of the node; None if the node fetches all its remaining chunks by itself.
        entry: Index of the first chunk of the part that the node takes from its cohort.
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
        """Index of the first chunk that the cohort has not given to the node; None without a cohort."""
        return None if self.cohort is None else max(self.entry, self.cohort.position)

    def blame(self, secs: float, now: float, memory_secs: float) -> float:
        """Add seconds for which the node delayed the others; return the decayed sum of all such times."""
        self._blame = self._blame * math.exp((self._blamed_at - now) / memory_secs) + secs
        self._blamed_at = now
        return self._blame

    def forgive(self) -> None:
        """Reset the recorded delays."""
        self._blame = 0.0


MAX_RANGES: Final = 64
"""Maximum ranges of the plan in a backlog; a node that reaches it also fetches all later chunks by itself, as one range."""


@dataclass(frozen=True, slots=True)
class PlanRange:
    """Chunks of a part of the plan from index `start` up to, not including, `end`, or to the end of the part."""

    part: PlanSection
    start: int
    end: int | None


class Backlog:
    """Chunks that a node fetches by itself: named chunks, and ranges of the plan that are read lazily."""

    def __init__(self) -> None:
        self._named: deque[tuple[ChunkRef, ...]] = deque()
        self._ranges: deque[PlanRange] = deque()
        self._reading: Iterator[ChunkRef] | None = None
        self._at = 0
        self._peeked: ChunkRef | None = None

    def add(self, chunks: tuple[ChunkRef, ...]) -> None:
        """Add named chunks."""
        if chunks:
            self._named.append(chunks)

    def add_range(self, part: PlanSection, start: int, end: int | None) -> None:
        """Add the chunks of a part of the plan from index `start` up to, not including, `end`, or to the end of the part.

        An empty range, whose `end` is not after its `start`, is ignored.
        """
        if end is not None and end <= start:
            return
        last = self._ranges[-1] if self._ranges else None
        if last is not None and last.part is part and last.end == start:
            self._ranges[-1] = PlanRange(part, last.start, end)
        else:
            self._ranges.append(PlanRange(part, start, end))

    @property
    def full(self) -> bool:
        """Whether the backlog has the maximum number of ranges."""
        return len(self._ranges) >= MAX_RANGES

    def __bool__(self) -> bool:
        """Return whether any chunk is left."""
        return bool(self._named) or self._peek() is not None

    def _peek(self) -> ChunkRef | None:
        """Return the next chunk of the ranges."""
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
        """Take the chunks of the next fetch; none if the first chunk does not fit.

        Args:
            most_chunks: Maximum chunks of the fetch.
            most_bytes: Maximum bytes of the fetch; a larger chunk goes alone.
            fits: Whether a number of bytes may be requested now.
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
        """Yield the remaining chunks of a lost node; the backlog must not be used afterwards."""
        yield from itertools.chain.from_iterable(self._named)
        if self._peeked is not None:
            yield self._peeked
        for number, plan_range in enumerate(self._ranges):
            first = self._at if number == 0 and self._reading is not None else plan_range.start
            yield from itertools.islice(
                plan_range.part.left(first), None if plan_range.end is None else plan_range.end - first
            )


class NodeState:
    """State of one node, without its tasks in flight.

    Args:
        name: Name of the node.
        role: Name of the node whose chunks it gets: its own, or that of the node that it replaces.
        rate: Cap on the bytes a second that reach the node; None for no cap.
        now: Current time, in seconds.

    Attributes:
        started: Whether the node may get tasks.
        backlog: Chunks that the node fetches by itself.
        memberships: Progress of the node in each part of the plan that concerns it.
        pace, receive_pace: Measured seconds a byte of the node's fetches and receives.
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
