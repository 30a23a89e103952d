"""How often one instance may call the Hub: its own cap, and the pauses that the Hub asks for.

The Hub counts calls per member in fixed windows of 5 minutes, and a fleet shares one quota. It answers 429 with
`Retry-After` when it is used up, and tells beforehand with `RateLimit: "<name>";r=<left>;t=<seconds to reset>`.
Reads from the store are no calls to the Hub: they go on during a pause. A thousand processes are told to wait by one used-up
quota: so pauses end, and probe requests are sent, at times of each process' own.
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
"""Bounds of the pauses after a 429 that does not say how long to wait; each is twice the one before it."""

_LONGEST_ASKED_SECS: Final = 300.0
"""A window of the Hub's. Whatever an answer asks for beyond it is no quota's reset."""

_BACKGROUND_SHARE: Final = 4
_SHORTEST_SLEEP_SECS: Final = 0.001
_SCOUT_SECS: Final = 15.0
"""In a long pause one call is let through after this, and up to as much again: whether the quota is back, or was only a
proxy's whim."""

_SCOUT_GROWTH: Final = 4
"""Each further probe request of a pause waits so many times longer: a process sends two in a window of the Hub's at most, and a
thousand of them 2,000, which is below the quota of PRO."""

_SPREAD: Final = 0.1
_MOST_SPREAD_SECS: Final = 15.0
"""Up to such a share of a pause, and no more than so many seconds, is waited beyond it: not everybody begins at the reset."""


class RateLimiter:
    """Admits calls of one instance; thread-safe.

    Args:
        instance: Its name, for errors.
        calls_per_minute: Most calls in any 60 s; None for no cap.
        clock: Seconds, monotonic; tests pass their own.
        sleep: Waits that many seconds.
        chance: A number from 0 to 1, by which processes differ in when they ask again.
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
        """Take a call from the budget, and return when it may be made.

        Args:
            what: Names the call in errors.
            deadline: When the caller gives up.
            patient: Whether to wait for a pause or for the budget, as far as the deadline allows (`Deadline.for_a_pause`). A
                lookup does not: a miss now is better than an answer later.

        Raises:
            ThrottledError: The Hub asked for a pause that is not over; `BudgetError` when the own cap is used up.
        """
        while (error := self._take(what)) is not None:
            wait = error.retry_after or 0.0
            if not patient or wait >= deadline.for_a_pause:
                raise error
            with deadline.pausing():
                self._sleep(max(min(wait, self._to_probe()), _SHORTEST_SLEEP_SECS))

    def sleep(self, seconds: float) -> None:
        """Wait, by the clock that this goes by."""
        self._sleep(seconds)

    def _to_probe(self) -> float:
        """Seconds until a probe request may ask whether the pause still holds."""
        with self._lock:
            return max(0.0, self._scout_at - self._clock()) if self._paused_until > self._clock() else _SCOUT_SECS

    def refuse_in_pause(self, what: str) -> None:
        """Stop here where `admit` would refuse a call because of a pause; takes nothing from the budget.

        Raises:
            ThrottledError: The Hub asked for a pause that is not over.
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
        """Record what an answer says about the quota.

        Args:
            status: Of the answer.
            headers: Of the answer.
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
                        )  # an answer to a probe request, not to a call from before the pause
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
        """Seconds left of a pause that the Hub asked for; 0 when there is none."""
        with self._lock:
            return max(0.0, self._paused_until - self._clock())

    @property
    def background_wait_secs(self) -> float:
        """Seconds until work in the background may take its next call.

        It leaves three quarters of the cap to others, and in a pause all calls: only a lookup tries whether the quota is back.
        """
        with self._lock:
            now = self._clock()
            wait = max(0.0, self._paused_until - now)
            share = max(1, self._cap // _BACKGROUND_SHARE) if self._cap is not None else None
            if share is not None and len(self._calls) >= share:
                wait = max(wait, self._calls[-share] + _WINDOW_SECS - now)
            return wait


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a 429 asks to wait: from `RateLimit` where it is used up, else from `Retry-After`, seconds or a date."""
    if (reset := _used_up_for(headers)) is not None:
        return reset
    value = headers.get("retry-after", "").strip()
    if value.isascii() and value.isdigit():
        return float(value)
    until, now = http_date(value), http_date(headers.get("date", ""))
    return max(0.0, (until - now).total_seconds()) if until is not None and now is not None else None


def _used_up_for(headers: Mapping[str, str]) -> float | None:
    """Seconds to the reset of a quota that is used up; None where none is, or where that is no number."""
    try:
        limit = parse_ratelimit_headers(headers)
        return float(limit.reset_in_seconds) if limit is not None and limit.remaining == 0 else None
    except (ValueError, OverflowError):  # thousands of digits
        return None
