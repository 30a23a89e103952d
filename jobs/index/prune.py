"""Takes old snapshots and journals of a key index away, by the same steps as any delete: a look at each object just before."""

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
"""Reasons, as reports name them."""


@dataclass(frozen=True, slots=True)
class PruneLimits:
    """What stays.

    Attributes:
        keep: How many snapshots, the present one included.
        grace: What is younger.
        until: When to begin no more.
    """

    keep: int
    grace: timedelta
    until: Deadline


def spare(found: IndexState, present: str, covers: float, now: datetime, limits: PruneLimits) -> Iterator[Item]:
    """What nobody needs any more.

    Args:
        found: What was listed before the present snapshot was published.
        present: The path of the present snapshot; empty for one that is not there yet.
        covers: Of the present snapshot.
        now: The Hub's time.
        limits: What stays.
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
    """Delete what is still as it was listed, as long as the lock is held and the pointer is the one that was published.

    Args:
        bucket: The instance's.
        lock: Held.
        items: What may go.
        pointer: The content of the published pointer.
        limits: What stays.
        on_end: Is told of every object that has ended.
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
