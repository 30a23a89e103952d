"""Whether chunks are there: the metadata cache, and the one request for what it does not know."""

from __future__ import annotations

from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import TYPE_CHECKING, Final

from hfbucket_plugin.errors import DeadlineError, HFBucketError, TransportError
from hfbucket_plugin.keys import encode_name
from hfbucket_plugin.metadata_cache import MetadataCache
from hfbucket_plugin.workers import WorkerPool

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hfbucket_plugin.bucket import Bucket
    from hfbucket_plugin.deadlines import Deadline
    from hfbucket_plugin.metadata_cache import Question
    from hfbucket_plugin.settings import InstanceSettings
    from hfbucket_plugin.transfer import Content

_THREADS: Final = 8
_BACKLOG: Final = 64
"""Lookups last at most a second: more than these at one time means that the Hub does not answer."""


class Existence:
    """Answers which chunks of an instance exist, and with what content.

    Args:
        bucket: Where they are looked up.
        settings: The instance's.
        instance: Its name.
    """

    def __init__(self, bucket: Bucket, settings: InstanceSettings, instance: str) -> None:
        self._bucket = bucket
        self._instance = instance
        self.cache = MetadataCache(
            settings.metadata_cache_entries,
            settings.metadata_cache_ttl_secs,
            settings.effective_miss_ttl_secs,
        )
        self._threads = WorkerPool(f"hfbucket-lookup-{instance}", _THREADS, _BACKLOG)

    def contents(self, keys: Sequence[str], deadline: Deadline) -> dict[str, Content | None]:
        """What the bucket holds under each key: its content, or None for a miss.

        What is cached costs nothing; the rest is one request, and a key that is being asked for already is not asked
        for again.

        Raises:
            HFBucketError: The Hub did not say. That is a failure and no miss: nothing is cached.
        """
        while True:
            values, question, others = self.cache.ask(keys, deadline.at)
            if question is not None:
                self._ask(question, deadline)
            try:
                for one in {id(q): q for q in (*others.values(), question) if q is not None}.values():
                    answer = self._wait(one, deadline)
                    values.update({key: answer[key] for key in keys if key in answer})
            except DeadlineError:
                # A question of somebody with less time than we have: ask what it left open ourselves.
                if not others or deadline.passed:
                    raise
            else:
                return values

    def _ask(self, question: Question, deadline: Deadline) -> None:
        # On a thread of its own: a lookup blocks the engine's scheduler, and must end with its deadline even while
        # a name server or a proxy does not.
        try:
            self._threads.submit(self._stat, question, deadline)
        except RuntimeError as error:
            self.cache.fail(question, TransportError(f"instance {self._instance!r}: lookup: {error}"))

    def _wait(self, question: Question, deadline: Deadline) -> dict[str, Content | None]:
        try:
            return question.future.result(timeout=deadline.remaining())
        except FutureTimeoutError as error:
            if isinstance(error, DeadlineError):  # a DeadlineError is a TimeoutError too: the request's own
                raise
            raise DeadlineError(
                f"instance {self._instance!r}: lookup: no answer within {deadline.seconds:g} s; the call was abandoned"
            ) from None

    def _stat(self, question: Question, deadline: Deadline) -> None:
        handle = self._bucket.handle
        try:
            paths = {handle.join(encode_name(key)): key for key in question.keys}
            found = self._bucket.stat(list(paths), deadline)
        except HFBucketError as error:
            self.cache.fail(question, error)
        except BaseException as error:  # noqa: BLE001 - whoever waits must get an answer, and one that they handle
            what = f"instance {self._instance!r}: lookup: {type(error).__name__}: {error}"
            self.cache.fail(question, TransportError(what))
        else:
            self.cache.answer(question, {paths[p]: info.content for p, info in found.items() if p in paths})

    def in_background(self, function: Callable[[], None]) -> None:
        """Run something small beside the lookups, if a thread is free for it."""
        try:
            self._threads.submit(function)
        except RuntimeError:
            return

    def close(self) -> None:
        """Take no more questions, and forget all answers."""
        self._threads.close()
        self.cache.clear()
