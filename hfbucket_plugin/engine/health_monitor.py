"""Prevents LMCache's health monitor from disabling the engine because of a failed bucket.

The monitor (`lmcache/v1/health_monitor/checks/remote_backend_check.py`) counts gets that returned less than requested.
After `get_blocking_failed_threshold` (10) of them within `ping_interval` (30 s) it disables the engine's whole cache,
including local CPU memory, for at least 5 minutes. Deadlines and circuit breakers already protect the engine here, so:

- if the operator has not set the threshold and this package serves all remote stores of the engine, the threshold is
  lifted, because the requests that a scheduler admits together can reach 10 before any failure is known;
- otherwise, once half as many gets have failed, all lookups are misses, so that no further get can fail.
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
"""Names and defaults from `lmcache/v1/health_monitor/constants.py`."""

LIFTED: Final = 1_000_000_000


class HealthShield:
    """Counts recently failed gets; thread-safe. Inactive if the threshold is lifted.

    Args:
        extra: The engine's `extra_config`.
        clock: Monotonic clock in seconds.
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
        """Record whether a get returned everything that was requested."""
        if self._needed and not everything:
            with self._lock:
                self._failed.append(self._clock())

    @property
    def raised(self) -> bool:
        """Return whether so many gets have failed recently that lookups must be misses."""
        if len(self._failed) < self._limit:
            return False
        with self._lock:
            return self._clock() - self._failed[0] < self._window


def lift_threshold(config: Any, is_ours: Callable[[str], bool]) -> None:
    """Lift LMCache's threshold, unless an operator set it or the store of another package needs it.

    Args:
        config: LMCache's configuration, which the health monitor reads at each check.
        is_ours: Returns whether this package serves the instance of a name.
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
