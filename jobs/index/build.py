"""Build and publish a snapshot of a key index."""

from __future__ import annotations

import logging
import math
import re
import shutil
import time
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Final

import numpy as np

from hfbucket_plugin.core.deadline import Deadline
from hfbucket_plugin.core.units import Extent
from hfbucket_plugin.errors import HFBucketError, IntegrityError, MissingError, ThrottledError, TransportError
from hfbucket_plugin.hub.connect import PAGE_SECS, REQUEST_SECS, files_in
from hfbucket_plugin.hub.transfer import xet_hashes
from hfbucket_plugin.index import build
from hfbucket_plugin.index.format import read_header
from hfbucket_plugin.index.store import MAX_JOURNALS, POINTER
from jobs import report
from jobs.deletion.guards import check_listing
from jobs.index.report import IndexBuild
from jobs.lock.lock import DEFAULT_SECONDS
from jobs.report import note

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from datetime import datetime
    from pathlib import Path

    from hfbucket_plugin.core.keys import ContentId
    from hfbucket_plugin.hub.bucket import Bucket, ObjectInfo
    from hfbucket_plugin.index.build import BuiltSnapshot
    from hfbucket_plugin.index.format import Pointer
    from hfbucket_plugin.index.store import IndexStore, Journal
    from jobs.index.inventory import IndexState
    from jobs.lock.lock import BucketLock


_SNAPSHOT: Final = re.compile(r"[0-9]{8}T[0-9]{6}-[0-9a-f]{8}\.npy")
"""Names given by `IndexStore.put_snapshot`: objects with other names are never deleted."""

_AHEAD_SECS: Final = 60.0


def why_listing(
    pointer: Pointer | None, now: float, every_secs: float, journals: int, max_age_secs: float = math.inf
) -> str:
    """Return why a snapshot must be built from a listing; empty if the previous snapshot and the journals suffice.

    Args:
        pointer: Pointer to the current snapshot, if there is one.
        now: Time of the Hub, in seconds since 1970.
        every_secs: Maximum age of the listing on which the current snapshot is based.
        journals: Number of journals.
        max_age_secs: `index_max_age_secs`: writers record no journals while the current snapshot is older.
    """
    if pointer is None:
        return "there is no snapshot yet"
    if journals > MAX_JOURNALS:
        return f"there are more than {MAX_JOURNALS:,} journals, which nobody reads"
    if pointer.full > now + _AHEAD_SECS or pointer.covers > now + _AHEAD_SECS:
        return "the times of the present snapshot are ahead of the Hub's clock"
    if now - pointer.full >= every_secs:
        return "the last listing is older than --full-every"
    if now - pointer.covers >= max_age_secs:
        return "the present snapshot is older than index_max_age_secs, and writers have told of nothing since"
    return ""


def spare_snapshots(
    snapshots: Iterable[ObjectInfo], present: str, now: datetime, keep: int, grace: timedelta
) -> Iterator[tuple[ObjectInfo, datetime]]:
    """Yield the snapshots that may be deleted, each with its time.

    Args:
        snapshots: All existing snapshots.
        present: Path of the current snapshot, which always stays.
        now: Time of the Hub.
        keep: Number of snapshots to keep, the current one included; at least 1.
        grace: Minimum age to delete: a reader that has just read an older pointer is still loading its snapshot.
    """
    others = [
        (one, one.uploaded_at)
        for one in snapshots
        if one.path != present and one.uploaded_at is not None and _SNAPSHOT.fullmatch(one.path.rpartition("/")[2])
    ]
    others.sort(key=lambda pair: (pair[1], pair[0].path), reverse=True)
    for one, at in others[max(0, keep - 1) :]:
        if at <= now - grace:
            yield one, at


def spare_journals(journals: Sequence[Journal], covers: float, now: datetime, grace: timedelta) -> Iterator[Journal]:
    """Yield the journals that may be deleted: covered by the current snapshot, and older than the grace period.

    Readers may still use the previous snapshot during the grace period.

    Args:
        journals: All known journals.
        covers: Coverage of the current snapshot.
        now: Time of the Hub.
        grace: Minimum age to delete.
    """
    for journal in journals:
        if journal.at < covers and journal.at <= (now - grace).timestamp():
            yield journal


_log = logging.getLogger(__name__)

_TRIES: Final = 3
"""Maximum number of tries: a writer may replace its last journal before it is read, and then all are listed again."""

_TOLD_SECS: Final = 30.0
_BLOCK_ROWS: Final = 100_000


@dataclass(frozen=True, slots=True)
class IndexOrder:
    """Settings of an index build.

    Attributes:
        full: Whether to build from a listing even if none is due; an unreadable pointer is then also replaced.
        full_every_secs: Maximum age of the listing on which an index is based.
        max_age_secs: `index_max_age_secs` of the instance: an older snapshot makes a listing due.
        keep: Number of snapshots to keep, the current one included.
        grace: Minimum age of the old snapshots and journals to delete.
        dry_run: Whether to write nothing.
        accept_shrunk: Whether to accept a listing that is empty or lacks a large part of what the last run left.
        max_duration_secs: Maximum duration of the build, if `until` is not set.
        until: Deadline of the whole command, which may cover several instances.
        lock_secs: Lifetime of the lock of a killed run.
        temp_dir: Directory in which snapshots are assembled; None for a directory of temporary files.
    """

    full: bool = False
    full_every_secs: float = 86400.0
    max_age_secs: float = math.inf
    keep: int = 2
    grace: timedelta = timedelta(hours=1)
    dry_run: bool = False
    accept_shrunk: bool = False
    max_duration_secs: float = 3600.0
    until: Deadline | None = None
    lock_secs: int = DEFAULT_SECONDS
    temp_dir: Path | None = None

    @property
    def page_secs(self) -> float:
        """Timeout of a listing page, in seconds."""
        return PAGE_SECS


class IndexBuilder:
    """Builder of one snapshot.

    Args:
        name: Name of the instance, for messages.
        bucket: Client of the instance's bucket.
        store: Its index.
        order: Settings of the build.
        until: Deadline of the build.
        tick: Called periodically; what it raises ends the build.
    """

    def __init__(
        self,
        name: str,
        bucket: Bucket,
        store: IndexStore,
        order: IndexOrder,
        *,
        until: Deadline,
        tick: Callable[[], None],
    ) -> None:
        self._name = name
        self._bucket = bucket
        self._store = store
        self._order = order
        self._until = until
        self._tick = tick
        self._seen = 0
        self._reported_at = time.monotonic()

    def make(self, found: IndexState, now: datetime, temp_dir: Path) -> tuple[BuiltSnapshot, IndexBuild]:
        """Build a snapshot, from journals if they suffice.

        Args:
            found: State of the index.
            now: Time of the Hub.
            temp_dir: Empty directory for files, used by no other process.

        Raises:
            GuardError: If the listing fails a safety check.
            HFBucketError: If an object or a listing cannot be read.
        """
        why = "--full asked for it" if self._order.full else ""
        why = why or why_listing(
            found.pointer, now.timestamp(), self._order.full_every_secs, found.journals, self._order.max_age_secs
        )
        built: BuiltSnapshot | None = None
        if not why:
            built, why = self._of_journals(temp_dir / "journals")
        if built is None:
            built = self._of_listing(temp_dir / "listing")
        how = "listing" if why else "journals"
        keys = extent_of(built.path)
        if why:
            self._judge(keys)
        size = built.path.stat().st_size
        return built, IndexBuild(how, why, keys, None, size, same=False, journals=found.waiting, garbage=built.garbage)

    def _of_journals(self, temp_dir: Path) -> tuple[BuiltSnapshot | None, str]:
        """Build a snapshot from the previous one and the journals; return it, or the reason why a listing is needed.

        Raises:
            HFBucketError: If an object or a listing cannot be read.
        """
        problem: HFBucketError | None = None
        for number in range(_TRIES):
            self._tick()
            directory = temp_dir / str(number)
            directory.mkdir(parents=True)
            try:
                return build.from_journals(self._bucket, self._store, directory, REQUEST_SECS), ""
            except (MissingError, IntegrityError) as error:
                problem = error
            except TransportError as error:  # hf_xet does not always report a missing content as such
                if number == _TRIES - 1 and problem is None:
                    raise
                _log.warning("the snapshot before, or a journal, could not be read: %s", error)
            shutil.rmtree(directory)
        return None, f"the snapshot before, or a journal, cannot be read ({problem})"

    def _of_listing(self, temp_dir: Path) -> BuiltSnapshot:
        temp_dir.mkdir()

        def each(_info: ObjectInfo) -> None:
            self._seen += 1

        def page() -> None:
            self._tick()
            if time.monotonic() - self._reported_at >= _TOLD_SECS:
                self._reported_at = time.monotonic()
                note(f"{self._name}: {self._seen:,} objects listed")

        return build.from_listing(self._bucket, temp_dir, self._order.page_secs, page, each, store=self._store)

    def _judge(self, keys: Extent) -> None:
        """Refuse a listing that cannot be complete, judged by what the last run of any job left.

        Raises:
            GuardError: If the listing is empty, truncated, or has less than half of what the last run left.
        """
        accepted = self._order.accept_shrunk
        last = None if accepted else report.last_run(self._bucket, REQUEST_SECS, builds=True)
        check_listing(
            keys,
            self._seen,
            in_bucket=None if self._bucket.handle.prefix or accepted else files_in(self._bucket),
            last=None if last is None else last.left,
            may_be_empty=accepted or (last is not None and not last.left.objects),
            done="published",
        )

    def publish(
        self, found: IndexState, built: BuiltSnapshot, lock: BucketLock, temp_dir: Path
    ) -> tuple[Pointer, bool]:
        """Upload the snapshot, read it back, and publish its pointer if the lock is still held.

        Returns:
            The pointer, and whether it names the previous snapshot because nothing has changed.

        Raises:
            LockLostError: If the lock is lost; the previous snapshot stays in use.
            HFBucketError: If the snapshot is not published, or this is unknown.
        """
        before = self._unchanged(found, built)
        if before is not None:
            pointer = replace(
                before, covers=built.covers, listed=built.listed, full=built.full,
                heat_since=built.heat.since, heat_until=built.heat.until, heat_told=built.heat.reported,
                heat_lost=built.heat.lost, heat_lost_at=built.heat.lost_at,
            )  # fmt: skip
        else:
            pointer = build.put(self._store, built, self._until)
        try:  # the pointer must name a snapshot that can be read
            build.fetch_snapshot(self._bucket, self._store, pointer, temp_dir / "read-back.npy", self._until)
        except MissingError as error:
            raise TransportError(f"the snapshot was stored and cannot be read: {error}: nothing is published") from None
        while True:
            seconds = lock.confirm(patient=True)
            try:
                self._store.publish(pointer, Deadline.after(min(REQUEST_SECS, seconds)))
            except ThrottledError as error:  # the lock may be lost by the end of the pause
                self._until.wait_out(error)
            else:
                return pointer, before is not None

    def _unchanged(self, found: IndexState, built: BuiltSnapshot) -> Pointer | None:
        """Return the previous pointer if its snapshot exists with identical bytes."""
        before = found.pointer
        if before is None or (before.size, before.keys) != (built.path.stat().st_size, built.keys):
            return None
        if xet_hashes([built.path])[0] != before.xet_hash:
            return None
        path = self._store.snapshot_path(before)
        return before if any(info.path == path for info in found.listing.snapshots) else None

    def expect(self, pointer: Pointer) -> ContentId:
        """Verify that readers find a published pointer.

        Returns:
            Content of the pointer's object.

        Raises:
            TransportError: If readers find another pointer.
            HFBucketError: If the pointer cannot be read.
        """
        path = self._bucket.handle.join(POINTER)
        info = self._bucket.stat([path], Deadline.patient(REQUEST_SECS)).get(path)
        if info is None or self._store.read_pointer(info, Deadline.patient(REQUEST_SECS)) != pointer:
            raise TransportError(f"{path}: the Hub took it and shows another one: run again")
        return info.content


def extent_of(path: Path) -> Extent:
    """Return the number of keys of a snapshot and the bytes of their objects; the file is read in blocks."""
    with path.open("rb") as file:
        header = read_header(file, str(path))
        nbytes = 0
        while data := file.read(_BLOCK_ROWS * header.dtype.itemsize):
            nbytes += int(np.frombuffer(data, header.dtype)["size"].sum(dtype=np.uint64))
    return Extent(header.rows, nbytes)
