"""One try at one batch: look up every object again, and delete those that are still as planned."""

from __future__ import annotations

from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Final

from hfbucket_plugin.errors import DeadlineError, ThrottledError, TransportError
from jobs.batch.apply import InProcess
from jobs.batch.model import FRESH_SECS, SEND_SECS, TRIES, ItemBatch, ItemOutcome, Outcome, ReferenceEndpoint, Result
from jobs.lock.clock import ServerClock

if TYPE_CHECKING:
    from collections.abc import Container
    from datetime import datetime

    from hfbucket_plugin.core.deadline import Deadline
    from hfbucket_plugin.hub.bucket import Bucket, ObjectInfo
    from jobs.deletion.plan import Item

_PAUSE_SECS: Final = 1.0
"""Seconds to wait after a 429 without a retry time."""


@dataclass(frozen=True, slots=True)
class _Look:
    """Look-up of the objects of a batch.

    Attributes:
        found: The objects found, by path.
        sent: When the request was sent; the answer holds from then on.
        deadline: Time until which a delete may be based on this look-up.
    """

    found: dict[str, ObjectInfo]
    sent: float
    deadline: Deadline

    @property
    def fresh(self) -> bool:
        """Whether a delete may still be based on this look-up."""
        return monotonic() - self.sent <= FRESH_SECS


def attempt(
    bucket: Bucket,
    batch: ItemBatch[Item],
    not_after: datetime,
    deadline: Deadline,
    lock_end: datetime | None = None,
    *,
    source: ReferenceEndpoint | None = None,
) -> Result[Item]:
    """Delete the objects of a batch that are still as planned, in one try; rewritten and too young ones stay.

    The delete request directly follows the look-up, which is repeated if it has become too old by then.

    Args:
        bucket: Client of the instance's bucket.
        batch: The objects to delete.
        not_after: Objects uploaded later are too young.
        deadline: Time after which no request is sent.
        lock_end: End of the lock by the Hub's clock; nothing is deleted after it. Needed where the batch may have
            arrived
            arrived
            late; None where `deadline` was set when the lock was confirmed.
        source: Source of a mirror; objects that it holds end as `changed`, and stay.

    Raises:
        HFBucketError: If an error is permanent: no permission, no such bucket.
    """
    paths = [item.path for item in batch.items]
    try:
        while True:
            at_source = () if source is None else source.look_up([item.key for item in batch.items], deadline)
            look = _look(bucket, paths, deadline, lock_end)
            ended, todo = _compare(batch, look.found, at_source, not_after)
            if look.fresh or not todo:
                break
    except ThrottledError as error:
        return Result((), batch, error.retry_after or _PAUSE_SECS)
    except TransportError as error:
        return _again(batch, batch.items, batch.asked, dict.fromkeys(paths, str(error)), [])
    if not todo:
        return Result(tuple(ended))
    left = tuple(todo.values())
    try:
        failed = bucket.delete(list(todo), look.deadline.within(SEND_SECS), once=True)
    except ThrottledError as error:
        return Result(tuple(ended), ItemBatch(left, batch.tries, batch.asked), error.retry_after or _PAUSE_SECS)
    except TransportError as error:
        return _again(batch, left, batch.asked | todo.keys(), dict.fromkeys(todo, str(error)), ended)
    ended += [ItemOutcome(item, Outcome.DELETED) for path, item in todo.items() if path not in failed]
    left = tuple(item for path, item in todo.items() if path in failed)
    return _again(batch, left, batch.asked, {path: failure.message for path, failure in failed.items()}, ended)


def _look(bucket: Bucket, paths: list[str], deadline: Deadline, lock_end: datetime | None) -> _Look:
    """Look up the objects at the given paths.

    Raises:
        DeadlineError: If the lock has ended.
        HFBucketError: If the Hub does not answer.
    """
    sent = monotonic()
    if lock_end is None:
        return _Look(bucket.stat(paths, deadline, patient=False), sent, deadline)
    found, date = bucket.stat_dated(paths, deadline)
    if date is None:
        raise TransportError(
            "the Hub's answer has no Date, so nobody knows here whether the lock still holds: give --local"
        )
    clock = ServerClock(monotonic)
    clock.stamped(date, sent, monotonic(), unsure_secs=1.0)
    seconds = (lock_end - clock.latest()).total_seconds()
    if seconds <= 0:
        raise DeadlineError("the lock ended before this batch could be deleted")
    return _Look(found, sent, deadline.within(seconds))


def _compare(
    batch: ItemBatch[Item], found: dict[str, ObjectInfo], at_source: Container[str], not_after: datetime
) -> tuple[list[ItemOutcome[Item]], dict[str, Item]]:
    """Return the outcomes that are certain, and by path the objects that are still as planned."""
    ended: list[ItemOutcome[Item]] = []
    todo: dict[str, Item] = {}
    for item in batch.items:
        info = found.get(item.path)
        if info is None:
            ended.append(ItemOutcome(item, Outcome.DELETED if item.path in batch.asked else Outcome.GONE))
        elif info.uploaded_at != item.uploaded_at or info.content.xet_hash != item.xet_hash or item.key in at_source:
            ended.append(ItemOutcome(item, Outcome.CHANGED))
        elif item.uploaded_at > not_after:
            ended.append(ItemOutcome(item, Outcome.TOO_YOUNG))
        elif item.path in todo:  # a listing whose pages shifted may name an object twice
            ended.append(ItemOutcome(item, Outcome.GONE))
        else:
            todo[item.path] = item
    return ended, todo


def _again(
    batch: ItemBatch[Item],
    left: tuple[Item, ...],
    asked: frozenset[str],
    why: dict[str, str],
    ended: list[ItemOutcome[Item]],
) -> Result[Item]:
    """Return the result of a try that left objects: another try, or failures after the last one."""
    tries = batch.tries + 1
    if not left:
        return Result(tuple(ended))
    if tries >= TRIES:
        return Result((*ended, *(ItemOutcome(item, Outcome.FAILED, why[item.path]) for item in left)))
    return Result(tuple(ended), ItemBatch(left, tries, asked & {item.path for item in left}))


def in_process(bucket: Bucket, width: int, source: ReferenceEndpoint | None = None) -> InProcess[Item]:
    """Return an executor that deletes from this process.

    Args:
        bucket: Client of the instance's bucket.
        width: Maximum number of concurrent batches.
        source: Source of a mirror; None for any other job.
    """

    def attempt_in_time(batch: ItemBatch[Item], not_after: datetime, deadline: Deadline) -> Result[Item]:
        return attempt(bucket, batch, not_after, deadline, source=source)

    return InProcess("jobs-delete", width, attempt_in_time)
