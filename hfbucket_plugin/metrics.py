"""Counters and histograms behind one hook.

Code that has something to tell calls a `Sink`; where the numbers go is decided once, at the outermost door. Names and
labels are stable: they are only ever added to.

======================================  =========  ====================================================================
name                                    kind       labels
======================================  =========  ====================================================================
``hfbucket_operations_total``           counter    ``instance``, ``operation`` (lookup, get, put, delete, list),
                                                   ``outcome`` (ok, or the reason of a miss or failure)
``hfbucket_chunks_total``               counter    ``instance``, ``operation`` (lookup, get, put, delete), ``outcome``:
                                                   hit, stored, present, deleted, or the `kind` of an error
``hfbucket_bytes_total``                counter    ``instance``, ``direction`` (read, write)
``hfbucket_seconds``                    histogram  ``instance``, ``operation``
``hfbucket_hub_requests_total``         counter    ``instance``, ``route``, ``outcome`` (ok or an error's `kind`)
======================================  =========  ====================================================================
"""

from __future__ import annotations

import threading
from collections import Counter
from typing import Literal, Protocol

import prometheus_client

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
HEAT_HITS = "hfbucket_heat_hits_total"

_COUNTERS = {
    OPERATIONS: ("Operations of the engine on a bucket instance", ("instance", "operation", "outcome")),
    CHUNKS: ("Chunks looked up, read, written and deleted", ("instance", "operation", "outcome")),
    BYTES: ("Bytes of chunks moved", ("instance", "direction")),
    HUB_REQUESTS: ("Requests to the Hub's API", ("instance", "route", "outcome")),
    FINGERPRINT_CONFLICTS: (
        "Times that a field was found to differ from the bucket's fingerprint",
        ("instance", "field"),
    ),
    BREAKER_CHANGES: ("Times that a breaker opened or closed", ("instance", "part", "to")),
    BAD_OBJECTS: ("Objects proven bad by two fetches that failed their hash", ("instance",)),
    INDEX_REFRESHES: ("Refreshes of the key index, by how they ended", ("instance", "outcome")),
    INDEX_JOURNALS: (
        "Journals of the key index that were read or written, by what became of them",
        ("instance", "outcome"),
    ),
    INDEX_DROPPED: ("Puts and deletes that no journal will tell of, since too many waited", ("instance",)),
    INDEX_ANSWERS: ("Keys that the index was asked for: hit, miss, or left for the Hub", ("instance", "outcome")),
    HEAT_HITS: (
        "Chunks served that others were told of, or will not be, since too many keys wait",
        ("instance", "outcome"),
    ),
}
# How the values of several processes become one, where LMCache runs prometheus_client in its multi-process mode.
_GAUGES: dict[str, tuple[str, tuple[str, ...], Literal["livemax", "livesum"]]] = {
    BREAKER_OPEN: ("Whether a breaker is open: its calls are misses at once", ("instance", "part"), "livemax"),
    IN_FLIGHT: ("Calls under way", ("instance", "operation"), "livesum"),
    WAITING_PUT_BYTES: ("Bytes of chunks whose puts wait or are under way", ("instance",), "livesum"),
    FINGERPRINT_STATE: ("Models of this process by the state of their fingerprint", ("instance", "state"), "livesum"),
    CACHE_ENTRIES: ("Entries of the metadata cache", ("instance",), "livesum"),
    INDEX_STATE: ("1 for the state that the key index is in", ("instance", "state"), "livemax"),
    INDEX_KEYS: ("Keys of the snapshot that is in use", ("instance",), "livemax"),
    INDEX_BYTES: ("Memory of the key index", ("instance",), "livesum"),
    INDEX_AGE: ("Age of the key index in use, at its last refresh", ("instance",), "livemax"),
    QUARANTINED: ("Contents that could not be served of late, and are not offered", ("instance",), "livesum"),
}
# From a cached lookup (microseconds) to a put that ran into its deadline.
_BUCKETS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)


class Sink(Protocol):
    """Where measurements go. Implementations are thread-safe and do not raise."""

    def count(self, name: str, value: float = 1, /, **labels: str) -> None:
        """Add `value` to a counter."""

    def observe(self, name: str, value: float, /, **labels: str) -> None:
        """Record one value of a histogram."""

    def gauge(self, name: str, value: float, /, **labels: str) -> None:
        """Set a gauge."""


class Tally:
    """A sink that keeps its numbers in memory, for reports and tests."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, tuple[tuple[str, str], ...]]] = Counter()

    def count(self, name: str, value: float = 1, /, **labels: str) -> None:
        """Add `value` to a counter."""
        with self._lock:
            self._counts[name, tuple(sorted(labels.items()))] += value  # type: ignore[assignment]

    def observe(self, name: str, value: float, /, **labels: str) -> None:
        """Count the observation and add up its values, as `<name>_count` and `<name>_sum`."""
        self.count(f"{name}_count", **labels)
        self.count(f"{name}_sum", value, **labels)

    def gauge(self, name: str, value: float, /, **labels: str) -> None:
        """Note the present value."""
        with self._lock:
            self._counts[name, tuple(sorted(labels.items()))] = value  # type: ignore[assignment]

    def get(self, name: str, /, **labels: str) -> float:
        """The sum of all counters of that name whose labels include the given ones."""
        wanted = set(labels.items())
        with self._lock:
            return sum(v for (n, pairs), v in self._counts.items() if n == name and wanted <= set(pairs))


class PrometheusSink:
    """A sink into a Prometheus registry: by default the process-wide one, which LMCache serves too."""

    def __init__(self, registry: prometheus_client.CollectorRegistry = prometheus_client.REGISTRY) -> None:
        self._counters = {
            name: prometheus_client.Counter(name, text, labels, registry=registry)
            for name, (text, labels) in _COUNTERS.items()
        }
        self._seconds = prometheus_client.Histogram(
            SECONDS,
            "Duration of operations on a bucket instance",
            ("instance", "operation"),
            buckets=_BUCKETS,
            registry=registry,
        )
        self._gauges = {
            name: prometheus_client.Gauge(name, text, labels, registry=registry, multiprocess_mode=mode)
            for name, (text, labels, mode) in _GAUGES.items()
        }

    def count(self, name: str, value: float = 1, /, **labels: str) -> None:
        """Add `value` to a counter of the table above."""
        self._counters[name].labels(**labels).inc(value)

    def observe(self, name: str, value: float, /, **labels: str) -> None:
        """Record a duration in seconds."""
        if name == SECONDS:
            self._seconds.labels(**labels).observe(value)

    def gauge(self, name: str, value: float, /, **labels: str) -> None:
        """Set a gauge of the table above."""
        self._gauges[name].labels(**labels).set(value)


_shared: PrometheusSink | None = None
_shared_lock = threading.Lock()


def default_sink() -> Sink:
    """The process's sink into the default Prometheus registry: made once, since collectors register by name."""
    global _shared  # noqa: PLW0603 - the registry is process-wide too
    with _shared_lock:
        if _shared is None:
            _shared = PrometheusSink()
        return _shared
