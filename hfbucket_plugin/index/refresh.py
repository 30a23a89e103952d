"""Where a reader's view of an instance comes from: published snapshots and journals, or a listing of its own."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np

from hfbucket_plugin.core.deadline import Deadline
from hfbucket_plugin.core.keys import RESERVED
from hfbucket_plugin.errors import HFBucketError, RefusedError, ThrottledError, TransportError
from hfbucket_plugin.index.format import JOURNAL, FormatError
from hfbucket_plugin.index.store import CLOCK_MARGIN_SECS
from hfbucket_plugin.index.table import CHANGE, ROW, Table, View, in_order, last_of_each, rows_of

if TYPE_CHECKING:
    import threading
    from collections.abc import Collection, Iterable

    from hfbucket_plugin.config.settings import InstanceSettings
    from hfbucket_plugin.core.keys import BucketHandle, ContentId
    from hfbucket_plugin.hub.bucket import Bucket, ObjectInfo
    from hfbucket_plugin.index.format import Pointer
    from hfbucket_plugin.index.store import IndexListing, IndexStore
    from hfbucket_plugin.index.table import Rows

_PAGE_SECS: Final = 60.0
_READ_SECS: Final = 60.0
_MOST_SKIPPED: Final = 31
"""Refreshes that pass before a snapshot that could not be loaded is tried again: half an hour, with defaults."""

_RESUME_SECS: Final = 3600.0
"""How long a listing that broke off may be gone on with: its first pages are as old."""

_ALIVE_SECS: Final = 2 * 3600.0
"""A process that wrote no journal for this long has ended."""

_LOAD_SECS: Final = 300.0
"""A snapshot of 60 MB over a slow line; lookups go on meanwhile as before."""


_WINDOW_SECS: Final = 300.0
_READERS_CALLS: Final = 1000
_WRITERS_CALLS: Final = 1000
"""Calls that all processes of an instance make for refreshes, and for journals, in a window of the Hub's quota, at most: the more
processes there are, the rarer each one asks. The smallest quota of a paid plan is 2,500."""


def refresh_secs(settings: InstanceSettings, writers: int, calls: int) -> float:
    """Seconds between two refreshes from snapshots.

    Args:
        settings: The instance's.
        writers: How many processes there are, see `writers_of`.
        calls: Calls to the Hub of a refresh.
    """
    shared = _WINDOW_SECS * writers * calls / _READERS_CALLS
    return max(settings.index_refresh_secs, min(shared, settings.index_max_age_secs / 4))


def journal_secs(settings: InstanceSettings, writers: int) -> float:
    """Seconds between two journals of a process.

    Args:
        settings: The instance's.
        writers: How many processes there are, see `writers_of`.
    """
    return max(settings.index_journal_secs, _WINDOW_SECS * writers / _WRITERS_CALLS)


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
        writers: How many processes wrote journals recently.
        calls: Calls to the Hub.
        took: Seconds since the listing that the view stands on was begun; 0 where this refresh began it.
        crowded: See `IndexListing`.
        strangers: The same.
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
    writers: int = 1
    calls: int = 1
    took: float = 0.0
    crowded: str = ""
    strangers: str = ""


class ViewSource(Protocol):
    """Makes views.

    What a source knows it has seen changes together with what it hands out, at the end of a refresh: one that fails, in whatever
    way and at whatever step, is done again by the next one.
    """

    @property
    def calls(self) -> int:
        """Calls to the Hub of the last refresh, whatever came of it."""

    def refresh(self, view: View | None) -> Refreshed:
        """Look for news.

        Raises:
            HFBucketError: Nothing is known but what was known before.
        """


@dataclass(frozen=True, slots=True)
class _Seen:
    """What a `SnapshotSource` knows.

    Attributes:
        content: Of the pointer that was seen last.
        pointer: The last one that was followed.
        problem: Why that of `content` was not, or what there is does not fit.
        failures: How often in a row it could not be followed.
        skip: How many refreshes pass before that is tried again.
        folded: Journals that are in the view.
    """

    content: ContentId | None = None
    pointer: Pointer | None = None
    problem: HFBucketError | None = None
    failures: int = 0
    skip: int = 0
    folded: frozenset[tuple[str, str]] = frozenset()


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
    _seen: _Seen = field(default_factory=_Seen)

    @property
    def calls(self) -> int:
        """Calls to the Hub of the last refresh, whatever came of it."""
        return self.store.calls

    def refresh(self, view: View | None) -> Refreshed:
        """One listing; the pointer and its snapshot if they are new; and the journals that are."""
        listing = self.store.list(Deadline.after(_PAGE_SECS))
        result = Refreshed(
            view,
            date=listing.date,
            calls=listing.calls,
            crowded=listing.crowded,
            strangers=listing.strangers,
            writers=writers_of(listing),
        )
        if listing.pointer is None:
            self._seen = _Seen()
            result.view = None
            return result
        seen = self._seen
        if listing.pointer.content != seen.content:
            seen = replace(seen, content=listing.pointer.content, problem=None, failures=0, skip=0)
            seen = self._follow(listing, listing.pointer, seen, result)
        elif seen.failures:
            seen = replace(seen, skip=seen.skip - 1)
            if seen.skip < 0:
                seen = self._follow(listing, listing.pointer, seen, result)
        if seen.pointer is not None:
            result.alive = True
            pointer = seen.pointer
            result.covers, result.listed, result.full = pointer.covers, pointer.listed, pointer.full
            result.heat_until = pointer.heat_until
        if result.view is not None:
            seen = self._fold(listing, result.view, seen, result)
        result.problem = seen.problem
        self._seen = seen
        return result

    def _follow(self, listing: IndexListing, info: ObjectInfo, seen: _Seen, result: Refreshed) -> _Seen:
        """Go to the snapshot that a pointer names; where that fails the one before stays in use.

        What fails is tried again, less and less often: a snapshot that is broken must not be fetched every minute.
        """
        try:
            pointer = self.store.read_pointer(info, Deadline.after(_READ_SECS))
            _expect_present(info, pointer, listing)
            view = self.load(info, pointer, listing) if self.loads else result.view
        except Exception as error:  # noqa: BLE001 - whatever it was, it is named and tried again
            failures = seen.failures + 1
            skip = min(_MOST_SKIPPED, 2**failures - 1)
            return replace(seen, problem=problem_of(error), failures=failures, skip=skip)
        result.view, result.renewed = view, True
        return _Seen(seen.content, pointer)

    def load(self, info: ObjectInfo, pointer: Pointer, listing: IndexListing) -> View:
        """Load the snapshot that a pointer names, if engines may go by it. What judges an index for people asks here too.

        Args:
            info: The pointer's object.
            pointer: Its content.
            listing: What was listed.

        Raises:
            TooLargeError: It takes more memory than it may.
            FormatError: It is none that engines go by.
            HFBucketError: It did not arrive.
        """
        _expect_present(info, pointer, listing)
        size = pointer.size + 8 * pointer.keys
        if size > self.max_bytes:
            raise TooLargeError(
                f"the snapshot {pointer.snapshot} has {pointer.keys} keys, which take {size} bytes of memory, and "
                f"index_max_bytes permits {self.max_bytes}"
            )
        for one in listing.snapshots:
            if one.path == self.store.snapshot_path(pointer) and one.content != pointer.content:
                raise FormatError(
                    f"{one.path}: the pointer says {pointer.size} bytes, and the Hub lists another content"
                )
        table = self.store.read_snapshot(pointer, Deadline.after(_LOAD_SECS))
        return View(table, pointer.covers, pointer.listed)

    def _fold(self, listing: IndexListing, view: View, seen: _Seen, result: Refreshed) -> _Seen:
        live = [journal for journal in listing.journals if journal.at >= view.covers and not journal.name.hits]
        folded = {(journal.path, journal.content.xet_hash) for journal in live} & seen.folded
        fresh = [one for one in live if (one.path, one.content.xet_hash) not in folded]
        entries = sum(one.content.size for one in fresh) // JOURNAL.itemsize
        if view.nbytes + entries * CHANGE.itemsize > self.max_bytes:
            result.view = None
            return replace(
                seen,
                problem=TooLargeError(
                    f"what happened since the snapshot takes more memory than index_max_bytes permits ({self.max_bytes}): "
                    "does the builder of the index run often enough?"
                ),
            )
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
            folded.add((journal.path, journal.content.xet_hash))
        result.view = view.folded(*changes)
        if not listing.crowded:  # else some of ours may not have been listed
            result.own_seq = self._own_seq(listing, view, folded)
        return replace(seen, folded=frozenset(folded))

    def _own_seq(self, listing: IndexListing, view: View, folded: Collection[tuple[str, str]]) -> int:
        """Up to which entry all journals of ours are in the view."""
        known = 0
        for journal in sorted(listing.journals, key=lambda one: one.name.seq):
            if journal.name.writer == self.writer and not journal.name.hits:
                if journal.at >= view.covers and (journal.path, journal.content.xet_hash) not in folded:
                    break
                known = journal.name.seq
        return known


def problem_of(error: Exception) -> HFBucketError:
    """An error of a refresh, as one that names itself."""
    if isinstance(error, HFBucketError):
        return error
    return HFBucketError(f"the refresh failed, and is tried again: {type(error).__name__}: {error}")


def _expect_present(info: ObjectInfo, pointer: Pointer, listing: IndexListing) -> None:
    """Make sure that the times of a pointer are none of the future: who went by them would never find it old.

    Raises:
        FormatError: They are.
    """
    if ahead := pointer.ahead_of(time.time() if listing.date is None else listing.date):
        raise FormatError(f"{info.path}: {ahead}: it is ignored until a builder has replaced it")


def writers_of(listing: IndexListing) -> int:
    """How many processes wrote journals recently: about as many as share the instance, since a process that records heat writes hourly."""
    since = (time.time() if listing.date is None else listing.date) - _ALIVE_SECS
    late = [journal.name for journal in listing.journals if journal.at >= since]
    # A process has a name for its journals of puts and deletes, and another one for those of hits.
    return max(1, *(len({name.writer for name in late if name.hits is hits}) for hits in (False, True)))


@dataclass(slots=True)
class _Partial:
    """A listing that is not at its end."""

    began: float  # by the Hub's clock; ours, where it does not tell its own
    asked: float  # monotonic
    parts: list[Rows] = field(default_factory=list)
    size: int = 0
    cursor: str | None = None
    dated: bool = False


@dataclass(slots=True)
class ListingSource:
    """A listing of the whole instance, made by this process.

    One that broke off goes on where it did, with the next refresh.

    Attributes:
        bucket: The instance's.
        max_bytes: Most memory of a view.
        closed: Set when its result is not needed any more.
        calls: Calls to the Hub of the last refresh, whatever came of it.
    """

    bucket: Bucket
    max_bytes: int
    closed: threading.Event
    calls: int = 0
    _partial: _Partial | None = None

    def refresh(self, view: View | None) -> Refreshed:
        """List everything, a page at a time, as far as other calls leave room."""
        del view
        self.calls = 0
        partial, self._partial = self._partial, None
        if partial is None or time.monotonic() - partial.asked > _RESUME_SECS:
            partial = _Partial(time.time(), time.monotonic())
        try:
            result = self._list(partial)
        except (ThrottledError, TransportError):
            self._partial = partial
            raise
        listed = partial.began - CLOCK_MARGIN_SECS
        rows = np.concatenate(partial.parts) if partial.parts else np.zeros(0, ROW)
        partial.parts.clear()  # so that there are two of it at a time, and not three
        rows = last_of_each(in_order(rows))
        result.view, result.listed = View(Table(rows), listed, listed), listed
        result.calls, result.took = self.calls, time.monotonic() - partial.asked
        return result

    def _list(self, partial: _Partial) -> Refreshed:
        result = Refreshed(alive=False, renewed=True, calls=0)
        while True:
            while (busy := self.bucket.background_wait_secs) and not self.closed.wait(busy):
                pass
            if self.closed.is_set():
                raise TransportError("the instance was closed")
            self.calls += 1
            infos, cursor, date = self.bucket.list_page_dated(
                self.bucket.handle.join(""), partial.cursor, Deadline.after(_PAGE_SECS)
            )
            if date is not None:
                partial.began = partial.began if partial.dated else date.timestamp()
                partial.dated = True
                result.date, result.dated = date.timestamp(), time.monotonic()
            rows = listed_rows(infos, self.bucket.handle)
            partial.size += rows.nbytes + 8 * len(rows)
            if partial.size > self.max_bytes:
                raise TooLargeError(f"the instance holds more keys than index_max_bytes permits ({self.max_bytes})")
            partial.parts.append(rows)
            partial.cursor = cursor
            if cursor is None:
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
