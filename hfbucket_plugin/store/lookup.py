"""Lookup of the chunks that a bucket holds."""

from __future__ import annotations

import logging
import time
from collections import Counter
from typing import TYPE_CHECKING, Final, Literal

from hfbucket_plugin.core import telemetry
from hfbucket_plugin.core.concurrency import WorkerPool, result_of
from hfbucket_plugin.core.keys import RESERVED, encode_name
from hfbucket_plugin.errors import (
    BreakerOpenError,
    DeadlineError,
    HFBucketError,
    ThrottledError,
    TransportError,
    UnsentError,
)
from hfbucket_plugin.hub.bucket import MAX_BATCH
from hfbucket_plugin.store.metadata_cache import MetadataCache, Reported

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from hfbucket_plugin.core.deadline import Deadline
    from hfbucket_plugin.core.keys import ContentId
    from hfbucket_plugin.core.telemetry import Telemetry
    from hfbucket_plugin.index.reader import KeyIndex
    from hfbucket_plugin.store.guarded import GuardedBucket
    from hfbucket_plugin.store.metadata_cache import PendingLookup
    from hfbucket_plugin.store.quarantine import Quarantine


_log = logging.getLogger(__name__)

Belief = Literal["all", "hits", "nothing"]

_THREADS: Final = 64
_BACKLOG: Final = 64
"""Maximum number of requests of lookups and gets, running or queued, in addition to the one in each caller's thread.
Only calls with more than 1,000 keys need them. They last at most a second, so a full queue means that the Hub hangs."""

_PATIENT_THREADS: Final = 16
"""The same limit for puts and deletes, in addition to one thread for each of `max_parallel_writes`. They may sleep
while the Hub asks for a pause, so lookups do not share their threads."""


class Existence:
    """Answers which chunks of an instance exist and with what content.

    Args:
        guarded: Bucket in which chunks are looked up.
        sink: Metrics sink for the size of the cache.
        index: Key index, which knows most answers locally; None without an index.
    """

    def __init__(
        self,
        guarded: GuardedBucket,
        sink: telemetry.Sink,
        *,
        index: KeyIndex | None = None,
    ) -> None:
        settings = guarded.settings
        self._bucket = guarded.bucket
        self._index = index
        self._instance = guarded.instance
        self._breakers = guarded.breakers
        self._sink = sink
        self.cache = MetadataCache(
            settings.metadata_cache_entries,
            settings.metadata_cache_ttl_secs,
            settings.effective_miss_ttl_secs,
        )
        self._threads = WorkerPool(f"hfbucket-lookup-{guarded.instance}", _THREADS, _BACKLOG)
        patient = settings.max_parallel_writes + _PATIENT_THREADS
        self._patient_threads = WorkerPool(f"hfbucket-question-of-put-{guarded.instance}", patient, _BACKLOG)
        self.learn: Callable[[Mapping[str, ContentId | None], float], None] = lambda _contents, _asked: None
        """Callback for each answer of the Hub, with the time at which the request was made."""

    def known(self, keys: Sequence[str]) -> dict[str, ContentId | None]:
        """Return what is known locally about the keys, without a request to the Hub."""
        indexed = self._indexed(keys, "all")
        found = {key: self.cache.get(key) for key in keys if key not in indexed}
        return indexed | {key: content for key, (is_known, content) in found.items() if is_known}

    def some(self, count: int) -> list[ContentId]:
        """Return at most `count` contents that exist according to the Hub."""
        return self.cache.some(count)

    def _indexed(self, keys: Sequence[str], believe: Belief) -> dict[str, ContentId | None]:
        if self._index is None or believe == "nothing":
            return {}
        return self._index.known(keys, misses=believe == "all")

    def contents(
        self, keys: Sequence[str], deadline: Deadline, *, patient: bool = False, believe: Belief = "all"
    ) -> dict[str, ContentId | None]:
        """Return what the bucket holds under each key: the content, or None for a miss.

        Answers from the index or the cache need no request. The other keys are requested concurrently, 1,000 in a
        request; keys that another thread is already requesting are not requested again.

        Args:
            keys: Key strings.
            deadline: When to give up.
            patient: Whether a request waits for pauses of the Hub and for the request budget; see `HubClient.request`.
            believe: Which answers of the index to trust. A wrong miss makes a lookup recompute a chunk and a put
                upload an existing one again, so puts trust hits only. Deletes trust nothing.

        Raises:
            HFBucketError: The Hub did not answer. This is a failure, not a miss: nothing is cached.
        """
        contents, failure = self.answers(keys, deadline, patient=patient, believe=believe)
        if failure is not None:
            raise failure
        return contents

    def answers(
        self, keys: Sequence[str], deadline: Deadline, *, patient: bool = False, believe: Belief = "all"
    ) -> tuple[dict[str, ContentId | None], HFBucketError | None]:
        """Return what is known even if some requests failed; otherwise like `contents`.

        Returns:
            The known answers, and the error that left the others unknown; None if all are known.
        """
        indexed = self._indexed(keys, believe)
        if indexed:
            keys = [key for key in keys if key not in indexed]
            if not keys:
                return indexed, None
        if len(keys) <= MAX_BATCH:
            asked, failure = self._answers_of([keys], deadline, patient=patient)
            return indexed | asked, failure
        cached = {key: self.cache.get(key) for key in keys}
        values = indexed | {key: content for key, (is_known, content) in cached.items() if is_known}
        left = list(dict.fromkeys(key for key in keys if key not in values))
        pages = [left[start : start + MAX_BATCH] for start in range(0, len(left), MAX_BATCH)]
        asked, failure = self._answers_of(pages, deadline, patient=patient)
        return values | asked, failure

    # --- changes made by this process -----------------------------------------------------------------------------------

    def wrote(self, key: str, content: ContentId) -> None:
        """Record the content that was stored under a key."""
        self.cache.put(key, content)
        if self._index is not None:
            self._index.wrote(key, content)

    def deleted(self, key: str) -> None:
        """Record that a key was deleted."""
        self.cache.put(key, None)
        if self._index is not None:
            self._index.deleted(key)

    def drop(self, key: str) -> None:
        """Forget a key whose state is unknown or whose cached answer is wrong."""
        self.cache.drop(key)
        if self._index is not None:
            self._index.doubt(key)

    def gone(self, key: str) -> None:
        """Record that the store lacks a content that was believed to exist.

        Cached answers about other keys expire too, so that stale ones cannot add up until LMCache disables the engine.
        """
        self.cache.clear()
        if self._index is not None:
            self._index.gone(key)

    def served(self, keys: Sequence[str]) -> None:
        """Record that the chunks of these keys were served to the engine."""
        if self._index is not None:
            self._index.served(keys)

    def _answers_of(
        self, pages: Sequence[Sequence[str]], deadline: Deadline, *, patient: bool
    ) -> tuple[dict[str, ContentId | None], HFBucketError | None]:
        """Request all pages concurrently; only the keys of failed pages stay unknown."""
        values: dict[str, ContentId | None] = {}
        failure: HFBucketError | None = None
        asked = [self.cache.ask(page, deadline.at, patient=patient) for page in pages]
        self._ask([lookup for _, lookup, _ in asked if lookup is not None], deadline, patient=patient)
        for page, (known, lookup, others) in zip(pages, asked, strict=True):
            values.update(known)
            try:
                values.update(self._answers(page, lookup, others, deadline, patient=patient))
            except HFBucketError as error:
                failure = failure or error
        return values, failure

    def _answers(
        self,
        page: Sequence[str],
        lookup: PendingLookup | None,
        others: dict[str, PendingLookup],
        deadline: Deadline,
        *,
        patient: bool,
    ) -> dict[str, ContentId | None]:
        """Wait for the answers about a page, from own requests and from those of other threads."""
        values: dict[str, ContentId | None] = {}
        while True:
            try:
                for one in {id(q): q for q in (*others.values(), lookup) if q is not None}.values():
                    answer = self._wait(one, deadline)
                    values.update({key: answer[key] for key in page if key in answer})
            except DeadlineError:
                # The other request belonged to a caller with less time: request again what it left open.
                if not others or deadline.passed:
                    raise
            except ThrottledError:  # or a caller that does not wait for pauses
                if not others or not patient or deadline.passed:
                    raise
            else:
                return values
            known, lookup, others = self.cache.ask(page, deadline.at, patient=patient)
            self._ask([lookup] if lookup is not None else [], deadline, patient=patient)
            values.update(known)

    def _ask(self, lookups: Sequence[PendingLookup], deadline: Deadline, *, patient: bool) -> None:
        """Run lookups concurrently: the last in this thread, which is freed at the deadline, the others in the pool."""
        reported = Reported()
        threads = self._patient_threads if patient else self._threads
        for number, lookup in enumerate(lookups, start=1):
            lookup.reported = reported
            try:
                reported.already |= deadline.passed  # a late start says nothing about the Hub
                deadline.check(f"instance {self._instance!r}: lookup")
                if not patient:
                    self._bucket.refuse_in_pause(f"instance {self._instance!r}: lookup")
                self._breakers.admit("lookup")
                if number < len(lookups):
                    threads.submit(self._stat, lookup, deadline, patient)
            except (BreakerOpenError, DeadlineError, ThrottledError) as error:
                self.cache.fail(lookup, error)
            except RuntimeError as error:
                self.cache.fail(lookup, TransportError(f"instance {self._instance!r}: lookup: {error}"))
            else:
                if number == len(lookups):
                    self._stat(lookup, deadline, patient)

    def _wait(self, lookup: PendingLookup, deadline: Deadline) -> dict[str, ContentId | None]:
        try:
            return result_of(lookup.future, deadline, f"instance {self._instance!r}: lookup")
        except DeadlineError as error:
            late = error
            if not lookup.sent.is_set() and not isinstance(error, UnsentError):
                late = UnsentError(f"{error} before it was sent")
            self._report_health(lookup, late)
            raise late from None

    def _report_health(self, lookup: PendingLookup, error: HFBucketError | None) -> None:
        """Report the requests of a call to the breaker once: by the first thread, or the caller that gave up."""
        if not lookup.reported.already:
            lookup.reported.already = True
            self._breakers.ended("lookup", error)

    def _stat(self, lookup: PendingLookup, deadline: Deadline, patient: bool) -> None:
        """Send the request and resolve the lookup for all waiting callers."""
        handle = self._bucket.handle
        asked = time.monotonic()
        try:
            paths = {handle.join(encode_name(key)): key for key in lookup.keys}
            found = self._bucket.stat(list(paths), deadline, patient=patient, sent=lookup.sent)
            contents = {paths[p]: info.content for p, info in found.items() if p in paths}
            answers = {key: contents.get(key) for key in lookup.keys}
            if self._index is not None:
                self._index.reported(answers, asked)
        except HFBucketError as error:
            self._report_health(lookup, error)
            self.cache.fail(lookup, error)
        except BaseException as error:
            what = f"instance {self._instance!r}: lookup: {type(error).__name__}: {error}"
            self.cache.fail(lookup, TransportError(what))
            if not isinstance(error, Exception):  # for example KeyboardInterrupt, which is meant for this thread
                raise
        else:
            self._report_health(lookup, None)
            self._sink.gauge(telemetry.CACHE_ENTRIES, len(self.cache), instance=self._instance)
            self.cache.answer(lookup, contents)
            self._learn(answers, asked)

    def _learn(self, answers: Mapping[str, ContentId | None], asked: float) -> None:
        try:
            self.learn(answers, asked)
        except Exception:  # noqa: BLE001 - the answer is valid even if the callback fails
            _log.exception("[%s] lookup: what was answered was not taken in", self._instance)

    def probe(self, deadline: Deadline) -> None:
        """Check with a lookup request that the Hub answers.

        Raises:
            HFBucketError: The Hub did not answer, or not before the deadline.
        """
        self._bucket.stat([self._bucket.handle.join(f"{RESERVED}/probe/none")], deadline, patient=False)

    def in_background(self, function: Callable[[], None]) -> None:
        """Run a short function in the lookup pool, if a thread is free."""
        try:
            self._threads.submit(function)
        except RuntimeError:
            return

    def close(self) -> None:
        """Refuse new lookups and forget all answers."""
        if self._index is not None:
            self._index.close()
        self._threads.close()
        self._patient_threads.close()
        self.cache.clear()


_HIT: Final = "hit"
_BEHIND_A_GAP: Final = "behind_a_gap"


class Lookups:
    """Answers lookups of one instance.

    Args:
        guarded: Bucket of the instance. While its `read` breaker is open every key is a miss, as no read would succeed.
        existence: Known objects of the bucket.
        outcomes: Telemetry for results.
        quarantine: Contents that recently could not be served.
    """

    def __init__(
        self,
        guarded: GuardedBucket,
        existence: Existence,
        outcomes: Telemetry,
        quarantine: Quarantine,
    ) -> None:
        self._existence = existence
        self._outcomes = outcomes
        self._breakers = guarded.breakers
        self._quarantine = quarantine

    def found(
        self, keys: Sequence[str], sizes: Sequence[int | None], deadline: Deadline, *, prefix_only: bool
    ) -> list[bool]:
        """Return, for each key, whether it would be served; see `ChunkStore.found`."""
        started = time.monotonic()
        outcome, unknown = "ok", "missing"
        contents: Mapping[str, ContentId | None] = {}
        try:
            deadline.check("lookup")  # time spent waiting for a thread is not a fault of the Hub or the store
            self._breakers.admit("read", keys)
            contents, failure = self._existence.answers(keys, deadline)
            if failure is not None:
                raise failure
        except HFBucketError as error:
            if self._breakers.is_open("read"):
                contents = {}
            elif not contents:
                contents = self._existence.known(keys)
            if self._outcomes.excuses(error):
                unknown = "missing"
            else:
                unknown = outcome = error.kind
                self._outcomes.warn("lookup", error.kind, str(error))
        judged = [self._judge(key, contents, size, unknown) for key, size in zip(keys, sizes, strict=True)]
        if prefix_only:
            gap = next((index for index, word in enumerate(judged) if word != _HIT), len(judged))
            judged[gap:] = [_BEHIND_A_GAP if word == _HIT else word for word in judged[gap:]]
        for word, chunks in Counter(judged).items():
            self._outcomes.chunks("lookup", word, chunks)
        self._outcomes.ended("lookup", outcome, started)
        return [word == _HIT for word in judged]

    def _judge(self, key: str, contents: Mapping[str, ContentId | None], size: int | None, unknown: str) -> str:
        """Return the outcome of a key as a label value."""
        if key not in contents:
            return unknown
        content = contents[key]
        if content is None:
            return "missing"
        if not content.size or size not in (None, content.size):
            self._outcomes.warn_of_size("lookup", key, content.size, size)
            return "size"
        return "quarantined" if self._quarantine.holds(content.xet_hash) else _HIT
