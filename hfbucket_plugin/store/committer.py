"""Batching of the calls that name uploaded contents: uploads of one or several puts share one call to the Hub."""

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
"""Maximum number of concurrent calls. Usually one runs; more run only when the Hub is slow to answer."""


@dataclass(slots=True)
class _Request:
    files: Mapping[str, ContentId]
    deadline: Deadline
    since: float = field(default_factory=time.monotonic)
    future: Future[dict[str, ItemFailure]] = field(default_factory=Future)


class BatchCommitter:
    """Collects uploaded contents while other uploads are in progress, and names them in one batch.

    The batch is sent when the last upload in progress ends, so that a single put never waits, or when its oldest
    content has waited for `window_secs`. Only hashes are held here; the engine's memory has already been released.

    Args:
        bucket: Bucket in which the objects are named.
        window_secs: Maximum wait in seconds.
    """

    def __init__(self, bucket: Bucket, window_secs: float) -> None:
        self._bucket = bucket
        self.window_secs = window_secs
        self._closed = False
        self._threads = WorkerPool("hfbucket-name", _THREADS)
        self._start_over()
        forks.reset_in_child(self._start_over)

    def _start_over(self) -> None:
        """Reset to no uploads, initially and in a forked child, where the parent's uploads do not continue."""
        self._lock = threading.Lock()
        self._uploads = 0
        self._waiting: list[_Request] = []

    @contextlib.contextmanager
    def expecting(self) -> Iterator[None]:
        """Announce an upload for a `with` block; then send the batch if no other upload is in progress."""
        with self._lock:
            self._uploads += 1
        try:
            yield
        finally:
            with self._lock:
                self._uploads -= 1
            self.flush(only_due=True)

    def name(self, files: Mapping[str, ContentId], deadline: Deadline) -> Future[dict[str, ItemFailure]]:
        """Queue contents, given by path, for naming.

        Returns:
            A future with the failures by path, or with the error that failed the whole request.
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
        """Send the waiting contents from another thread, since the caller has its own deadline and further work.

        Args:
            only_due: Keep them waiting while uploads are in progress and the window has not ended.
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
        if self._closed:  # closed while the requests waited for a thread
            _fail(requests, TransportError("naming: the instance was closed"))
            return
        files: dict[str, ContentId] = {}
        for request in requests:
            request.future.set_running_or_notify_cancel()  # the request has waited here until now
            files.update(request.files)
        try:
            failed = self._bucket.add(files, max((request.deadline for request in requests), key=lambda one: one.at))
        except BaseException as error:  # noqa: BLE001 - the waiting callers must get the error
            _fail(requests, error if isinstance(error, HFBucketError) else TransportError(str(error)))
            return
        for request in requests:
            request.future.set_result({path: failed[path] for path in request.files if path in failed})

    def _is_due(self) -> bool:
        return not self._uploads or time.monotonic() - self._waiting[0].since >= self.window_secs

    def close(self) -> None:
        """Stop naming contents: the memory that they were read from may have been reused."""
        with self._lock:
            self._closed = True
            requests, self._waiting = self._waiting, []
        self._threads.close()
        _fail(requests, TransportError("naming: the instance was closed"))


def _fail(requests: Sequence[_Request], error: HFBucketError) -> None:
    for request in requests:
        request.future.set_exception(error)
