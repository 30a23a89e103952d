"""Naming uploaded contents: many uploads, of one put or of several, share one call to the Hub."""

from __future__ import annotations

import contextlib
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from hfbucket_plugin.core import forks
from hfbucket_plugin.core.concurrency import WorkerPool
from hfbucket_plugin.errors import HFBucketError, TransportError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from hfbucket_plugin.core.deadline import Deadline
    from hfbucket_plugin.core.keys import ContentId
    from hfbucket_plugin.errors import ItemFailure
    from hfbucket_plugin.hub.bucket import Bucket

_THREADS: Final = 4
"""Calls in progress at one time: one as a rule, more where the Hub is slow to answer the first ones."""


@dataclass(slots=True)
class _Request:
    files: Mapping[str, ContentId]
    deadline: Deadline
    since: float = field(default_factory=time.monotonic)
    future: Future[dict[str, ItemFailure]] = field(default_factory=Future)


class BatchCommitter:
    """Collects contents while more are being uploaded, and names them all in one batch.

    A call is made when the last upload in progress has ended, so that a lone put never waits; or when the first content
    has waited for the window. Only hashes wait here: the engine's memory was given back.

    Args:
        bucket: Where objects are named.
        window_secs: Longest wait.
    """

    def __init__(self, bucket: Bucket, window_secs: float) -> None:
        self._bucket = bucket
        self.window_secs = window_secs
        self._closed = False
        self._threads = WorkerPool("hfbucket-name", _THREADS)
        self._start_over()
        forks.reset_in_child(self._start_over)

    def _start_over(self) -> None:
        """Await nothing: at first, and in a forked child, where the uploads of the parent do not go on."""
        self._lock = threading.Lock()
        self._uploads = 0
        self._waiting: list[_Request] = []

    @contextlib.contextmanager
    def expecting(self) -> Iterator[None]:
        """Announce an upload for the length of a `with` block; at its end, name what waits if no other is in progress."""
        with self._lock:
            self._uploads += 1
        try:
            yield
        finally:
            with self._lock:
                self._uploads -= 1
            self.flush(only_due=True)

    def name(self, files: Mapping[str, ContentId], deadline: Deadline) -> Future[dict[str, ItemFailure]]:
        """Name contents, by path, soon.

        Returns:
            What failed, by path; or the error with which the request failed as a whole.
        """
        request = _Request(files, deadline)
        with self._lock:
            closed = self._closed
            if not closed:
                self._waiting.append(request)
        if closed:
            request.future.set_exception(TransportError("naming: the instance is closed"))
        return request.future

    def flush(self, *, only_due: bool) -> None:
        """Have what waits named, in another thread: the caller has a deadline of its own, and work to go on with.

        Args:
            only_due: Leave it waiting while uploads are in progress and the window is not over.
        """
        with self._lock:
            if not self._waiting or (only_due and not self._is_due()):
                return
            requests, self._waiting = self._waiting, []
        try:
            self._threads.submit(self._name_all, requests)
        except RuntimeError as error:
            _fail(requests, TransportError(f"naming: {error}"))

    def _name_all(self, requests: Sequence[_Request]) -> None:
        if self._closed:  # while they waited for a thread
            _fail(requests, TransportError("naming: the instance was closed"))
            return
        files: dict[str, ContentId] = {}
        for request in requests:
            request.future.set_running_or_notify_cancel()  # it waited here until now
            files.update(request.files)
        try:
            failed = self._bucket.add(files, max((request.deadline for request in requests), key=lambda one: one.at))
        except BaseException as error:  # noqa: BLE001 - the waiters must be told
            _fail(requests, error if isinstance(error, HFBucketError) else TransportError(str(error)))
            return
        for request in requests:
            request.future.set_result({path: failed[path] for path in request.files if path in failed})

    def _is_due(self) -> bool:
        return not self._uploads or time.monotonic() - self._waiting[0].since >= self.window_secs

    def close(self) -> None:
        """Name nothing any more: the memory that contents came from may have been reused since."""
        with self._lock:
            self._closed = True
            requests, self._waiting = self._waiting, []
        self._threads.close()
        _fail(requests, TransportError("naming: the instance was closed"))


def _fail(requests: Sequence[_Request], error: HFBucketError) -> None:
    for request in requests:
        request.future.set_exception(error)
