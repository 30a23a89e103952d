"""One deletion job on one instance: plan → guards → apply → report, with the lock held around every delete."""

from __future__ import annotations

import contextlib
import secrets
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from hfbucket_plugin.core.deadline import Deadline, patience
from hfbucket_plugin.core.keys import same_endpoint
from hfbucket_plugin.core.units import Extent
from hfbucket_plugin.errors import (
    ConfigError,
    HFBucketError,
    Interrupted,
    RefusedError,
    SafetyError,
)
from hfbucket_plugin.hub.connect import PAGE_SECS, REQUEST_SECS, files_in, opened
from hfbucket_plugin.index.notifier import notifying
from hfbucket_plugin.tools import exit_codes
from hfbucket_plugin.tools.inventory import Classifier
from hfbucket_plugin.tools.plan_file import plan_dir, remove_if_temporary
from jobs import report
from jobs.batch.apply import Applier, Executor
from jobs.batch.model import Outcome, ReferenceEndpoint
from jobs.deletion.attempt import in_process
from jobs.deletion.guards import check_listing, check_not_more
from jobs.deletion.plan import MIRROR, DeletionHeader, DeletionPlanFile, DeletionPlanWriter
from jobs.deletion.planning import Planning
from jobs.deletion.recheck import rechecking
from jobs.deletion.report import DeletionSummary, header_record
from jobs.lock.clock import ServerClock, ask
from jobs.lock.lock import BucketLock
from jobs.report import OutcomeTally, failure_of, verdict_of
from jobs.retention.access import NOT_ASKED, AccessStats, open_access_stats

if TYPE_CHECKING:
    from collections.abc import Callable

    from hfbucket_plugin.config.instances import InstanceConfig
    from hfbucket_plugin.core.keys import BucketHandle
    from hfbucket_plugin.hub.bucket import Bucket
    from hfbucket_plugin.index.format import Pointer
    from hfbucket_plugin.index.notifier import IndexNotifier
    from hfbucket_plugin.tools.signals import ShutdownSignal
    from jobs.batch.apply import ApplyResult
    from jobs.batch.model import ItemOutcome
    from jobs.deletion.plan import Item
    from jobs.deletion.planning import CandidateSource
    from jobs.options import DeletionOptions
    from jobs.report import ReportFile


_SKEW: Final = timedelta(minutes=1)


@dataclass(frozen=True, slots=True)
class DeletionContext:
    """Context of a job beyond its options, set by the command or program that runs it.

    Attributes:
        job: `cleanup`, `rm` or `mirror`.
        min_age: Minimum age of the objects to delete.
        until: Deadline of the whole command, which may cover several instances.
        local: Whether to delete in this process.
        ask: Asks whether to apply a plan; None if there is nobody to ask, and nothing is deleted.
        show: Shows a plan.
        neighbours: Handles of all instances in the configuration.
        source: Source of a mirror, which is looked up before each batch by this process: requires `local`.
    """

    job: str
    min_age: timedelta
    until: Deadline
    local: bool
    ask: Callable[[DeletionPlanFile], bool] | None = None
    show: Callable[[DeletionPlanFile], None] = field(default=lambda _: None)
    neighbours: tuple[BucketHandle, ...] = ()
    source: ReferenceEndpoint | None = None


class DeletionJob:
    """Deletion job on one instance.

    Args:
        named: The instance.
        options: Options of the job.
        context: Context of the job beyond its options.
        file: Report file, with a line for every object.
        stop: Signal that requests a stop.

    Attributes:
        error: Error that ended the job, if any.
    """

    def __init__(
        self,
        named: InstanceConfig,
        options: DeletionOptions,
        context: DeletionContext,
        file: ReportFile,
        stop: ShutdownSignal,
    ) -> None:
        self._name = context.job
        self._named = named
        self._options = options
        self._context = context
        self._file = file
        self._stop = stop
        self._started = time.monotonic()
        self._until = context.until
        self._plan: DeletionPlanFile | None = None
        self._applied = options.unasked
        self._tally = OutcomeTally(file)
        self._chunks_gone = Extent()
        self._notifier: IndexNotifier | None = None
        self._planned_by: Pointer | None = None
        self._resumed = False
        self._message = ""
        self.error: Exception | None = None

    def select(self, selection: CandidateSource, wanted: dict[str, Any]) -> DeletionSummary:
        """Plan the deletion of a selection, and apply the plan if requested."""
        return self._reported(lambda bucket: self._select(bucket, selection, wanted))

    def resume(self, plan: DeletionPlanFile) -> DeletionSummary:
        """Apply an existing plan."""
        return self._reported(lambda bucket: self._resume(bucket, plan))

    def _reported(self, work: Callable[[Bucket], int]) -> DeletionSummary:
        """Run the work, and report its end, also after an error."""
        try:
            with patience(self._until), opened(self._named, REQUEST_SECS) as bucket:
                code = work(bucket)
        except (Interrupted, Exception) as error:  # noqa: BLE001 - each instance is done whatever becomes of the others
            self.error = error if isinstance(error, Exception) else None
            code, message = failure_of(error, self._stop, self._until)
            self._message = message or self._message
        summary = self._summary(code)
        self._file.write(summary.record())
        if code == exit_codes.COMPLETE and self._applied and self._plan is not None:
            remove_if_temporary(self._plan.path)
        return summary

    def _summary(self, code: int) -> DeletionSummary:
        return DeletionSummary(
            self._name,
            self._named.name,
            str(self._named.settings.bucket_handle),
            code,
            self._applied,
            self._message,
            self._plan,
            dict(self._tally.ended),
            self._chunks_gone,
            tuple(self._tally.failures),
            time.monotonic() - self._started,
        )

    def _select(self, bucket: Bucket, selection: CandidateSource, wanted: dict[str, Any]) -> int:
        if self._options.unasked:
            with self._lock(bucket).held() as lock:
                plan = self._make(bucket, lock.clock, selection, wanted, tick=lock.keep_planning)
                return self._apply(bucket, lock, plan)
        clock = ServerClock()
        ask(bucket, clock, REQUEST_SECS)
        plan = self._make(bucket, clock, selection, wanted, tick=lambda: None)
        if self._context.ask is None or not plan.left.objects or not self._context.ask(plan):
            return exit_codes.COMPLETE
        self._applied = True
        with self._lock(bucket).held() as lock:
            return self._apply(bucket, lock, plan)

    def _resume(self, bucket: Bucket, plan: DeletionPlanFile) -> int:
        self._plan, self._resumed = plan, True
        self._name = plan.header.job
        endpoint = self._named.settings.endpoint
        if plan.header.bucket != bucket.handle or not same_endpoint(plan.header.endpoint, endpoint):
            raise ConfigError(
                f"plan {str(plan.path)!r} is for {plan.header.bucket} of {plan.header.endpoint}, and {self._named.name!r} is "
                f"{bucket.handle} of {endpoint}"
            )
        self._file.write(header_record(plan.header))
        self._context.show(plan)
        if plan.header.foreign:
            self._expect_no_neighbour(bucket, plan)
        for limits in (plan.header.max_delete, self._options.max_delete):
            plan.check(limits)
        if not self._options.unasked and (self._context.ask is None or not self._context.ask(plan)):
            return exit_codes.COMPLETE
        self._applied = True
        with self._lock(bucket).held() as lock:
            return self._apply(bucket, lock, plan)

    def _expect_no_neighbour(self, bucket: Bucket, plan: DeletionPlanFile) -> None:
        """Refuse a plan that deletes objects which now belong to another instance."""
        classifier = Classifier(bucket, self._neighbours(bucket, foreign=True))
        for item in plan.items():
            if classifier.is_neighbour(item.path):
                raise RefusedError(
                    f"{item.path!r}, which the plan deletes, belongs to another instance of the configuration: nothing is "
                    "deleted. Make a new plan"
                )

    def _neighbours(self, bucket: Bucket, *, foreign: bool) -> tuple[BucketHandle, ...]:
        """Return the other instances of this bucket, named as here; nothing below their prefixes is deleted.

        If foreign objects may be deleted, also ask the Hub which other bucket names resolve to this bucket.

        Raises:
            HFBucketError: If the Hub does not answer.
        """
        own, others = bucket.handle, self._context.neighbours
        if not foreign or all(other.same_bucket(own) for other in others):
            return others
        deadline = Deadline.patient(REQUEST_SECS)
        settled = bucket.settled(own, deadline)
        buckets = {other.bucket_id.casefold(): other for other in others}
        ours = {name for name, other in buckets.items() if bucket.settled(other, deadline).same_bucket(settled)}
        return tuple(other.within(own.bucket_id) if other.bucket_id.casefold() in ours else other for other in others)

    def _lock(self, bucket: Bucket) -> BucketLock:
        if not self._named.settings.writes:
            raise RefusedError(f"role is {self._named.settings.role}, so nothing is deleted through this instance")
        return BucketLock(bucket, self._name, seconds=self._options.lock_secs, request_secs=REQUEST_SECS)

    def _make(
        self,
        bucket: Bucket,
        clock: ServerClock,
        selection: CandidateSource,
        wanted: dict[str, Any],
        *,
        tick: Callable[[], None],
    ) -> DeletionPlanFile:
        """List the instance, plan, and check the plan.

        Raises:
            GuardError: If a safety check fails.
            HeatUnknownError: If the plan depends on reads, and these are not known.
        """
        now = clock.earliest() if clock.known else datetime.now(UTC)
        with self._open_access(bucket, now, needed=selection.needs_access) as heat:
            return self._make_by(bucket, clock, selection, wanted, now=now, heat=heat, tick=tick)

    def _open_access(
        self, bucket: Bucket, now: datetime, *, needed: bool
    ) -> contextlib.AbstractContextManager[AccessStats]:
        if not needed:
            return contextlib.nullcontext(NOT_ASKED)
        return open_access_stats(bucket, now, REQUEST_SECS, without=self._options.without_heat)

    def _make_by(
        self,
        bucket: Bucket,
        clock: ServerClock,
        selection: CandidateSource,
        wanted: dict[str, Any],
        *,
        now: datetime,
        heat: AccessStats,
        tick: Callable[[], None],
    ) -> DeletionPlanFile:
        options = self._options
        self._planned_by = None if heat.table is None else heat.table.pointer
        header = DeletionHeader(
            self._name,
            self._named.name,
            bucket.handle,
            self._named.settings.endpoint,
            now,
            "hub" if clock.known else "local",
            self._context.min_age,
            options.max_delete,
            options.deletes_foreign,
            options.config_name,
            wanted,
            heat.record(),
        )
        self._file.write(header_record(header))
        last = None if options.accept_shrunk else report.last_run(bucket, REQUEST_SECS)
        total = None if options.accept_shrunk else files_in(bucket)
        in_bucket = None if bucket.handle.prefix else total
        path = plan_dir(options.plan_dir) / _file_name(header)

        def in_time() -> None:
            if self._until.passed:
                raise RefusedError("--max-duration was over before all was listed: nothing is deleted")

        def each() -> None:
            in_time()
            tick()

        with DeletionPlanWriter(path, header) as writer:
            planning = Planning(header, selection, writer, each, heat)
            page_secs = PAGE_SECS
            neighbours = self._neighbours(bucket, foreign=options.deletes_foreign)
            planning.run(Classifier(bucket, neighbours).walk(page_secs, in_time))
            left = None if last is None else last.left
            if total is not None:
                _expect_not_more(bucket, planning, total)
            check_listing(planning.listed, planning.seen, in_bucket=in_bucket, last=left, foreign=planning.foreign)
            planning.finish()
        self._plan = plan = DeletionPlanFile.open(path)
        self._context.show(plan)
        plan.check(options.max_delete)
        return plan

    def _apply(self, bucket: Bucket, lock: BucketLock, plan: DeletionPlanFile) -> int:
        options = self._options
        if self._name == MIRROR:
            if self._context.source is None:
                raise RefusedError("the source of the mirror is not known: nothing is deleted")
            self._context.source.expect_chunks()
        now = lock.clock.earliest()
        if plan.header.made_at > lock.clock.latest() + _SKEW:
            raise RefusedError(
                f"the plan was made at {plan.header.made_at.isoformat(timespec='seconds')} by a clock that is ahead of the "
                f"Hub's ({now.isoformat(timespec='seconds')}), so its ages are wrong: nothing is deleted. Make a new plan"
            )
        with (
            self._stop.orderly(),
            notifying(bucket) as notifier,
            rechecking(bucket, plan.header, self._planned_by, now, self._count, without=options.without_heat) as unused,
            contextlib.closing(self._executor(bucket)) as executor,
        ):
            self._notifier = notifier
            if not self._context.local:
                self._stop.take_back()  # `ray.init` installs its own signal handlers
            applier = Applier(
                executor,
                confirm=lock.confirm,
                not_after=now - max(plan.header.min_age, self._context.min_age),
                on_end=self._count,
                stop=self._stop,
                until=self._until,
                batch_size=self._options.batch_size,
                lock_end=lambda: lock.stops,
                keep=lock.keep,
            )
            try:
                end = applier.run(unused(plan.items()))
            finally:
                if applier.undrained:
                    lock.leave()
            code = self._judge(end)
            if not isinstance(end.why, RefusedError):
                code = self._keep(bucket, code)
        return code

    def _executor(self, bucket: Bucket) -> Executor[Item]:
        """Return the executor of deletes: this process, or actors of the configured Ray cluster.

        Raises:
            HFBucketError: If the Ray cluster cannot be joined, or its actors have no token for the instance.
        """
        options = self._options
        if self._context.local:
            return in_process(bucket, options.parallel, self._context.source)
        from jobs.deletion.ray import DeletionActors  # noqa: PLC0415 - Ray takes a second to import

        return DeletionActors(self._named, options.parallel, options.address)

    def _count(self, ended: ItemOutcome[Item]) -> None:
        if self._notifier is not None and ended.outcome is Outcome.DELETED:
            self._notifier.did(self._named.settings.bucket_handle.relative(ended.item.path) or "", None)
        if ended.outcome in (Outcome.DELETED, Outcome.GONE) and ended.item.is_chunk:
            self._chunks_gone = self._chunks_gone.plus(ended.item.size)
        self._tally.add(ended)

    def _judge(self, end: ApplyResult) -> int:
        unfinished = self._summary(exit_codes.COMPLETE).unfinished.objects
        code, message = verdict_of(end, unfinished, "objects", failures=bool(self._tally.failures))
        self._message = message or self._message
        return code

    def _left(self, bucket: Bucket) -> Extent:
        """Return the chunks that the instance holds now, as a floor for the outdated count of an old plan.

        Raises:
            HFBucketError: If the last report cannot be read.
        """
        left = self._summary(exit_codes.COMPLETE).left
        last = report.last_run(bucket, REQUEST_SECS) if self._resumed else None
        return left if last is None else max(left, last.left.minus(self._chunks_gone), key=lambda one: one.objects)

    def _keep(self, bucket: Bucket, code: int) -> int:
        """Store the report in the bucket: the next run checks its listing against it."""
        try:
            report.keep(bucket, self._summary(code), self._left(bucket), REQUEST_SECS)
        except HFBucketError as error:
            self._message = f"{self._message}; " if self._message else ""
            self._message += f"the report could not be kept in the bucket: {error}"
            return code or exit_codes.FAILED
        return code


def _file_name(header: DeletionHeader) -> str:
    safe = "".join(char if char.isalnum() or char in "._-" else "_" for char in header.instance)
    return f"{header.job}-{safe}-{header.made_at:%Y%m%dT%H%M%S}-{secrets.token_hex(4)}.jsonl"


def _expect_not_more(bucket: Bucket, planning: Planning, total: int) -> None:
    """Refuse a listing with more objects than the bucket reports before or after it: engines write during a listing.

    Raises:
        GuardError: If the listing has too many objects.
        HFBucketError: If the bucket's object count cannot be read.
    """
    try:
        check_not_more(planning.shown, planning.seen, total)
    except SafetyError:
        check_not_more(planning.shown, planning.seen, max(total, files_in(bucket) or 0))
