"""Rates: a cap on bytes a second, and what was measured. Pure: time is an argument."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

_BURST_SECS: Final = 1.0
_WEIGHT: Final = 0.2


@dataclass(frozen=True, slots=True)
class Caps:
    """Most bytes a second.

    Attributes:
        run: That the Hub is asked for, in the whole run; None for no cap.
        node: That reach a node, from the Hub or from others; None for no cap.
    """

    run: float | None = None
    node: float | None = None


class TokenBucket:
    """A cap on bytes a second, by which work is let go before it runs.

    Whatever is let go is let go whole, so the bucket may be in debt: over any time, what was let go is at most the rate
    times that time, one second's worth, and one piece of work.

    Args:
        rate: Bytes a second; None for no cap.
        now: The time, in seconds of any clock that goes forwards.
    """

    def __init__(self, rate: float | None, now: float = 0.0) -> None:
        if rate is not None and rate <= 0:
            raise ValueError("a rate is more than nothing")
        self.rate = rate
        self._level = 0.0 if rate is None else rate * _BURST_SECS
        self._at = now

    def ready(self, now: float) -> bool:
        """Whether anything may go now."""
        if self.rate is None:
            return True
        if now > self._at:
            self._level = min(self.rate * _BURST_SECS, self._level + (now - self._at) * self.rate)
            self._at = now
        return self._level > 0

    def spend(self, amount: int) -> None:
        """Take bytes out of the bucket."""
        if self.rate is not None:
            self._level -= amount

    def give_back(self, amount: int) -> None:
        """Put back bytes that were taken and did not move, up to one second's worth."""
        if self.rate is not None:
            self._level = min(self.rate * _BURST_SECS, self._level + amount)


class MovingAverage:
    """Seconds a byte, as measured: the latest count most."""

    def __init__(self) -> None:
        self.secs_per_byte: float | None = None

    def add(self, size: int, secs: float) -> None:
        """Note a piece of work."""
        measured = max(secs, 1e-6) / max(size, 1)
        known = self.secs_per_byte
        self.secs_per_byte = measured if known is None else known + _WEIGHT * (measured - known)
