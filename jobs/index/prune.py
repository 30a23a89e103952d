"""Pruning of old snapshots and journals of a key index; like any delete, it looks up each object just before."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from hfbucket_plugin.core.deadline import Deadline
from hfbucket_plugin.errors import RefusedError
from hfbucket_plugin.index.store import POINTER
from jobs.batch.apply import Applier
from jobs.deletion.attempt import in_process
from jobs.deletion.plan import Item
from jobs.index.build import spare_journals, spare_snapshots

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from datetime import timedelta

    from hfbucket_plugin.core.keys import ContentId
    from hfbucket_plugin.hub.bucket import Bucket
    from hfbucket_plugin.tools.signals import ShutdownSignal
    from jobs.batch.apply import ApplyResult
    from jobs.batch.model import ItemOutcome
    from jobs.index.inventory import IndexState
    from jobs.lock.lock import BucketLock

SNAPSHOT: Final = "old-snapshot"
JOURNAL: Final = "covered-journal"
"""Reasons, as they appear in reports."""


@dataclass(frozen=True, slots=True)
class PruneLimits:
    """Limits of pruning.

    Attributes:
        keep: Number of snapshots to keep, the current one included.
        grace: Minimum age of the objects to delete.
        until: Deadline after which no delete starts.
    """

    keep: int
    grace: timedelta
    until: Deadline


def spare(found: IndexState, present: str, covers: float, now: datetime, limits: PruneLimits) -> Iterator[Item]:
    """Yield the snapshots and journals that are no longer needed.

    Args:
        found: State listed before the current snapshot was published.
        present: Path of the current snapshot; empty if it is not published yet.
        covers: Coverage of the current snapshot.
        now: Time of the Hub.
        limits: Limits of pruning.
    """
    for info, at in spare_snapshots(found.listing.snapshots, present, now, limits.keep, limits.grace):
        yield Item(info.path, info.path, info.content.xet_hash, info.content.size, at, SNAPSHOT)
    for one in spare_journals(found.listing.journals, covers, now, limits.grace):
        at = datetime.fromtimestamp(one.at, UTC)
        yield Item(one.path, one.name.text, one.content.xet_hash, one.content.size, at, JOURNAL)


def prune(
    bucket: Bucket,
    lock: BucketLock,
    items: Iterator[Item],
    *,
    pointer: ContentId,
    limits: PruneLimits,
    on_end: Callable[[ItemOutcome[Item]], None],
    stop: ShutdownSignal,
) -> ApplyResult:
    """Delete items that are still as listed, while the lock is held and the published pointer is unchanged.

    Args:
        bucket: Client of the instance's bucket.
        lock: The lock, held.
        items: Objects that may be deleted.
        pointer: Content of the published pointer.
        limits: Limits of pruning.
        on_end: Called with the outcome of every object.
        stop: Whether to stop.
    """
    path = bucket.handle.join(POINTER)

    def confirm() -> float:
        seconds = lock.confirm()
        info = bucket.stat([path], Deadline.after(seconds)).get(path)
        if info is None or info.content != pointer:
            raise RefusedError(f"{path} was written by somebody else meanwhile: no more old objects are deleted")
        return seconds

    executor = in_process(bucket, 1)
    with stop.orderly():
        applier = Applier(
            executor,
            confirm=confirm,
            not_after=lock.clock.earliest() - limits.grace,
            on_end=on_end,
            stop=stop,
            until=limits.until,
            lock_end=lambda: lock.stops,
            keep=lock.keep,
        )
        try:
            return applier.run(items)
        finally:
            executor.close()
            if applier.undrained:
                lock.leave()
