"""Journal of a job's puts and deletes for the key index, as engines write it.

Without it, readers would trust deleted keys until the next snapshot made from a listing: each such hit is a miss at the
read, after which they ask the Hub about everything for a while. A failed report has no other effect, and fails no job.
"""

from __future__ import annotations

import contextlib
import logging
import time
from typing import TYPE_CHECKING, Final

from hfbucket_plugin.core.deadline import Deadline
from hfbucket_plugin.errors import HFBucketError
from hfbucket_plugin.index.journal import JournalWriter
from hfbucket_plugin.index.store import IndexStore
from hfbucket_plugin.index.table import digests_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hfbucket_plugin.core.keys import ContentId
    from hfbucket_plugin.hub.bucket import Bucket

_log = logging.getLogger(__name__)

_ENTRIES: Final = 50_000
"""Maximum number of entries of a journal: 3 MB."""

_WAITING: Final = 2 * _ENTRIES
_FLUSH_ENTRIES: Final = 10_000
_FLUSH_SECS: Final = 15.0
_REQUEST_SECS: Final = 60.0
_LOOK_SECS: Final = 15.0


class IndexNotifier:
    """Collects changes and periodically writes them; created by `notifying`. Not thread-safe.

    Whether the instance has an index is checked with one call when there is something to report.

    Args:
        bucket: Bucket of the instance.

    Attributes:
        unreported: Number of entries that no reader will learn of.
    """

    def __init__(self, bucket: Bucket) -> None:
        self._indexed: bool | None = None
        self._store = IndexStore(bucket, "jobs")
        self._journal = JournalWriter(_ENTRIES, _WAITING)
        self._flushed = time.monotonic()
        self._problem: HFBucketError | None = None
        self.unreported = 0

    def did(self, name: str, content: ContentId | None) -> None:
        """Record a change of an object.

        Args:
            name: Name below the instance's prefix; nested names are ignored, because engines never request them.
            content: Current content; None for a deleted object.
        """
        if not name or "/" in name or self._indexed is False:
            return
        _, dropped = self._journal.note(digests_of([name]).tobytes(), content, time.monotonic())
        self.unreported += dropped
        if len(self._journal) >= _FLUSH_ENTRIES or time.monotonic() - self._flushed >= _FLUSH_SECS:
            self._flush()

    def _flush(self) -> None:
        """Write pending entries; a failure is reported at the end if it persists."""
        self._flushed = time.monotonic()
        if not len(self._journal) or not self._is_indexed():
            return
        while (draft := self._journal.draft(time.monotonic())) is not None:
            deadline = Deadline.after(_REQUEST_SECS)
            try:
                self._store.put_journal(draft.name.text, draft.data, draft.instead_of, deadline)
            except HFBucketError as error:
                self._problem = error
                return
            finally:
                self._journal.attempted(time.monotonic())
            self._journal.written(draft)

    def _is_indexed(self) -> bool:
        if self._indexed is None:
            try:
                self._indexed = self._store.find_pointer(Deadline.after(_LOOK_SECS), patient=False) is not None
            except HFBucketError:  # it may have one, and a journal without readers does no harm
                self._indexed = True
        return self._indexed

    def close(self) -> None:
        """Write the remaining entries, and log a failure."""
        self._flush()
        if self._indexed is False:
            self.unreported = 0
        else:
            self.unreported += len(self._journal)
        self._store.close()
        if self.unreported:
            _log.warning(
                "%d changes were not recorded in the key index (%s): readers learn of them from the next snapshot of a "
                "listing, such as by: python -m jobs index --full",
                self.unreported,
                self._problem or "too many waited",
            )


@contextlib.contextmanager
def notifying(bucket: Bucket | None) -> Iterator[IndexNotifier | None]:
    """Provide a notifier for the duration of a block.

    Args:
        bucket: Bucket of the instance; None if the work is done elsewhere.
    """
    if bucket is None:
        yield None
        return
    notifier = IndexNotifier(bucket)
    try:
        yield notifier
    finally:
        notifier.close()
