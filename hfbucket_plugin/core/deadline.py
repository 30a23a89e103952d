"""Points in time after which a call is abandoned, not waited for; and how long a command puts up with the Hub's pauses."""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from hfbucket_plugin.errors import DeadlineError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hfbucket_plugin.errors import ThrottledError


_LEAST_PAUSE_SECS: Final = 1.0
"""After a 429 that does not say how long to wait."""


class Patience:
    """How long a command waits for pauses that the Hub asks for, and how long it has waited so far; thread-safe.

    Args:
        until: The command's own deadline; None where it has none.
    """

    def __init__(self, until: Deadline | None) -> None:
        self.until = until
        self._lock = threading.Lock()
        self._waiting = 0
        self._since = 0.0
        self._total = 0.0

    def waited(self) -> float:
        """Seconds during which some call of the command waited for a pause."""
        with self._lock:
            return self._total + (time.monotonic() - self._since if self._waiting else 0.0)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the length of a `with` block as a pause; blocks of several threads at one time count once."""
        with self._lock:
            if not self._waiting:
                self._since = time.monotonic()
            self._waiting += 1
        try:
            yield
        finally:
            with self._lock:
                self._waiting -= 1
                if not self._waiting:
                    self._total += time.monotonic() - self._since


_patience: Patience | None = None


@contextlib.contextmanager
def patience(until: Deadline | None) -> Iterator[None]:
    """Let pauses of the Hub not count against the time of single calls (`Deadline.patient`), for the length of a `with` block.

    For commands, whose only deadline is their own. An engine never does so: its requests cannot wait. It holds for the whole
    process, since a command's listings and uploads run on threads.

    Args:
        until: The deadline of the command, past which no pause is waited for; None for none.
    """
    global _patience  # noqa: PLW0603 - one command a process; worker threads must see it
    before, _patience = _patience, Patience(until)
    try:
        yield
    finally:
        _patience = before


def expect_time(what: str) -> None:
    """Stop here when the command's own deadline is over: for loops that may never end.

    Raises:
        DeadlineError: It is.
    """
    until = None if _patience is None else _patience.until
    if until is not None and until.passed:
        raise DeadlineError(f"{what}: not complete when the command had to end, after {until.seconds:g} s")


@dataclass(frozen=True, slots=True)
class Deadline:
    """A point on the monotonic clock, handed down from the caller to every step made for it.

    Attributes:
        at: Seconds on `time.monotonic`, pauses of the Hub not regarded.
        seconds: How long it was from the start, for messages.
        pauses: Whose pauses move it; None where nothing does.
        waited: What had been waited for pauses when it was made.
    """

    at: float
    seconds: float
    pauses: Patience | None = field(default=None, repr=False, compare=False)
    waited: float = field(default=0.0, repr=False, compare=False)

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        """The deadline that many seconds from now, whatever happens."""
        return cls(time.monotonic() + seconds, seconds)

    @classmethod
    def patient(cls, seconds: float) -> Deadline:
        """The deadline of a call that may take so many seconds, during which the Hub wants to be asked at all.

        Within `patience`, time that the command spends in pauses does not count, and it ends with the command. Elsewhere, and
        for what is done after that end, this is `after`.
        """
        return cls._of(seconds, _patience)

    @classmethod
    def _of(cls, seconds: float, pauses: Patience | None) -> Deadline:
        if pauses is None or (pauses.until is not None and pauses.until.passed):  # what is done at the very end
            return cls.after(seconds)
        return cls(time.monotonic() + seconds, seconds, pauses, pauses.waited())

    @property
    def ends_at(self) -> float:
        """Seconds on `time.monotonic` when it ends, as far as is known now."""
        if self.pauses is None:
            return self.at
        moved = self.at + self.pauses.waited() - self.waited
        return moved if self.pauses.until is None else min(moved, self.pauses.until.at)

    def remaining(self) -> float:
        """Seconds left, never below 0."""
        return max(0.0, self.ends_at - time.monotonic())

    @property
    def passed(self) -> bool:
        """Whether it is over."""
        return time.monotonic() >= self.ends_at

    @property
    def for_a_pause(self) -> float:
        """How many seconds a pause of the Hub may take so that something is left afterwards."""
        if self.pauses is None:
            return self.remaining()
        return float("inf") if self.pauses.until is None else self.pauses.until.remaining()

    def pausing(self) -> contextlib.AbstractContextManager[None]:
        """For the length of a `with` block, this waits for a pause of the Hub."""
        return contextlib.nullcontext() if self.pauses is None else self.pauses.waiting()

    def wait_out(self, error: ThrottledError) -> None:
        """Wait for the pause that an error tells of, so that what it was about can be looked at again.

        Raises:
            ThrottledError: The pause does not end in time; it is the error itself.
        """
        pause = max(error.retry_after or 0.0, _LEAST_PAUSE_SECS)
        if pause >= self.for_a_pause:
            raise error
        with self.pausing():
            time.sleep(pause)

    def within(self, seconds: float) -> Deadline:
        """The earlier of this deadline and one that many seconds from now, which pauses move as they do this one."""
        other = Deadline._of(seconds, self.pauses)
        return other if other.at < self.ends_at else self

    def check(self, what: str) -> None:
        """Stop here when it is over.

        Raises:
            DeadlineError: It is over; the message names `what`.
        """
        if self.passed:
            raise DeadlineError(f"{what}: no answer within {self.seconds:g} s; the call was abandoned")
