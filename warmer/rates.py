"""How fast something grows of late, and how long the rest of it will take. Pure."""

from __future__ import annotations

from collections import deque
from typing import Final

WINDOW_SECS: Final = 15.0
"""Long enough to even out batches, short enough to show that a node has become slow."""

_SAMPLE_SECS: Final = 1.0


class Rate:
    """How fast a total grows; keeps a sample a second, and no more than the window holds.

    Args:
        now: The time, in seconds.
        window_secs: Over how long it is measured.
    """

    def __init__(self, now: float, window_secs: float = WINDOW_SECS) -> None:
        self._samples: deque[tuple[float, float]] = deque([(now, 0.0)])
        self._window_secs = window_secs
        self._last = (now, 0.0)

    def add(self, now: float, total: float) -> None:
        """Note what the total is by now."""
        self._last = (now, total)
        if now - self._samples[-1][0] >= _SAMPLE_SECS:
            self._samples.append(self._last)
        while len(self._samples) > 1 and self._samples[1][0] <= now - self._window_secs:
            self._samples.popleft()

    @property
    def per_sec(self) -> float:
        """What it grew by in a second."""
        then, before = self._samples[0]
        now, total = self._last
        return (total - before) / (now - then) if now > then else 0.0

    def secs_for(self, left: float) -> float | None:
        """How long the rest will take at this rate; None while it does not grow."""
        if left <= 0:
            return 0.0
        return left / self.per_sec if self.per_sec > 0 else None
