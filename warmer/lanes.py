"""One node of a schedule: what it is busy with, and what it has to fetch for itself. Pure."""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from warmer.orders import total_bytes
from warmer.pace import Pace, TokenBucket

MOST_STRETCHES: Final = 64
"""A node with more stretches of the plan to fetch for itself takes all that follows for itself, too, as one."""

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from warmer.convoys import Part, Seat
    from warmer.orders import Window
    from warmer.plan import PlannedChunk


@dataclass(frozen=True, slots=True)
class Stretch:
    """The chunks of a part of the plan from number `start` up to `end`, or to its end."""

    part: Part
    start: int
    end: int | None


class Backlog:
    """What a node fetches for itself: chunks that are named, and stretches of the plan that are read when it comes to them."""

    def __init__(self) -> None:
        self._named: deque[tuple[PlannedChunk, ...]] = deque()
        self._stretches: deque[Stretch] = deque()
        self._reading: Iterator[PlannedChunk] | None = None
        self._at = 0
        self._peeked: PlannedChunk | None = None

    def add(self, chunks: tuple[PlannedChunk, ...]) -> None:
        """Name chunks."""
        if chunks:
            self._named.append(chunks)

    def add_stretch(self, part: Part, start: int, end: int | None) -> None:
        """Add the chunks of a part of the plan from number `start` up to `end`, or to its end."""
        last = self._stretches[-1] if self._stretches else None
        if last is not None and last.part is part and last.end == start:
            self._stretches[-1] = Stretch(part, last.start, end)
        elif end is None or start < end:
            self._stretches.append(Stretch(part, start, end))

    @property
    def full(self) -> bool:
        """Whether there are as many stretches as are kept."""
        return len(self._stretches) >= MOST_STRETCHES

    def __bool__(self) -> bool:
        """Whether anything is left."""
        return bool(self._named) or self._peek() is not None

    def _peek(self) -> PlannedChunk | None:
        """The next chunk of the stretches."""
        while self._peeked is None and self._stretches:
            stretch = self._stretches[0]
            if self._reading is None:
                self._at = stretch.start
                self._reading = stretch.part.plan(stretch.start)
            self._peeked = next(self._reading, None) if stretch.end is None or self._at < stretch.end else None
            self._at += 1
            if self._peeked is None:
                self._stretches.popleft()
                self._reading = None
        return self._peeked

    def cut(self, most_chunks: int, most_bytes: int, fits: Callable[[int], bool]) -> tuple[PlannedChunk, ...]:
        """Take what makes the next order; nothing where the first chunk does not fit.

        Args:
            most_chunks: Of the order.
            most_bytes: Of the order; a larger chunk goes alone.
            fits: Whether so many bytes may be ordered now.
        """
        taken: list[PlannedChunk] = []
        size = 0
        while len(taken) < most_chunks and (chunk := self._next()) is not None:
            if (taken and size + chunk.size > most_bytes) or not fits(size + chunk.size):
                break
            self._take()
            taken.append(chunk)
            size += chunk.size
        return tuple(taken)

    def _next(self) -> PlannedChunk | None:
        return self._named[0][0] if self._named else self._peek()

    def _take(self) -> None:
        if not self._named:
            self._peeked = None
            return
        rest = self._named.popleft()[1:]
        if rest:
            self._named.appendleft(rest)

    def rest(self) -> Iterator[PlannedChunk]:
        """What is left of a lost node's; nothing is to be taken any more."""
        yield from itertools.chain.from_iterable(self._named)
        if self._peeked is not None:
            yield self._peeked
        for number, stretch in enumerate(self._stretches):
            first = self._at if number == 0 and self._reading is not None else stretch.start
            yield from itertools.islice(stretch.part.left(first), None if stretch.end is None else stretch.end - first)


class Lane:
    """One node.

    Args:
        name: Its name.
        role: Whose chunks it is to have: its own, or those of the node that it replaces.
        window: How much may be under way on it.
        rate: Most bytes a second that reach it; None for no cap.
        now: The time.

    Attributes:
        started: Whether it may be given orders.
        backlog: What it fetches for itself.
        seats: Where it is in each part of the plan that it is to have.
        fetches, receives: Orders under way.
        bytes: Under way.
        pace, receive_pace: How fast it fetches, and receives.
    """

    def __init__(self, name: str, role: str, window: Window, rate: float | None, now: float) -> None:
        self.name = name
        self.role = role
        self.backlog = Backlog()
        self.seats: dict[Part, Seat] = {}
        self.bucket = TokenBucket(rate, now)
        self._window = window
        self.started = False
        self.fetches = 0
        self.receives = 0
        self.bytes = 0
        self.pace = Pace()
        self.receive_pace = Pace()

    def may_fetch(self, size: int, now: float) -> bool:
        """Whether it may be told to fetch so many bytes now."""
        return self.fetches < self._window.fetches and self._may(size, now)

    def may_receive(self, size: int, now: float) -> bool:
        """Whether it may be told to receive so many bytes now."""
        return self.receives < self._window.receives and self._may(size, now)

    def _may(self, size: int, now: float) -> bool:
        if not self.started or (self.bytes and self.bytes + size > self._window.bytes):
            return False
        return self.bucket.ready(now)

    def begin(self, chunks: tuple[PlannedChunk, ...], *, fetch: bool) -> None:
        """An order is under way."""
        size = total_bytes(chunks)
        self.bytes += size
        self.bucket.spend(size)
        if fetch:
            self.fetches += 1
        else:
            self.receives += 1

    def end(self, chunks: tuple[PlannedChunk, ...], *, fetch: bool) -> None:
        """An order has ended."""
        self.bytes -= total_bytes(chunks)
        if fetch:
            self.fetches -= 1
        else:
            self.receives -= 1

    def load(self, size: int, typical: float) -> float:
        """How many seconds it would take it to have fetched so many bytes, after what is under way."""
        return (self.bytes + size) * (self.pace.secs_per_byte or typical)
