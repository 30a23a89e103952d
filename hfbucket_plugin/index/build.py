"""Construction of key index snapshots in bounded memory, from a listing or from the previous snapshot and journals.

Digests are evenly distributed, so rows are sorted by writing them into `PARTS` files by digest range and sorting one
file after the other: 10,000,000 keys take 600 MB of disk and 10 MB of memory at a time.

A listing costs a call per 1,000 objects and is complete, including changes by other tools. The previous snapshot and
the journals cost two calls, and carry over the errors of either.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, BinaryIO, Final, Self

import numpy as np

from hfbucket_plugin.core.buffers import RevocableBuffer
from hfbucket_plugin.core.deadline import Deadline
from hfbucket_plugin.errors import HFBucketError, IntegrityError, MissingError, TransportError
from hfbucket_plugin.hub.transfer import DownloadToBuffer, xet_hashes
from hfbucket_plugin.index.access.stats import (
    HIT,
    WARM_ROW,
    HitLog,
    Span,
    deduplicated,
    has_access_columns,
    warmed,
    with_access_columns,
    with_earlier_access,
)
from hfbucket_plugin.index.access.stats import LATE_SECS as ACCESS_LATE_SECS
from hfbucket_plugin.index.format import (
    ACCESS_JOURNAL,
    FormatError,
    check_order,
    check_snapshot,
    header_of,
    read_header,
)
from hfbucket_plugin.index.refresh import listed_rows
from hfbucket_plugin.index.store import CLOCK_MARGIN_SECS, LATE_SECS, JournalRows
from hfbucket_plugin.index.table import CHANGE, ROW, applied, in_order, last_of_each, newest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from hfbucket_plugin.hub.bucket import Bucket, ObjectInfo
    from hfbucket_plugin.index.format import Pointer
    from hfbucket_plugin.index.store import IndexListing, IndexStore, Journal
    from hfbucket_plugin.index.table import Rows

_log = logging.getLogger(__name__)

PARTS: Final = 64
_BLOCK_ROWS: Final = 50_000
_ACCESS: Final = np.dtype([(name, WARM_ROW[name]) for name in ("digest_hi", "digest_lo", "last_hit", "heat")])
_PAGE: Final = 1000
_TRIES: Final = 3


class _Parts:
    """Rows on disk, by digest range.

    Args:
        directory: Existing directory that no other process uses.
        name: Prefix of the file names.
        dtype: Type of the rows.
    """

    def __init__(self, directory: Path, name: str, dtype: np.dtype[Any]) -> None:
        self.dtype = dtype
        self._paths = [directory / f"{name}-{part:02d}" for part in range(PARTS)]
        self._files: list[BinaryIO] = []  # created when there is something to write
        self._held: list[Rows] = []
        self._held_rows = 0

    def add(self, rows: Rows) -> None:
        self._held.append(rows)
        self._held_rows += len(rows)
        if self._held_rows >= _BLOCK_ROWS:
            self._spill()

    def _spill(self) -> None:
        rows = np.concatenate(self._held)
        self._files = self._files or [path.open("xb") for path in self._paths]
        self._held, self._held_rows = [], 0
        part = (rows["digest_hi"] >> np.uint64(64 - PARTS.bit_length() + 1)).astype(np.int64)
        order = np.argsort(part, kind="stable")  # stable, so that later rows of a key stay later
        ends = np.searchsorted(part[order], np.arange(PARTS + 1))
        for number, file in enumerate(self._files):
            file.write(rows[order[ends[number] : ends[number + 1]]].tobytes())

    def read(self, part: int) -> Rows:
        if self._held:
            self._spill()
        if not self._files:
            return np.zeros(0, self.dtype)
        self._files[part].flush()
        rows: Rows = np.fromfile(self._paths[part], self.dtype)
        return rows

    def drop(self, part: int) -> None:
        if self._files:
            self._files[part].close()
            self._paths[part].unlink(missing_ok=True)

    def close(self) -> None:
        for part in range(PARTS):
            self.drop(part)


class SnapshotFile:
    """Snapshot under construction. Use it as a context manager, which removes its temporary files.

    Args:
        directory: Empty directory for temporary files that no other process uses.
        dtype: Type of the rows: the columns of `ROW`, possibly with more.
        now: Time of the Hub in Unix seconds, which caps the times of hits.
    """

    def __init__(self, directory: Path, dtype: np.dtype[Any] = ROW, now: float = 0xFFFFFFFF) -> None:
        self._latest = np.uint32(min(0xFFFFFFFF, now))
        self._rows = _Parts(directory, "rows", dtype)
        self._changes = _Parts(directory, "changes", CHANGE)
        self._hits = _Parts(directory, "hits", HIT)
        self._before = _Parts(directory, "before", _ACCESS)
        self._all = (self._rows, self._changes, self._hits, self._before)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for parts in self._all:
            parts.close()

    def add(self, rows: Rows) -> None:
        """Add keys; the last row of each key counts."""
        if has_access_columns(rows.dtype) and len(rows) and rows["last_hit"].max() > self._latest:
            rows = rows.copy()
            rows["last_hit"] = np.minimum(rows["last_hit"], self._latest)
        self._rows.add(rows)

    def change(self, changes: Rows) -> None:
        """Add later changes, in any order."""
        self._changes.add(changes)

    def hit(self, hits: Rows) -> None:
        """Add reported hits, in any order and with repetitions."""
        self._hits.add(hits)

    def carry(self, rows: Rows) -> None:
        """Add rows of an earlier snapshot, for their heat."""
        rows = with_access_columns(rows, _ACCESS).copy()
        rows["last_hit"] = np.minimum(rows["last_hit"], self._latest)
        self._before.add(rows)

    def write(self, path: Path, counted: tuple[float, float] | None = None) -> int:
        """Write the snapshot, sorted and with each key once.

        Args:
            path: Path of the file.
            counted: Time window of the reports to count, see `stats.warmed`; None for a snapshot without heat.

        Returns:
            The number of keys.
        """
        keys, dtype = 0, self._rows.dtype
        if counted is not None and not has_access_columns(dtype):
            dtype = WARM_ROW
        with path.open("wb") as out:
            out.write(header_of(dtype, 0))
            for part in range(PARTS):
                rows = last_of_each(in_order(self._rows.read(part)))
                rows = applied(rows, newest(self._changes.read(part)))
                if counted is not None:
                    rows = with_earlier_access(
                        with_access_columns(rows, dtype), last_of_each(in_order(self._before.read(part)))
                    )
                    rows = warmed(rows, deduplicated(self._hits.read(part)), *counted)
                out.write(rows.tobytes())
                keys += len(rows)
                for parts in self._all:
                    parts.drop(part)
            out.seek(0)
            out.write(header_of(dtype, keys))
        return keys


@dataclass(frozen=True, slots=True)
class BuiltSnapshot:
    """Snapshot in a file, not uploaded yet.

    Attributes:
        path: Path of the file.
        keys: Number of rows.
        covers: See `Pointer`.
        listed: See `Pointer`.
        full: See `Pointer`.
        garbage: Number of invalid journals, which were skipped.
        heat: Period for which heat is known.
    """

    path: Path
    keys: int
    covers: float
    listed: float
    full: float
    garbage: int = 0
    heat: Span = Span()  # noqa: RUF009 - it is frozen


def hub_time(bucket: Bucket, deadline: Deadline) -> float:
    """Return the time of the Hub in Unix seconds, minus `CLOCK_MARGIN_SECS`.

    Raises:
        TransportError: The Hub's responses have no date.
        HFBucketError: The Hub did not answer.
    """
    date = bucket.time(deadline)
    if date is None:
        raise TransportError("the Hub's answers have no Date: no index can say what it covers")
    return date.timestamp() - CLOCK_MARGIN_SECS


def from_listing(
    bucket: Bucket,
    directory: Path,
    page_secs: float,
    each_page: Callable[[], None] = lambda: None,
    each_object: Callable[[ObjectInfo], None] = lambda _info: None,
    *,
    store: IndexStore | None = None,
) -> BuiltSnapshot:
    """Build a snapshot from a listing of the whole instance, with heat from the previous snapshot and the journals.

    If these are damaged, heat starts over and a warning is logged, because a listing has to repair a damaged index.

    Args:
        bucket: Bucket of the instance.
        directory: Empty directory for the snapshot and temporary files that no other process uses.
        page_secs: Maximum time for a page in seconds.
        each_page: Called before each page; an exception ends the listing.
        each_object: Called with each listed object, for callers that check the listing.
        store: Index of the instance, for its heat; None for none.

    Raises:
        HFBucketError: A page failed; no snapshot was built.
    """
    began = hub_time(bucket, Deadline.patient(page_secs))
    with SnapshotFile(directory, now=began) as file:
        infos = _watched(bucket.list_objects(bucket.handle.join(""), page_secs, each_page), each_object)
        while page := list(islice(infos, _PAGE)):
            file.add(listed_rows(page, bucket.handle))
        path, heat, counted = directory / "snapshot.npy", Span(until=began - ACCESS_LATE_SECS), None
        if store is not None:
            heat, counted = _access_for_listing(bucket, store, file, directory, request_secs=page_secs, began=began)
        return BuiltSnapshot(path, file.write(path, counted), began, began, began, heat=heat)


_Counted = tuple[float, float] | None


def _access_for_listing(
    bucket: Bucket, store: IndexStore, file: SnapshotFile, directory: Path, *, request_secs: float, began: float
) -> tuple[Span, _Counted]:
    """Add the heat of the previous snapshot and of journals to a snapshot made from a listing."""
    path = directory / "before.npy"
    journals: list[Journal] = []
    tells = HitLog()
    try:
        listing = store.list(Deadline.patient(request_secs))
        journals, why = listing.journals, listing.crowded
    except HFBucketError as error:  # for example too many journals, which this listing repairs
        why = str(error)
    if why:
        _log.warning("the hits that journals report are lost, so nothing counts as idle before now: %s", why)
        tells.unread(1, began)
    before, lost = _access_before(bucket, store, path, request_secs, began)
    if before.known:
        with path.open("rb") as source:
            dtype = read_header(source, str(path)).dtype
            for rows in _blocks(source, dtype):
                file.carry(rows)
    path.unlink(missing_ok=True)
    live = [journal for journal in journals if journal.name.hits and journal.at >= before.until]
    for journal, reported in store.read_journal_rows(live, Deadline.patient(10 * request_secs)):
        if isinstance(reported, JournalRows):
            _take_hits(reported, file, tells, began)
        else:
            _miss_hits(journal, reported, tells)
    span, counted = _span(tells, before, began)
    if lost and not span.known:  # lost reads must not make keys look idle
        return Span(began, span.until, began), (before.until, span.until)
    return span, counted


def _access_before(bucket: Bucket, store: IndexStore, path: Path, request_secs: float, now: float) -> tuple[Span, bool]:
    """Fetch the previous snapshot if it has heat.

    Returns:
        The period for which it knows heat, and whether it had heat that is unreadable now.

    Raises:
        HFBucketError: The Hub did not answer, which is no reason to discard a month of heat.
    """
    lost = False
    for number in range(_TRIES):
        info = store.find_pointer(Deadline.patient(request_secs))
        if info is None:
            return Span(), lost
        try:
            pointer = store.read_pointer(info, Deadline.patient(request_secs))
            if not pointer.heat.known:
                return Span(), False
            lost = True
            fetch_snapshot(bucket, store, pointer, path, Deadline.patient(10 * request_secs))
        except (
            MissingError,
            IntegrityError,
            TransportError,
        ) as error:  # a store may also raise the last error for what it lacks
            _log.warning("the heat of the snapshot before cannot be read (try %d of %d): %s", number + 1, _TRIES, error)
        else:
            return _sane(pointer, now), False
    _log.warning("heat starts again from now: earlier reads are not known any more")
    return Span(), lost


def _take_hits(reported: JournalRows, file: SnapshotFile, tells: HitLog, began: float) -> None:
    file.hit(reported.hits)
    for rows in (reported.hits, reported.lost):
        tells.add(rows["told"], began)
    tells.lose(reported.lost, began)


def _miss_hits(journal: Journal, why: HFBucketError, tells: HitLog) -> None:
    """Record that a journal of hits was unreadable; otherwise its keys would look idle."""
    hits = max(1, journal.content.size // ACCESS_JOURNAL.itemsize)
    tells.unread(hits, journal.at)
    _log.warning(
        "%s: the journal could not be read, so that up to %d keys that were read are not known: %s",
        journal.path, hits, why,
    )  # fmt: skip


def _sane(pointer: Pointer, began: float) -> Span:
    """Return the period for which a snapshot knows heat; it restarts now if its times are ahead of the Hub's clock."""
    ahead = pointer.ahead_of(began) if pointer.heat.known else ""
    if not ahead:
        return pointer.heat
    _log.warning("heat starts again from now: the pointer to the key index is not valid: %s", ahead)
    return Span(began, began - ACCESS_LATE_SECS, min(began, pointer.heat_told))


def _span(tells: HitLog, before: Span, began: float) -> tuple[Span, _Counted]:
    """Return the period for which heat is known after reports, and the window of counted ones; None if none exist."""
    span = tells.span(before, began, began - ACCESS_LATE_SECS)
    return span, (before.until, span.until) if span.known else None


def _watched(infos: Iterable[ObjectInfo], each: Callable[[ObjectInfo], None]) -> Iterator[ObjectInfo]:
    for info in infos:
        each(info)
        yield info


def from_journals(bucket: Bucket, store: IndexStore, directory: Path, request_secs: float) -> BuiltSnapshot:
    """Build a snapshot from the current one and the journals since.

    Args:
        bucket: Bucket of the instance.
        store: Index of the instance.
        directory: Empty directory for the snapshot and temporary files that no other process uses.
        request_secs: Maximum time in seconds of a request, and of reading the journals.

    Raises:
        MissingError: There is no snapshot yet.
        IntegrityError: The current snapshot or a journal is damaged, or not all journals could be listed.
        HFBucketError: A read failed; no snapshot was built.
    """
    began = hub_time(bucket, Deadline.patient(request_secs))
    listing = store.list(Deadline.patient(request_secs))
    pointer = _present(bucket, store, listing, began, request_secs)
    garbage = 0
    before = directory / "before.npy"
    fetch_snapshot(bucket, store, pointer, before, Deadline.patient(10 * request_secs))
    with before.open("rb") as source:
        header = read_header(source, str(before))
        with SnapshotFile(directory, header.dtype, began) as file:
            for rows in _blocks(source, header.dtype):
                file.add(rows)
            tells, since = HitLog(), min(pointer.covers, pointer.heat_until or pointer.covers)
            live = [journal for journal in listing.journals if journal.at >= since]
            for journal, reported in store.read_journal_rows(live, Deadline.patient(10 * request_secs)):
                if isinstance(reported, JournalRows):
                    _take_hits(reported, file, tells, began)
                    if journal.at >= pointer.covers:
                        file.change(reported.changes[reported.changes["at"] >= pointer.listed])
                    continue
                if journal.name.hits:
                    _miss_hits(journal, reported, tells)
                if isinstance(reported, FormatError):
                    garbage += journal.at >= pointer.covers
                elif (
                    journal.at >= pointer.covers and not journal.name.hits
                ):  # it would be lost, because the new snapshot claims to cover it
                    raise reported
            path = directory / "snapshot.npy"
            heat, counted = _span(tells, _sane(pointer, began), began)
            keys = file.write(path, counted)
    before.unlink()
    covers = max(began, pointer.covers)
    return BuiltSnapshot(path, keys, covers, max(pointer.listed, covers - LATE_SECS), pointer.full, garbage, heat)


def _present(bucket: Bucket, store: IndexStore, listing: IndexListing, began: float, request_secs: float) -> Pointer:
    """Return the pointer to a snapshot that another one may be built from."""
    if listing.pointer is None:
        raise MissingError(f"{bucket.handle}: its index has no snapshot yet: run `python -m jobs index --full`")
    if listing.crowded:  # unlisted journals would be lost, because the new snapshot claims to cover them
        raise IntegrityError(listing.crowded)
    pointer = store.read_pointer(listing.pointer, Deadline.patient(request_secs))
    if ahead := pointer.ahead_of(began):
        raise FormatError(f"{listing.pointer.path}: {ahead}")
    return pointer


def _blocks(source: BinaryIO, dtype: np.dtype[Any]) -> Iterator[Rows]:
    while data := source.read(_BLOCK_ROWS * dtype.itemsize):
        yield np.frombuffer(data, dtype)


def fetch_snapshot(bucket: Bucket, store: IndexStore, pointer: Pointer, path: Path, deadline: Deadline) -> None:
    """Read a snapshot of any size into a file, and check it like the readers in engines.

    Raises:
        FormatError: It is not a snapshot that this version reads.
        IntegrityError: It does not match the pointer.
        HFBucketError: It was not read.
    """
    name = store.snapshot_path(pointer)
    info = bucket.stat([name], deadline).get(name)
    if info is None:
        raise MissingError(f"{name}: the pointer names a snapshot that is not there")
    if info.content != pointer.content:  # before allocating a size that anyone may have written into the pointer
        raise IntegrityError(
            f"{name}: the pointer says {pointer.size} bytes of hash {pointer.xet_hash}, and the Hub lists "
            f"{info.content.size} of {info.content.xet_hash}"
        )
    with path.open("w+b") as file:
        file.truncate(max(1, pointer.size))
        with mmap.mmap(file.fileno(), 0) as memory, memoryview(memory) as view:
            read = DownloadToBuffer(name, pointer.content, RevocableBuffer(view[: pointer.size]))
            try:
                bucket.transfer.read([read], deadline)
            finally:
                read.lease.revoke()
        if read.error is not None:
            raise read.error
        if xet_hashes([path])[0] != pointer.xet_hash:
            raise IntegrityError(f"{name}: what arrived is not what its hash says")
        file.seek(0)
        header = read_header(file, name)
    check_snapshot(header, pointer, name)
    if header.rows:
        rows = np.memmap(path, header.dtype, "r", header.offset, (header.rows,))
        check_order(rows, name)


def put(store: IndexStore, built: BuiltSnapshot, deadline: Deadline) -> Pointer:
    """Upload and name a snapshot; readers ignore it until `IndexStore.publish`.

    Raises:
        IntegrityError: The store accepted something other than the file.
        HFBucketError: It was not written, or its state is unknown.
    """
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(built.path.open("rb"))
        memory = stack.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        view = stack.enter_context(memoryview(memory))
        lease = RevocableBuffer(view)
        stack.callback(lease.revoke)
        pointer = store.put_snapshot(
            lease,
            keys=built.keys,
            covers=built.covers,
            listed=built.listed,
            full=built.full,
            deadline=deadline,
            heat=built.heat,
        )
    if xet_hashes([built.path])[0] != pointer.xet_hash:
        raise IntegrityError(f"{built.path}: the store took something else than the file: it is not published")
    return pointer


def publish(store: IndexStore, built: BuiltSnapshot, deadline: Deadline) -> Pointer:
    """Upload and name a snapshot, then point to it. A failure in between changes nothing for readers.

    Raises:
        HFBucketError: It was not published, or its state is unknown.
    """
    pointer = put(store, built, deadline)
    store.publish(pointer, deadline)
    return pointer
