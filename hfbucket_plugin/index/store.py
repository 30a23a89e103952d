"""Objects of an instance's key index, and the protocol by which many writers and readers share them.

::

    <prefix>/.hfbucket/index/current.json                              the pointer to the current snapshot
    <prefix>/.hfbucket/index/journal/<time>-<writer>-<seq>.npy         recent changes by one writer
    <prefix>/.hfbucket/index/journal/<time>-<writer>-<seq>-hits.npy    recent reads by one reader
    <prefix>/.hfbucket/index/snapshots/<time>-<random>.npy             all keys, as found by a builder

One listing of `index/` shows a reader whether the pointer has changed (by its hash) and which journals are new.
Contents are read from the store by the hashes in the listing and the pointer, without calls to the Hub. Every read is
verified by its hash, and a damaged object is treated as missing.

**Publication.** Snapshots are never overwritten. The pointer is written after its snapshot, so a process that reads the
pointer finds the snapshot. A killed builder leaves a snapshot without a pointer, or nothing.

**Time.** Everything is ordered by the Hub's clock, which stamps each object with `uploaded_at`. Writers do not know
that clock: a journal states for each entry how many milliseconds *before the journal was written* it happened, and
readers count back from the journal's `uploaded_at`. The result is never too early, and late by the duration of the
journal's upload. Clocks of writers do not matter; those in names are for people, and for the order of listings.

**What a snapshot covers.** A builder asks the Hub for the time and then lists. The time minus a margin
(`CLOCK_MARGIN_SECS`) becomes `covers`: journals uploaded earlier are in the snapshot, and readers skip them. `listed`
is the same for single entries: earlier changes are in the snapshot, so older *entries* of later journals are skipped
too. For a snapshot made from a listing, `listed` is the start of the listing, with or without journals about earlier
changes. A snapshot made from its predecessor and journals skips what is reported later than `LATE_SECS`. The reason is
that journals grow: a put that is reported again, after another writer's delete was merged and its journal pruned, would
restore the key. Changes reported later, by a writer that could not reach the Hub for that long, are known from the next
listing. `full` is the start of the last listing.

**Merging.** The latest entry of a key counts, and overrides the snapshot. This is a maximum, so the order, repetition
and splitting of journals make no difference (`hfbucket_plugin.index.table.newest`).

- *A put by another process is visible within two refreshes* after its journal is named: a listing that began before may
  miss it, and the next one shows it. A writer replaces its last journal by a longer one in one batch call, new one
  first, with a name that sorts after the old one's, so a listing in progress shows one of them or both.
- *A lost journal* (its writer died first, or could not reach the Hub for long) hides its keys from others until the
  next snapshot made from a listing. Keys that are not in the index are misses, which are always safe.
- *A duplicate or late journal* changes nothing that was not changed before.
- *A put and a delete of the same key* count in the order of their times. If two writers did both within the duration of
  a journal's upload, readers may take them in the wrong order: the key is then missed until the next snapshot, or its
  read is a miss, after which the reader asks the Hub. The bytes under a hash are the bytes that were put under that
  key, so no order serves a wrong chunk.

**Hits.** Separate journals report hits (`hfbucket_plugin.index.access.stats`). Readers do not fetch them, and builders
add them up.
"""

from __future__ import annotations

import re
import secrets
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from hfbucket_plugin.core.keys import RESERVED
from hfbucket_plugin.core.units import batches
from hfbucket_plugin.errors import HFBucketError, IntegrityError, TransportError
from hfbucket_plugin.hub.records import RecordStore, raise_failed
from hfbucket_plugin.index.access.stats import Span
from hfbucket_plugin.index.format import (
    MAX_POINTER_BYTES,
    FormatError,
    Pointer,
    changes_of,
    hits_of,
    snapshot_of,
)
from hfbucket_plugin.index.table import LOST, READ

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from hfbucket_plugin.core.buffers import RevocableBuffer
    from hfbucket_plugin.core.deadline import Deadline
    from hfbucket_plugin.core.keys import BucketHandle, ContentId
    from hfbucket_plugin.hub.bucket import Bucket, ObjectInfo
    from hfbucket_plugin.index.table import Rows, Table

DIRECTORY: Final = f"{RESERVED}/index"
POINTER: Final = f"{DIRECTORY}/current.json"
JOURNALS: Final = f"{DIRECTORY}/journal"
SNAPSHOTS: Final = f"{DIRECTORY}/snapshots"

CLOCK_MARGIN_SECS: Final = 10.0
"""Tolerance in seconds between the Hub's response clock and its upload timestamps, and for the delay of listings."""

LATE_SECS: Final = 3600.0
"""Maximum delay in seconds with which a journal may report a change; no longer than cleanups spare young objects."""

MAX_JOURNALS: Final = 20_000
"""Maximum number of journals that a reader reads, 20 listing calls. More mean that no builder runs."""

MAX_STRANGE: Final = 1000
"""Maximum number of foreign objects below `DIRECTORY` that a reader lists, one page. There should be none."""

_CROWDED_SECS: Final = 3600.0

MAX_JOURNAL_BYTES: Final = 4 * 1024 * 1024
_READ_TOGETHER_BYTES: Final = 32 * 1024 * 1024
_JOURNAL: Final = re.compile(
    r"(?P<time>[0-9]{8}T[0-9]{9})-(?P<writer>[0-9a-f]{16})-(?P<seq>[0-9]{1,18})(?P<hits>-hits)?\.npy"
)


@dataclass(frozen=True, slots=True)
class JournalName:
    """Name of a journal.

    Attributes:
        text: Name of the object, below `JOURNALS`.
        writer: Random id of its writer, one per process and instance.
        seq: Number of the last of the writer's entries in it; all earlier ones are in this or in earlier journals.
        hits: Whether it reports only hits, so that readers need not fetch it.
    """

    text: str
    writer: str
    seq: int
    hits: bool = False

    @classmethod
    def make(cls, writer: str, seq: int, now: datetime, *, hits: bool = False) -> JournalName:
        """Create the name of a journal written now."""
        time = now.astimezone(UTC).strftime("%Y%m%dT%H%M%S") + f"{now.microsecond // 1000:03d}"
        return cls(f"{time}-{writer}-{seq:012d}{'-hits' if hits else ''}.npy", writer, seq, hits)

    @classmethod
    def parse(cls, text: str) -> JournalName | None:
        """Parse the name of a listed object; return None if it is not a journal."""
        match = _JOURNAL.fullmatch(text)
        return None if match is None else cls(text, match["writer"], int(match["seq"]), match["hits"] is not None)


@dataclass(frozen=True, slots=True)
class Journal:
    """Journal found by a listing.

    Attributes:
        name: Name of the object.
        path: Path from the root of the bucket.
        content: Hash and size.
        at: Upload time in Unix seconds.
    """

    name: JournalName
    path: str
    content: ContentId
    at: float


@dataclass(frozen=True, slots=True)
class JournalRows:
    """Content of a journal.

    Attributes:
        changes: Puts and deletes, rows of `CHANGE`.
        hits: Rows of `stats.HIT`.
        lost: Rows of `stats.HIT` for hits that the writer dropped.
    """

    changes: Rows
    hits: Rows
    lost: Rows


@dataclass(slots=True)
class IndexListing:
    """Result of one listing.

    Attributes:
        pointer: Object of the pointer; None if there is none.
        journals: All journals.
        snapshots: Objects of all snapshots.
        strange: Foreign objects.
        date: Time of the Hub at the end of the listing in Unix seconds; None if its responses had no date.
        calls: Number of calls to the Hub.
        crowded: Why not all journals were listed, and what to do; empty if they were.
        strangers: Warning that foreign objects make listings more expensive, and what to do; empty if they do not.
    """

    pointer: ObjectInfo | None = None
    journals: list[Journal] = field(default_factory=list)
    snapshots: list[ObjectInfo] = field(default_factory=list)
    strange: list[ObjectInfo] = field(default_factory=list)
    date: float | None = None
    calls: int = 1
    crowded: str = ""
    strangers: str = ""

    def see(self, info: ObjectInfo, handle: BucketHandle) -> None:
        """Add an object of the listing."""
        name = handle.relative(info.path) or ""
        directory, _, last = name.rpartition("/")
        journal = JournalName.parse(last) if directory == JOURNALS else None
        if name == POINTER:
            self.pointer = info
        elif directory == SNAPSHOTS:
            self.snapshots.append(info)
        elif journal is not None and info.uploaded_at is not None:
            self.journals.append(Journal(journal, info.path, info.content, info.uploaded_at.timestamp()))
        else:
            self.strange.append(info)


class IndexStore:
    """Reads and writes the objects of an instance's index.

    Args:
        bucket: Bucket of the instance.
        name: Prefix of the thread names.
    """

    def __init__(self, bucket: Bucket, name: str) -> None:
        self._bucket = bucket
        self._own = RecordStore(bucket, f"index-{name}")
        self._crowded_until = float("-inf")
        self._strangers = ""
        self.calls = 0
        """Number of Hub calls of the last listing, whatever its outcome."""

    def list(self, deadline: Deadline) -> IndexListing:
        """List the whole index, with one call per 1,000 objects.

        With more than `MAX_STRANGE` foreign objects, only the journals are listed for `_CROWDED_SECS`, and the pointer
        is looked up; with that many among the journals too, not all journals are listed. Any number of foreign objects
        thus costs only a call or two more, and `IndexListing.crowded` reports it.

        Raises:
            HFBucketError: A page failed, or there are more than `MAX_JOURNALS`.
        """
        self.calls = 0
        if time.monotonic() >= self._crowded_until:
            listing = self._list(DIRECTORY, deadline)
            if not listing.crowded:
                return listing
            self._crowded_until, self._strangers = time.monotonic() + _CROWDED_SECS, listing.crowded
        self.calls += 1
        info = self.find_pointer(deadline)
        listing = self._list(JOURNALS, deadline)
        listing.pointer, listing.calls, listing.strangers = info, self.calls, self._strangers
        listing.strange.clear()
        return listing

    def _list(self, directory: str, deadline: Deadline) -> IndexListing:
        handle = self._bucket.handle
        listing = IndexListing()
        cursor: str | None = None
        while True:
            self.calls += 1
            infos, cursor, date = self._bucket.list_page_dated(handle.join(f"{directory}/"), cursor, deadline)
            for info in infos:
                listing.see(info, handle)
            listing.date, listing.calls = date.timestamp() if date is not None else None, self.calls
            if cursor is None:
                return listing
            if len(listing.strange) + len(listing.snapshots) > MAX_STRANGE:
                listing.crowded = (
                    f"{handle.join(directory)} holds more than {MAX_STRANGE} objects that are no journals of a key index, such "
                    f"as {(listing.strange or listing.snapshots)[0].path}: delete them"
                )
                return listing
            if len(listing.journals) > MAX_JOURNALS:
                raise TransportError(
                    f"{handle.join(JOURNALS)} holds more than {MAX_JOURNALS} journals: they are not read. Does a builder of "
                    "the index run on a schedule, and prune them?"
                )

    def find_pointer(self, deadline: Deadline, *, patient: bool = True) -> ObjectInfo | None:
        """Look up the pointer's object with one call; return None without an index.

        Raises:
            HFBucketError: See `Bucket.stat`.
        """
        path = self._bucket.handle.join(POINTER)
        return self._bucket.stat([path], deadline, patient=patient).get(path)

    def read_pointer(self, info: ObjectInfo, deadline: Deadline) -> Pointer:
        """Read the listed pointer.

        Raises:
            FormatError: It is not a pointer.
            HFBucketError: It was not read.
        """
        if info.content.size > MAX_POINTER_BYTES:
            raise FormatError(f"{info.path}: {info.content.size} bytes are no pointer to a key index")
        return Pointer.parse(self._own.read_one(info.path, info.content, deadline), info.path)

    def read_snapshot(self, pointer: Pointer, deadline: Deadline) -> Table:
        """Read a snapshot into a table without a copy.

        Raises:
            FormatError: It does not match the pointer.
            HFBucketError: It was not read.
        """
        path = self.snapshot_path(pointer)
        table = snapshot_of(self._own.read_one(path, pointer.content, deadline), path)
        if len(table) != pointer.keys:
            raise FormatError(f"{path}: {len(table)} keys, and its pointer says {pointer.keys}")
        return table

    def read_journals(
        self, journals: Sequence[Journal], deadline: Deadline
    ) -> Iterator[tuple[Journal, Rows | HFBucketError]]:
        """Read journals, in groups of moderate memory use.

        Yields:
            Each journal with its changes, or with the error: `FormatError` for an object that is not a journal.
        """
        for journal, reported in self.read_journal_rows(journals, deadline):
            yield journal, reported.changes if isinstance(reported, JournalRows) else reported

    def read_journal_rows(
        self, journals: Sequence[Journal], deadline: Deadline
    ) -> Iterator[tuple[Journal, JournalRows | HFBucketError]]:
        """Read journals as `read_journals` does, including hits, for builders."""
        for journal in journals:
            if journal.content.size > MAX_JOURNAL_BYTES:
                yield (
                    journal,
                    FormatError(f"{journal.path}: {journal.content.size} bytes are no journal of a key index"),
                )
        for batch in batches(
            [one for one in journals if one.content.size <= MAX_JOURNAL_BYTES],
            _READ_TOGETHER_BYTES,
            lambda one: one.content.size,
        ):
            results = self._own.read([(one.path, one.content) for one in batch], deadline)
            for journal, data in zip(batch, results, strict=True):
                if isinstance(data, HFBucketError):
                    yield journal, data
                    continue
                try:
                    writer = int(journal.name.writer, 16)
                    changes = changes_of(data, journal.at, journal.path)
                    hits, lost = (hits_of(data, journal.at, writer, journal.path, kind) for kind in (READ, LOST))
                    yield journal, JournalRows(changes, hits, lost)
                except FormatError as error:
                    yield journal, error

    def snapshot_path(self, pointer: Pointer) -> str:
        """Return the path of a snapshot in the bucket."""
        return self._bucket.handle.join(f"{SNAPSHOTS}/{pointer.snapshot}")

    # --- writing ----------------------------------------------------------------------------------------------------

    def put_journal(self, name: str, data: bytes, instead_of: str | None, deadline: Deadline) -> None:
        """Write a journal in place of an earlier one of the same writer whose entries it contains.

        Raises:
            HFBucketError: It was not written, or its state is unknown; the earlier one may still exist.
        """
        (failed,) = self.put_journals([(name, data, instead_of)], deadline)
        if failed is not None:
            raise failed

    def put_journals(
        self, journals: Sequence[tuple[str, bytes, str | None]], deadline: Deadline
    ) -> Sequence[HFBucketError | None]:
        """Write several journals in one call, each as `put_journal`.

        Args:
            journals: Name, bytes, and name of the replaced journal if any, of each journal.
            deadline: When to give up.

        Returns:
            For each journal the error, or None if it was written.

        Raises:
            HFBucketError: None was written, or their state is unknown.
        """
        paths = [self._bucket.handle.join(f"{JOURNALS}/{name}") for name, _, _ in journals]
        files = {path: self._own.upload(data, deadline) for path, (_, data, _) in zip(paths, journals, strict=True)}
        old = [self._bucket.handle.join(f"{JOURNALS}/{one}") for _, _, one in journals if one is not None]
        failed = self._bucket.replace(old, files, deadline)
        return [
            TransportError(f"{path}: {failed[path].message}")
            if path in failed
            else None  # the journal that it replaces may be gone
            for path in paths
        ]

    def put_snapshot(
        self,
        data: RevocableBuffer,
        *,
        keys: int,
        covers: float,
        listed: float,
        full: float,
        deadline: Deadline,
        heat: Span | None = None,
    ) -> Pointer:
        """Upload and name a snapshot; readers ignore it until `publish`.

        Args:
            data: Content of the file. A lease on mapped memory needs no copy.
            keys: Number of rows.
            covers: See `Pointer`.
            listed: See `Pointer`.
            full: See `Pointer`.
            deadline: When to give up.
            heat: Period for which heat is known.

        Raises:
            HFBucketError: It was not written, or its state is unknown.
        """
        heat = heat or Span()
        content = self._own.upload(data, deadline)
        if content.size != data.size:
            raise IntegrityError(f"{content.size} of {data.size} bytes of the snapshot were taken")
        name = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(4)}.npy"
        pointer = Pointer(
            name, content.xet_hash, content.size, keys, covers, listed, full,
            heat_since=heat.since, heat_until=heat.until, heat_told=heat.reported,
            heat_lost=heat.lost, heat_lost_at=heat.lost_at,
        )  # fmt: skip
        raise_failed(self._bucket.add({self.snapshot_path(pointer): content}, deadline))
        return pointer

    def publish(self, pointer: Pointer, deadline: Deadline) -> None:
        """Point to a snapshot, which makes it the current one.

        Raises:
            HFBucketError: The state of the pointer is unknown.
        """
        self._own.put(self._bucket.handle.join(POINTER), pointer.to_bytes(), deadline)

    def close(self) -> None:
        """Stop writing."""
        self._own.close()
