"""Points in time after which a call is abandoned, not waited for."""

from __future__ import annotations

import time
from dataclasses import dataclass

from hfbucket_plugin.errors import DeadlineError


@dataclass(frozen=True, slots=True)
class Deadline:
    """A point on the monotonic clock, handed down from the caller to every step made for it.

    Attributes:
        at: Seconds on `time.monotonic`.
        seconds: How long it was from the start, for messages.
    """

    at: float
    seconds: float

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        """The deadline that many seconds from now."""
        return cls(time.monotonic() + seconds, seconds)

    def remaining(self) -> float:
        """Seconds left, never below 0."""
        return max(0.0, self.at - time.monotonic())

    @property
    def passed(self) -> bool:
        """Whether it is over."""
        return time.monotonic() >= self.at

    def within(self, seconds: float) -> Deadline:
        """The earlier of this deadline and one that many seconds from now."""
        other = Deadline.after(seconds)
        return other if other.at < self.at else self

    def check(self, what: str) -> None:
        """Stop here when it is over.

        Raises:
            DeadlineError: It is over; the message names `what`.
        """
        if self.passed:
            raise DeadlineError(f"{what}: no answer within {self.seconds:g} s; the call was abandoned")
