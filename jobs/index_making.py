"""Makes snapshots of a key index and publishes them.

Whatever ends this before the pointer is written leaves the snapshot before in use.
"""

from __future__ import annotations

import logging
import math
import shutil
import time
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Final

import numpy as np

from hfbucket_plugin import index_build
from hfbucket_plugin.deadlines import Deadline
from hfbucket_plugin.errors import HFBucketError, IntegrityError, MissingError, ThrottledError, TransportError
from hfbucket_plugin.index_format import read_header
from hfbucket_plugin.index_store import POINTER
from hfbucket_plugin.transfer import xet_hashes
from jobs import history, show
from jobs.guards import Extent, check_listing
from jobs.index_report import Made
from jobs.index_rules import why_listing
from jobs.lock import DEFAULT_SECONDS
from jobs.run import PAGE_SECS, REQUEST_SECS, files_in

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime
    from pathlib import Path

    from hfbucket_plugin.bucket import Bucket, ObjectInfo
    from hfbucket_plugin.content import Content
    from hfbucket_plugin.index_build import Built
    from hfbucket_plugin.index_format import Pointer
    from hfbucket_plugin.index_store import IndexStore
    from jobs.index_shelf import Found
    from jobs.lock import Lock

_log = logging.getLogger(__name__)

_TRIES: Final = 3
"""A writer replaces its last journal while it is about to be read: then all are listed anew."""

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
        scratch: Where snapshots are put together; None for a directory of temporary files.
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
    scratch: Path | None = None

    @property
    def page_secs(self) -> float:
        """Most seconds of a page of a listing."""
        return PAGE_SECS


class Maker:
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
        self._told_at = time.monotonic()

    def make(self, found: Found, now: datetime, scratch: Path) -> tuple[Built, Made]:
        """Make a snapshot, of journals where that will do.

        Args:
            found: What there is.
            now: The Hub's time.
            scratch: For files: empty, and nobody else's.

        Raises:
            GuardError: The listing looks wrong.
            HFBucketError: Something did not arrive.
        """
        why = "--full asked for it" if self._order.full else ""
        why = why or why_listing(
            found.pointer, now.timestamp(), self._order.full_every_secs, found.journals, self._order.max_age_secs
        )
        built: Built | None = None
        if not why:
            built, why = self._of_journals(scratch / "journals")
        if built is None:
            built = self._of_listing(scratch / "listing")
        how = "listing" if why else "journals"
        keys = extent_of(built.path)
        if why:
            self._judge(keys)
        size = built.path.stat().st_size
        return built, Made(how, why, keys, None, size, same=False, journals=found.waiting, garbage=built.garbage)

    def _of_journals(self, scratch: Path) -> tuple[Built | None, str]:
        """A snapshot of the one before and the journals; or why that one cannot be gone by.

        Raises:
            HFBucketError: Something did not arrive.
        """
        problem: HFBucketError | None = None
        for number in range(_TRIES):
            self._tick()
            directory = scratch / str(number)
            directory.mkdir(parents=True)
            try:
                return index_build.from_journals(self._bucket, self._store, directory, REQUEST_SECS), ""
            except (MissingError, IntegrityError) as error:
                problem = error
            except TransportError as error:  # hf_xet does not always say that the store lacks something
                if number == _TRIES - 1 and problem is None:
                    raise
                _log.warning("the snapshot before, or a journal, could not be read: %s", error)
            shutil.rmtree(directory)
        return None, f"the snapshot before, or a journal, cannot be read ({problem})"

    def _of_listing(self, scratch: Path) -> Built:
        scratch.mkdir()

        def each(_info: ObjectInfo) -> None:
            self._seen += 1

        def page() -> None:
            self._tick()
            if time.monotonic() - self._told_at >= _TOLD_SECS:
                self._told_at = time.monotonic()
                show.note(f"{self._name}: {self._seen:,} objects listed")

        return index_build.from_listing(self._bucket, scratch, self._order.page_secs, page, each, store=self._store)

    def _judge(self, keys: Extent) -> None:
        """Refuse a listing that cannot be all of it, by what the last run of any job left.

        Raises:
            GuardError: It is empty, truncated, or has less than half of what there was.
        """
        accepted = self._order.accept_shrunk
        last = None if accepted else history.last_run(self._bucket, REQUEST_SECS, builds=True)
        check_listing(
            keys,
            self._seen,
            in_bucket=None if self._bucket.handle.prefix or accepted else files_in(self._bucket),
            last=None if last is None else last.left,
            may_be_empty=accepted or (last is not None and not last.left.objects),
            done="published",
        )

    def publish(self, found: Found, built: Built, lock: Lock, scratch: Path) -> tuple[Pointer, bool]:
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
                heat_since=built.heat.since, heat_until=built.heat.until, heat_told=built.heat.told,
                heat_lost=built.heat.lost, heat_lost_at=built.heat.lost_at,
            )  # fmt: skip
        else:
            pointer = index_build.put(self._store, built, self._until)
        try:  # readers are sent to nothing that cannot be read
            index_build.fetch_snapshot(self._bucket, self._store, pointer, scratch / "read-back.npy", self._until)
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

    def _unchanged(self, found: Found, built: Built) -> Pointer | None:
        """The pointer before, where its snapshot is there and has the very same bytes."""
        before = found.pointer
        if before is None or (before.size, before.keys) != (built.path.stat().st_size, built.keys):
            return None
        if xet_hashes([built.path])[0] != before.xet_hash:
            return None
        path = self._store.snapshot_path(before)
        return before if any(info.path == path for info in found.shelf.snapshots) else None

    def expect(self, pointer: Pointer) -> Content:
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
