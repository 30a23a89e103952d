"""Metrics and rate-limited logs of an instance."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Literal, Protocol

import prometheus_client

from hfbucket_plugin.core import forks
from hfbucket_plugin.errors import BucketMissingError

if TYPE_CHECKING:
    from collections.abc import Callable

    from hfbucket_plugin.errors import HFBucketError


class RateLimitedLogger:
    """Logger of at most one warning per kind and interval.

    Args:
        log: Target logger.
        interval_secs: Interval in seconds; by default 30, as LMCache's health monitor.
        clock: Monotonic clock in seconds.
    """

    def __init__(
        self, log: logging.Logger, interval_secs: float = 30.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._log = log
        self._interval = interval_secs
        self._clock = clock
        self._lock = forks.ForkSafeLock()
        self._next: dict[str, float] = {}
        self._left_out: dict[str, int] = {}

    def warning(self, kind: str, message: str) -> bool:
        """Log the message, unless one of its kind was logged within the interval.

        Returns:
            Whether it was logged.
        """
        now = self._clock()
        with self._lock:
            if now < self._next.get(kind, float("-inf")):
                self._left_out[kind] = self._left_out.get(kind, 0) + 1
                return False
            self._next[kind] = now + self._interval
            left_out = self._left_out.pop(kind, 0)
        more = f" ({left_out} more like this since the last one)" if left_out else ""
        self._log.warning("%s%s", message, more)
        return True


OPERATIONS = "hfbucket_operations_total"
CHUNKS = "hfbucket_chunks_total"
BYTES = "hfbucket_bytes_total"
SECONDS = "hfbucket_seconds"
HUB_REQUESTS = "hfbucket_hub_requests_total"
BREAKER_OPEN = "hfbucket_breaker_open"
BREAKER_CHANGES = "hfbucket_breaker_changes_total"
IN_FLIGHT = "hfbucket_in_flight"
WAITING_PUT_BYTES = "hfbucket_waiting_put_bytes"
CACHE_ENTRIES = "hfbucket_metadata_cache_entries"
FINGERPRINT_STATE = "hfbucket_fingerprint_state"
FINGERPRINT_CONFLICTS = "hfbucket_fingerprint_conflicts_total"
QUARANTINED = "hfbucket_quarantined_contents"
BAD_OBJECTS = "hfbucket_bad_objects_total"
INDEX_STATE = "hfbucket_index_state"
INDEX_KEYS = "hfbucket_index_keys"
INDEX_BYTES = "hfbucket_index_bytes"
INDEX_AGE = "hfbucket_index_age_seconds"
INDEX_REFRESHES = "hfbucket_index_refreshes_total"
INDEX_JOURNALS = "hfbucket_index_journals_total"
INDEX_DROPPED = "hfbucket_index_entries_dropped_total"
INDEX_ANSWERS = "hfbucket_index_answers_total"
ACCESS_HITS = "hfbucket_heat_hits_total"

_COUNTERS = {
    OPERATIONS: ("Operations of the engine on a bucket instance, by outcome", ("instance", "operation", "outcome")),
    CHUNKS: ("Chunks looked up, read, written and deleted, by outcome", ("instance", "operation", "outcome")),
    BYTES: ("Bytes of chunks read from and written to the store", ("instance", "direction")),
    HUB_REQUESTS: ("Requests to the Hub's API, which count against its quota", ("instance", "route", "outcome")),
    FINGERPRINT_CONFLICTS: (
        "Conflicts with the bucket's fingerprint, by the field that differs",
        ("instance", "field"),
    ),
    BREAKER_CHANGES: ("Openings and closings of circuit breakers", ("instance", "part", "to")),
    BAD_OBJECTS: ("Objects proven bad: two fetches failed their hash", ("instance",)),
    INDEX_REFRESHES: ("Refreshes of the key index, by outcome", ("instance", "outcome")),
    INDEX_JOURNALS: (
        "Journals of the key index read or written, by outcome",
        ("instance", "outcome"),
    ),
    INDEX_DROPPED: ("Puts and deletes that no journal reports, because too many entries waited", ("instance",)),
    INDEX_ANSWERS: (
        "Keys looked up in the key index, by whether it answered or the Hub was asked",
        ("instance", "outcome"),
    ),
    ACCESS_HITS: (
        "Chunks served, by whether the hit was reported to other processes or dropped because too many keys waited",
        ("instance", "outcome"),
    ),
}
# How the values of several processes are merged if LMCache runs prometheus_client in its multi-process mode.
_GAUGES: dict[str, tuple[str, tuple[str, ...], Literal["livemax", "livesum"]]] = {
    BREAKER_OPEN: (
        "Whether a circuit breaker is open: 1 while its operations fail at once",
        ("instance", "part"),
        "livemax",
    ),
    IN_FLIGHT: ("Calls of the engine in progress", ("instance", "operation"), "livesum"),
    WAITING_PUT_BYTES: ("Bytes of chunks whose puts wait or are in progress", ("instance",), "livesum"),
    FINGERPRINT_STATE: ("Models of this process, by the state of their fingerprint", ("instance", "state"), "livesum"),
    CACHE_ENTRIES: ("Entries of the metadata cache", ("instance",), "livesum"),
    INDEX_STATE: ("State of the key index: 1 for the current one", ("instance", "state"), "livemax"),
    INDEX_KEYS: ("Keys of the key index's snapshot in use", ("instance",), "livemax"),
    INDEX_BYTES: ("Memory of the key index, in bytes", ("instance",), "livesum"),
    INDEX_AGE: (
        "Seconds since the key index in use was made or last refreshed, whichever is longer, at its last refresh",
        ("instance",),
        "livemax",
    ),
    QUARANTINED: ("Contents that recently could not be served and are not offered", ("instance",), "livesum"),
}
# From a cached lookup (microseconds) to a put that reaches its deadline.
_BUCKETS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)


class Sink(Protocol):
    """Receiver of measurements. Implementations are thread-safe and do not raise."""

    def count(self, name: str, value: float = 1, /, **labels: str) -> None:
        """Add `value` to a counter."""

    def observe(self, name: str, value: float, /, **labels: str) -> None:
        """Record one value of a histogram."""

    def gauge(self, name: str, value: float, /, **labels: str) -> None:
        """Set a gauge."""


class MemorySink:
    """Sink that keeps its numbers in memory, for reports and tests."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, tuple[tuple[str, str], ...]]] = Counter()

    def count(self, name: str, value: float = 1, /, **labels: str) -> None:
        """Add `value` to a counter."""
        with self._lock:
            self._counts[name, tuple(sorted(labels.items()))] += value  # type: ignore[assignment]

    def observe(self, name: str, value: float, /, **labels: str) -> None:
        """Add an observation to `<name>_count` and its value to `<name>_sum`."""
        self.count(f"{name}_count", **labels)
        self.count(f"{name}_sum", value, **labels)

    def gauge(self, name: str, value: float, /, **labels: str) -> None:
        """Set a gauge."""
        with self._lock:
            self._counts[name, tuple(sorted(labels.items()))] = value  # type: ignore[assignment]

    def get(self, name: str, /, **labels: str) -> float:
        """Return the sum of all counters of a name whose labels include the given ones."""
        wanted = set(labels.items())
        with self._lock:
            return sum(v for (n, pairs), v in self._counts.items() if n == name and wanted <= set(pairs))


class PrometheusSink:
    """Sink into a Prometheus registry, by default the process-wide one that LMCache serves."""

    def __init__(self, registry: prometheus_client.CollectorRegistry = prometheus_client.REGISTRY) -> None:
        self._counters = {
            name: prometheus_client.Counter(name, text, labels, registry=registry)
            for name, (text, labels) in _COUNTERS.items()
        }
        self._seconds = prometheus_client.Histogram(
            SECONDS,
            "Duration of operations on a bucket instance, in seconds",
            ("instance", "operation"),
            buckets=_BUCKETS,
            registry=registry,
        )
        self._gauges = {
            name: prometheus_client.Gauge(name, text, labels, registry=registry, multiprocess_mode=mode)
            for name, (text, labels, mode) in _GAUGES.items()
        }

    def count(self, name: str, value: float = 1, /, **labels: str) -> None:
        """Add `value` to a counter of `_COUNTERS`."""
        self._counters[name].labels(**labels).inc(value)

    def observe(self, name: str, value: float, /, **labels: str) -> None:
        """Record a duration in seconds."""
        if name == SECONDS:
            self._seconds.labels(**labels).observe(value)

    def gauge(self, name: str, value: float, /, **labels: str) -> None:
        """Set a gauge of `_GAUGES`."""
        self._gauges[name].labels(**labels).set(value)


_shared: PrometheusSink | None = None
_shared_lock = threading.Lock()


def default_sink() -> Sink:
    """Return the process's only sink into the default Prometheus registry; collectors register by name."""
    global _shared  # noqa: PLW0603 - the registry is process-wide too
    with _shared_lock:
        if _shared is None:
            _shared = PrometheusSink()
        return _shared


_log = logging.getLogger(__name__)


class Telemetry:
    """Metrics and logs of the chunks and operations of one instance.

    Args:
        instance: Name of the instance.
        sink: Metrics sink.
        creates_bucket: Whether a missing bucket is not a failure, because the first write creates it.
    """

    def __init__(self, instance: str, sink: Sink, *, creates_bucket: bool = False) -> None:
        self.instance = instance
        self._creates_bucket = creates_bucket
        self.sink = sink
        self._limited = RateLimitedLogger(_log)

    def chunks(self, operation: str, outcome: str, chunks: int) -> None:
        """Count chunks of an operation with the same outcome."""
        if chunks:
            self.sink.count(CHUNKS, chunks, instance=self.instance, operation=operation, outcome=outcome)

    def bytes(self, direction: str, amount: int) -> None:
        """Count transferred bytes of chunks, ``read`` or ``write``."""
        if amount:
            self.sink.count(BYTES, amount, instance=self.instance, direction=direction)

    def ended(self, operation: str, outcome: str, started: float) -> None:
        """Count an operation, and its duration since `started` on the monotonic clock."""
        self.sink.count(OPERATIONS, instance=self.instance, operation=operation, outcome=outcome)
        self.sink.observe(SECONDS, time.monotonic() - started, instance=self.instance, operation=operation)

    def excuses(self, error: HFBucketError) -> bool:
        """Return whether an error only means that the bucket has not been created yet."""
        return self._creates_bucket and isinstance(error, BucketMissingError)

    def failed(self, operation: str, error: HFBucketError, chunks: int, started: float) -> None:
        """Count an operation that failed as a whole, and log the cause."""
        if self.excuses(error):
            self.chunks(operation, "missing", chunks)
            self.ended(operation, "ok", started)
            return
        self.chunks(operation, error.kind, chunks)
        self.ended(operation, error.kind, started)
        self.warn(operation, error.kind, str(error))

    def in_flight(self, operation: str, calls: int) -> None:
        """Report the number of calls of an operation in progress."""
        self.sink.gauge(IN_FLIGHT, calls, instance=self.instance, operation=operation)

    def quarantined(self, contents: int) -> None:
        """Report the number of contents that are not offered because they recently could not be served."""
        self.sink.gauge(QUARANTINED, contents, instance=self.instance)

    def warn_of_size(self, operation: str, what: str, actual: int, size: int | None) -> None:
        """Log that an object is not a full chunk of `size` bytes, if the size is known."""
        full = "none of 0 bytes" if size is None else str(size)
        self.warn(
            operation,
            "size",
            f"{what}: refused, since the object has {actual} bytes and a full chunk {full}; was it written with another "
            "chunk_size, dtype or layout?",
        )

    def waiting_puts(self, calls: int, amount: int) -> None:
        """Report the number and bytes of puts that wait or are in progress."""
        self.in_flight("put", calls)
        self.sink.gauge(WAITING_PUT_BYTES, amount, instance=self.instance)

    def warn(self, operation: str, kind: str, message: str) -> None:
        """Log a warning, at most one per kind and operation within 30 s, with the number of suppressed ones."""
        self._limited.warning(f"{operation} {kind}", f"[{self.instance}] {operation}: {message}")
