"""Bounded cache of object metadata, with lifetimes for hits and misses and one request for concurrent lookups."""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
import time
from concurrent.futures import Future
from typing import TYPE_CHECKING

import cachetools

from hfbucket_plugin.core import forks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from hfbucket_plugin.core.keys import ContentId


class MetadataCache:
    """Maps key strings to the content of an object, or to None for a miss.

    Args:
        entries: Maximum number of entries; the least recently used are dropped first.
        hit_secs: Lifetime of an existing object, in seconds.
        miss_secs: Lifetime of a miss, in seconds.
        clock: Monotonic clock in seconds.
    """

    def __init__(
        self, entries: int, hit_secs: float, miss_secs: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._entries, self._hit_secs, self._miss_secs, self._clock = entries, hit_secs, miss_secs, clock
        self._start_over()
        forks.reset_in_child(self._start_over)

    def _start_over(self) -> None:
        """Reset to an empty cache, initially and in a forked child, where no thread resolves the parent's lookups."""
        self._lock = threading.Lock()
        self._cache: cachetools.TLRUCache[str, ContentId | None] = cachetools.TLRUCache(
            maxsize=self._entries,
            ttu=lambda _key, value, now: now + (self._miss_secs if value is None else self._hit_secs),
            timer=self._clock,
        )
        self._asking: dict[str, PendingLookup] = {}

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock with time frozen, so that no entry expires between two reads of it."""
        with self._lock, self._cache.timer:
            yield

    def get(self, key: str) -> tuple[bool, ContentId | None]:
        """Return whether a key is cached, and its content."""
        with self._locked():
            try:
                return True, self._cache[key]
            except KeyError:
                return False, None

    def put(self, key: str, content: ContentId | None) -> None:
        """Record a change that this process made; it overrides the answer to an earlier request."""
        with self._locked():
            self._set(key, content)
            if (lookup := self._asking.get(key)) is not None:
                lookup.overtaken[key] = content

    def _set(self, key: str, content: ContentId | None) -> None:
        """Replace the entry of a key.

        cachetools before 8.0 ignores a value that expires at once, such as a miss with `miss_cache_ttl_secs: 0`, and
        keeps serving the previous value; the entry is therefore removed first.
        """
        self._cache.pop(key, None)
        self._cache[key] = content

    def drop(self, key: str) -> None:
        """Forget a key: request it the next time, and ignore the answer to an earlier request."""
        with self._locked():
            self._cache.pop(key, None)
            if (lookup := self._asking.get(key)) is not None:
                lookup.overtaken.pop(key, None)
                lookup.doubtful.add(key)

    def ask(
        self, keys: Iterable[str], until: float = math.inf, *, patient: bool = False
    ) -> tuple[dict[str, ContentId | None], PendingLookup | None, dict[str, PendingLookup]]:
        """Sort keys into known ones, ones to request now, and ones that another thread is already requesting.

        Args:
            keys: Wanted keys.
            until: `time.monotonic` at which the caller gives up its request. A request that should have ended by now
                is not joined but repeated, because its thread may be blocked for long.
            patient: Whether the caller's request may wait for pauses of the Hub. Impatient callers do not join patient
                requests.

        Returns:
            The known contents; the request that the caller must make and then `answer` or `fail`, or None; and the
            requests of other threads, by key.
        """
        known: dict[str, ContentId | None] = {}
        others: dict[str, PendingLookup] = {}
        own = PendingLookup(until, patient=patient)
        now = time.monotonic()
        with self._locked():
            for key in keys:
                if key in known or key in own.keys or key in others:
                    continue
                if key in self._cache:
                    known[key] = self._cache[key]
                elif (
                    (lookup := self._asking.get(key)) is not None
                    and lookup.until > now
                    and (patient or not lookup.patient)
                ):
                    others[key] = lookup
                else:
                    own.keys[key] = None
                    self._asking[key] = own
        return known, own if own.keys else None, others

    def answer(self, lookup: PendingLookup, found: Mapping[str, ContentId]) -> dict[str, ContentId | None]:
        """Resolve a request with the answer of the Hub; keys that the answer lacks are misses."""
        with self._locked():
            values: dict[str, ContentId | None] = {}
            for key in lookup.keys:
                if key in lookup.overtaken:
                    values[key] = lookup.overtaken[key]
                else:
                    values[key] = found.get(key)
                    if key not in lookup.doubtful and self._asking.get(key) is lookup:
                        self._set(key, values[key])
                self._end(key, lookup)
        lookup.future.set_result(values)
        return values

    def fail(self, lookup: PendingLookup, error: BaseException) -> None:
        """Resolve a request with an error: nothing is cached, and the next caller requests again."""
        with self._locked():
            for key in lookup.keys:
                self._end(key, lookup)
        lookup.future.set_exception(error)

    def _end(self, key: str, lookup: PendingLookup) -> None:
        if self._asking.get(key) is lookup:  # otherwise it was given up and has been repeated since
            del self._asking[key]

    def some(self, count: int) -> list[ContentId]:
        """Return the contents of at most `count` existing objects."""
        with self._locked():
            keys = list(itertools.islice(self._cache, 8 * count))
            contents = [self._cache.get(key) for key in keys]
        return [content for content in contents if content is not None][:count]

    def clear(self) -> None:
        """Forget everything."""
        with self._locked():
            self._cache.clear()

    def __len__(self) -> int:
        with self._locked():
            return len(self._cache)


class Reported:
    """Whether the outcome of a call was reported to a breaker, which counts calls, not requests."""

    def __init__(self) -> None:
        self.already = False


class PendingLookup:
    """Keys of one request; all callers that want one of them wait for the same `future`."""

    def __init__(self, until: float = math.inf, *, patient: bool = False) -> None:
        self.until = until
        self.patient = patient
        self.reported = Reported()
        self.sent = threading.Event()
        self.keys: dict[str, None] = {}
        self.overtaken: dict[str, ContentId | None] = {}
        self.doubtful: set[str] = set()
        self.future: Future[dict[str, ContentId | None]] = Future()
