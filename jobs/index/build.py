"""Make an index."""

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
"""As `IndexStore.put_snapshot` names them: what is called otherwise is not ours to delete."""

_AHEAD_SECS: Final = 60.0


def why_listing(
    pointer: Pointer | None, now: float, every_secs: float, journals: int, max_age_secs: float = math.inf
) -> str:
    """Why a snapshot has to be made of a listing; empty where the one before and the journals will do.

    Args:
        pointer: To the present snapshot; None where there is none.
        now: The Hub's time, in seconds since 1970.
        every_secs: How old the listing that the present one goes back to may be.
        journals: How many there are.
        max_age_secs: `index_max_age_secs`: writers tell nothing of what they do while the present one is older.
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
    """Snapshots that may go, each with its time.

    Args:
        snapshots: All that there are.
        present: The path of the one that is pointed to, which always stays.
        now: The Hub's time.
        keep: How many stay, that one included; at least 1.
        grace: None goes that is younger: a reader that found its pointer just now is still loading it.
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
    """Journals that may go: the present snapshot covers them, and they are older than the grace period.

    In that time readers may still go by the snapshot before it.

    Args:
        journals: All that are known.
        covers: Of the present snapshot.
        now: The Hub's time.
        grace: None goes that is younger.
    """
    for journal in journals:
        if journal.at < covers and journal.at <= (now - grace).timestamp():
            yield journal


_log = logging.getLogger(__name__)

_TRIES: Final = 3
"""A writer replaces its last journal while it is about to be read: then all are listed again."""

_TOLD_SECS: Final = 30.0
_BLOCK_ROWS: Final = 100_000


@dataclass(frozen=True, slots=True)
class IndexOrder:
    """How an index is to be built.

    Attributes:
        full: Whether to make it of a listing, whether that is due or not; then a pointer that cannot be read is replaced, too.
        full_every_secs: How old the listing may be that an index goes back to.
        max_age_secs: `index_max_age_secs` of the instance: with a snapshot that is older a listing is due.
        keep: How many snapshots stay, the present one included.
        grace: No old snapshot and no journal is deleted that is younger.
        dry_run: Whether to write nothing.
        accept_shrunk: Whether a listing is believed that is empty or lacks much of what there was.
        max_duration_secs: When to give up, where `until` does not say.
        until: The deadline of the whole command, of which this may be one instance of several.
        lock_secs: How long the lock of a killed run keeps others out.
        temp_dir: Where snapshots are put together; None for a directory of temporary files.
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
        """Most seconds of a page of a listing."""
        return PAGE_SECS


class IndexBuilder:
    """Makes one snapshot.

    Args:
        name: Of the instance, for people.
        bucket: The instance's.
        store: Its index.
        order: How it is to be done.
        until: When to give up.
        tick: Called now and then; what it raises ends the work.
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
        """Make a snapshot, of journals where that will do.

        Args:
            found: What there is.
            now: The Hub's time.
            temp_dir: For files: empty, and nobody else's.

        Raises:
            GuardError: The listing looks wrong.
            HFBucketError: Something did not arrive.
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
        """A snapshot of the one before and the journals; or why that one cannot be gone by.

        Raises:
            HFBucketError: Something did not arrive.
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
            except TransportError as error:  # hf_xet does not always say that the store lacks something
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
        """Refuse a listing that cannot be all of it, by what the last run of any job left.

        Raises:
            GuardError: It is empty, truncated, or has less than half of what there was.
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
        """Upload the snapshot, read it back, and point to it if the lock is still ours.

        Returns:
            The pointer, and whether it names the same snapshot as before, since nothing has changed.

        Raises:
            LockLostError: It is not: the snapshot before stays in use.
            HFBucketError: It is not published, or nobody knows.
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
        try:  # readers are sent to nothing that cannot be read
            build.fetch_snapshot(self._bucket, self._store, pointer, temp_dir / "read-back.npy", self._until)
        except MissingError as error:
            raise TransportError(f"the snapshot was stored and cannot be read: {error}: nothing is published") from None
        while True:
            seconds = lock.confirm(patient=True)
            try:
                self._store.publish(pointer, Deadline.after(min(REQUEST_SECS, seconds)))
            except ThrottledError as error:  # when the pause is over, the lock may not be ours any more
                self._until.wait_out(error)
            else:
                return pointer, before is not None

    def _unchanged(self, found: IndexState, built: BuiltSnapshot) -> Pointer | None:
        """The pointer before, where its snapshot is there and has the very same bytes."""
        before = found.pointer
        if before is None or (before.size, before.keys) != (built.path.stat().st_size, built.keys):
            return None
        if xet_hashes([built.path])[0] != before.xet_hash:
            return None
        path = self._store.snapshot_path(before)
        return before if any(info.path == path for info in found.listing.snapshots) else None

    def expect(self, pointer: Pointer) -> ContentId:
        """Make sure that readers find it.

        Returns:
            The content of the pointer's object.

        Raises:
            TransportError: They find another one.
            HFBucketError: Nobody knows.
        """
        path = self._bucket.handle.join(POINTER)
        info = self._bucket.stat([path], Deadline.patient(REQUEST_SECS)).get(path)
        if info is None or self._store.read_pointer(info, Deadline.patient(REQUEST_SECS)) != pointer:
            raise TransportError(f"{path}: the Hub took it and shows another one: run again")
        return info.content


def extent_of(path: Path) -> Extent:
    """How many keys a snapshot has, and the sum of the sizes of their objects; a block of it at a time."""
    with path.open("rb") as file:
        header = read_header(file, str(path))
        nbytes = 0
        while data := file.read(_BLOCK_ROWS * header.dtype.itemsize):
            nbytes += int(np.frombuffer(data, header.dtype)["size"].sum(dtype=np.uint64))
    return Extent(header.rows, nbytes)
