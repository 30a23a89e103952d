"""One job on one instance: plan → guards → apply → report, with the lock around what deletes."""

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
from jobs.report import OutcomeTally, exit_code_of, failure_of
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
    """What the options of a job do not say: how the command or program that asks for it goes on.

    Attributes:
        job: `cleanup`, `rm` or `mirror`.
        min_age: Nothing younger is deleted.
        until: The deadline of the whole command, of which this may be one instance of several.
        local: Whether to delete in this process.
        ask: Asks whether to carry out a plan; None if nobody can be asked, and nothing is deleted.
        show: Shows a plan.
        neighbours: Handles of all instances that the configuration names.
        source: Of a mirror, which is asked again before each batch, by this process: then `local` has to be true.
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
    """A job on one instance.

    Args:
        named: The instance.
        options: How it is to be done.
        context: The same, as far as options do not say it.
        file: Reports every object.
        stop: Whether to stop.

    Attributes:
        error: What ended the job, if an error did.
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
        """Plan what a selection wants, and carry it out if that was ordered."""
        return self._reported(lambda bucket: self._select(bucket, selection, wanted))

    def resume(self, plan: DeletionPlanFile) -> DeletionSummary:
        """Carry a plan out that was made before."""
        return self._reported(lambda bucket: self._resume(bucket, plan))

    def _reported(self, work: Callable[[Bucket], int]) -> DeletionSummary:
        """Do the work, and report however it ends."""
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
        """Refuse a plan that deletes what is of another instance by now."""
        classifier = Classifier(bucket, self._neighbours(bucket, foreign=True))
        for item in plan.items():
            if classifier.is_neighbour(item.path):
                raise RefusedError(
                    f"{item.path!r}, which the plan deletes, belongs to another instance of the configuration: nothing is "
                    "deleted. Make a new plan"
                )

    def _neighbours(self, bucket: Bucket, *, foreign: bool) -> tuple[BucketHandle, ...]:
        """The other instances, those of this bucket by its name here: what is below their prefixes is not deleted.

        Where objects that are not chunks may be deleted, the Hub is asked which of the other names lead to this bucket.

        Raises:
            HFBucketError: Nobody knows.
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
        """List, plan, and judge the plan.

        Raises:
            GuardError: It looks wrong.
            HeatUnknownError: It would go by what was read, and that cannot be told.
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
                self._stop.take_back()  # `ray.init` puts handlers of its own
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
        """Where batches are deleted: in this process, or on actors of the configured Ray cluster.

        Raises:
            HFBucketError: The Ray cluster cannot be joined, or its actors cannot have the instance's token.
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
        if end.why is not None:
            self._message = str(end.why)
            return exit_code_of(end.why)
        if end.stopped and unfinished:
            self._message = "told to stop"
            return exit_codes.INTERRUPTED
        if unfinished:
            self._message = f"--max-duration was over before all was done: {unfinished} objects are left"
            return exit_codes.FAILED
        return exit_codes.FAILED if self._tally.failures else exit_codes.COMPLETE

    def _left(self, bucket: Bucket) -> Extent:
        """The chunks that the instance has now: what an old plan knew of it is not less than what the last run left.

        Raises:
            HFBucketError: The last report cannot be read.
        """
        left = self._summary(exit_codes.COMPLETE).left
        last = report.last_run(bucket, REQUEST_SECS) if self._resumed else None
        return left if last is None else max(left, last.left.minus(self._chunks_gone), key=lambda one: one.objects)

    def _keep(self, bucket: Bucket, code: int) -> int:
        """Keep the report in the bucket: the next run judges its listing by it."""
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
    """Refuse a listing of more than the bucket says it has, before it or after: engines wrote while it was listed.

    Raises:
        GuardError: It is one.
        HFBucketError: The bucket does not say.
    """
    try:
        check_not_more(planning.shown, planning.seen, total)
    except SafetyError:
        check_not_more(planning.shown, planning.seen, max(total, files_in(bucket) or 0))
