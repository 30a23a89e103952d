"""One build of the key index of an instance: lock → snapshot → guards → publication → pruning → report.

Only objects below `.hfbucket/index/`, the lock and the report are written or deleted. A build that ends before its
pointer
is written leaves the previous snapshot in use; one that ends afterwards leaves old objects to the next build.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

from hfbucket_plugin.core.deadline import Deadline, patience
from hfbucket_plugin.core.units import Extent
from hfbucket_plugin.errors import HFBucketError, Interrupted, MissingError, RefusedError
from hfbucket_plugin.hub.connect import REQUEST_SECS, opened
from hfbucket_plugin.index.refresh import journal_secs, refresh_secs, writers_of
from hfbucket_plugin.index.store import SNAPSHOTS, IndexStore
from hfbucket_plugin.tools import exit_codes
from jobs import report
from jobs.index import inventory
from jobs.index.build import IndexBuilder
from jobs.index.prune import PruneLimits, prune, spare
from jobs.index.report import IndexBuild, IndexSummary
from jobs.index.verify import Verification
from jobs.lock.claims import INDEXING
from jobs.lock.clock import ServerClock, ask
from jobs.lock.lock import BucketLock, LockRefresher
from jobs.report import OutcomeTally, exit_code_of, failure_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from hfbucket_plugin.config.instances import InstanceConfig
    from hfbucket_plugin.core.keys import ContentId
    from hfbucket_plugin.hub.bucket import Bucket
    from hfbucket_plugin.index.format import Pointer
    from hfbucket_plugin.tools.signals import ShutdownSignal
    from jobs.deletion.plan import Item
    from jobs.index.build import IndexOrder
    from jobs.index.inventory import IndexState
    from jobs.index.verify import Differences
    from jobs.report import ReportFile

_TELL: Final = 1.5
"""Journal intervals within which a writer records a change: it waits one interval, and uploads take time."""


class IndexJob:
    """Index job of one instance.

    Args:
        named: The instance.
        order: Settings of the build.
        file: Report file, with a line for every deleted object, and a summary.
        stop: Signal that requests a stop.
    """

    def __init__(self, named: InstanceConfig, order: IndexOrder, file: ReportFile, stop: ShutdownSignal) -> None:
        self._named = named
        self._order = replace(order, max_age_secs=named.settings.index_max_age_secs)
        self._file = file
        self._stop = stop
        self._started = time.monotonic()
        self._until = order.until or Deadline.after(order.max_duration_secs)
        self._tally = OutcomeTally(file)
        self._made: IndexBuild | None = None
        self._differences: Differences | None = None
        self._spare = Extent()
        self._strange = 0
        self._message = ""

    def run(self) -> IndexSummary:
        """Build the index, and report the end, also after an error."""
        return self._reported(self._locked)

    def verify(self) -> IndexSummary:
        """Compare the index, as a reader sees it, with a listing; write nothing."""
        return self._reported(self._verify)

    def _reported(self, work: Callable[[Bucket, IndexStore], int]) -> IndexSummary:
        try:
            with patience(self._until):
                code = self._with_bucket(work)
        except (Interrupted, Exception) as error:  # noqa: BLE001 - a failed instance does not stop the others
            code, message = failure_of(error, self._stop, self._until)
            self._message = message or self._message
        summary = self._summary(code)
        self._file.write(summary.record())
        return summary

    def _summary(self, code: int) -> IndexSummary:
        return IndexSummary(
            self._named.name,
            str(self._named.settings.bucket_handle),
            code,
            self._order.dry_run,
            self._message,
            self._made,
            self._differences,
            self._spare,
            dict(self._tally.ended),
            tuple(self._tally.failures),
            self._strange,
            time.monotonic() - self._started,
        )

    def _with_bucket(self, work: Callable[[Bucket, IndexStore], int]) -> int:
        self._file.write({"record": "report", "job": report.INDEX, "instance": self._named.name})
        with opened(self._named, REQUEST_SECS) as bucket:
            store = IndexStore(bucket, "builder")
            try:
                return work(bucket, store)
            finally:
                store.close()

    def _locked(self, bucket: Bucket, store: IndexStore) -> int:
        if self._order.dry_run:
            clock = ServerClock()
            ask(bucket, clock, REQUEST_SECS)
            return self._work(bucket, store, clock, None, self._in_time)
        if not self._named.settings.writes:
            raise RefusedError(f"role is {self._named.settings.role}, so no index is published through this instance")
        lock = BucketLock(bucket, report.INDEX, seconds=self._order.lock_secs, request_secs=REQUEST_SECS, kind=INDEXING)
        with lock.held(), LockRefresher(lock, self._order.lock_secs) as refresher:

            def tick() -> None:
                self._in_time()
                refresher.check()

            return self._work(bucket, store, lock.clock, lock, tick)

    def _in_time(self) -> None:
        if self._until.passed:
            raise RefusedError("--max-duration was over before all was listed and read: nothing is published. Raise it")

    def _work(
        self, bucket: Bucket, store: IndexStore, clock: ServerClock, lock: BucketLock | None, tick: Callable[[], None]
    ) -> int:
        found = inventory.look(bucket, store, self._order.page_secs, REQUEST_SECS, tick)
        self._strange = found.strange
        if found.unknown and not self._order.full:
            raise RefusedError(
                f"{found.unknown}: nothing is published. If no newer version works on this instance, give --full once"
            )
        with tempfile.TemporaryDirectory(prefix="hfbucket-index-", dir=self._order.temp_dir) as temp_dir:
            maker = IndexBuilder(self._named.name, bucket, store, self._order, until=self._until, tick=tick)
            built, made = maker.make(found, _now(clock), Path(temp_dir))
            self._made = made
            if lock is None:
                self._spare = _extent(spare(found, "", built.covers, _now(clock), self._limits))
                return exit_codes.COMPLETE
            pointer, same = maker.publish(found, built, lock, Path(temp_dir))
        content = maker.expect(pointer)
        self._made = replace(made, pointer=pointer, same=same)
        code = self._prune(bucket, found, pointer, content, lock)
        return self._keep(bucket, made.keys, code)

    # --- verification
    # ---------------------------------------------------------------------------------------------------

    def _verify(self, bucket: Bucket, store: IndexStore) -> int:
        settings = self._named.settings
        listing = store.list(Deadline.after(self._order.page_secs))
        writers = writers_of(listing)
        refresh, journal = refresh_secs(settings, writers, listing.calls), journal_secs(settings, writers)
        with tempfile.TemporaryDirectory(prefix="hfbucket-index-", dir=self._order.temp_dir) as temp_dir:
            verification = Verification(
                bucket,
                store,
                Path(temp_dir),
                page_secs=self._order.page_secs,
                request_secs=REQUEST_SECS,
                window_secs=2 * refresh + journal,
                tell_secs=_TELL * journal,
                each_page=self._in_time,
            )
            try:
                self._differences = found = verification.run()
            except MissingError as error:
                self._message = str(error)
                return exit_codes.FAILED
        return exit_codes.FAILED if found.total else exit_codes.COMPLETE

    # --- after publication
    # ----------------------------------------------------------------------------------------------

    @property
    def _limits(self) -> PruneLimits:
        return PruneLimits(self._order.keep, self._order.grace, self._until)

    def _prune(self, bucket: Bucket, found: IndexState, pointer: Pointer, content: ContentId, lock: BucketLock) -> int:
        """Delete unneeded snapshots and journals; a failure does not affect the published index."""
        present = bucket.handle.join(f"{SNAPSHOTS}/{pointer.snapshot}")
        items = list(spare(found, present, pointer.covers, lock.clock.earliest(), self._limits))
        self._spare = _extent(items)
        if not items:
            return exit_codes.COMPLETE
        end = prune(
            bucket, lock, iter(items), pointer=content, limits=self._limits, on_end=self._tally.add, stop=self._stop
        )
        left = self._summary(exit_codes.COMPLETE).unfinished.objects
        if end.why is not None:
            self._message = f"the index is published; old objects are left: {end.why}"
            return exit_code_of(end.why)
        if left:
            why = "told to stop" if end.stopped else "--max-duration was over"
            self._message = f"{why}; the index is published, and {left} old objects are left"
            return exit_codes.INTERRUPTED if end.stopped else exit_codes.FAILED
        return exit_codes.FAILED if self._tally.failures else exit_codes.COMPLETE

    def _keep(self, bucket: Bucket, keys: Extent, code: int) -> int:
        """Store the report in the bucket: the next build checks its listing against it."""
        try:
            report.keep(bucket, self._summary(code), keys, REQUEST_SECS)
        except HFBucketError as error:
            self._message = f"{self._message}; " if self._message else ""
            self._message += f"the report could not be kept in the bucket: {error}"
            return code or exit_codes.FAILED
        return code


def _extent(items: Iterable[Item]) -> Extent:
    extent = Extent()
    for item in items:
        extent = extent.plus(item.size)
    return extent


def _now(clock: ServerClock) -> datetime:
    """Return the Hub's time if known, for the age of a snapshot, whose times are the Hub's."""
    return clock.earliest() if clock.known else datetime.now(UTC)
