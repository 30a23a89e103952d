"""Planning of deletions from a listing."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Final, Protocol, Self

from hfbucket_plugin.core.keys import encode_name
from hfbucket_plugin.core.units import Extent
from hfbucket_plugin.errors import (
    AccessDeniedError,
    BucketMissingError,
    ConfigError,
    HFBucketError,
    RefusedError,
    SafetyError,
)
from hfbucket_plugin.index.access.table import AccessUnknownError
from hfbucket_plugin.tools.external_sort import open_temporary
from jobs.deletion.plan import Item
from jobs.retention.access import NOT_ASKED
from jobs.retention.order import Decision, Reason

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from datetime import datetime, timedelta

    from hfbucket_plugin.tools.inventory import ListedObject, RetentionEntry
    from jobs.deletion.plan import DeletionHeader, DeletionPlanWriter
    from jobs.retention.access import AccessStats

_CACHE_KIB: Final = 16 * 1024

TICK_OBJECTS: Final = 1000
"""Number of entries of a page."""


class CandidateSource(Protocol):
    """Source of the decisions which objects to delete."""

    def chunks(self, entries: Iterable[RetentionEntry], now: datetime) -> Iterator[Decision]:
        """Yield a decision for every chunk, in any order."""

    def foreign(self, entry: RetentionEntry, now: datetime) -> Decision:
        """Decide on an object that is not a chunk, if such objects may be deleted."""

    @property
    def needs_access(self) -> bool:
        """Whether the decisions depend on the last reads of chunks."""


class Planning:
    """Planner that counts a listing, and writes the objects to delete into a plan.

    Args:
        header: Header of the plan.
        selection: Decides which objects to delete.
        writer: Writer of the plan.
        tick: Called for every page, for periodic work.
        heat: Known last reads of chunks.

    Attributes:
        listed: Chunks of the instance.
        foreign: Other objects that may be deleted.
        seen: Number of distinct objects in the listing.
        shown: Number of objects in the listing, duplicates included.
    """

    def __init__(
        self,
        header: DeletionHeader,
        selection: CandidateSource,
        writer: DeletionPlanWriter,
        tick: Callable[[], None],
        heat: AccessStats = NOT_ASKED,
    ) -> None:
        self._header = header
        self._selection = selection
        self._writer = writer
        self._tick = tick
        self._access = heat
        self.listed = self.foreign = Extent()
        self.seen = self.shown = 0
        self.kept: defaultdict[str, Extent] = defaultdict(Extent)
        self.passed_by: defaultdict[str, Extent] = defaultdict(Extent)

    def run(self, listing: Iterable[ListedObject]) -> None:
        """Plan the deletions of a listing.

        Raises:
            GuardError: If the listing is incomplete.
            HFBucketError: If the listing fails permanently: no permission, no such bucket.
            HeatUnknownError: If a budget would delete by reads that are not known.
        """
        now = self._header.made_at
        for decision in self._selection.chunks(self._access.warmed(self._chunks(listing)), now):
            self._take(decision, self._header.bucket.join(encode_name(decision.entry.key)), decision.entry.model)

    def _chunks(self, listing: Iterable[ListedObject]) -> Iterator[RetentionEntry]:
        for one in self._distinct(_whole(listing)):
            entry = one.entry
            if one.kind.is_chunk:
                self.listed = self.listed.plus(entry.size)
                yield entry
            elif one.kind.foreign and self._header.foreign:
                self.foreign = self.foreign.plus(entry.size)
                self._take(self._selection.foreign(entry, self._header.made_at), one.info.path, "")
            else:
                self.passed_by[str(one.kind)] = self.passed_by[str(one.kind)].plus(entry.size)

    def _distinct(self, listing: Iterable[ListedObject]) -> Iterator[ListedObject]:
        """Yield each object once, so that repeated pages do not raise the limit of deletes."""
        with SeenPaths() as seen:
            for one in listing:
                if self.shown % TICK_OBJECTS == 0:
                    self._tick()
                self.shown += 1
                if seen.new(one.info.path):
                    self.seen += 1
                    yield one

    def _take(self, decision: Decision, path: str, model: str) -> None:
        entry = decision.entry
        if not decision.delete or entry.uploaded_at is None:
            reason = str(decision.reason)
            self.kept[reason] = self.kept[reason].plus(entry.size)
            return
        if decision.reason is Reason.OVER_BUDGET:
            why = self._access.why_no_order(entry.last_used, self._header.made_at)
            if why:
                raise AccessUnknownError(why)
        used = None if self._access.table is None else entry.last_used
        item = Item(path, entry.key, entry.xet_hash, entry.size, entry.uploaded_at, str(decision.reason), used)
        self._writer.add(item, model)

    def finish(self) -> None:
        """Complete the plan."""
        self._writer.finish(self.listed, dict(self.kept), dict(self.passed_by), self.foreign)


class SeenPaths:
    """Set of seen paths, in a temporary file. Use it as a context manager.

    Paths normally arrive in ascending order, so the table grows at its end, and memory does not grow with their number.
    """

    def __init__(self) -> None:
        self._base = open_temporary(cache_kib=_CACHE_KIB)
        self._base.executescript("CREATE TABLE seen (path BLOB PRIMARY KEY) WITHOUT ROWID; BEGIN")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._base.close()

    def new(self, path: str) -> bool:
        """Add a path; return whether it is new."""
        return bool(
            self._base.execute(
                "INSERT OR IGNORE INTO seen VALUES (?)", (path.encode("utf-8", "surrogatepass"),)
            ).rowcount
        )


def _whole(listing: Iterable[ListedObject]) -> Iterator[ListedObject]:
    """Yield a listing; raise `GuardError` if it ends early."""
    try:
        yield from listing
    except (AccessDeniedError, BucketMissingError, ConfigError, RefusedError):
        raise
    except HFBucketError as error:
        raise SafetyError(f"the listing is not complete, so nothing is deleted: {error}") from None


def by_age(entry: RetentionEntry, now: datetime, min_age: timedelta, reason: Reason) -> Decision:
    """Decide to delete an entry unless it is younger than `min_age`."""
    if entry.uploaded_at is None:
        return Decision(entry, Reason.NO_DATE, delete=False)
    if now - entry.uploaded_at < min_age:
        return Decision(entry, Reason.TOO_YOUNG, delete=False)
    return Decision(entry, reason, delete=True)
