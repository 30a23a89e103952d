"""The Hub's clock, estimated from its answers. Ages and expiries use this clock, never a local one.

Each time stamp of the Hub (an object's `uploaded_at`, a `Date` header) shows its clock at some moment
between a request and its answer. That bounds the offset of its clock from the local monotonic one, from both sides.
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
    """Bounds on the current time of the Hub. Not thread-safe.

    Args:
        monotonic: Returns monotonic seconds; tests inject their own.
    """

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self.monotonic = monotonic
        self._low = -math.inf
        self._high = math.inf

    @property
    def known(self) -> bool:
        """Whether the Hub's time is known at all."""
        return math.isfinite(self._high)

    def stamped(self, moment: datetime, sent: float, answered: float, unsure_secs: float = 0.0) -> None:
        """Record a time stamp of the Hub.

        Args:
            moment: Time shown by its clock.
            sent: Local monotonic seconds at the request.
            answered: Local monotonic seconds at the answer.
            unsure_secs: Seconds by which the time may have been later than `moment`: a header shows whole seconds.
        """
        seconds = moment.timestamp()
        self._low = max(self._low, seconds - answered)
        self._high = min(self._high, seconds + unsure_secs - sent)
        self._high = max(self._high, self._low)  # the clock was set forward in the meantime

    def saw(self, moment: datetime) -> None:
        """Record that the Hub's clock has passed the time stamp of an object."""
        self._low = max(self._low, moment.timestamp() - self.monotonic())
        self._high = max(self._high, self._low)

    def earliest(self) -> datetime:
        """Return the earliest possible time; the clock must be known."""
        return _moment(self._low + self.monotonic())

    def latest(self) -> datetime:
        """Return the latest possible time; the clock must be known."""
        return _moment(self._high + self.monotonic())


def _moment(seconds: float) -> datetime:
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds)


def ask(bucket: Bucket, clock: ServerClock, request_secs: float) -> bool:
    """Set a clock by the `Date` header of an answer; return whether there was one.

    Raises:
        HFBucketError: If the Hub does not answer.
    """
    sent = clock.monotonic()
    moment = bucket.greet(Deadline.patient(request_secs)).date
    if moment is None:
        return False
    clock.stamped(moment, sent, clock.monotonic(), unsure_secs=1.0)
    return True
