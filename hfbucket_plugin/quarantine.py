"""Contents that could not be served though the bucket lists them: not offered again for a while, each time for longer."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import cachetools

from hfbucket_plugin import forks

if TYPE_CHECKING:
    from collections.abc import Callable

_FIRST_SECS: Final = 15.0
"""Short, so that service is back soon after something else than the object was at fault; doubled each time."""

_LONGEST_SECS: Final = 3600.0
_PROOF: Final = 2
"""Fetches that failed the hash, one after the other and independent of each other, that prove an object bad."""

_ENTRIES: Final = 10_000


@dataclass(slots=True)
class _Record:
    until: float
    strikes: int
    wrong_hashes: int


class Quarantine:
    """Xet hashes of contents, bounded in number; thread-safe.

    By content and not by key: an object that was written anew is served at once.

    Args:
        clock: Seconds, monotonic; tests hand in their own.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._start_over()
        forks.reset_in_child(self._start_over)

    def _start_over(self) -> None:
        """Hold nothing: at first, and in a forked child, where the cache may be half changed."""
        self._lock = threading.Lock()
        self._records: cachetools.LRUCache[str, _Record] = cachetools.LRUCache(_ENTRIES)

    def add(self, xet_hash: str, *, wrong_hash: bool) -> bool:
        """Note that a content could not be served.

        Args:
            xet_hash: Of the content as it is listed.
            wrong_hash: Whether as many bytes arrived as it has, and their hash was another.

        Returns:
            Whether this proves the object bad: a second, independent fetch has failed the hash.
        """
        with self._lock:
            record = self._records.get(xet_hash) or _Record(float("-inf"), 0, 0)
            if self._clock() < record.until:  # asked for beside the fetch that failed: the same failure, seen twice
                return False
            record.until = self._clock() + min(_LONGEST_SECS, _FIRST_SECS * 2.0 ** min(record.strikes, 10))
            record.strikes += 1
            record.wrong_hashes += wrong_hash
            self._records[xet_hash] = record
            return wrong_hash and record.wrong_hashes == _PROOF

    def holds(self, xet_hash: str) -> bool:
        """Whether a content should not be offered now."""
        if not self._records:
            return False
        with self._lock:
            record = self._records.get(xet_hash)
            return record is not None and self._clock() < record.until

    def knows(self, xet_hash: str) -> bool:
        """Whether a content has failed before and was not served since."""
        if not self._records:
            return False
        with self._lock:
            return xet_hash in self._records

    def clear(self, xet_hash: str) -> bool:
        """Note that a content was served after all; return whether it had failed before."""
        if not self._records:
            return False
        with self._lock:
            return self._records.pop(xet_hash, None) is not None

    def __len__(self) -> int:
        return len(self._records)
