"""Deadlines after which calls are abandoned, and how long a command waits for pauses that the Hub requests."""

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
"""Minimum pause in seconds after a 429 without a wait time."""


class Patience:
    """Total time that a command waits for pauses of the Hub; thread-safe.

    Args:
        until: Deadline of the command; None without one.
    """

    def __init__(self, until: Deadline | None) -> None:
        self.until = until
        self._lock = threading.Lock()
        self._waiting = 0
        self._since = 0.0
        self._total = 0.0

    def waited(self) -> float:
        """Seconds so far during which at least one call of the command waited for a pause."""
        with self._lock:
            return self._total + (time.monotonic() - self._since if self._waiting else 0.0)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count a `with` block as a pause; overlapping blocks of several threads count once."""
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
    """Exclude pauses of the Hub from the time of single calls (`Deadline.patient`), for the duration of a `with` block.

    For commands, whose only deadline is their own; the requests of an engine cannot wait. It applies to the whole
    process, because a command's listings and uploads run on threads.

    Args:
        until: Deadline of the command, which ends all waits; None for none.
    """
    global _patience  # noqa: PLW0603 - one command per process, and worker threads must see it
    before, _patience = _patience, Patience(until)
    try:
        yield
    finally:
        _patience = before


def expect_time(what: str) -> None:
    """Raise if the command's own deadline has passed; for loops that may never end.

    Raises:
        DeadlineError: The deadline has passed.
    """
    until = None if _patience is None else _patience.until
    if until is not None and until.passed:
        raise DeadlineError(f"{what}: not complete when the command had to end, after {until.seconds:g} s")


@dataclass(frozen=True, slots=True)
class Deadline:
    """Point on the monotonic clock, passed from the caller to every step made for it.

    Attributes:
        at: Time on `time.monotonic` in seconds, without pauses of the Hub.
        seconds: Time allowed at the start in seconds, for messages.
        pauses: Patience whose pauses extend it; None if nothing does.
        waited: Seconds spent in pauses before it was created.
    """

    at: float
    seconds: float
    pauses: Patience | None = field(default=None, repr=False, compare=False)
    waited: float = field(default=0.0, repr=False, compare=False)

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        """Return a fixed deadline `seconds` from now."""
        return cls(time.monotonic() + seconds, seconds)

    @classmethod
    def patient(cls, seconds: float) -> Deadline:
        """Return the deadline of a call that may take `seconds`, not counting pauses of the Hub.

        Within `patience`, pauses of the command do not count, and the call ends with the command. Elsewhere, and after
        the command's deadline, this equals `after`.
        """
        return cls._of(seconds, _patience)

    @classmethod
    def _of(cls, seconds: float, pauses: Patience | None) -> Deadline:
        if pauses is None or (pauses.until is not None and pauses.until.passed):  # work at the very end of the command
            return cls.after(seconds)
        return cls(time.monotonic() + seconds, seconds, pauses, pauses.waited())

    @property
    def ends_at(self) -> float:
        """Time on `time.monotonic` in seconds at which it ends, as known now."""
        if self.pauses is None:
            return self.at
        moved = self.at + self.pauses.waited() - self.waited
        return moved if self.pauses.until is None else min(moved, self.pauses.until.at)

    def remaining(self) -> float:
        """Return the seconds left, at least 0."""
        return max(0.0, self.ends_at - time.monotonic())

    @property
    def passed(self) -> bool:
        """Whether the deadline has passed."""
        return time.monotonic() >= self.ends_at

    @property
    def for_a_pause(self) -> float:
        """Return the maximum length in seconds of a pause that leaves time for the call."""
        if self.pauses is None:
            return self.remaining()
        return float("inf") if self.pauses.until is None else self.pauses.until.remaining()

    def pausing(self) -> contextlib.AbstractContextManager[None]:
        """Return a context manager that counts its block as a wait for a pause of the Hub."""
        return contextlib.nullcontext() if self.pauses is None else self.pauses.waiting()

    def wait_out(self, error: ThrottledError) -> None:
        """Wait for the end of the pause that an error reports, so that the caller can retry.

        Args:
            error: Error of the throttled call.

        Raises:
            ThrottledError: The pause does not end in time; it is `error` itself.
        """
        pause = max(error.retry_after or 0.0, _LEAST_PAUSE_SECS)
        if pause >= self.for_a_pause:
            raise error
        with self.pausing():
            time.sleep(pause)

    def within(self, seconds: float) -> Deadline:
        """Return the earlier of this deadline and one `seconds` from now, which pauses extend in the same way."""
        other = Deadline._of(seconds, self.pauses)
        return other if other.at < self.ends_at else self

    def check(self, what: str) -> None:
        """Raise if the deadline has passed.

        Raises:
            DeadlineError: The deadline has passed; the message names `what`.
        """
        if self.passed:
            raise DeadlineError(f"{what}: no answer within {self.seconds:g} s; the call was abandoned")
