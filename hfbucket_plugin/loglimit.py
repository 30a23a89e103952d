"""Error logs that an outage cannot flood: one line a kind and interval, and how many were left out."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from hfbucket_plugin import forks

if TYPE_CHECKING:
    import logging
    from collections.abc import Callable


class LimitedLog:
    """Logs at most one warning per kind and interval.

    Args:
        log: Where to.
        interval_secs: 30 by default: LMCache's health monitor looks as often.
        clock: Seconds, monotonic; tests hand in their own.
    """

    def __init__(
        self, log: logging.Logger, interval_secs: float = 30.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._log = log
        self._interval = interval_secs
        self._clock = clock
        self._lock = forks.Lock()
        self._next: dict[str, float] = {}
        self._left_out: dict[str, int] = {}

    def warning(self, kind: str, message: str) -> bool:
        """Log the message, unless one of its kind was logged within the interval.

        Returns:
            Whether it was logged.
        """
        now = self._clock()
        with self._lock:
            if now < self._next.get(kind, float("-inf")):
                self._left_out[kind] = self._left_out.get(kind, 0) + 1
                return False
            self._next[kind] = now + self._interval
            left_out = self._left_out.pop(kind, 0)
        more = f" ({left_out} more like this since the last one)" if left_out else ""
        self._log.warning("%s%s", message, more)
        return True
