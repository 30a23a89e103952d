"""Caps on bytes a second, and measured rates. Pure: time is an argument."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

_BURST_SECS: Final = 1.0
_WEIGHT: Final = 0.2


@dataclass(frozen=True, slots=True)
class Caps:
    """Bandwidth caps, in bytes a second.

    Attributes:
        run: Cap on the bytes requested from the Hub in the whole run; None for no cap.
        node: Cap on the bytes that reach a node, from the Hub or from other nodes; None for no cap.
    """

    run: float | None = None
    node: float | None = None


class TokenBucket:
    """Cap on bytes a second that admits work before it runs.

    Work is admitted whole, so the bucket may be in debt: in any period, the admitted bytes are at most the rate times the
    period, plus one second's worth, plus one piece of work.

    Args:
        rate: Bytes a second; None for no cap.
        now: Current time, in seconds of a monotonic clock.
    """

    def __init__(self, rate: float | None, now: float = 0.0) -> None:
        if rate is not None and rate <= 0:
            raise ValueError("a rate is more than nothing")
        self.rate = rate
        self._level = 0.0 if rate is None else rate * _BURST_SECS
        self._at = now

    def ready(self, now: float) -> bool:
        """Return whether work may be admitted now."""
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
        """Return bytes to the bucket that were taken and did not move; it holds at most one second's worth."""
        if self.rate is not None:
            self._level = min(self.rate * _BURST_SECS, self._level + amount)


class MovingAverage:
    """Moving average of seconds a byte, in which the latest measurements count most."""

    def __init__(self) -> None:
        self.secs_per_byte: float | None = None

    def add(self, size: int, secs: float) -> None:
        """Add a measurement: bytes and seconds of a piece of work."""
        measured = max(secs, 1e-6) / max(size, 1)
        known = self.secs_per_byte
        self.secs_per_byte = measured if known is None else known + _WEIGHT * (measured - known)
