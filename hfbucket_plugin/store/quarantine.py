"""Corrupt objects: how they are recorded, and temporarily not served."""

from __future__ import annotations

import json
import logging
import platform
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

import cachetools

from hfbucket_plugin.core import forks, telemetry
from hfbucket_plugin.core.concurrency import WorkerPool
from hfbucket_plugin.core.deadline import Deadline
from hfbucket_plugin.core.keys import RESERVED
from hfbucket_plugin.errors import HashMismatchError, HFBucketError
from hfbucket_plugin.hub.records import RecordStore

if TYPE_CHECKING:
    from collections.abc import Callable

    from hfbucket_plugin.config.settings import InstanceSettings
    from hfbucket_plugin.core.keys import ContentId
    from hfbucket_plugin.hub.bucket import Bucket


_log = logging.getLogger(__name__)

BAD_DIRECTORY: Final = f"{RESERVED}/bad"
_RECORD_SECS: Final = 30.0
_BACKLOG: Final = 100


class CorruptObjectLog:
    """Records objects that are proven corrupt, in the background.

    Args:
        bucket: Bucket in which they are recorded.
        settings: Settings of the instance. Without write access, corrupt objects are logged but not recorded.
        instance: Name of the instance.
        sink: Metrics sink that counts corrupt objects.
    """

    def __init__(self, bucket: Bucket, settings: InstanceSettings, instance: str, sink: telemetry.Sink) -> None:
        self._bucket = bucket
        self._settings = settings
        self._instance = instance
        self._sink = sink
        self._threads = WorkerPool(f"hfbucket-bad-{instance}", 1, _BACKLOG)
        self._own = RecordStore(bucket, f"bad-{instance}")

    def record(self, key: str, content: ContentId, why: str) -> None:
        """Report an object whose content failed its hash in two independent fetches."""
        self._sink.count(telemetry.BAD_OBJECTS, instance=self._instance)
        _log.error(
            "[%s] %s is corrupt: two fetches failed its hash. It is not served; delete it, or leave it. Storing it "
            "again may be deduplicated onto the same bad bytes. %s", self._instance, key, why,
        )  # fmt: skip
        if self._settings.writes:
            try:
                self._threads.submit(self._write, key, content, why)
            except RuntimeError as error:
                _log.warning("[%s] %s: no record was written: %s", self._instance, key, error)

    def _write(self, key: str, content: ContentId, why: str) -> None:
        record = {
            "key": key,
            "xet_hash": content.xet_hash,
            "size": content.size,
            "recorded_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "host": platform.node(),
            "why": why,
        }
        deadline = Deadline.after(_RECORD_SECS)
        path = self._bucket.handle.join(f"{BAD_DIRECTORY}/{content.xet_hash}.json")
        try:
            self._own.put(path, json.dumps(record).encode(), deadline)
        except HFBucketError as error:
            _log.warning("[%s] %s: no record was written: %s", self._instance, key, error)

    def close(self) -> None:
        """Stop recording."""
        self._threads.close()
        self._own.close()


_FIRST_SECS: Final = 15.0
"""Initial quarantine in seconds, doubled each time. Short, because the cause may be a passing one elsewhere."""

_LONGEST_SECS: Final = 3600.0
_PROOF: Final = 2
"""Number of consecutive, independent fetches with a wrong hash that prove an object corrupt."""

_ENTRIES: Final = 10_000


@dataclass(slots=True)
class _Record:
    until: float
    strikes: int
    wrong_hashes: int


class Quarantine:
    """Bounded set of Xet hashes of contents that are not served for a while; thread-safe.

    Keyed by content rather than by key, so that an object that is written again is served at once.

    Args:
        clock: Monotonic clock in seconds.
        changed: Called with the number of known contents when it may have changed.
        proven: Called with the key, the content and the reason when an object is proven corrupt.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        changed: Callable[[int], None] = lambda _number: None,
        proven: Callable[[str, ContentId, str], None] = lambda _key, _content, _why: None,
    ) -> None:
        self._clock = clock
        self._changed = changed
        self._proven = proven
        self._start_over()
        forks.reset_in_child(self._start_over)

    def _start_over(self) -> None:
        """Reset to an empty quarantine, initially and in a forked child, where the cache may be half updated."""
        self._lock = threading.Lock()
        self._records: cachetools.LRUCache[str, _Record] = cachetools.LRUCache(_ENTRIES)

    def failed(self, content: ContentId, error: HFBucketError | None = None, key: str = "") -> None:
        """Record that a content could not be served although the store works.

        Args:
            content: Content as the listing names it.
            error: Cause; None if only a probe read a part of it.
            key: Key under which it was requested.
        """
        if self.add(content.xet_hash, wrong_hash=isinstance(error, HashMismatchError)):
            self._proven(key, content, str(error))
        self._changed(len(self))

    def served(self, content: ContentId) -> None:
        """Record that a content was served."""
        if self.clear(content.xet_hash):
            self._changed(len(self))

    def add(self, xet_hash: str, *, wrong_hash: bool) -> bool:
        """Record that a content could not be served.

        Args:
            xet_hash: Hash of the content as listed.
            wrong_hash: Whether the expected number of bytes arrived with another hash.

        Returns:
            Whether this proves the object corrupt: a second, independent fetch has failed the hash.
        """
        with self._lock:
            record = self._records.get(xet_hash) or _Record(float("-inf"), 0, 0)
            if (
                self._clock() < record.until
            ):  # requested together with the fetch that failed: the same failure, seen twice
                return False
            record.until = self._clock() + min(_LONGEST_SECS, _FIRST_SECS * 2.0 ** min(record.strikes, 10))
            record.strikes += 1
            record.wrong_hashes += wrong_hash
            self._records[xet_hash] = record
            return wrong_hash and record.wrong_hashes == _PROOF

    def holds(self, xet_hash: str) -> bool:
        """Return whether a content must not be offered now."""
        if not self._records:
            return False
        with self._lock:
            record = self._records.get(xet_hash)
            return record is not None and self._clock() < record.until

    def knows(self, xet_hash: str) -> bool:
        """Return whether a content has failed before and has not been served since."""
        if not self._records:
            return False
        with self._lock:
            return xet_hash in self._records

    def clear(self, xet_hash: str) -> bool:
        """Record that a content was served; return whether it had failed before."""
        if not self._records:
            return False
        with self._lock:
            return self._records.pop(xet_hash, None) is not None

    def __len__(self) -> int:
        return len(self._records)
