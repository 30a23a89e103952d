"""Where a reader's view of an instance comes from: published snapshots and journals, or a listing of its own."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np

from hfbucket_plugin.deadlines import Deadline
from hfbucket_plugin.errors import HFBucketError, RefusedError, TransportError
from hfbucket_plugin.handle import RESERVED
from hfbucket_plugin.index_format import JOURNAL, FormatError
from hfbucket_plugin.index_store import CLOCK_MARGIN_SECS
from hfbucket_plugin.index_table import CHANGE, ROW, Table, in_order, last_of_each, rows_of
from hfbucket_plugin.index_view import View

if TYPE_CHECKING:
    import threading
    from collections.abc import Iterable

    from hfbucket_plugin.bucket import Bucket, ObjectInfo
    from hfbucket_plugin.content import Content
    from hfbucket_plugin.handle import BucketHandle
    from hfbucket_plugin.index_format import Pointer
    from hfbucket_plugin.index_store import IndexStore, Shelf
    from hfbucket_plugin.index_table import Rows

_PAGE_SECS: Final = 60.0
_READ_SECS: Final = 60.0
_MOST_SKIPPED: Final = 31
"""Refreshes that pass before a snapshot that could not be loaded is tried again: half an hour, with defaults."""

_LOAD_SECS: Final = 300.0
"""A snapshot of 60 MB over a slow line; lookups go on meanwhile as before."""


class TooLargeError(RefusedError):
    """The index would take more memory than it may."""


@dataclass(slots=True)
class Refreshed:
    """What a refresh found.

    Attributes:
        view: The view from now on; None where there is no index.
        alive: Whether there is one in the bucket, so that journals find readers.
        renewed: Whether the view stands on another snapshot than before.
        covers: See `Pointer`; of the present snapshot, whether it was loaded or not.
        listed: The same.
        full: The same.
        heat_until: The same.
        date: The Hub's time, in seconds since 1970; None where it did not say.
        dated: When that came, in our monotonic seconds: what was read afterwards took its time.
        problem: Why there is no view, or only an older one.
        folded: Journals that were folded in.
        garbage: Those that are none.
        unread: Those that did not arrive, and are tried again.
        own_seq: Up to which number the view knows the entries of the writer that asked.
        calls: Pages that were listed.
    """

    view: View | None = None
    alive: bool = False
    renewed: bool = False
    covers: float = 0.0
    listed: float = 0.0
    full: float = 0.0
    heat_until: float = 0.0
    date: float | None = None
    dated: float = field(default_factory=time.monotonic)
    problem: HFBucketError | None = None
    folded: int = 0
    garbage: int = 0
    unread: int = 0
    own_seq: int = 0
    calls: int = 1


class Source(Protocol):
    """Makes views."""

    def refresh(self, view: View | None) -> Refreshed:
        """Look for news.

        Raises:
            HFBucketError: Nothing is known but what was known before.
        """


@dataclass(slots=True)
class SnapshotSource:
    """Published snapshots, and journals.

    Attributes:
        store: Where they lie.
        writer: Of this process's own journals.
        max_bytes: Most memory of a view.
        loads: Whether snapshots are wanted at all; without, only whether there is one is looked for.
    """

    store: IndexStore
    writer: str
    max_bytes: int
    loads: bool = True
    _seen: Content | None = None
    _pointer: Pointer | None = None
    _problem: HFBucketError | None = None
    _failures: int = 0
    _skip: int = 0
    _folded: set[tuple[str, str]] = field(default_factory=set)

    def refresh(self, view: View | None) -> Refreshed:
        """One listing; the pointer and its snapshot if they are new; and the journals that are."""
        shelf = self.store.list(Deadline.after(_PAGE_SECS))
        result = Refreshed(view, date=shelf.date)
        if shelf.pointer is None:
            self._seen = self._pointer = self._problem = None
            self._failures = self._skip = 0
            return Refreshed(date=shelf.date)
        if shelf.pointer.content != self._seen:
            self._seen, self._problem, self._failures, self._skip = shelf.pointer.content, None, 0, 0
            self._follow(shelf.pointer, result)
        elif self._failures:
            self._skip -= 1
            if self._skip < 0:
                self._follow(shelf.pointer, result)
        result.problem = self._problem
        if self._pointer is not None:
            result.alive = True
            pointer = self._pointer
            result.covers, result.listed, result.full = pointer.covers, pointer.listed, pointer.full
            result.heat_until = pointer.heat_until
        if result.view is not None:
            self._fold(shelf, result.view, result)
        return result

    def _follow(self, info: ObjectInfo, result: Refreshed) -> None:
        """Go to the snapshot that a pointer names; where that fails the one before stays in use.

        What fails is tried again, less and less often: a snapshot that is broken must not be fetched every minute.
        """
        try:
            pointer = self.store.read_pointer(info, Deadline.after(_READ_SECS))
            if self.loads:
                result.view = self._load(pointer)
                self._folded.clear()
        except HFBucketError as error:
            self._problem = error
            self._failures += 1
            self._skip = min(_MOST_SKIPPED, 2**self._failures - 1)
            return
        self._problem, self._failures = None, 0
        self._pointer, result.renewed = pointer, True

    def _load(self, pointer: Pointer) -> View:
        size = pointer.size + 8 * pointer.keys
        if size > self.max_bytes:
            raise TooLargeError(
                f"the snapshot {pointer.snapshot} has {pointer.keys} keys, which take {size} bytes of memory, and "
                f"index_max_bytes permits {self.max_bytes}"
            )
        table = self.store.read_snapshot(pointer, Deadline.after(_LOAD_SECS))
        return View(table, pointer.covers, pointer.listed)

    def _fold(self, shelf: Shelf, view: View, result: Refreshed) -> None:
        live = [journal for journal in shelf.journals if journal.at >= view.covers and not journal.name.hits]
        self._folded &= {(journal.path, journal.content.xet_hash) for journal in live}
        fresh = [one for one in live if (one.path, one.content.xet_hash) not in self._folded]
        entries = sum(one.content.size for one in fresh) // JOURNAL.itemsize
        if view.nbytes + entries * CHANGE.itemsize > self.max_bytes:
            result.view = None
            self._problem = result.problem = TooLargeError(
                f"what happened since the snapshot takes more memory than index_max_bytes permits ({self.max_bytes}): does "
                "the builder of the index run often enough?"
            )
            return
        changes: list[Rows] = []
        for journal, rows in self.store.read_journals(fresh, Deadline.after(_READ_SECS)):
            if isinstance(rows, FormatError):
                result.garbage += 1
            elif isinstance(rows, HFBucketError):
                result.unread += 1
                continue
            else:
                changes.append(rows)
                result.folded += 1
            self._folded.add((journal.path, journal.content.xet_hash))
        result.view = view.folded(*changes)
        result.own_seq = self._own_seq(shelf, view)

    def _own_seq(self, shelf: Shelf, view: View) -> int:
        """Up to which entry all journals of ours are in the view."""
        known = 0
        for journal in sorted(shelf.journals, key=lambda one: one.name.seq):
            if journal.name.writer == self.writer:
                if journal.at >= view.covers and (journal.path, journal.content.xet_hash) not in self._folded:
                    break
                known = journal.name.seq
        return known


@dataclass(slots=True)
class ListingSource:
    """A listing of the whole instance, made by this process.

    Attributes:
        bucket: The instance's.
        max_bytes: Most memory of a view.
        closed: Set when nobody waits for it any more.
    """

    bucket: Bucket
    max_bytes: int
    closed: threading.Event

    def refresh(self, view: View | None) -> Refreshed:
        """List everything, a page at a time, as far as other calls leave room."""
        del view
        result = Refreshed(alive=False, renewed=True, calls=0)
        began = time.time()  # ours, where the Hub does not tell its own
        parts: list[Rows] = []
        size = 0
        cursor: str | None = None
        while True:
            while (busy := self.bucket.background_wait_secs) and not self.closed.wait(busy):
                pass
            if self.closed.is_set():
                raise TransportError("the instance was closed")
            infos, cursor, date = self.bucket.list_page_dated(
                self.bucket.handle.join(""), cursor, Deadline.after(_PAGE_SECS)
            )
            result.calls += 1
            if date is not None:
                began = date.timestamp() if result.date is None else began
                result.date, result.dated = date.timestamp(), time.monotonic()
            parts.append(listed_rows(infos, self.bucket.handle))
            size += parts[-1].nbytes + 8 * len(parts[-1])
            if size > self.max_bytes:
                raise TooLargeError(f"the instance holds more keys than index_max_bytes permits ({self.max_bytes})")
            if cursor is None:
                break
        listed = began - CLOCK_MARGIN_SECS
        rows = last_of_each(in_order(np.concatenate(parts))) if parts else np.zeros(0, ROW)
        result.view, result.listed = View(Table(rows), listed, listed), listed
        return result


def listed_rows(infos: Iterable[ObjectInfo], handle: BucketHandle) -> Rows:
    """Rows of the listed objects that an engine may ask for, in the order of the listing.

    All that lie at the first level below the prefix, whether their names parse as keys or not: what an engine asks for is
    looked up by its name alone.
    """
    entries = []
    for info in infos:
        name = handle.relative(info.path)
        if name is not None and name and "/" not in name and name != RESERVED:
            at = info.uploaded_at.timestamp() if info.uploaded_at is not None else 0.0
            entries.append((name, info.content, at))
    return rows_of(entries)
