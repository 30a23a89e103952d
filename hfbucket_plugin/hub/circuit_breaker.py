"""Circuit breakers: what fails for a while is not asked for."""

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
"""A breaker that opens again sooner than this goes on with the backoff that it had: probes lie more easily than work does,
and each lie costs a deadline."""

_TRIAL_AFTER, _TRIALS_IN_A_ROW, _TRIAL_EVERY = 2, 3, 3
"""One request is tried after the second failed probe in a row and the two that follow, then after every third: a probe can fail
for a reason of its own, and in a long outage each trial costs a request its deadline."""

_JITTER: Final = 0.2
"""Share by which a wait is shortened at random, so that a fleet does not probe in step."""


class CircuitBreaker:
    """Counts failures in a row; thread-safe.

    Args:
        failures: In a row that open it.
        first_probe_secs: From opening to the first probe.
        max_probe_secs: Most seconds between probes; they double from the first on.
        clock: Seconds, monotonic; tests pass their own.
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
        """Whether nothing should be tried."""
        return self._open

    @property
    def probe_in(self) -> float:
        """Seconds until the next probe is due; 0 when it is. Without meaning while the breaker is closed."""
        with self._lock:
            return max(0.0, self._probe_at - self._clock())

    def failed(self) -> bool:
        """Record a failure, and return whether it opened the breaker."""
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
        """Record that work was done, and return whether it closed the breaker.

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
        """Record how a probe ended: it closes the breaker, or puts the next probe off for twice as long.

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
"""A probe has the deadline of the work that it stands for, which may be a minute. One that takes longer than this goes on, and the
next ones no longer wait for it: a store that came back meanwhile is found soon."""

_AT_ONCE: Final = 16
"""Probes of one part in progress at one time."""


class _Probe:
    """A probe in progress.

    Attributes:
        late: Whether the next ones no longer wait for it.
        ended: Whether it has ended.
    """

    def __init__(self) -> None:
        self.late = False
        self.ended = False


class CircuitBreakers:
    """Opens and closes the breakers of one instance.

    Args:
        settings: The instance's.
        instance: Its name.
        sink: Where states are reported.
        probes: What tells whether a part works: returns, or raises an `HFBucketError` within its own deadline. One that takes
            long holds up no other.
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
        """Have no prober: at first, and in a forked child, where that of the parent does not run."""
        self._lock = threading.Lock()
        self._prober: threading.Thread | None = None
        self._probing: dict[Part, set[threading.Thread]] = {part: set() for part in PARTS}
        self._wake = threading.Event()

    def is_open(self, part: Part) -> bool:
        """Whether a part's work should not be tried."""
        return self._breakers[part].is_open

    def check(self, part: Part) -> None:
        """Stop here while a part's breaker is open.

        Raises:
            BreakerOpenError: It is open; the message tells why it opened and when it is probed next.
        """
        if self.is_open(part):
            if not self._breakers[part].probe_in or self._prober is None or not self._prober.is_alive():
                # Due, and perhaps nobody's: no thread was left, or this is a fork.
                self._start_prober()
            raise BreakerOpenError(
                f"instance {self._instance!r}: {part}: not tried, since {self.reason(part)}; probed again in "
                f"{self._breakers[part].probe_in:.1f} s"
            )

    def admit(self, part: Part, keys: Collection[str] = (), *, found: bool = False) -> None:
        """As `check`, for work that reports how it ends: while a breaker is open, one request is let through now and then.

        So a part whose probes fail for a reason of their own does not stay given up.

        Args:
            part: What does the work.
            keys: What a request is about. A lookup that is let through has the get of its keys let through too.
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
        """Why a part's breaker opened last, in words."""
        return self._reasons.get(part, "it failed repeatedly")

    def succeeded(self, part: Part) -> None:
        """Record that some work of a part was done."""
        if self._breakers[part].succeeded():
            self._log_closed(part)

    def failed(self, part: Part, error: HFBucketError) -> None:
        """Record that some work of a part failed for no reason of its own. What was never sent says nothing about the part."""
        if self._closed or isinstance(error, UnsentError):
            return
        self._reasons.setdefault(part, str(error))
        if not self._breakers[part].is_open:
            self._reasons[part] = str(error)
        if self._breakers[part].failed():
            self._notify(part, "open", str(error))
            self._start_prober()

    def ended(self, part: Part, error: HFBucketError | None) -> None:
        """Record how some work of a part ended: only failures in transport speak against the part."""
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
            except RuntimeError:  # no thread left: the next caller tries again
                return
            self._prober = thread

    def _probe_all(self) -> None:
        """Probe what is open when it is due, until nothing is, or another thread has taken over."""
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
        with contextlib.suppress(RuntimeError):  # no thread left: the others wait for this probe
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
        """Go on with the other probes while one takes long: it is undecided, and may still close its breaker."""
        with self._lock:
            if self._closed or probe.ended or self._prober is not prober:
                return
            probe.late = True
            self._prober = threading.current_thread()
        self._breakers[part].probed(well=False)
        self._probe_all()

    def _failure(self, part: Part) -> str | None:
        """Probe a part, and say why it does not work; None where it does."""
        try:
            self._probes[part]()
        except (TransportError, ThrottledError, BreakerOpenError) as error:
            return str(error)
        except HFBucketError as error:
            # An answer, if a refusal, is an answer: work is refused at once too, and told as what it is. But nothing would be read.
            return str(error) if part == "read" and not isinstance(error, MissingError) else None
        except BaseException as error:  # noqa: BLE001 - hf_xet's panics too; the prober must live
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
        """Why each open part is open, in words; empty when all work."""
        return {part: self.reason(part) for part in PARTS if self.is_open(part)}

    def close(self) -> None:
        """Probe no more."""
        self._closed = True
        self._wake.set()
