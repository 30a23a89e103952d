"""`python -m jobs export`, and the application of its plans."""

from __future__ import annotations

from collections.abc import Mapping  # noqa: TC003 - Typer evaluates the annotations
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfbucket_plugin.config.instances import handles_of
from hfbucket_plugin.errors import ConfigError
from hfbucket_plugin.tools.options import Flag, flags_of, request_of, with_flags
from jobs.cli.session import CommandSession, asker, options_checked
from jobs.deletion.job import DeletionContext, DeletionJob
from jobs.deletion.plan import MIRROR
from jobs.deletion.report import DeletionSummary, ask_to_delete, show_plan
from jobs.export.bucket import InstanceEnd
from jobs.export.job import Export
from jobs.export.mirror import NotAtSource, check_mirror
from jobs.export.plan import EndpointRef, ExportOrder, ExportPlanFile, Renames
from jobs.export.planning import WantedChunks, prompts_of
from jobs.export.report import ask_to_replace
from jobs.export.resolve import EndpointSpec, check_endpoints, endpoint
from jobs.options import ExportOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hfbucket_plugin.config.instances import InstanceConfig
    from hfbucket_plugin.tools.signals import ShutdownSignal
    from jobs.cli.session import Works
    from jobs.deletion.plan import DeletionPlanFile
    from jobs.export.report import ExportSummary
    from jobs.options import ApplyOptions
    from jobs.report import ReportFile

# An export does not depend on reads: a limit of bytes keeps the newest chunks.
_FLAGS = [flag for flag in flags_of(ExportOptions) if flag.name != "--hottest"]


@with_flags(_FLAGS)
def export(*, given: Mapping[Flag, Any]) -> None:
    """Copy chunks from one instance or directory to another; what is there already is skipped. Without a choice, all.

    Exits 0 when done or only planned, 2 for a wrong command or configuration, 3 when some failed or are left, 4 when
    nothing was chosen or it was refused as a whole, 5 when told to stop. Running again moves only what is missing.
    """
    with options_checked():
        request = request_of(ExportOptions, given)
        works = _exporting(request)
    CommandSession(request).run(works)


def _exporting(request: ExportOptions) -> Works:
    """Return the jobs of an export: the copy, and the mirror if requested."""
    endpoints = (
        endpoint(request.source, "--from", request.lmcache_config, request.l2_adapter),
        endpoint(request.destination, "--to", request.lmcache_config, request.l2_adapter),
    )
    selection, renames = request.selection, Renames.parse(request.rename)
    check_endpoints(endpoints, renames, without_manifest=request.without_manifest)
    if request.mirror:
        check_mirror(selection, renames, directories=None in (endpoints[0].named, endpoints[1].named))
    until, local = request.deadline(), request.runs_here()
    order = ExportOrder(
        mode=request.mode,
        on_conflict=request.on_conflict,
        renames=renames,
        believe_files=request.without_manifest,
        dry_run=request.dry_run,
        yes=request.yes,
        ask=asker(ask_to_replace, request),
        until=until,
        plan_dir=request.plan_dir,
        local=local,
        address=request.address,
        parallel=request.parallel,
        window_bytes=request.window,
        config=request.config_name,
    )
    wanted = WantedChunks(selection, now(), prompts_of(selection, endpoints[0].named, request.lmcache_config))
    asked = selection.model_dump(mode="json", exclude_defaults=True)
    context = DeletionContext(MIRROR, request.min_age, until, local, asker(ask_to_delete, request), show_plan)
    done: list[ExportSummary] = []

    def copying(file: ReportFile, stop: ShutdownSignal) -> ExportSummary:
        done.append(Export(endpoints, order, file, stop).select(wanted, asked))
        return done[0]

    def mirroring(file: ReportFile, stop: ShutdownSignal) -> DeletionSummary | None:
        if not done or done[0].code:  # nothing is deleted unless everything was copied
            return None
        return _mirror(endpoints, request, context, file, stop, applied=done[0].applied)

    works: Works = [("the export", copying)]
    if request.mirror:
        works.append(("the mirror", mirroring))
    return works


def _mirror(
    endpoints: tuple[EndpointSpec, EndpointSpec],
    request: ExportOptions,
    context: DeletionContext,
    file: ReportFile,
    stop: ShutdownSignal,
    *,
    applied: bool,
) -> DeletionSummary:
    source, destination = endpoints[0].named, endpoints[1].named
    if source is None or destination is None:
        raise ConfigError("--mirror works between two instances")
    options = request.deletion()
    if not applied:  # the copy was only planned, so the deletion is only planned too
        options, context = options.model_copy(update={"yes": False}), replace(context, ask=None)
    with InstanceEnd(source.name, source.settings).opened() as end:
        selection = NotAtSource(end, request.selection, context.min_age)
        context = replace(context, local=True, source=end, neighbours=handles_of((source, destination)))
        job = DeletionJob(destination, options, context, file, stop)
        return job.select(selection, {"source": endpoints[0].place.record()})


def mirror_source(plan: DeletionPlanFile, config: Path | None, l2_adapters: Sequence[str]) -> InstanceConfig:
    """Return the source of a mirror whose plan is applied.

    Args:
        plan: The plan.
        config: Path of the LMCache YAML, if any.
        l2_adapters: JSON of MP adapters.

    Raises:
        ConfigError: If the plan names no source, or a place that differs from the configuration.
    """
    try:
        place = EndpointRef.from_record(plan.header.wanted.get("source"))
    except ValueError:
        place = EndpointRef(None, "")
    if place.instance is None:
        raise ConfigError(f"plan {str(plan.path)!r} of a mirror names no source: nothing is deleted. Make a new plan")
    found = endpoint(place.instance, "the plan's source", config, l2_adapters)
    if found.named is None or not found.place.same_as(place):
        raise ConfigError(f"the plan's source is {place.where}, and {place.name!r} is {found.place.where} now")
    return found.named


def resuming(plan: Path, request: ApplyOptions) -> Works:
    """Return the job that applies an export plan, or the rest of one.

    Args:
        plan: The plan.
        request: Options of the job. Without a configuration, the one that the plan names is read.

    Raises:
        ConfigError: If the plan or the configuration is invalid.
        RefusedError: If another user may have written the plan.
    """
    opened = ExportPlanFile.open(plan, ours=True)
    header = opened.header
    config = request.lmcache_config or (None if header.config is None else Path(header.config))
    source, destination = (
        endpoint(place.instance or place.where, option, config, request.l2_adapter)
        for place, option in ((header.source, "the plan's source"), (header.destination, "the plan's destination"))
    )
    order = ExportOrder(
        mode=header.mode,
        renames=header.renames,
        believe_files=header.believe_files,
        dry_run=request.dry_run,
        yes=request.yes,
        ask=asker(ask_to_replace, request),
        until=request.deadline(),
        local=request.runs_here(),
        address=request.address,
        parallel=request.parallel,
    )

    def work(file: ReportFile, stop: ShutdownSignal) -> ExportSummary:
        return Export((source, destination), order, file, stop).resume(opened)

    return [("the export", work)]


def now() -> datetime:
    """Return the local time, from which `--since` counts back if no Hub provides the time."""
    return datetime.now(UTC)
