"""The Hub's clock, as far as its answers tell it. Ages and expiries go by it, and never by a clock of ours.

Whenever the Hub stamps something for us (an object's `uploaded_at`, a `Date` header), its clock stood there at some moment
between our request and its answer. That bounds how far its clock is from our monotonic one, from both sides.
"""

from __future__ import annotations

import math
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from hfbucket_plugin.core.deadline import Deadline

if TYPE_CHECKING:
    from collections.abc import Callable

    from hfbucket_plugin.hub.bucket import Bucket


class ServerClock:
    """Bounds on what time it is at the Hub. Not thread-safe.

    Args:
        monotonic: Seconds; tests hand in their own.
    """

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self.monotonic = monotonic
        self._low = -math.inf
        self._high = math.inf

    @property
    def known(self) -> bool:
        """Whether it was told at all."""
        return math.isfinite(self._high)

    def stamped(self, moment: datetime, sent: float, answered: float, unsure_secs: float = 0.0) -> None:
        """Note a time that the Hub gave.

        Args:
            moment: What its clock showed.
            sent: Our monotonic seconds when it was asked.
            answered: The same when it had answered.
            unsure_secs: How much later than `moment` it may have been: a header shows whole seconds.
        """
        seconds = moment.timestamp()
        self._low = max(self._low, seconds - answered)
        self._high = min(self._high, seconds + unsure_secs - sent)
        self._high = max(self._high, self._low)  # a clock that was set forward meanwhile

    def saw(self, moment: datetime) -> None:
        """Note that the Hub's clock has passed a moment: an object bears it."""
        self._low = max(self._low, moment.timestamp() - self.monotonic())
        self._high = max(self._high, self._low)

    def earliest(self) -> datetime:
        """The earliest that it can be; the clock must be known."""
        return _moment(self._low + self.monotonic())

    def latest(self) -> datetime:
        """The latest that it can be; the clock must be known."""
        return _moment(self._high + self.monotonic())


def _moment(seconds: float) -> datetime:
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds)


def ask(bucket: Bucket, clock: ServerClock, request_secs: float) -> bool:
    """Set a clock by the `Date` header of an answer; say whether there was one.

    Raises:
        HFBucketError: No answer.
    """
    sent = clock.monotonic()
    moment = bucket.greet(Deadline.patient(request_secs)).date
    if moment is None:
        return False
    clock.stamped(moment, sent, clock.monotonic(), unsure_secs=1.0)
    return True
