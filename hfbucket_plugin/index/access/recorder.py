"""Recorder of an engine's reads, counted per key until they are reported; bounded in memory and in report size.

The hot path appends keys without a lock; the journal thread counts them (`due`). Each report contains all pending keys
up to `_SURGE` times `heat_keys`. If more are pending, half of the report are the keys with the most hits, so that hot
keys are known soon, and half those pending longest, so that occasional reads are known at all. What does not fit is
dropped, counted and reported (`take_lost`), because a job that deletes by use must know of unreported reads.
"""

from __future__ import annotations

import heapq
import threading
from collections import Counter, deque
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING, Final

from hfbucket_plugin.core.keys import encode_name, is_probe
from hfbucket_plugin.index.table import DIGEST_BYTES, digests_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hfbucket_plugin.config.settings import InstanceSettings

_FRESH_KEYS: Final = 32_768
"""Maximum number of uncounted hits: 1,000 a second, with defaults. Their key strings take 6 MB, and counting them 0.3
s."""

_WAITING_KEYS: Final = 32_768
"""Maximum number of keys to report, 9 MB."""

_SURGE: Final = 40
"""Factor by which a report under load exceeds `heat_keys`: 8,000 keys with defaults, 27 distinct chunks a second."""

MOST_TOLD: Final = 16_384
"""Maximum number of keys of one report, whatever the settings."""

HITS_ENTRIES: Final = 32_768
"""Maximum number of entries of a journal of hits, 2.1 MB: large, so that readers list few journals however much is
read."""

_SIGN_SECS: Final = 3600.0
"""Interval in seconds at which a recorder without hits reports that it records."""

NO_KEY: Final = bytes(DIGEST_BYTES)


@dataclass(frozen=True, slots=True)
class Hits:
    """Hits of one key, or lost hits.

    Attributes:
        digest: Digest of the object name; `NO_KEY` for a sign of life, and for lost hits.
        number: Number of hits.
        last: Time of the last one in monotonic seconds: never too early, and late by at most a journal's interval.
        lost: Whether their keys are unknown.
    """

    digest: bytes
    number: int
    last: float
    lost: bool = False


class AccessRecorder:
    """Hits of one process and instance. `read` is thread-safe; the other methods need external synchronization.

    Args:
        keys: Number of keys in a report; under load up to `_SURGE` times as many.
        secs: Minimum seconds between two reports.
        began: Start in monotonic seconds; the first report is due `secs` later.
    """

    def __init__(self, keys: int, secs: float, began: float) -> None:
        self._keys = min(keys * _SURGE, MOST_TOLD)
        self._secs = secs
        self._fresh: deque[tuple[str, ...]] = deque()
        self._fresh_keys = 0
        self._overflow = 0
        self._overflow_lock = threading.Lock()
        self._waiting: dict[bytes, list[float]] = {}
        self._reported_at = self._sign_at = began
        self._dropped = 0
        self._lost: Hits | None = None

    def __len__(self) -> int:
        return len(self._waiting) + len(self._fresh)

    def read(self, keys: Iterable[str]) -> None:
        """Record served chunks, in about a microsecond; hits that do not fit until the next count are lost."""
        batch = tuple(keys)
        room = _FRESH_KEYS - self._fresh_keys  # threads that meet here may each exceed the limit by a batch
        if len(batch) > room:
            with self._overflow_lock:
                self._overflow += len(batch) - max(0, room)
            batch = batch[: max(0, room)]
        if batch:
            self._fresh_keys += len(batch)
            self._fresh.append(batch)

    def look(self, now: float) -> None:
        """Count new reads; call at least once per `_FRESH_KEYS` served chunks.

        Args:
            now: Time in monotonic seconds.
        """
        batches = [self._fresh.popleft() for _ in range(len(self._fresh))]
        self._fresh_keys = 0  # reads during the count are bounded by the next one
        with self._overflow_lock:
            self._lose(self._overflow, now)
            self._overflow = 0
        read = Counter(key for key in chain.from_iterable(batches) if not is_probe(key))
        digests = digests_of(map(encode_name, read))
        for row, number in zip(digests, read.values(), strict=True):
            digest = row.tobytes()
            waiting = self._waiting.get(digest)
            if waiting is not None:
                waiting[0] += number
                waiting[1] = now
            elif len(self._waiting) < _WAITING_KEYS:
                self._waiting[digest] = [number, now]
            else:
                self._lose(number, now)

    def _lose(self, number: int, now: float) -> None:
        if number:
            self._dropped += number
            self._lost = Hits(NO_KEY, number + (0 if self._lost is None else self._lost.number), now, lost=True)

    def due(self, now: float, *, last: bool = False) -> list[Hits]:
        """Count new reads, and remove and return the hits to report; empty before they are due.

        Args:
            now: Time in monotonic seconds.
            last: Whether this is the last report, which is always due.
        """
        self.look(now)
        if now - self._reported_at < self._secs and not last:
            return []
        reported = self._hottest() | self._longest_waiting()
        if not reported and self._lost is None and now - self._sign_at < _SIGN_SECS:
            return []
        self._reported_at = self._sign_at = now
        if not reported:
            return [Hits(NO_KEY, 0, now)]
        return [Hits(digest, int(number), last) for digest, (number, last) in reported.items()]

    def take_lost(self) -> Hits | None:
        """Return the hits lost since the last call, with the time of the last one, to report with due ones."""
        lost, self._lost = self._lost, None
        return lost

    def take_dropped(self) -> int:
        """Return the number of hits lost since the last call, for metrics."""
        dropped, self._dropped = self._dropped, 0
        return dropped

    def _hottest(self) -> dict[bytes, list[float]]:
        if len(self._waiting) <= self._keys:
            reported, self._waiting = self._waiting, {}
            return reported
        hottest = heapq.nlargest(self._keys // 2, self._waiting.items(), key=lambda one: (one[1][0], one[0]))
        return {digest: self._waiting.pop(digest) for digest, _ in hottest}

    def _longest_waiting(self) -> dict[bytes, list[float]]:
        longest = list(islice(self._waiting, self._keys - self._keys // 2))  # a dict keeps its order
        return {digest: self._waiting.pop(digest) for digest in longest}


def recorder_of(settings: InstanceSettings, now: float) -> AccessRecorder | None:
    """Create the recorder of an instance; return None if the settings disable recording or reporting.

    Args:
        settings: Settings of the instance.
        now: Time in monotonic seconds.
    """
    if settings.heat == "off" or settings.index != "snapshot" or not (settings.reads and settings.writes):
        return None
    return AccessRecorder(settings.heat_keys, settings.heat_secs, now)


def why_not(settings: InstanceSettings) -> str:
    """Return why nothing is recorded although `heat` is on, if that deserves a warning; otherwise empty."""
    if settings.heat == "off" or not settings.reads:
        return ""
    if settings.index != "snapshot":
        asked = "heat" in settings.model_fields_set
        return f"heat is not recorded: it needs index: snapshot, and index is {settings.index}" if asked else ""
    if not settings.writes:
        return (
            f"heat is not recorded: role is {settings.role}, so reads are not reported. A cleanup by max_idle may "
            "delete what only such engines read"
        )
    return ""
