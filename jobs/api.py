"""The jobs as Python functions: cleanup, export and status of one instance, with the same code as the commands.

Nothing is printed to stdout, no signal handler is installed, logging is not configured. Cleanup and export only plan
unless `apply` is true. This module is public; the other modules of this package are not.
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
    """What a cleanup deletes, and within which limits; one request is for one instance.

    Attributes:
        lmcache_config: LMCache YAML of the engines.
        instance: Name of the instance in that YAML. There is no default: a deletion must name its instance.
        l2_adapter: For MP mode, instead of a YAML: the JSON that `lmcache server` takes.
        policy: The retention policy, or the path of a `retention.yaml`.
        max_delete: Refuse a plan that deletes more than this. None: 30 % of the objects.
        foreign: Whether objects that are not chunks are also deleted.
        accept_shrunk: Accept a listing that lacks a large part of what the last run left.
        without_heat: Decide by upload time even if reads are recorded.
        max_duration: End after this long; pauses that the Hub requests are waited out within it.
        parallel: Maximum number of batches at a time, up to 64.
        batch_size: Maximum number of objects per batch, up to 1000.
        local: Delete in this process, even if a Ray cluster is configured.
        address: Address of the Ray cluster, <host>:<port>. None: RAY_ADDRESS, or the cluster of the current Ray job.
        plan_dir: Directory in which plans are kept. None: temporary files.
        report: File for a JSON line per object, and the summary.
        metrics_textfile: File for metrics, read by Prometheus' textfile collector.
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
    """What an export copies, from where and to where.

    Attributes:
        source: Name of an instance, or path of a directory; a path contains a slash.
        destination: Instance or directory to copy to, written like `source`.
        lmcache_config: LMCache YAML that declares the instances.
        l2_adapters: JSON of MP-mode instances, as `lmcache server` takes it.
        select: Which chunks to copy; default: all. `hottest` is not supported.
        mode: `copy`: the Hub copies by hash. `stream`: bytes pass through this process. `auto`: `copy` where the Hub
            permits it.
            permits it.
            permits it.
        on_conflict: What to do with a chunk whose key holds other content at the destination.
        rename: Key prefixes to rewrite, each as `old=new`.
        without_manifest: Import files of a directory without a manifest that lists them.
        window_bytes: Maximum memory for chunks in transit, in bytes.
        max_duration: End after this long; pauses that the Hub requests are waited out within it.
        parallel: Maximum number of batches at a time, up to 64.
        local: Stream bytes through this process, even if a Ray cluster is configured.
        address: Address of the Ray cluster, <host>:<port>. None: RAY_ADDRESS, or the cluster of the current Ray job.
        plan_dir: Directory in which plans are kept. None: temporary files.
        report: File for a JSON line per chunk, and the summary.
        metrics_textfile: File for metrics, read by Prometheus' textfile collector.
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
    """Delete what the policy of an instance does not keep, as `python -m jobs cleanup` does.

    Args:
        request: What to delete, and within which limits.
        apply: Whether to delete. If false, only plan; the plan that the summary names can be applied later.
        stop: Event that another thread sets to stop the job in an orderly way; the summary then says what is left.

    Returns:
        The result of the job, also if some objects failed: check `exit_code` and `failures`.

    Raises:
        ConfigError: If the configuration or the policy is invalid.
        SafetyError: If the listing or the plan fails a safety check, or exceeds `max_delete`; nothing was deleted.
        HFBucketError: If the Hub or the Ray cluster cannot be used; nothing was deleted.
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
    """Copy chunks from one instance or directory to another, as `python -m jobs export` does; skip those already there.

    Args:
        request: What to copy, from where and to where.
        apply: Whether to copy, and to replace what `on_conflict` permits. If false, only plan.
        stop: Event that another thread sets to stop the job in an orderly way; the summary then says what is left.

    Returns:
        The result of the job, also if some chunks failed: check `exit_code`, `failures` and `conflicts`.

    Raises:
        ConfigError: If the configuration is invalid, or source and destination are the same.
        RefusedError: If nothing is selected, or the destination is not writable; nothing was copied.
        HFBucketError: If the Hub or the Ray cluster cannot be used; nothing was copied.
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
    """Return what an instance holds, its growth, and what the next cleanup would do, as `python -m jobs status` does.

    Args:
        lmcache_config: LMCache YAML of the engines.
        instance: Name of the instance in that YAML.
        l2_adapter: For MP mode, instead of a YAML: the JSON that `lmcache server` takes.
        policy: Policy of the next cleanup, or the path of a `retention.yaml`; None to leave the cleanup out.
        max_delete: Limits of that cleanup. None: 30 % of the objects.
        without_heat: Decide by upload time even if reads are recorded.

    Raises:
        ConfigError: If the configuration or the policy is invalid.
        HFBucketError: If the listing is incomplete.
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
    """Run a job, and write its report and metrics.

    Raise the error that ended the job if the job changed nothing; otherwise the summary reports it.
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
    """Return the named instance, and all instances of the configuration."""
    if config is not None and l2_adapter is not None:
        raise ConfigError("l2_adapter and lmcache_config name two sources; give one")
    names, adapters = (instance,) if instance else (), (l2_adapter,) if l2_adapter else ()
    named, every = chosen(config, names, adapters, everything=False)
    return named[0], every


def _policy(given: Policy | Path, instance: str) -> Policy:
    """Return the policy of an instance; refuse one that cannot delete anything."""
    if isinstance(given, Policy):
        return from_values(given.record(), "policy")
    return read(given, instance)


def _absolute(path: Path | None) -> str | None:
    return None if path is None else str(path.absolute())
