"""Where the key index of an instance lies in its bucket, and the protocol by which many writers and readers share it.

::

    <prefix>/.hfbucket/index/current.json                              the pointer: which snapshot is the present one
    <prefix>/.hfbucket/index/journal/<time>-<writer>-<seq>.npy         what one writer did since
    <prefix>/.hfbucket/index/journal/<time>-<writer>-<seq>-hits.npy    what one reader read since
    <prefix>/.hfbucket/index/snapshots/<time>-<random>.npy             all keys, as a builder found them

One listing of `index/` tells a reader everything: whether the pointer is another one than before (by its hash), and which
journals are new. Contents are read from the store by the hashes that the listing and the pointer give; that costs no calls
to the Hub. Everything that is read is compared with its hash, and what is not whole is as if it were not there.

**Publication.** A snapshot is an object that is never written again. The pointer is written when it is there, so a process that
reads the pointer finds it. A builder that is killed leaves a snapshot without a pointer to it, or none.

**Time.** Everything is ordered by one clock, the Hub's, which stamps each object with `uploaded_at`. A writer does not know
that clock: its journal says for each entry how many milliseconds *before the journal was written* it happened, and readers
count from the journal's own stamp. That is never too early, and too late by what the journal's upload took. Clocks of
writers matter nowhere (those in names are for people, and for the order in which a listing shows them).

**What a snapshot covers.** A builder asks the Hub for the time, and lists afterwards; the time, less a margin
(`CLOCK_MARGIN_SECS`), becomes `covers`: journals that the Hub took earlier are in the snapshot, and readers pass over them.
`listed` is the same for single entries: what happened earlier is in the snapshot, so older *entries* of later journals are passed
over too. For a snapshot that was made of a listing it is when that began, and then it is so whether or not a journal tells of it.
One that was made of its predecessor and of journals alone passes over what is told later than `LATE_SECS`: journals grow, and a
put that is told again after another writer's delete was folded in, and its journal pruned, would bring the key back. So what
is told later than that (its writer did not reach the Hub for so long) is known with the next listing. `full` says when
the last one began.

**Folding.** Of all entries for a key the latest counts, and it overrules the snapshot. That is a maximum, so it makes no
difference in which order journals are seen, how often, or in how many pieces (`index_table.newest`).

- *A put elsewhere is visible within two refreshes* of its journal's naming: a listing that began before may miss it, the next
  one shows it. A writer replaces its last journal by a longer one, in one batch call, the new one first, and its name sorts
  behind the old one's: a listing that goes by shows either, or both.
- *A lost journal* (its writer died first, or could not reach the Hub for long) hides its keys from others until the next
  snapshot that was made of a listing: what is not in the index is a miss, and a miss is always right to serve.
- *A duplicated journal*, or one that comes late, changes nothing that was not changed before.
- *A put and a delete of the same key* count in the order of their times. Where two writers did both within the time that a
  journal's upload takes, readers may take them in the wrong order: the key is then missed until the next snapshot, or it is
  found and its read is a miss, after which the reader asks the Hub. Bytes under a hash are the bytes that were put under that
  key, whatever the order: no order of anything serves a wrong chunk.

**Hits.** Journals of a name of their own tell of hits (`heat`). They change nothing of the above: readers do not fetch them, builders
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
"""How far the clock that the Hub's answers show may be ahead of the one that stamps objects, and a listing behind."""

LATE_SECS: Final = 3600.0
"""How late a journal may tell of something; no longer than the time in which a cleanup deletes nothing that is young."""

MAX_JOURNALS: Final = 20_000
"""Journals that a reader takes in: 20 calls for their listing. More mean that no builder runs."""

MAX_STRANGE: Final = 1000
"""Objects below `DIRECTORY` that are none of an index, which a reader lists: a page. There should be none."""

_CROWDED_SECS: Final = 3600.0

MAX_JOURNAL_BYTES: Final = 4 * 1024 * 1024
_READ_TOGETHER_BYTES: Final = 32 * 1024 * 1024
_JOURNAL: Final = re.compile(
    r"(?P<time>[0-9]{8}T[0-9]{9})-(?P<writer>[0-9a-f]{16})-(?P<seq>[0-9]{1,18})(?P<hits>-hits)?\.npy"
)


@dataclass(frozen=True, slots=True)
class JournalName:
    """The name of a journal.

    Attributes:
        text: Of the object, below `JOURNALS`.
        writer: Who wrote it: random, one a process and instance.
        seq: Number of its writer's last entry that is in it: all up to it are in this one or in earlier ones.
        hits: Whether it tells of hits alone, so that readers need not fetch it.
    """

    text: str
    writer: str
    seq: int
    hits: bool = False

    @classmethod
    def make(cls, writer: str, seq: int, now: datetime, *, hits: bool = False) -> JournalName:
        """A name for what is written now."""
        time = now.astimezone(UTC).strftime("%Y%m%dT%H%M%S") + f"{now.microsecond // 1000:03d}"
        return cls(f"{time}-{writer}-{seq:012d}{'-hits' if hits else ''}.npy", writer, seq, hits)

    @classmethod
    def parse(cls, text: str) -> JournalName | None:
        """The name of a listed object, or None where it is none."""
        match = _JOURNAL.fullmatch(text)
        return None if match is None else cls(text, match["writer"], int(match["seq"]), match["hits"] is not None)


@dataclass(frozen=True, slots=True)
class Journal:
    """A journal that was listed.

    Attributes:
        name: Of the object.
        path: From the root of the bucket.
        content: Its hash and size.
        at: When the Hub took it, in seconds since 1970.
    """

    name: JournalName
    path: str
    content: ContentId
    at: float


@dataclass(frozen=True, slots=True)
class JournalRows:
    """What a journal tells of.

    Attributes:
        changes: Puts and deletes, rows of `CHANGE`.
        hits: Rows of `heat.HIT`.
        lost: The same, of hits that its writer dropped.
    """

    changes: Rows
    hits: Rows
    lost: Rows


@dataclass(slots=True)
class IndexListing:
    """What one listing found.

    Attributes:
        pointer: The pointer's object; None where there is none.
        journals: All journals.
        snapshots: The objects of all snapshots.
        strange: Objects that lie there and are none of these.
        date: The Hub's time when the listing ended, in seconds since 1970; None where it does not say.
        calls: Calls to the Hub that it took.
        crowded: Why not all journals were listed, and what to do; empty where they were.
        strangers: That strangers make listings cost more, and what to do; empty where they do not.
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
        """Take in an object of the listing."""
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
        bucket: The instance's.
        name: Names the threads.
    """

    def __init__(self, bucket: Bucket, name: str) -> None:
        self._bucket = bucket
        self._own = RecordStore(bucket, f"index-{name}")
        self._crowded_until = float("-inf")
        self._strangers = ""
        self.calls = 0
        """Calls to the Hub of the last listing, whatever came of it."""

    def list(self, deadline: Deadline) -> IndexListing:
        """List all of it: one call for 1000 objects.

        Where more than `MAX_STRANGE` objects lie there that are none of an index, the journals alone are listed for
        `_CROWDED_SECS`, and the pointer is looked up; where that many lie among the journals too, those are not all listed.
        So strangers cost a call or two more, however many they are, and `IndexListing.crowded` says so.

        Raises:
            HFBucketError: A page did not come; or there are more than `MAX_JOURNALS`.
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
        """The pointer's object, by one call; None where there is no index.

        Raises:
            HFBucketError: See `Bucket.stat`.
        """
        path = self._bucket.handle.join(POINTER)
        return self._bucket.stat([path], deadline, patient=patient).get(path)

    def read_pointer(self, info: ObjectInfo, deadline: Deadline) -> Pointer:
        """Read the pointer that was listed.

        Raises:
            FormatError: It is none.
            HFBucketError: It did not arrive.
        """
        if info.content.size > MAX_POINTER_BYTES:
            raise FormatError(f"{info.path}: {info.content.size} bytes are no pointer to a key index")
        return Pointer.parse(self._own.read_one(info.path, info.content, deadline), info.path)

    def read_snapshot(self, pointer: Pointer, deadline: Deadline) -> Table:
        """Read a snapshot: its bytes become the table, without a copy.

        Raises:
            FormatError: It is not what the pointer says.
            HFBucketError: It did not arrive.
        """
        path = self.snapshot_path(pointer)
        table = snapshot_of(self._own.read_one(path, pointer.content, deadline), path)
        if len(table) != pointer.keys:
            raise FormatError(f"{path}: {len(table)} keys, and its pointer says {pointer.keys}")
        return table

    def read_journals(
        self, journals: Sequence[Journal], deadline: Deadline
    ) -> Iterator[tuple[Journal, Rows | HFBucketError]]:
        """Read journals, so many together as are moderate in memory.

        Yields:
            Each, with the changes that it tells of, or with why there are none: `FormatError` for one that is no journal.
        """
        for journal, reported in self.read_journal_rows(journals, deadline):
            yield journal, reported.changes if isinstance(reported, JournalRows) else reported

    def read_journal_rows(
        self, journals: Sequence[Journal], deadline: Deadline
    ) -> Iterator[tuple[Journal, JournalRows | HFBucketError]]:
        """The same, with the hits that they tell of too, for who adds these up."""
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
        """The path of a snapshot in the bucket."""
        return self._bucket.handle.join(f"{SNAPSHOTS}/{pointer.snapshot}")

    # --- writing ----------------------------------------------------------------------------------------------------

    def put_journal(self, name: str, data: bytes, instead_of: str | None, deadline: Deadline) -> None:
        """Write a journal, in place of an earlier one of the same writer's that it holds all of.

        Raises:
            HFBucketError: It is not there, or its state is unknown; the earlier one may still be there.
        """
        (failed,) = self.put_journals([(name, data, instead_of)], deadline)
        if failed is not None:
            raise failed

    def put_journals(
        self, journals: Sequence[tuple[str, bytes, str | None]], deadline: Deadline
    ) -> Sequence[HFBucketError | None]:
        """Write journals by one call, as `put_journal` does each.

        Args:
            journals: Of each its name, its bytes, and the name of the one that it replaces, if any.
            deadline: When to give up.

        Returns:
            Why each was not written; None where it was.

        Raises:
            HFBucketError: None of them is there, or their state is unknown.
        """
        paths = [self._bucket.handle.join(f"{JOURNALS}/{name}") for name, _, _ in journals]
        files = {path: self._own.upload(data, deadline) for path, (_, data, _) in zip(paths, journals, strict=True)}
        old = [self._bucket.handle.join(f"{JOURNALS}/{one}") for _, _, one in journals if one is not None]
        failed = self._bucket.replace(old, files, deadline)
        return [
            TransportError(f"{path}: {failed[path].message}")
            if path in failed
            else None  # what it stands for may be gone
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
        """Upload and name a snapshot; no reader looks at it before `publish`.

        Args:
            data: The file. A lease on mapped memory needs none of its own.
            keys: Rows in it.
            covers: See `Pointer`.
            listed: See there.
            full: See there.
            deadline: When to give up.
            heat: For how long heat is known.

        Raises:
            HFBucketError: It is not there, or its state is unknown.
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
        """Point to a snapshot: from now on it is the present one.

        Raises:
            HFBucketError: Its state is unknown.
        """
        self._own.put(self._bucket.handle.join(POINTER), pointer.to_bytes(), deadline)

    def close(self) -> None:
        """Write nothing any more."""
        self._own.close()
