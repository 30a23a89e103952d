"""The jobs for programs: a cleanup, an export and the status of one instance, by the same code as the commands.

Nothing is printed to stdout, no signal handler is installed, logging is not configured. What deletes or copies only plans, unless
`apply` is true. Public; the other modules of this package are not.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path  # noqa: TC003 - pydantic evaluates the annotations
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from hfbucket_plugin.config.instances import handles_of
from hfbucket_plugin.core import texts
from hfbucket_plugin.core.deadline import Deadline, patience
from hfbucket_plugin.core.files import expect_apart
from hfbucket_plugin.errors import ConfigError
from hfbucket_plugin.hub.connect import LISTING_SECS, PAGE_SECS, REQUEST_SECS, opened
from hfbucket_plugin.tools import exit_codes
from hfbucket_plugin.tools.selection import Selection
from hfbucket_plugin.tools.signals import ExternalStop
from jobs.batch.apply import in_process
from jobs.deletion.guards import MaxDelete
from jobs.deletion.job import DeletionContext, DeletionJob
from jobs.deletion.select import ByPolicy
from jobs.export.job import Export
from jobs.export.plan import ExportOrder, OnConflict, Renames
from jobs.export.planning import WantedChunks, prompts_of
from jobs.export.resolve import check_endpoints, endpoint
from jobs.options import DeletionOptions, chosen
from jobs.report import ReportFile, write_metrics
from jobs.retention.policy import Policy, from_values, read
from jobs.status.status import examine

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Sequence

    from hfbucket_plugin.config.instances import InstanceConfig
    from jobs.deletion.report import DeletionSummary
    from jobs.export.report import ExportSummary
    from jobs.status.status import Status

_Summary = TypeVar("_Summary", "DeletionSummary", "ExportSummary")
_Batches = Annotated[int, Field(ge=1, le=64)]


class _Request(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    lmcache_config: Path | None = None
    max_duration: Annotated[timedelta, Field(gt=timedelta(0))] = timedelta(hours=1)
    parallel: _Batches = 4
    local: bool = False
    address: str | None = None
    plan_dir: Path | None = None
    report: Path | None = None
    metrics_textfile: Path | None = None


class CleanupRequest(_Request):
    """What a cleanup is to delete, and within which limits. One instance; call again for another.

    Attributes:
        lmcache_config: The LMCache YAML of the engines.
        instance: The instance in it. What deletes goes by no default: it has to be named.
        l2_adapter: In place of a YAML, for MP mode: the JSON that `lmcache server` takes.
        policy: What is kept, or the `retention.yaml` that says so.
        max_delete: Refuse a plan that deletes more. None: 30 % of the objects.
        foreign: Whether objects that are not chunks are deleted too.
        accept_shrunk: Believe a listing that lacks much of what was there before.
        without_heat: Go by when objects were put, even if reads are recorded.
        max_duration: End after this; pauses that the Hub asks for are waited out within it.
        parallel: Most batches at one time, up to 64.
        batch_size: Most objects of a batch, up to 1000.
        local: Delete in this process, even if a Ray cluster is configured.
        address: The Ray cluster, <host>:<port>. None: RAY_ADDRESS, or that of the job.
        plan_dir: Keep plans here. None: temporary files.
        report: Write a JSON line for every object, and the summary.
        metrics_textfile: Write metrics for Prometheus' textfile collector.
    """

    instance: str | None = None
    l2_adapter: str | None = None
    policy: Policy | Path
    max_delete: MaxDelete | None = None
    foreign: bool = False
    accept_shrunk: bool = False
    without_heat: bool = False
    batch_size: Annotated[int, Field(ge=1, le=1000)] = 1000


_SHARED = DeletionOptions.model_fields.keys() & CleanupRequest.model_fields.keys() - {"foreign"}


class ExportRequest(_Request):
    """What an export is to copy, from where and to where.

    Attributes:
        source: An instance, or a directory, which has a slash in it.
        destination: The same: where chunks go.
        lmcache_config: The LMCache YAML that declares the instances.
        l2_adapters: The JSON of instances of MP mode, as `lmcache server` takes it.
        select: Which chunks; all by default. `hottest` is not supported.
        mode: `copy`: the Hub copies by hash. `stream`: bytes go through here. `auto`: what the Hub permits.
        on_conflict: What becomes of a chunk under whose key the destination has something else.
        rename: Rewrite the start of keys, each as `old=new`.
        without_manifest: Import files of a directory that no manifest vouches for.
        window_bytes: Most memory that chunks in transit take.
        max_duration: End after this; pauses that the Hub asks for are waited out within it.
        parallel: Most batches at one time, up to 64.
        local: Bytes go through this process, even if a Ray cluster is configured.
        address: The Ray cluster, <host>:<port>. None: RAY_ADDRESS, or that of the job.
        plan_dir: Keep plans here. None: temporary files.
        report: Write a JSON line for every chunk, and the summary.
        metrics_textfile: Write metrics for Prometheus' textfile collector.
    """

    source: str
    destination: str
    l2_adapters: tuple[str, ...] = ()
    select: Selection = Field(default_factory=lambda: Selection.model_validate({}))
    mode: Literal["auto", "copy", "stream"] = "auto"
    on_conflict: Literal["skip", "newer", "overwrite"] = "skip"
    rename: tuple[str, ...] = ()
    without_manifest: bool = False
    window_bytes: Annotated[int, Field(gt=0)] = 512 * 1024 * 1024


@texts.hide_in_errors()
def run_cleanup(
    request: CleanupRequest, *, apply: bool = False, stop: threading.Event | None = None
) -> DeletionSummary:
    """Delete what the policy of an instance releases, as `python -m jobs cleanup` does.

    Args:
        request: What to delete, and within which limits.
        apply: Delete. Otherwise only plan: the plan that the summary names can be applied later.
        stop: Set it, from another thread, to stop in good order: the summary then tells what is left.

    Returns:
        What happened; look at `exit_code` and `failures`.

    Raises:
        ConfigError: The configuration or the policy is wrong.
        SafetyError: The listing or the plan looks wrong, or exceeds `max_delete`; nothing was deleted.
        HFBucketError: The Hub, or the Ray cluster, could not be used; nothing was deleted.
    """
    named, others = _instance(request.lmcache_config, request.instance, request.l2_adapter)
    policy = _policy(request.policy, named.name)
    shared = {name: getattr(request, name) for name in _SHARED if getattr(request, name) is not None}
    options = DeletionOptions(**shared, yes=apply, foreign="delete" if request.foreign else "keep")
    here = options.runs_here(at_once=apply)
    context = DeletionContext("cleanup", policy.min_age, options.deadline(), here, neighbours=handles_of(others))
    file = None if isinstance(request.policy, Policy) else request.policy

    def work(report: ReportFile, switch: ExternalStop) -> tuple[DeletionSummary, Exception | None]:
        job = DeletionJob(named, options, context, report, switch)
        return job.select(ByPolicy(policy), policy.record()), job.error

    return _run(request, [("policy", file)], work, stop)


@texts.hide_in_errors()
def run_export(request: ExportRequest, *, apply: bool = False, stop: threading.Event | None = None) -> ExportSummary:
    """Copy chunks from one instance or directory to another, as `python -m jobs export` does; what is there is skipped.

    Args:
        request: What to copy, from where and to where.
        apply: Copy, and replace what `on_conflict` lets replace. Otherwise only plan.
        stop: Set it, from another thread, to stop in good order: the summary then tells what is left.

    Returns:
        What happened; look at `exit_code`, `failures` and `conflicts`.

    Raises:
        ConfigError: The configuration is wrong, or source and destination are the same.
        RefusedError: Nothing is selected, or the destination may not be written; nothing was copied.
        HFBucketError: The Hub, or the Ray cluster, could not be used; nothing was copied.
    """
    endpoints = (
        endpoint(request.source, "--from", request.lmcache_config, request.l2_adapters),
        endpoint(request.destination, "--to", request.lmcache_config, request.l2_adapters),
    )
    renames, selection = Renames.parse(list(request.rename)), request.select
    check_endpoints(endpoints, renames, without_manifest=request.without_manifest)
    if selection.hottest is not None:
        raise ConfigError("select.hottest: an export does not know which chunks are read; use newest")
    order = ExportOrder(
        mode=request.mode,
        on_conflict=OnConflict(request.on_conflict),
        renames=renames,
        believe_files=request.without_manifest,
        dry_run=not apply,
        yes=apply,
        quiet=True,
        until=Deadline.after(request.max_duration.total_seconds()),
        plan_dir=request.plan_dir,
        local=in_process(request.address, local=request.local),
        address=request.address,
        parallel=request.parallel,
        window_bytes=request.window_bytes,
        config=_absolute(request.lmcache_config),
    )
    wanted = WantedChunks(
        selection, datetime.now(UTC), prompts_of(selection, endpoints[0].named, request.lmcache_config)
    )

    def work(report: ReportFile, switch: ExternalStop) -> tuple[ExportSummary, Exception | None]:
        job = Export(endpoints, order, report, switch)
        return job.select(wanted, selection.model_dump(mode="json", exclude_defaults=True)), job.error

    inputs = [("prompts", selection.prompts), *(("keys_from", path) for path in selection.keys_from)]
    return _run(request, inputs, work, stop)


@texts.hide_in_errors()
def read_status(
    *,
    lmcache_config: Path | None = None,
    instance: str | None = None,
    l2_adapter: str | None = None,
    policy: Policy | Path | None = None,
    max_delete: MaxDelete | None = None,
    without_heat: bool = False,
) -> Status:
    """Return what an instance holds, how it grew, and what the next cleanup would do, as `python -m jobs status` shows it.

    Args:
        lmcache_config: The LMCache YAML of the engines.
        instance: The instance in it.
        l2_adapter: In place of a YAML, for MP mode: the JSON that `lmcache server` takes.
        policy: What the next cleanup will go by, or the `retention.yaml` that says so; None to leave that out.
        max_delete: What that cleanup may delete. None: 30 % of the objects.
        without_heat: Go by when objects were put, even if reads are recorded.

    Raises:
        ConfigError: The configuration or the policy is wrong.
        HFBucketError: The listing is not complete.
    """
    named, _ = _instance(lmcache_config, instance, l2_adapter)
    with patience(Deadline.after(LISTING_SECS)), opened(named, REQUEST_SECS) as bucket:
        return examine(
            named.name,
            bucket,
            None if policy is None else _policy(policy, named.name),
            max_delete or MaxDelete.parse(()),
            request_secs=REQUEST_SECS,
            page_secs=PAGE_SECS,
            without_heat=without_heat,
        )


def _run(
    request: _Request,
    inputs: Sequence[tuple[str, Path | None]],
    work: Callable[[ReportFile, ExternalStop], tuple[_Summary, Exception | None]],
    stop: threading.Event | None,
) -> _Summary:
    """Do a job with its report and metrics.

    An error is raised where the job changed nothing; else the summary tells of it.
    """
    expect_apart(
        [("report", request.report), ("metrics_textfile", request.metrics_textfile)],
        [("lmcache_config", request.lmcache_config), *inputs],
    )
    switch = ExternalStop(stop)
    with contextlib.closing(ReportFile(request.report)) as file, switch.listening():
        summary, error = work(file, switch)
    if file.problem:
        code = exit_codes.worst([summary.code, exit_codes.FAILED])
        summary = replace(summary, code=code, message="; ".join(filter(None, (summary.message, file.problem))))
    if request.metrics_textfile is not None:
        write_metrics(request.metrics_textfile, [summary], time.time())
    if error is not None and not summary.ended:
        raise error
    failures = tuple(texts.hidden(one) for one in summary.failures)
    return replace(summary, message=texts.shown(summary.message), failures=failures)


def _instance(
    config: Path | None, instance: str | None, l2_adapter: str | None
) -> tuple[InstanceConfig, list[InstanceConfig]]:
    """The one instance that is named, and all of the configuration."""
    if config is not None and l2_adapter is not None:
        raise ConfigError("l2_adapter and lmcache_config name two sources; give one")
    names, adapters = (instance,) if instance else (), (l2_adapter,) if l2_adapter else ()
    named, every = chosen(config, names, adapters, everything=False)
    return named[0], every


def _policy(given: Policy | Path, instance: str) -> Policy:
    """A policy that deletes something."""
    if isinstance(given, Policy):
        return from_values(given.record(), "policy")
    return read(given, instance)


def _absolute(path: Path | None) -> str | None:
    return None if path is None else str(path.absolute())
