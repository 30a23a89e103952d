"""Rate limit of one instance's Hub calls: a client-side limit, and the pauses that the Hub requests.

The Hub counts calls per account in fixed windows of 5 minutes, and a fleet shares one quota. A used-up quota gives 429
with `Retry-After`; before that, `RateLimit: "<name>";r=<left>;t=<seconds to reset>` announces it. Reads from the store
are not Hub calls and continue during a pause. One quota pauses a thousand processes, so each ends its pause and sends
its probe requests at a random time of its own.
"""

from __future__ import annotations

import random
import time
from collections import deque
from typing import TYPE_CHECKING, Final

from huggingface_hub.utils import parse_ratelimit_headers

from hfbucket_plugin.core import forks
from hfbucket_plugin.core.dates import http_date
from hfbucket_plugin.errors import BudgetError, ThrottledError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from hfbucket_plugin.core.deadline import Deadline

_TOO_MANY: Final = 429
_WINDOW_SECS: Final = 60.0
_FIRST_PAUSE_SECS: Final = 1.0
_LONGEST_PAUSE_SECS: Final = 30.0
"""Bounds of the pause in seconds after a 429 without a wait time; each pause is twice as long as the one before."""

_LONGEST_ASKED_SECS: Final = 300.0
"""Length of the Hub's window. Longer requested pauses cannot be the reset of a quota."""

_BACKGROUND_SHARE: Final = 4
_SHORTEST_SLEEP_SECS: Final = 0.001
_SCOUT_SECS: Final = 15.0
"""During a long pause, one call is let through after this time in seconds plus a random time of up to the same length,
to test whether the quota is back or the 429 came from a proxy."""

_SCOUT_GROWTH: Final = 4
"""Factor between the waits of a pause's probe requests: a process sends at most two in a window of the Hub, and a
thousand processes send 2,000, which is below the quota of PRO."""

_SPREAD: Final = 0.1
_MOST_SPREAD_SECS: Final = 15.0
"""Pauses are randomly extended by up to this fraction and this number of seconds, so that processes do not all start at
the reset."""


class RateLimiter:
    """Admits calls of one instance; thread-safe.

    Args:
        instance: Name of the instance, for errors.
        calls_per_minute: Maximum number of calls in any 60 s; None for no limit.
        clock: Monotonic clock in seconds.
        sleep: Waits a number of seconds.
        chance: Random number from 0 to 1 that spreads the retries of processes.
    """

    def __init__(
        self,
        instance: str,
        calls_per_minute: int | None,
        clock: Callable[[], float] | None = None,
        sleep: Callable[[float], None] | None = None,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._instance = instance
        self._cap = calls_per_minute
        self._clock = clock or time.monotonic
        self._sleep = sleep or time.sleep
        self._chance = chance
        self._lock = forks.ForkSafeLock()
        self._calls: deque[float] = deque()
        self._paused_until = float("-inf")
        self._paused_since = float("-inf")
        self._scout_at = float("inf")
        self._scout_secs = _SCOUT_SECS
        self._spread = 0.0
        self._unexplained = 0

    def admit(self, what: str, deadline: Deadline, *, patient: bool) -> None:
        """Take a call from the budget, waiting if necessary.

        Args:
            what: Name of the call, for errors.
            deadline: When the caller gives up.
            patient: Whether to wait for a pause or the budget, as far as the deadline allows (`Deadline.for_a_pause`).
                Lookups do not wait: a miss now is better than a late answer.

        Raises:
            ThrottledError: A pause that the Hub requested is in effect; `BudgetError` if the client-side limit is used
                up.
        """
        while (error := self._take(what)) is not None:
            wait = error.retry_after or 0.0
            if not patient or wait >= deadline.for_a_pause:
                raise error
            with deadline.pausing():
                self._sleep(max(min(wait, self._to_probe()), _SHORTEST_SLEEP_SECS))

    def sleep(self, seconds: float) -> None:
        """Wait, by the clock of this limiter."""
        self._sleep(seconds)

    def _to_probe(self) -> float:
        """Return the seconds until a probe request may test whether the pause is still in effect."""
        with self._lock:
            return max(0.0, self._scout_at - self._clock()) if self._paused_until > self._clock() else _SCOUT_SECS

    def refuse_in_pause(self, what: str) -> None:
        """Raise if `admit` would refuse a call because of a pause; takes nothing from the budget.

        Raises:
            ThrottledError: A pause that the Hub requested is in effect.
        """
        with self._lock:
            error = self._pause(what, self._clock())
        if error is not None:
            raise error

    def _pause(self, what: str, now: float) -> ThrottledError | None:
        pause = self._paused_until - now
        if pause <= 0 or now >= self._scout_at:
            return None
        return ThrottledError(
            f"{what}: not sent, because the Hub asked this token to wait {pause:.1f} s more (429)", pause
        )

    def _take(self, what: str) -> ThrottledError | None:
        with self._lock:
            now = self._clock()
            if (error := self._pause(what, now)) is not None:
                return error
            if self._paused_until > now:
                self._scout_secs *= _SCOUT_GROWTH
                self._scout_at = now + self._scout_secs
            if self._cap is not None:
                while self._calls and self._calls[0] <= now - _WINDOW_SECS:
                    self._calls.popleft()
                if len(self._calls) >= self._cap:
                    wait = self._calls[0] + _WINDOW_SECS - now
                    return BudgetError(
                        f"{what}: not sent, because instance {self._instance!r} made {self._cap} calls to the Hub within a "
                        f"minute (max_hub_calls_per_minute); the next is free in {wait:.1f} s",
                        wait,
                    )
                self._calls.append(now)
        return None

    def observe(self, status: int, headers: Mapping[str, str]) -> None:
        """Record the quota state of a response.

        Args:
            status: HTTP status of the response.
            headers: Headers of the response.
        """
        asked = retry_after(headers)
        with self._lock:
            now = self._clock()
            if status != _TOO_MANY:
                self._unexplained = 0
                if _used_up_for(headers) is None:
                    if now - self._paused_since >= _SCOUT_SECS:
                        self._paused_until = float(
                            "-inf"
                        )  # a response to a probe request, not to a call from before the pause
                    return
            elif asked is None:
                asked = min(_LONGEST_PAUSE_SECS, _FIRST_PAUSE_SECS * 2**self._unexplained)
                self._unexplained = min(self._unexplained + 1, 10)
            if self._paused_until <= now:
                self._spread = self._chance()
                self._scout_secs = _SCOUT_SECS * (1 + self._chance())
                self._paused_since, self._scout_at = now, now + self._scout_secs
            pause = min(asked or 0.0, _LONGEST_ASKED_SECS)
            pause += self._spread * min(pause * _SPREAD, _MOST_SPREAD_SECS)
            self._paused_until = max(self._paused_until, now + pause)

    @property
    def paused_secs(self) -> float:
        """Seconds left of a pause that the Hub requested; 0 without a pause."""
        with self._lock:
            return max(0.0, self._paused_until - self._clock())

    @property
    def background_wait_secs(self) -> float:
        """Seconds until background work may make its next call.

        Background work leaves three quarters of the client-side limit to other calls, and all calls during a pause,
        when only lookups test whether the quota is back.
        """
        with self._lock:
            now = self._clock()
            wait = max(0.0, self._paused_until - now)
            share = max(1, self._cap // _BACKGROUND_SHARE) if self._cap is not None else None
            if share is not None and len(self._calls) >= share:
                wait = max(wait, self._calls[-share] + _WINDOW_SECS - now)
            return wait


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the wait in seconds of a 429: from `RateLimit` if used up, else from `Retry-After` (seconds or a date)."""
    if (reset := _used_up_for(headers)) is not None:
        return reset
    value = headers.get("retry-after", "").strip()
    if value.isascii() and value.isdigit():
        return float(value)
    until, now = http_date(value), http_date(headers.get("date", ""))
    return max(0.0, (until - now).total_seconds()) if until is not None and now is not None else None


def _used_up_for(headers: Mapping[str, str]) -> float | None:
    """Return the seconds to the reset of a used-up quota; None if none is used up, or the value is not a number."""
    try:
        limit = parse_ratelimit_headers(headers)
        return float(limit.reset_in_seconds) if limit is not None and limit.remaining == 0 else None
    except (ValueError, OverflowError):  # a number with thousands of digits
        return None
