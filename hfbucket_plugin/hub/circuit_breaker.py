"""Circuit breakers, which stop requests to a part that keeps failing."""

from __future__ import annotations

import contextlib
import logging
import random
import threading
import time
from typing import TYPE_CHECKING, Final, Literal

from hfbucket_plugin.core import forks, telemetry
from hfbucket_plugin.errors import (
    BreakerOpenError,
    BudgetError,
    HFBucketError,
    MissingError,
    RevokedError,
    ThrottledError,
    TransportError,
    UnsentError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from hfbucket_plugin.config.settings import InstanceSettings


_STEADY_SECS: Final = 60.0
"""A breaker that opens again within this time keeps its backoff. Probes succeed wrongly more often than work does, and
each wrong success costs a deadline."""

_TRIAL_AFTER, _TRIALS_IN_A_ROW, _TRIAL_EVERY = 2, 3, 3
"""One request is let through after the second consecutive failed probe, after the next two, and then after every third
one: a probe can fail for its own reasons, but during an outage each such request costs a deadline."""

_JITTER: Final = 0.2
"""Fraction by which a wait is randomly shortened, so that the processes of a fleet do not probe at the same time."""


class CircuitBreaker:
    """Counter of consecutive failures; thread-safe.

    Args:
        failures: Number of consecutive failures that open the breaker.
        first_probe_secs: Seconds from opening to the first probe.
        max_probe_secs: Maximum seconds between probes; the interval doubles from the first one on.
        clock: Monotonic clock in seconds.
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
        self._lock = forks.ForkSafeLock()
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
        """Whether requests should not be tried."""
        return self._open

    @property
    def probe_in(self) -> float:
        """Seconds until the next probe is due, 0 if it is due; meaningless while the breaker is closed."""
        with self._lock:
            return max(0.0, self._probe_at - self._clock())

    def failed(self) -> bool:
        """Record a failure; return whether it opened the breaker."""
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
        """Record a success; return whether it closed the breaker.

        Only a request that was let through (`try_anyway`) closes it, not work that began before the breaker opened.
        """
        with self._lock:
            if self._open and self._trying:
                self._close()
                return True
            if not self._open:
                self._failures = 0
            return False

    def try_anyway(self) -> bool:
        """Return whether one request may be tried while the breaker is open, as it may after some failed probes."""
        with self._lock:
            if not self._trial_due or not self._open:
                return False
            self._trial_due = False
            self._trying = True
            return True

    def probed(self, *, well: bool) -> bool:
        """Record the result of a probe: success closes the breaker, and failure doubles the wait for the next probe.

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


_log = logging.getLogger(__name__)

Part = Literal["lookup", "read", "write"]
PARTS: Final[tuple[Part, ...]] = ("lookup", "read", "write")

_OVERLAP_SECS: Final = 3.0
"""A probe has the deadline of the work that it stands for, which may be a minute. After this time in seconds it
continues, but the next probes no longer wait for it, so that a recovered store is noticed soon."""

_AT_ONCE: Final = 16
"""Maximum number of concurrent probes of one part."""


class _Probe:
    """Probe in progress.

    Attributes:
        late: Whether the next probes no longer wait for it.
        ended: Whether it has ended.
    """

    def __init__(self) -> None:
        self.late = False
        self.ended = False


class CircuitBreakers:
    """Circuit breakers of one instance.

    Args:
        settings: Settings of the instance.
        instance: Name of the instance.
        sink: Metrics sink for breaker states.
        probes: Function per part that returns if the part works, or raises an `HFBucketError` within its own deadline.
            A slow probe does not delay others.
    """

    def __init__(
        self,
        settings: InstanceSettings,
        instance: str,
        sink: telemetry.Sink,
        probes: Mapping[Part, Callable[[], None]],
    ) -> None:
        self._instance = instance
        self._sink = sink
        self._probes = probes
        self._breakers = {
            part: CircuitBreaker(
                settings.breaker_failures, settings.breaker_probe_secs, settings.breaker_max_probe_secs
            )
            for part in PARTS
        }
        self._reasons: dict[Part, str] = {}
        self._trials: dict[Part, frozenset[str]] = {}
        self._closed = False
        self._start_over()
        forks.reset_in_child(self._start_over)
        for part in PARTS:
            sink.gauge(telemetry.BREAKER_OPEN, 0, instance=instance, part=part)

    def _start_over(self) -> None:
        """Reset to no prober thread, initially and in a forked child, where the parent's does not run."""
        self._lock = threading.Lock()
        self._prober: threading.Thread | None = None
        self._probing: dict[Part, set[threading.Thread]] = {part: set() for part in PARTS}
        self._wake = threading.Event()

    def is_open(self, part: Part) -> bool:
        """Return whether work of a part should not be tried."""
        return self._breakers[part].is_open

    def check(self, part: Part) -> None:
        """Raise while the breaker of a part is open.

        Raises:
            BreakerOpenError: The breaker is open; the message gives the cause and the time of the next probe.
        """
        if self.is_open(part):
            if not self._breakers[part].probe_in or self._prober is None or not self._prober.is_alive():
                # A due probe may have no prober: no thread was available, or this is a fork.
                self._start_prober()
            raise BreakerOpenError(
                f"instance {self._instance!r}: {part}: not tried, since {self.reason(part)}; probed again in "
                f"{self._breakers[part].probe_in:.1f} s"
            )

    def admit(self, part: Part, keys: Collection[str] = (), *, found: bool = False) -> None:
        """Check a breaker for work that reports its outcome: while it is open, some requests are let through.

        This way a part whose probes fail for their own reasons recovers.

        Args:
            part: Part that does the work.
            keys: Keys of the request. If a lookup is let through, so is the get of its keys.
            found: Whether a lookup may have found the keys before.

        Raises:
            BreakerOpenError: See `check`.
        """
        if not self.is_open(part):
            return
        with self._lock:
            if found and not self._trials.get(part, frozenset()).isdisjoint(keys):
                del self._trials[part]
                return
        if not self._breakers[part].try_anyway():
            self.check(part)
        elif not found:
            with self._lock:
                self._trials[part] = frozenset(keys)

    def reason(self, part: Part) -> str:
        """Return why the breaker of a part last opened."""
        return self._reasons.get(part, "it failed repeatedly")

    def succeeded(self, part: Part) -> None:
        """Record a success of a part."""
        if self._breakers[part].succeeded():
            self._log_closed(part)

    def failed(self, part: Part, error: HFBucketError) -> None:
        """Record a failure of a part, unless the request was never sent, which says nothing about the part."""
        if self._closed or isinstance(error, UnsentError):
            return
        self._reasons.setdefault(part, str(error))
        if not self._breakers[part].is_open:
            self._reasons[part] = str(error)
        if self._breakers[part].failed():
            self._notify(part, "open", str(error))
            self._start_prober()

    def ended(self, part: Part, error: HFBucketError | None) -> None:
        """Record the outcome of work of a part: only transport failures count against it."""
        if isinstance(error, TransportError):
            self.failed(part, error)
        elif not isinstance(error, (BudgetError, BreakerOpenError, RevokedError)):
            self.succeeded(part)

    def _notify(self, part: Part, to: Literal["open", "closed"], why: str) -> None:
        self._sink.gauge(telemetry.BREAKER_OPEN, float(to == "open"), instance=self._instance, part=part)
        self._sink.count(telemetry.BREAKER_CHANGES, instance=self._instance, part=part, to=to)
        if to == "open":
            _log.warning(
                "[%s] breaker: %s is disabled for now and probed in the background: %s", self._instance, part, why
            )
        else:
            _log.warning("[%s] breaker: %s works again", self._instance, part)

    # --- probing --------------------------------------------------------------------------------------------------

    def _start_prober(self) -> None:
        with self._lock:
            self._wake.set()
            if self._closed or (self._prober is not None and self._prober.is_alive()):
                return
            thread = threading.Thread(target=self._probe_all, name=f"hfbucket-probe-{self._instance}", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # no thread is available: the next caller retries
                return
            self._prober = thread

    def _probe_all(self) -> None:
        """Run due probes until no breaker is open or another thread has taken over."""
        me = threading.current_thread()
        while True:
            with self._lock:
                if self._prober is not me:
                    return
                waiting = [part for part in PARTS if self.is_open(part)]
                if self._closed or not waiting:
                    self._prober = None
                    return
                ready = [part for part in waiting if sum(one.is_alive() for one in self._probing[part]) < _AT_ONCE]
                self._wake.clear()
            self._wake.wait(min((self._breakers[part].probe_in for part in ready), default=None))
            for part in ready:
                if self._prober is me and self.is_open(part) and not self._breakers[part].probe_in:
                    self._probe(part)

    def _probe(self, part: Part) -> None:
        if self._closed:
            return
        me, probe = threading.current_thread(), _Probe()
        self._probing[part].add(me)
        successor = threading.Timer(_OVERLAP_SECS, self._take_over, (me, part, probe))
        successor.daemon = True
        with contextlib.suppress(RuntimeError):  # no thread is available: the others wait for this probe
            successor.start()
        try:
            reason = self._failure(part)
        finally:
            successor.cancel()
        with self._lock:
            probe.ended = True
            self._probing[part].discard(me)
        if reason is None:
            self._close(part)
        else:
            self._reasons[part] = reason
            if not probe.late:
                self._breakers[part].probed(well=False)
        if probe.late:
            self._wake.set()

    def _take_over(self, prober: threading.Thread, part: Part, probe: _Probe) -> None:
        """Continue with other probes in another thread while one is slow; that one may still close its breaker."""
        with self._lock:
            if self._closed or probe.ended or self._prober is not prober:
                return
            probe.late = True
            self._prober = threading.current_thread()
        self._breakers[part].probed(well=False)
        self._probe_all()

    def _failure(self, part: Part) -> str | None:
        """Probe a part; return why it fails, or None if it works."""
        try:
            self._probes[part]()
        except (TransportError, ThrottledError, BreakerOpenError) as error:
            return str(error)
        except HFBucketError as error:
            # A refusal is a response: work gets the same one at once and reports it. Reads, however, would return nothing.
            return str(error) if part == "read" and not isinstance(error, MissingError) else None
        except BaseException as error:  # noqa: BLE001 - includes hf_xet's panics; the prober must go on
            return f"the probe failed: {type(error).__name__}: {error}"
        return None

    def _close(self, part: Part) -> None:
        if self._breakers[part].probed(well=True):
            self._log_closed(part)

    def _log_closed(self, part: Part) -> None:
        self._reasons.pop(part, None)
        self._notify(part, "closed", "")
        self._wake.set()

    def status(self) -> dict[str, str]:
        """Return the cause for each open part; empty if all parts work."""
        return {part: self.reason(part) for part in PARTS if self.is_open(part)}

    def close(self) -> None:
        """Stop probing."""
        self._closed = True
        self._wake.set()
