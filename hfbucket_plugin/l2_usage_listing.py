"""Listings in the background that tell how much an instance holds, and LMCache's eviction what there is to evict."""

from __future__ import annotations

import logging
import threading
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final

from hfbucket_plugin.catalog import chunk_entry
from hfbucket_plugin.deadlines import Deadline
from hfbucket_plugin.errors import BucketMissingError, HFBucketError
from hfbucket_plugin.l2_keys import object_key

if TYPE_CHECKING:
    from collections.abc import Callable

    from lmcache.v1.distributed.api import ObjectKey

    from hfbucket_plugin.bucket import Bucket, ObjectInfo
    from hfbucket_plugin.l2_usage import Usage

_log = logging.getLogger(__name__)

_SETTLE_SECS: Final = 0.2
"""Between the wish for a listing and its start: LMCache makes an adapter, and registers its listeners right after that."""

_PAGE_SECS: Final = 60.0
_RETRY_SECS: Final = 60.0
_MOST_TOLD: Final = 1_000_000
"""Objects that LMCache's eviction is told of: it keeps a key of about 400 bytes for each."""

_SLACK: Final = timedelta(minutes=5)


class UsageListing:
    """Lists an instance at first and every so often, on a thread of its own.

    Args:
        bucket: The instance's.
        usage: Is told what is there.
        refresh_secs: From the end of a listing to the next one; 0 never lists.
        max_pages: Most pages of a listing; None for all.
        tell: Given objects that are new to this process, with their sizes. The newest come first: LMCache takes the keys of
            a call for one request's, and evicts those at its end first.
    """

    def __init__(
        self,
        bucket: Bucket,
        usage: Usage,
        refresh_secs: float,
        max_pages: int | None,
        tell: Callable[[list[ObjectKey], list[int]], None],
    ) -> None:
        self._bucket = bucket
        self._usage = usage
        self._refresh_secs = refresh_secs
        self._max_pages = max_pages
        self._tell = tell
        self._wanted = threading.Event()
        self._closed = threading.Event()
        self._told_until: datetime | None = None
        self._anew = False
        if refresh_secs:
            self._wanted.set()
            threading.Thread(target=self._run, name="hfbucket-usage", daemon=True).start()

    def again(self) -> None:
        """List soon, and tell of everything anew."""
        self._anew = True  # taken up at the start of a listing: one that is under way has passed objects by
        self._wanted.set()

    def close(self) -> None:
        """List no more; a page under way ends by itself."""
        self._closed.set()
        self._wanted.set()

    def _run(self) -> None:
        wait = 0.0
        while True:
            self._wanted.wait(wait)
            if self._closed.wait(_SETTLE_SECS):
                return
            self._wanted.clear()
            try:
                self._list()
                wait = self._refresh_secs
            except BucketMissingError:
                self._usage.give_up()  # told by whoever reads or writes
                wait = min(_RETRY_SECS, self._refresh_secs)
            except HFBucketError as error:
                self._usage.give_up()
                wait = min(_RETRY_SECS, self._refresh_secs)
                _log.warning("usage: the listing did not complete, the figure of before stands: %s", error)
            except Exception:  # noqa: BLE001 - whatever it was, the next listing must come
                self._usage.give_up()
                wait = min(_RETRY_SECS, self._refresh_secs)
                _log.exception("usage: the listing failed")

    def _list(self) -> None:
        began = datetime.now(UTC)
        if self._anew:
            self._anew, self._told_until = False, None
        self._usage.begin()
        found: list[tuple[datetime, ObjectKey, int]] = []
        prefix = self._bucket.handle.join("")
        cursor: str | None = None
        pages = 0
        while not self._closed.is_set():
            if busy := self._bucket.background_wait_secs:
                self._closed.wait(busy)
                continue
            infos, cursor = self._bucket.list_page(prefix, cursor, Deadline.after(_PAGE_SECS))
            pages += 1
            for info in infos:
                self._see(info, found)
            if cursor is None or pages == self._max_pages:
                break
        self._usage.end(complete=cursor is None)
        found.sort(key=lambda entry: entry[0], reverse=True)
        if found and not self._closed.is_set():
            self._tell([key for _, key, _ in found], [size for _, _, size in found])
        self._told_until = began - _SLACK

    def _see(self, info: ObjectInfo, found: list[tuple[datetime, ObjectKey, int]]) -> None:
        chunk = chunk_entry(self._bucket, info)
        if chunk is None:
            return
        key = object_key(chunk.text)
        if key is None:  # the classic engine's: LMCache could not evict it, and would evict all others in its stead
            return
        self._usage.seen(info.path, key.cache_salt, info.content.size)
        uploaded = info.uploaded_at or datetime.fromtimestamp(0, UTC)
        is_new = self._told_until is None or uploaded > self._told_until
        if is_new and len(found) < _MOST_TOLD:
            found.append((uploaded, key, info.content.size))
