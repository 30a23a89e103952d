"""Background comparison of engines with the bucket's fingerprints, with reports and optional enforcement.

Nothing here waits in an engine's thread. Code that uses an engine's chunks calls `EngineHandle.refusal`, which answers
from known state and starts a look in a thread when one is due: at the start, at the first use (when the engine knows
its whole layout), at the first put (only engines that store record themselves), and periodically. Unused instances make
no calls.

Under `enforce`, chunks are served and stored only after fingerprints are known to agree; the unknown never times out.
The record is in the bucket beside the chunks, so both are unreadable together, and an engine that stores before its
record is valid might store under another engine's keys.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Final, Literal, get_args

from hfbucket_plugin.core import forks, telemetry
from hfbucket_plugin.core.concurrency import WorkerPool
from hfbucket_plugin.core.deadline import Deadline
from hfbucket_plugin.core.telemetry import RateLimitedLogger
from hfbucket_plugin.errors import BucketMissingError, HFBucketError, IntegrityError, ThrottledError, TransportError
from hfbucket_plugin.fingerprint.model import as_text, differences, printable
from hfbucket_plugin.fingerprint.store import FingerprintStore

if TYPE_CHECKING:
    from collections.abc import Callable

    from hfbucket_plugin.config.settings import InstanceSettings
    from hfbucket_plugin.fingerprint.model import Fingerprint
    from hfbucket_plugin.fingerprint.store import StoredRecord
    from hfbucket_plugin.hub.bucket import Bucket
    from hfbucket_plugin.hub.circuit_breaker import CircuitBreakers

_log = logging.getLogger(__name__)

State = Literal["unknown", "unrecorded", "agrees", "conflict", "unreadable"]
STATES: Final[tuple[State, ...]] = get_args(State)

CONFLICT: Final = "fingerprint"
UNKNOWN: Final = "fingerprint_unknown"
"""Outcomes of chunks that are not served or stored under `enforce`."""

_BACKLOG: Final = 1024
_MAX_CLAIMED: Final = 1024
"""Maximum number of remembered claimed digests; further claims are not written."""

_LOOK_SECS: Final = 30.0
_FIRST_RETRY_SECS: Final = 1.0
_LAST_RETRY_SECS: Final = 60.0
_SOONER: Final = 10
"""Factor by which looks are more frequent while something is wrong."""

_TELL_AGAIN_SECS: Final = 3600.0


class EngineHandle:
    """One engine, or all engines behind an L2 adapter whose keys could be equal.

    Args:
        watch: Watch that the engine belongs to.
        model: Name of the model.
        facts: Returns the known fingerprint without delay. Raises any exception if it is not a valid one.
    """

    def __init__(self, watch: FingerprintWatch, model: str, facts: Callable[[], Fingerprint]) -> None:
        self._watch = watch
        self.model = model
        self.facts = facts
        self.state: State = "unknown"
        self.used = False
        self.stores = False
        self.reported = ""
        self.write_at = float("-inf")  # time before which a refused write is not retried
        self.revision = 0  # of its facts: results for an earlier revision are invalid

    def refusal(self, *, storing: bool = False) -> str | None:
        """Return the outcome label that forbids to look up, read, delete or store its chunks now; None if allowed.

        Args:
            storing: Whether to store.
        """
        return self._watch.refusal(self, storing=storing)

    def changed(self) -> None:
        """Record that its facts have changed, which invalidates earlier results."""
        self._watch.changed(self)


class _Known:
    """State of one model's record."""

    def __init__(self) -> None:
        self.found: StoredRecord | None = None
        self.busy = False
        self.next_at = float("-inf")
        self.fresh_until = float("-inf")
        self.soon = self.later = float("-inf")
        self.status: Literal["unread", "read", "unreadable"] = "unread"
        self.retry_secs = _FIRST_RETRY_SECS
        self.bucket_is_missing = False


class FingerprintWatch:
    """Fingerprints of one instance in an engine.

    Args:
        bucket: Bucket of the instance.
        settings: Settings of the instance.
        instance: Name of the instance.
        breakers: Circuit breakers: no requests are made while that of lookups is open.
        sink: Metrics sink for states.
        clock: Monotonic clock in seconds.
    """

    def __init__(
        self,
        bucket: Bucket,
        settings: InstanceSettings,
        instance: str,
        breakers: CircuitBreakers,
        sink: telemetry.Sink,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._bucket = bucket
        self._settings = settings
        self._instance = instance
        self._breakers = breakers
        self._sink = sink
        self._clock = clock
        self._store = FingerprintStore(bucket, instance)
        self._threads = WorkerPool(f"hfbucket-fingerprint-{instance}", 1, _BACKLOG)
        self._limited = RateLimitedLogger(_log, _TELL_AGAIN_SECS)
        self._subjects: dict[EngineHandle, None] = {}
        self._known: dict[str, _Known] = {}
        self._claimed: set[str] = set()
        self._closed = False
        self._start_over()
        forks.reset_in_child(self._start_over)

    def _start_over(self) -> None:
        """Reset to no look in progress, initially and in a forked child, where the parent's do not continue."""
        self._lock = threading.Lock()
        self._ended = threading.Condition(self._lock)  # notified when a look ends
        for known in self._known.values():
            if known.busy:
                known.busy, known.next_at = False, float("-inf")

    def add(self, model: str, facts: Callable[[], Fingerprint]) -> EngineHandle:
        """Watch an engine; the record of its model is read soon.

        Args:
            model: See `EngineHandle`.
            facts: See `EngineHandle`.
        """
        subject = EngineHandle(self, model, facts)
        with self._lock:
            self._subjects[subject] = None
            self._known.setdefault(model, _Known())
        self.check_soon(model)
        return subject

    def drop(self, subject: EngineHandle) -> None:
        """Stop watching an engine."""
        with self._lock:
            self._subjects.pop(subject, None)
            if all(other.model != subject.model for other in self._subjects):
                self._known.pop(subject.model, None)

    # --- in an engine's thread ----------------------------------------------------------------------------------------

    def refusal(self, subject: EngineHandle, *, storing: bool) -> str | None:
        """See `EngineHandle.refusal`."""
        if self._settings.fingerprint == "off":
            return None
        stores = storing and self._settings.writes
        if not subject.used or (stores and not subject.stores):
            self._first_use(subject, stores=stores)
        elif (known := self._known.get(subject.model)) is not None and self._clock() >= known.next_at:
            self._look(subject.model)
        if self._settings.fingerprint == "warn" or subject.state == "agrees":
            return None
        return CONFLICT if subject.state == "conflict" else UNKNOWN

    def _first_use(self, subject: EngineHandle, *, stores: bool) -> None:
        """Reset the agreement of an engine at its first use, because it may know more of itself than at its start."""
        agrees = not subject.used and subject.state == "agrees" and self._agrees(subject)
        with self._lock:
            if not subject.used:
                subject.used = True
                subject.revision += 1
                if subject.state == "agrees" and not agrees:
                    subject.state = "unknown"
            subject.stores |= stores
        self.check_soon(subject.model)

    def _agrees(self, subject: EngineHandle) -> bool:
        known = self._known.get(subject.model)
        try:
            mine = subject.facts()
        except Exception:  # noqa: BLE001 - logged by `_judge`
            return False
        recorded = known.found.record.of(mine.space) if known is not None and known.found is not None else None
        if recorded is None or differences(recorded, mine):
            return False
        return not (subject.stores and recorded.completed(mine) != recorded)

    def changed(self, subject: EngineHandle) -> None:
        """Compare an engine again after a change; see `EngineHandle.changed`.

        An engine that still agrees with the record keeps agreeing during the background comparison, unless it stores
        and the record lacks something of it: nothing is stored before its record is valid.
        """
        agrees = subject.state == "agrees" and self._agrees(subject)
        with self._lock:
            subject.revision += 1
            if not agrees:
                subject.state = "unknown"
        self.check_soon(subject.model)

    def check_soon(self, model: str) -> None:
        """Start a comparison of a model's engines with its record, unless one runs. The Hub is asked only when due."""
        with self._lock:
            known = self._known.get(model)
            if known is None or self._settings.fingerprint == "off":
                return
            known.next_at = float("-inf")
        self._look(model)

    def _look(self, model: str) -> None:
        with self._lock:
            known = self._known.get(model)
            if known is None or known.busy:
                return
            known.busy = True
        try:
            self._threads.submit(self._work, model, known)
        except RuntimeError:  # closed, or no thread is available: the next caller retries
            known.busy = False

    # --- on the thread of the watch -------------------------------------------------------------------------------

    def _work(self, model: str, known: _Known) -> None:
        try:
            while self._clock() >= known.next_at:
                known.next_at = float("inf")  # reset by a caller that needs another look meanwhile
                known.fresh_until = self._looked(model, known)
                with self._lock:
                    known.next_at = min(known.next_at, known.fresh_until)
        except Exception:  # noqa: BLE001 - after any error the engine works without the fingerprint
            _log.exception("[%s] fingerprint: the look at %r failed", self._instance, model)
            known.next_at = self._clock() + _LAST_RETRY_SECS
        finally:
            self._log_states()
            with self._lock:
                known.busy = False
                again = self._clock() >= known.next_at and not self._closed
                if not again:
                    self._ended.notify_all()
            if again:  # requested at the last moment
                self._look(model)

    def _looked(self, model: str, known: _Known) -> float:
        """Look once; return the time until which the result is sufficient."""
        failed = False
        if self._clock() >= known.fresh_until:
            if wait := self._must_wait():
                return self._clock() + wait
            failed = not self._read(model, known)
        if known.status == "unread":
            return self._clock() + self._retry_secs(known) if failed else known.fresh_until
        with self._lock:
            subjects = [subject for subject in self._subjects if subject.model == model]
        for subject in subjects:
            failed |= not self._judge(subject, known)
        if failed:
            return self._clock() + self._retry_secs(known)
        known.retry_secs = _FIRST_RETRY_SECS
        return known.later if all(subject.state == "agrees" for subject in subjects) else known.soon

    @staticmethod
    def _retry_secs(known: _Known) -> float:
        known.retry_secs = min(2 * known.retry_secs, _LAST_RETRY_SECS)
        return known.retry_secs

    def _must_wait(self) -> float:
        """Return the seconds until background work may call the Hub."""
        if wait := self._bucket.paused_secs or self._bucket.background_wait_secs:
            return min(wait, _LAST_RETRY_SECS)
        return _FIRST_RETRY_SECS if self._breakers.is_open("lookup") else 0.0

    def _read(self, model: str, known: _Known) -> bool:
        """Read the record from the Hub; return whether the Hub answered."""
        refresh = self._settings.fingerprint_refresh_secs
        known.soon, known.later = self._clock() + refresh / _SOONER, self._clock() + refresh
        known.bucket_is_missing = False
        try:
            known.found = self._store.read(model, Deadline.after(_LOOK_SECS), known.found)
        except BucketMissingError:
            known.found, known.bucket_is_missing = None, True
        except IntegrityError as error:
            self._unreadable(model, known, error)
            return True
        except HFBucketError as error:
            self._warn(f"{model} {error.kind}", f"of {printable(model)} is not known for now{self._so()}: {error}")
            return False
        known.status = "read"
        return True

    def _unreadable(self, model: str, known: _Known, error: IntegrityError) -> None:
        known.found, known.status = None, "unreadable"
        self._warn(f"{model} unreadable", f"cannot be read, and nothing is compared{self._so()}: {error}")

    def _judge(self, subject: EngineHandle, known: _Known) -> bool:
        """Compare an engine with the record, and record it if there is none; return False if a retry may help soon."""
        with self._lock:
            revision, used, stores = subject.revision, subject.used, subject.stores
        try:
            mine = subject.facts()
        except Exception as error:  # noqa: BLE001 - another LMCache version, or an invalid value: the engine goes on
            self._settle(subject, revision, "unknown")
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            self._warn(f"{subject.model} facts", f"of {printable(subject.model)} cannot be made{self._so()}: {reason}")
            return True
        if not used:  # KV groups register, and hashes get their seed, after a connector is made
            mine = mine.model_copy(update={"layout": None, "hash_check": None})
        recorded, done = self._of(mine, known), True
        wanted = known.status == "read" and (recorded is None or self._lacks(recorded, mine))
        if stores and wanted and self._clock() >= subject.write_at:
            done = self._record(subject, mine, known)
            recorded = self._of(mine, known)
        if known.status == "unreadable":
            self._settle(subject, revision, "unreadable")
        elif recorded is None:
            self._settle(subject, revision, "unrecorded")
        elif not differences(recorded, mine):
            subject.reported = ""
            self._settle(subject, revision, "agrees")
        elif self._settle(subject, revision, "conflict"):
            self._conflict(subject, recorded, mine)
        return done

    @staticmethod
    def _of(mine: Fingerprint, known: _Known) -> Fingerprint | None:
        return known.found.record.of(mine.space) if known.found is not None else None

    @staticmethod
    def _lacks(recorded: Fingerprint, mine: Fingerprint) -> bool:
        return not differences(recorded, mine) and recorded.completed(mine) != recorded

    def _settle(self, subject: EngineHandle, revision: int, state: State) -> bool:
        """Set the state of an engine, unless its facts have changed meanwhile; then look again."""
        with self._lock:
            if subject.revision != revision:
                return False
            subject.state = state
            return True

    def _record(self, subject: EngineHandle, mine: Fingerprint, known: _Known) -> bool:
        """Record an engine, or what the record lacks of it. A missing permission is not an error of the engine.

        Returns:
            Whether it is recorded, or may not be.
        """
        try:
            if known.bucket_is_missing and self._settings.create_bucket_if_missing:
                self._bucket.create(Deadline.after(_LOOK_SECS))
            known.found = self._store.record_first(mine, Deadline.after(_LOOK_SECS))
        except IntegrityError as error:
            self._unreadable(subject.model, known, error)
        except HFBucketError as error:
            so = "" if subject.state == "agrees" else self._so()
            self._warn(
                f"{subject.model} record {error.kind}", f"of {printable(subject.model)} was not recorded{so}: {error}"
            )
            return self._refused(subject, error)
        return True

    def _refused(self, subject: EngineHandle, error: HFBucketError) -> bool:
        """Return whether the Hub refuses writes, which only an operator can change.

        The next attempt is then `fingerprint_refresh_secs` later: each takes several calls, and a fleet with read-only
        tokens would use up the quota of its lookups. Under `enforce` the engine looks nothing up meanwhile.
        """
        if isinstance(error, (TransportError, ThrottledError)):
            return False
        if self._settings.fingerprint == "warn":
            subject.write_at = self._clock() + self._settings.fingerprint_refresh_secs
        return True

    def _conflict(self, subject: EngineHandle, recorded: Fingerprint, mine: Fingerprint) -> None:
        found = differences(recorded, mine)
        words = as_text(found)
        if subject.reported != words:
            for one in found:
                self._sink.count(telemetry.FINGERPRINT_CONFLICTS, instance=self._instance, field=one.field)
        subject.reported = words
        who = f"{recorded.written_by or 'somebody'} at {recorded.recorded_at or 'some time'}"
        then = (
            "nothing is served from it or stored there (fingerprint: enforce)"
            if self._settings.fingerprint == "enforce"
            else "it is used all the same (fingerprint: warn)"
        )
        self._warn(
            f"{subject.model} {mine.space} {words}",
            f"{printable(subject.model)} ({printable(str(mine.space))}) is not what the bucket holds: {words}. That was recorded by "
            f"{printable(who)}; {then}. See `python -m jobs fingerprint show` and docs/fingerprint.md",
        )
        self._claim(subject, mine)

    def _claim(self, subject: EngineHandle, mine: Fingerprint) -> None:
        """Write the claim of an engine that differs from the record, for operators."""
        if not self._settings.writes or mine.digest in self._claimed or len(self._claimed) >= _MAX_CLAIMED:
            return
        if self._clock() < subject.write_at:
            return
        try:
            self._store.claim(mine, Deadline.after(_LOOK_SECS))
        except HFBucketError as error:
            self._refused(subject, error)
            self._warn(
                f"{mine.model} claim {error.kind}", f"of this engine was not left for `jobs fingerprint show`: {error}"
            )
        else:
            self._claimed.add(mine.digest)

    def _so(self) -> str:
        return (
            ", so nothing is served or stored (fingerprint: enforce)" if self._settings.fingerprint == "enforce" else ""
        )

    def _warn(self, kind: str, message: str) -> None:
        if self._closed:  # the bucket is closed too, so a failure now says nothing
            return
        self._limited.warning(kind, f"[{self._instance}] fingerprint: {message}")

    def _log_states(self) -> None:
        with self._lock:
            states = Counter(subject.state for subject in self._subjects)
        for state in STATES:
            self._sink.gauge(telemetry.FINGERPRINT_STATE, states[state], instance=self._instance, state=state)

    # --- status and shutdown ------------------------------------------------------------------------------------------

    def status(self) -> list[str]:
        """Return the problems as text; empty if all engines agree or are not compared yet."""
        with self._lock:
            subjects = list(self._subjects)
        return [
            f"{printable(one.model)}: {one.reported}"
            if one.state == "conflict"
            else f"{printable(one.model)}: its fingerprint is unreadable"
            for one in subjects
            if one.state in {"conflict", "unreadable"}
        ]

    def finish(self, secs: float) -> None:
        """Let a running look end that may record an engine, because a script may end right after its first store.

        Args:
            secs: Maximum wait in seconds.
        """
        with self._ended:
            self._ended.wait_for(lambda: not self._is_recording(), timeout=max(0.0, secs))

    def _is_recording(self) -> bool:
        storing = {subject.model for subject in self._subjects if subject.stores}
        return any(known.busy for model, known in self._known.items() if model in storing)

    def close(self) -> None:
        """Stop looking, without waiting."""
        self._closed = True
        self._threads.close()
        self._store.close()
