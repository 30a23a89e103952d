"""Check, just before unused objects are deleted, whether they were read since the plan."""

from __future__ import annotations

import contextlib
import time
from datetime import UTC, datetime
from itertools import islice
from typing import TYPE_CHECKING, Final

import numpy as np

from hfbucket_plugin.core.deadline import Deadline
from hfbucket_plugin.core.keys import encode_name
from hfbucket_plugin.errors import HFBucketError
from hfbucket_plugin.index.access.table import AccessUnknownError
from hfbucket_plugin.index.format import FormatError
from hfbucket_plugin.index.store import POINTER, IndexStore, JournalRows
from hfbucket_plugin.index.table import digests_of
from jobs.batch.model import ItemOutcome, Outcome
from jobs.retention.access import ADVICE, open_access_stats
from jobs.retention.order import BY_USE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hfbucket_plugin.hub.bucket import Bucket
    from hfbucket_plugin.index.access.table import AccessTable
    from hfbucket_plugin.index.format import Pointer
    from hfbucket_plugin.index.table import Rows
    from jobs.deletion.plan import DeletionHeader, Item

_ITEMS: Final = 1000
_LOOK_SECS: Final = 180.0
"""Maximum age in seconds of the known reads: a listing of journals costs a call per 1000, and readers report hits every
five minutes."""

_REQUEST_SECS: Final = 60.0
_DRIFT_SECS: Final = 60.0
"""Tolerance in seconds: a rewritten journal dates an old hit later by the duration of its upload."""

_MOST_HITS: Final = 4_000_000
"""Maximum number of keys read since the plan; they take 100 MB."""

_LAST: Final = np.dtype([("digest_hi", "<u8"), ("digest_lo", "<u8"), ("at", "<f8")])


class Recheck:
    """Filter that keeps items which were read since the plan.

    Args:
        bucket: Client of the instance's bucket.
        table: Rows of a snapshot newer than the plan; None for a plan made from the current snapshot.
        since: Start of the journals to read, by upload time, in seconds since 1970.
        on_end: Called with the outcome of every item that is kept.
        clock: Returns monotonic seconds.
        lost_at: Last time at which an engine dropped hits, as known to the plan, in seconds since 1970.
    """

    def __init__(
        self,
        bucket: Bucket,
        table: AccessTable | None,
        since: float,
        on_end: Callable[[ItemOutcome[Item]], None],
        clock: Callable[[], float] = time.monotonic,
        *,
        lost_at: float = 0.0,
    ) -> None:
        self._store = IndexStore(bucket, "recheck")
        self._table = table
        self._since = since
        self._lost_at = lost_at
        self._on_end = on_end
        self._clock = clock
        self._looked_at: float | None = None
        self._read: set[tuple[str, str]] = set()
        self._last: Rows = np.zeros(0, _LAST)

    def unused(self, items: Iterator[Item]) -> Iterator[Item]:
        """Lazily yield the items that were not read since the plan.

        Raises:
            HeatUnknownError: If the reads since the plan are not known.
        """
        while page := list(islice(items, _ITEMS)):
            asked = [item for item in page if item.reason in BY_USE and item.last_used is not None]
            used = self._used(asked) if asked else frozenset()
            for item in page:
                if item.path in used:
                    self._on_end(ItemOutcome(item, Outcome.USED))
                else:
                    yield item

    def _used(self, items: list[Item]) -> frozenset[str]:
        self._look()
        names = [encode_name(item.key) for item in items]
        lasts = self._by_journals(names)
        if self._table is not None:
            for index, use in enumerate(self._table.look_up(names)):
                lasts[index] = max(lasts[index], 0.0 if use.last is None else use.last.timestamp())
        return frozenset(
            item.path
            for item, last in zip(items, lasts, strict=True)
            if last > (item.last_used or datetime.fromtimestamp(0, UTC)).timestamp() + _DRIFT_SECS
        )

    def _by_journals(self, names: list[str]) -> list[float]:
        found = {(row["digest_hi"], row["digest_lo"]): row["at"] for row in self._among(names)}
        return [float(found.get((digest[0], digest[1]), 0.0)) for digest in digests_of(names)]

    def _among(self, names: list[str]) -> Rows:
        some: Rows = self._last[np.isin(self._last["digest_hi"], digests_of(names)[:, 0])]
        return some

    def _look(self) -> None:
        """Read new journals, if due."""
        if self._looked_at is not None and self._clock() - self._looked_at < _LOOK_SECS:
            return
        try:
            listing = self._store.list(Deadline.after(_REQUEST_SECS))
            if listing.crowded:
                raise AccessUnknownError(f"what was read since the plan is not known: {listing.crowded}. {ADVICE}")  # noqa: TRY301 - raised beside the other errors
            fresh = [
                one
                for one in listing.journals
                if one.name.hits and one.at >= self._since and (one.path, one.content.xet_hash) not in self._read
            ]
            for journal, rows in self._store.read_journal_rows(fresh, Deadline.after(10 * _REQUEST_SECS)):
                if isinstance(rows, JournalRows):
                    self._expect_whole(rows.lost)
                    self._take(rows.hits)
                elif not isinstance(rows, FormatError):
                    raise rows
                self._read.add((journal.path, journal.content.xet_hash))
        except AccessUnknownError:
            raise
        except HFBucketError as error:
            raise AccessUnknownError(
                f"what was read since the plan is not known: {error}. Run again, or {ADVICE[0].lower()}{ADVICE[1:]}"
            ) from None
        self._looked_at = self._clock()

    def _expect_whole(self, lost: Rows) -> None:
        """Refuse to continue if hits were dropped since the plan's data.

        Raises:
            HeatUnknownError: If hits were dropped.
        """
        lost = lost[lost["at"] > self._lost_at + _DRIFT_SECS]
        if len(lost):
            raise _dropped(int(lost["hits"].max()))

    def _take(self, hits: Rows) -> None:
        rows = np.zeros(len(hits), _LAST)
        for name in _LAST.names or ():
            rows[name] = hits[name]
        rows = np.concatenate([self._last, rows])
        rows = rows[np.lexsort((rows["at"], rows["digest_lo"], rows["digest_hi"]))]
        last = np.ones(len(rows), bool)
        last[:-1] = (rows["digest_hi"][1:] != rows["digest_hi"][:-1]) | (
            rows["digest_lo"][1:] != rows["digest_lo"][:-1]
        )
        self._last = rows[last]
        if len(self._last) > _MOST_HITS:
            raise AccessUnknownError(
                f"more than {_MOST_HITS:,} chunks were read since the plan: make a new plan. {ADVICE}"
            )

    def close(self) -> None:
        """Stop reading journals."""
        self._store.close()


def _dropped(hits: int) -> AccessUnknownError:
    return AccessUnknownError(
        f"what was read since the plan is not known: engines dropped {hits:,} hits or more. Plan again when the key index "
        f"knows of that, or {ADVICE[0].lower()}{ADVICE[1:]}"
    )


def _dropped_before(header: DeletionHeader, planned_by: Pointer | None) -> float:
    """Return the last time at which an engine dropped hits, as known to a plan, in seconds since 1970."""
    if planned_by is not None:
        return planned_by.heat_lost_at
    at = header.heat.get("dropped_at")
    try:
        return (
            datetime.fromisoformat(at).timestamp() + 1 if isinstance(at, str) else 0.0
        )  # it is recorded to the second
    except (ValueError, OverflowError):
        return 0.0


@contextlib.contextmanager
def rechecking(
    bucket: Bucket,
    header: DeletionHeader,
    planned_by: Pointer | None,
    now: datetime,
    on_end: Callable[[ItemOutcome[Item]], None],
    *,
    without: bool,
) -> Iterator[Callable[[Iterator[Item]], Iterator[Item]]]:
    """Provide a filter of items read since the plan; it passes every item of a plan that does not depend on reads.

    Args:
        bucket: Client of the instance's bucket.
        header: Header of the plan.
        planned_by: The snapshot that the plan was just made from; None for an existing plan.
            If there is a newer one, it is used: journals covered by it may have been pruned.
        now: Time of the Hub.
        on_end: Called with the outcome of every item that is kept.
        without: Whether to skip the check, even if the plan depends on reads.

    Raises:
        HeatUnknownError: If the reads since the plan are no longer known.
    """
    if not header.heat.get("known") or without:
        yield lambda items: items
        return
    with contextlib.ExitStack() as stack:
        table, pointer = None, planned_by
        if pointer is None or not _is_present(bucket, pointer):
            table = stack.enter_context(open_access_stats(bucket, now, _REQUEST_SECS)).table
            if table is None:
                raise AccessUnknownError(f"the plan goes by what was read, and that is known no more. {ADVICE}")
            pointer = table.pointer
        lost_at = _dropped_before(header, planned_by)
        if pointer.heat_lost_at > lost_at + _DRIFT_SECS:
            raise _dropped(max(1, pointer.heat_lost))
        recheck = Recheck(bucket, table, pointer.covers, on_end, lost_at=lost_at)
        stack.callback(recheck.close)
        yield recheck.unused


def _is_present(bucket: Bucket, pointer: Pointer) -> bool:
    """Return whether a snapshot is still the current one.

    Its coverage does not say: the Hub's clock has a resolution of seconds.
    """
    store, path = IndexStore(bucket, "recheck"), bucket.handle.join(POINTER)
    try:
        info = bucket.stat([path], Deadline.after(_REQUEST_SECS)).get(path)
        return info is not None and store.read_pointer(info, Deadline.after(_REQUEST_SECS)) == pointer
    except HFBucketError:  # reading the whole index reports the cause
        return False
    finally:
        store.close()
