"""Sources of a reader's view of an instance: published snapshots and journals, or a listing of its own."""

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
"""Maximum number of refreshes that skip a snapshot that could not be loaded: half an hour, with defaults."""

_RESUME_SECS: Final = 3600.0
"""Maximum age in seconds of an interrupted listing that may be continued, because its first pages are that old."""

_ALIVE_SECS: Final = 2 * 3600.0
"""Seconds without a journal after which a process counts as ended."""

_LOAD_SECS: Final = 300.0
"""Time limit in seconds for loading a snapshot, enough for 60 MB over a slow line; lookups continue meanwhile."""


_WINDOW_SECS: Final = 300.0
_READERS_CALLS: Final = 1000
_WRITERS_CALLS: Final = 1000
"""Maximum number of calls for refreshes, and for journals, by all processes of an instance in a window of the Hub's
quota: more processes each call less often. The smallest quota of a paid plan is 2,500."""


def refresh_secs(settings: InstanceSettings, writers: int, calls: int) -> float:
    """Return the seconds between two refreshes from snapshots.

    Args:
        settings: Settings of the instance.
        writers: Number of processes, see `writers_of`.
        calls: Number of Hub calls of a refresh.
    """
    shared = _WINDOW_SECS * writers * calls / _READERS_CALLS
    return max(settings.index_refresh_secs, min(shared, settings.index_max_age_secs / 4))


def journal_secs(settings: InstanceSettings, writers: int) -> float:
    """Return the seconds between two journals of a process.

    Args:
        settings: Settings of the instance.
        writers: Number of processes, see `writers_of`.
    """
    return max(settings.index_journal_secs, _WINDOW_SECS * writers / _WRITERS_CALLS)


class TooLargeError(RefusedError):
    """The index would exceed its memory limit."""


@dataclass(slots=True)
class Refreshed:
    """Result of a refresh.

    Attributes:
        view: Current view; None without an index.
        alive: Whether the bucket has an index, so that journals have readers.
        renewed: Whether the view is based on a new snapshot.
        covers: `Pointer.covers` of the current snapshot, loaded or not.
        listed: `Pointer.listed` likewise.
        full: `Pointer.full` likewise.
        heat_until: `Pointer.heat_until` likewise.
        date: Time of the Hub in Unix seconds; None if its responses had no date.
        dated: Local monotonic time in seconds at which `date` arrived; later reads took additional time.
        problem: Why there is no view, or only an older one.
        folded: Number of journals merged into the view.
        garbage: Number of invalid journals.
        unread: Number of journals that failed to arrive and will be retried.
        own_seq: Last entry of this process's writer that the view includes completely.
        writers: Number of processes that recently wrote journals.
        calls: Number of calls to the Hub.
        took: Seconds since the start of the listing that the view is based on; 0 if this refresh started it.
        crowded: See `IndexListing`.
        strangers: See `IndexListing`.
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
    """Source of views.

    A source records what it has seen only at the end of a refresh, together with its result, so a refresh that fails at
    any step is repeated by the next one.
    """

    @property
    def calls(self) -> int:
        """Number of Hub calls of the last refresh, whatever its outcome."""

    def refresh(self, view: View | None) -> Refreshed:
        """Look for changes.

        Raises:
            HFBucketError: Nothing new is known.
        """


@dataclass(frozen=True, slots=True)
class _Seen:
    """State of a `SnapshotSource`.

    Attributes:
        content: Content of the last seen pointer.
        pointer: Last pointer that was followed.
        problem: Why the pointer of `content` was not followed, or its index does not fit.
        failures: Number of consecutive failures to follow it.
        skip: Number of refreshes until the next attempt.
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
    """Source of views from published snapshots and journals.

    Attributes:
        store: Store of the index.
        writer: Writer of this process's own journals.
        max_bytes: Maximum memory of a view in bytes.
        loads: Whether to load snapshots; otherwise only their existence is checked.
    """

    store: IndexStore
    writer: str
    max_bytes: int
    loads: bool = True
    _seen: _Seen = field(default_factory=_Seen)

    @property
    def calls(self) -> int:
        """Number of Hub calls of the last refresh, whatever its outcome."""
        return self.store.calls

    def refresh(self, view: View | None) -> Refreshed:
        """List once; read the pointer and its snapshot if they are new, and all new journals."""
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
        """Load the snapshot of a pointer; after a failure the previous one stays in use.

        A failure is retried at growing intervals, so that a broken snapshot is not fetched every minute.
        """
        try:
            pointer = self.store.read_pointer(info, Deadline.after(_READ_SECS))
            _expect_present(info, pointer, listing)
            view = self.load(info, pointer, listing) if self.loads else result.view
        except Exception as error:  # noqa: BLE001 - any error is logged and the load retried
            failures = seen.failures + 1
            skip = min(_MOST_SKIPPED, 2**failures - 1)
            return replace(seen, problem=problem_of(error), failures=failures, skip=skip)
        result.view, result.renewed = view, True
        return _Seen(seen.content, pointer)

    def load(self, info: ObjectInfo, pointer: Pointer, listing: IndexListing) -> View:
        """Load the snapshot of a pointer if engines may use it. Also used to check an index for operators.

        Args:
            info: Object of the pointer.
            pointer: Content of the pointer.
            listing: Listing in which it was found.

        Raises:
            TooLargeError: It exceeds the memory limit.
            FormatError: Engines would not use it.
            HFBucketError: It was not read.
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
        if not listing.crowded:  # otherwise some own journals may be missing from the listing
            result.own_seq = self._own_seq(listing, view, folded)
        return replace(seen, folded=frozenset(folded))

    def _own_seq(self, listing: IndexListing, view: View, folded: Collection[tuple[str, str]]) -> int:
        """Return the last entry up to which all own journals are in the view."""
        known = 0
        for journal in sorted(listing.journals, key=lambda one: one.name.seq):
            if journal.name.writer == self.writer and not journal.name.hits:
                if journal.at >= view.covers and (journal.path, journal.content.xet_hash) not in folded:
                    break
                known = journal.name.seq
        return known


def problem_of(error: Exception) -> HFBucketError:
    """Return an error of a refresh with a descriptive message."""
    if isinstance(error, HFBucketError):
        return error
    return HFBucketError(f"the refresh failed, and is tried again: {type(error).__name__}: {error}")


def _expect_present(info: ObjectInfo, pointer: Pointer, listing: IndexListing) -> None:
    """Check that a pointer's times are not in the future, because they would never be found old.

    Raises:
        FormatError: A time is in the future.
    """
    if ahead := pointer.ahead_of(time.time() if listing.date is None else listing.date):
        raise FormatError(f"{info.path}: {ahead}: it is ignored until a builder has replaced it")


def writers_of(listing: IndexListing) -> int:
    """Return the number of processes that recently wrote journals: about all, because heat is reported hourly."""
    since = (time.time() if listing.date is None else listing.date) - _ALIVE_SECS
    late = [journal.name for journal in listing.journals if journal.at >= since]
    # A process uses one name for its journals of puts and deletes, and another for those of hits.
    return max(1, *(len({name.writer for name in late if name.hits is hits}) for hits in (False, True)))


@dataclass(slots=True)
class _Partial:
    """Incomplete listing."""

    began: float  # by the Hub's clock; by this machine's if the Hub reports none
    asked: float  # monotonic
    parts: list[Rows] = field(default_factory=list)
    size: int = 0
    cursor: str | None = None
    dated: bool = False


@dataclass(slots=True)
class ListingSource:
    """Source of views from this process's own listings of the whole instance.

    An interrupted listing is continued by the next refresh.

    Attributes:
        bucket: Bucket of the instance.
        max_bytes: Maximum memory of a view in bytes.
        closed: Set when its result is no longer needed.
        calls: Number of Hub calls of the last refresh, whatever its outcome.
    """

    bucket: Bucket
    max_bytes: int
    closed: threading.Event
    calls: int = 0
    _partial: _Partial | None = None

    def refresh(self, view: View | None) -> Refreshed:
        """List everything page by page, as far as other calls leave room."""
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
        partial.parts.clear()  # limits memory to two copies instead of three
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
    """Return rows of the listed objects that an engine may request, in the order of the listing.

    These are all objects at the first level below the prefix, even if their names do not parse as keys, because engines
    look up by name alone.
    """
    entries = []
    for info in infos:
        name = handle.relative(info.path)
        if name is not None and name and "/" not in name and name != RESERVED:
            at = info.uploaded_at.timestamp() if info.uploaded_at is not None else 0.0
            entries.append((name, info.content, at))
    return rows_of(entries)
