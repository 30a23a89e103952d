"""Keeps LMCache's health monitor from disabling the engine because a bucket failed.

The monitor (`lmcache/v1/health_monitor/checks/remote_backend_check.py`) counts gets that returned less than they were asked
for, and from `get_blocking_failed_threshold` (10) of them within `ping_interval` (30 s) on it switches the whole engine's
cache off, local CPU memory included, for 5 minutes at least. It means to protect the engine from a backend that stalls.
Here deadlines and breakers do that, so:

- where an operator has not set the threshold, and all remote stores of the engine are ours, it is lifted: requests that a
  scheduler had admitted together, before anything was known to fail, would reach 10 at one blow;
- where it stays, lookups are misses while half as many gets have failed, and so nothing more is got that may fail.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from hfbucket_plugin.core import forks

if TYPE_CHECKING:
    from collections.abc import Callable

_log = logging.getLogger(__name__)

_THRESHOLD_KEY: Final = "get_blocking_failed_threshold"
_DEFAULT_THRESHOLD: Final = 10
_INTERVAL_KEY: Final = "ping_interval"
_DEFAULT_INTERVAL_SECS: Final = 30.0
"""LMCache's own names and defaults (`lmcache/v1/health_monitor/constants.py`)."""

LIFTED: Final = 1_000_000_000


class HealthShield:
    """Counts gets that failed recently; thread-safe. Where the threshold is lifted there is nothing to shield.

    Args:
        extra: The engine's `extra_config`.
        clock: Seconds, monotonic; tests pass their own.
    """

    def __init__(self, extra: dict[str, Any], clock: Callable[[], float] = time.monotonic) -> None:
        threshold = _number(extra.get(_THRESHOLD_KEY), _DEFAULT_THRESHOLD)
        self._needed = threshold < LIFTED
        self._limit = max(1, int(threshold // 2))
        self._window = _number(extra.get(_INTERVAL_KEY), _DEFAULT_INTERVAL_SECS)
        self._clock = clock
        self._lock = forks.ForkSafeLock()
        self._failed: deque[float] = deque(maxlen=self._limit if self._needed else 0)

    def got(self, *, everything: bool) -> None:
        """Record a get: whether it returned all that it was asked for."""
        if self._needed and not everything:
            with self._lock:
                self._failed.append(self._clock())

    @property
    def raised(self) -> bool:
        """Whether so many gets have failed recently that nothing should be found."""
        if len(self._failed) < self._limit:
            return False
        with self._lock:
            return self._clock() - self._failed[0] < self._window


def lift_threshold(config: Any, is_ours: Callable[[str], bool]) -> None:
    """Lift LMCache's threshold in an engine's configuration, unless an operator set it or somebody else's store needs it.

    Args:
        config: LMCache's configuration; the health monitor reads it at each check.
        is_ours: Whether an instance's name is served by this package.
    """
    extra = config.extra_config
    others = [name for name in config.remote_storage_plugins or () if not is_ours(name)]
    if extra is None or _THRESHOLD_KEY in extra or others or config.remote_url:
        return
    extra[_THRESHOLD_KEY] = LIFTED
    _log.info(
        "extra_config.%s is lifted: gets that fail never disable the engine, since this package's deadlines and breakers keep "
        "them short; set it yourself to have LMCache's behaviour",
        _THRESHOLD_KEY,
    )


def _number(value: Any, default: float) -> float:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0 else default
