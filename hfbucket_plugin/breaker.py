"""A circuit breaker that recovers: opens on repeated failures, is probed in the background, and closes by itself.

Pure: no threads, no network. `Guard` in `hfbucket_plugin.guard` feeds it and runs the probes.
"""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING, Final

from hfbucket_plugin import forks

if TYPE_CHECKING:
    from collections.abc import Callable

_STEADY_SECS: Final = 60.0
"""A breaker that opens again sooner than this goes on with the backoff that it had: probes lie more easily than work does,
and each lie costs a deadline."""

_TRIAL_AFTER, _TRIALS_IN_A_ROW, _TRIAL_EVERY = 2, 3, 3
"""One request is tried after the second failed probe in a row and the two that follow, then after every third: a probe can fail
for a reason of its own, and in a long outage each trial costs a request its deadline."""

_JITTER: Final = 0.2
"""Share by which a wait is shortened at random, so that a fleet does not probe in step."""


class Breaker:
    """Counts failures in a row; thread-safe.

    Args:
        failures: In a row that open it.
        first_probe_secs: From opening to the first probe.
        max_probe_secs: Most seconds between probes; they double from the first on.
        clock: Seconds, monotonic; tests hand in their own.
    """

    def __init__(
        self,
        failures: int,
        first_probe_secs: float,
        max_probe_secs: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limit = failures
        self._first = min(first_probe_secs, max_probe_secs)
        self._longest = max_probe_secs
        self._clock = clock
        self._lock = forks.Lock()
        self._failures = 0
        self._open = False
        self._bad_probes = 0
        self._trial_due = False
        self._trying = False
        self._backoff = self._first
        self._probe_at = 0.0
        self._closed_at = float("-inf")

    @property
    def is_open(self) -> bool:
        """Whether nothing should be tried."""
        return self._open

    @property
    def probe_in(self) -> float:
        """Seconds until the next probe is due; 0 when it is. Without meaning while the breaker is closed."""
        with self._lock:
            return max(0.0, self._probe_at - self._clock())

    def failed(self) -> bool:
        """Note a failure; whether it opened the breaker."""
        with self._lock:
            self._failures += 1
            self._trying = False
            if self._open or self._failures < self._limit:
                return False
            self._open = True
            self._bad_probes, self._trial_due = 0, False
            if self._clock() - self._closed_at >= _STEADY_SECS:
                self._backoff = self._first
            self._schedule()
            return True

    def succeeded(self) -> bool:
        """Note that work was done; whether it closed the breaker.

        It does where one request was let through (`try_anyway`). What was begun before the breaker opened does not close it.
        """
        with self._lock:
            if self._open and self._trying:
                self._close()
                return True
            if not self._open:
                self._failures = 0
            return False

    def try_anyway(self) -> bool:
        """Whether one request may be tried although the breaker is open: after some of the probes that failed."""
        with self._lock:
            if not self._trial_due or not self._open:
                return False
            self._trial_due = False
            self._trying = True
            return True

    def probed(self, *, well: bool) -> bool:
        """Note how a probe ended: it closes the breaker, or puts the next probe off for twice as long.

        Returns:
            Whether it closed the breaker.
        """
        with self._lock:
            if not self._open:
                return False
            if well:
                self._close()
                return True
            self._bad_probes += 1
            bad = self._bad_probes - _TRIAL_AFTER
            self._trial_due = 0 <= bad < _TRIALS_IN_A_ROW or (bad > 0 and bad % _TRIAL_EVERY == 0)
            self._schedule()
            return False

    def _close(self) -> None:
        self._open = self._trying = self._trial_due = False
        self._failures = 0
        self._closed_at = self._clock()

    def _schedule(self) -> None:
        self._probe_at = self._clock() + self._backoff * (1 - _JITTER * random.random())
        self._backoff = min(self._longest, self._backoff * 2)
