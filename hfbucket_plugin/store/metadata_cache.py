"""What is known of objects for a while: bounded, with lifetimes for hits and misses, and one request per question."""

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
    """Key string → content of the object, or None for a miss.

    Args:
        entries: Most entries; the least recently used go first.
        hit_secs: Lifetime of an object that is there.
        miss_secs: Lifetime of one that is not.
        clock: Seconds, monotonic; tests pass their own.
    """

    def __init__(
        self, entries: int, hit_secs: float, miss_secs: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._entries, self._hit_secs, self._miss_secs, self._clock = entries, hit_secs, miss_secs, clock
        self._start_over()
        forks.reset_in_child(self._start_over)

    def _start_over(self) -> None:
        """Know nothing: at first, and in a forked child, where no thread answers the lookups of the parent."""
        self._lock = threading.Lock()
        self._cache: cachetools.TLRUCache[str, ContentId | None] = cachetools.TLRUCache(
            maxsize=self._entries,
            ttu=lambda _key, value, now: now + (self._miss_secs if value is None else self._hit_secs),
            timer=self._clock,
        )
        self._asking: dict[str, PendingLookup] = {}

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """The cache for one thread, and at one time: an entry must not end between two looks at it."""
        with self._lock, self._cache.timer:
            yield

    def get(self, key: str) -> tuple[bool, ContentId | None]:
        """Whether something is known of a key, and what."""
        with self._locked():
            try:
                return True, self._cache[key]
            except KeyError:
                return False, None

    def put(self, key: str, content: ContentId | None) -> None:
        """Record what this process has just done itself: it wins over the answer to a question asked before."""
        with self._locked():
            self._set(key, content)
            if (lookup := self._asking.get(key)) is not None:
                lookup.overtaken[key] = content

    def _set(self, key: str, content: ContentId | None) -> None:
        """Replace what is known of a key.

        Before 8.0 cachetools ignores a value that expires at once, as misses do with `miss_cache_ttl_secs: 0`, and goes on
        serving the one before it.
        """
        self._cache.pop(key, None)
        self._cache[key] = content

    def drop(self, key: str) -> None:
        """Forget a key: ask again the next time, and do not believe the answer to a question asked before either."""
        with self._locked():
            self._cache.pop(key, None)
            if (lookup := self._asking.get(key)) is not None:
                lookup.overtaken.pop(key, None)
                lookup.doubtful.add(key)

    def ask(
        self, keys: Iterable[str], until: float = math.inf, *, patient: bool = False
    ) -> tuple[dict[str, ContentId | None], PendingLookup | None, dict[str, PendingLookup]]:
        """Sort keys into what is known, what to ask now, and what another thread is asking already.

        Args:
            keys: What is wanted.
            until: When the caller's question will be given up, on `time.monotonic`. A question that should have ended
                by now is not joined but asked again: its thread may be blocked for long.
            patient: Whether the caller's question may wait for the Hub's pauses; who is not patient does not join such.

        Returns:
            The known ones; a question that the caller must ask and `answer` or `fail`, or None; and the questions of
            others, by key.
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
        """End a question with what the Hub said; keys that it left out are misses."""
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
        """End a question without an answer: nothing is noted, and the next one asks again."""
        with self._locked():
            for key in lookup.keys:
                self._end(key, lookup)
        lookup.future.set_exception(error)

    def _end(self, key: str, lookup: PendingLookup) -> None:
        if self._asking.get(key) is lookup:  # else it was given up, and asked again since
            del self._asking[key]

    def some(self, count: int) -> list[ContentId]:
        """Contents of objects that are there, as many as asked for at most."""
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
    """Whether a breaker was told already how a call ended: it counts calls, however many questions they asked."""

    def __init__(self) -> None:
        self.already = False


class PendingLookup:
    """Keys that one request asks for; everyone who wants one of them waits for the same `future`."""

    def __init__(self, until: float = math.inf, *, patient: bool = False) -> None:
        self.until = until
        self.patient = patient
        self.reported = Reported()
        self.sent = threading.Event()
        self.keys: dict[str, None] = {}
        self.overtaken: dict[str, ContentId | None] = {}
        self.doubtful: set[str] = set()
        self.future: Future[dict[str, ContentId | None]] = Future()
