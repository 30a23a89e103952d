"""`python -m jobs export`, and the carrying out of its plans."""

from __future__ import annotations

from collections.abc import Mapping  # noqa: TC003 - Typer evaluates the annotations
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, NoReturn

import typer

from hfbucket_plugin.config.instances import handles_of
from hfbucket_plugin.core.deadline import Deadline
from hfbucket_plugin.core.units import parse_bytes
from hfbucket_plugin.errors import ConfigError
from hfbucket_plugin.tools import console
from hfbucket_plugin.tools.options import Flag, with_flags
from jobs.batch.apply import in_process
from jobs.cli import options
from jobs.deletion import guards
from jobs.deletion.job import DeletionJob
from jobs.deletion.plan import MIRROR, DeletionOrder
from jobs.deletion.report import ask_to_delete, show_plan
from jobs.export.bucket import InstanceEnd
from jobs.export.job import Export
from jobs.export.mirror import NotAtSource, check_mirror
from jobs.export.plan import EndpointRef, ExportOrder, ExportPlanFile, OnConflict, Renames
from jobs.export.planning import CHOOSING, WantedChunks, prompts_of, selection_of
from jobs.export.report import ask_to_replace
from jobs.export.resolve import EndpointSpec, check_endpoints, endpoint
from jobs.session import CommandSession, options_checked

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hfbucket_plugin.config.instances import InstanceConfig
    from hfbucket_plugin.tools.selection import Selection
    from hfbucket_plugin.tools.signals import ShutdownSignal
    from jobs.deletion.plan import DeletionPlanFile as DeletePlan
    from jobs.deletion.report import DeletionSummary
    from jobs.export.report import ExportSummary
    from jobs.report import ReportFile
    from jobs.session import Work

From = Annotated[
    str, typer.Option("--from", metavar="NAME|DIR/", help="An instance, or a directory, which has a slash in it.")
]
To = Annotated[str, typer.Option("--to", metavar="NAME|DIR/", help="The same: where chunks go.")]
Mode = Annotated[
    str,
    typer.Option(
        metavar="auto|copy|stream",
        help="copy: the Hub copies by hash, no bytes move. stream: bytes go through here. auto: what the Hub permits.",
    ),
]
Conflict = Annotated[
    str,
    typer.Option(
        "--on-conflict",
        metavar="skip|newer|overwrite",
        help="What becomes of a chunk under whose key the destination has something else. It is named in any case.",
    ),
]
RenameFlag = Annotated[
    list[str] | None,
    typer.Option("--rename", metavar="OLD=NEW", help="Rewrite the start of keys: old-model@=new-model@. Repeatable."),
]
Mirror = Annotated[
    bool,
    typer.Option(
        "--mirror", help="Then delete chunks of the choice that the source does not have, by the guards of cleanup."
    ),
]
WithoutManifest = Annotated[
    bool, typer.Option("--without-manifest", help="Import files of a directory that no manifest vouches for.")
]
TaskLimits = Annotated[str, typer.Option(metavar="SIZE", help="Most memory that chunks on their way take.")]
ExportYes = Annotated[
    bool, typer.Option("--yes", help="Replace and delete without asking. What only adds needs no order.")
]
ExportLocal = Annotated[
    bool, typer.Option("--local", help="Bytes go through this process, whatever Ray cluster is configured.")
]
ExportParallel = Annotated[int, typer.Option(min=1, max=64, help="Most batches at one time.")]

_WINDOW: Final = "512MiB"


@with_flags(CHOOSING)
def export(
    *,
    given: Mapping[Flag, Any],
    source: From,
    destination: To,
    lmcache_config: options.LMCacheConfig = None,
    l2_adapters: options.L2Adapters = None,
    mode: Mode = "auto",
    on_conflict: Conflict = "skip",
    rename: RenameFlag = None,
    mirror: Mirror = False,
    without_manifest: WithoutManifest = False,
    yes: ExportYes = False,
    dry_run: options.DryRun = False,
    max_delete: options.MaxDelete = None,
    min_age: options.MinAge = options.DEFAULT_MIN_AGE,
    accept_shrunk: options.AcceptShrunk = False,
    max_duration: options.MaxDuration = options.DEFAULT_DURATION,
    lock_lifetime: options.LockLifetime = options.DEFAULT_LOCK,
    parallel: ExportParallel = 4,
    window: TaskLimits = _WINDOW,
    local: ExportLocal = False,
    address: options.Address = None,
    plan_dir: options.PlanDir = None,
    report: options.Report = None,
    metrics_textfile: options.MetricsFile = None,
) -> None:
    """Copy chunks from one instance or directory to another; what is there already is skipped. Without a choice, all.

    Exits 0 when done or only planned, 2 for a wrong command or configuration, 3 when some failed or are left, 4 when
    nothing was chosen or it was refused as a whole, 5 when told to stop. Running again moves only what is missing.
    """
    with options_checked():
        adapters = l2_adapters or []
        endpoints = (
            endpoint(source, "--from", lmcache_config, adapters),
            endpoint(destination, "--to", lmcache_config, adapters),
        )
        renames, selection = Renames.parse(rename or []), selection_of(given)
        check_endpoints(endpoints, renames, without_manifest=without_manifest)
        if mirror:
            check_mirror(selection, renames, directories=None in (endpoints[0].named, endpoints[1].named))
        order = ExportOrder(
            mode=_one_of(mode, "--mode", ("auto", "copy", "stream")),
            on_conflict=OnConflict(_one_of(on_conflict, "--on-conflict", tuple(OnConflict))),
            renames=renames,
            believe_files=without_manifest,
            dry_run=dry_run,
            yes=yes,
            ask=ask_to_replace if console.at_terminal() and not dry_run else None,
            until=Deadline.after(options.seconds(max_duration, "--max-duration")),
            plan_dir=plan_dir,
            local=in_process(address, local=local),
            address=address,
            parallel=parallel,
            window_bytes=_window(window),
            config=None if lmcache_config is None else str(lmcache_config.absolute()),
        )
        wanted = WantedChunks(selection, options.now(), prompts_of(selection, endpoints[0].named, lmcache_config))
        deleting = DeletionOrder(
            max_delete=guards.MaxDelete.parse(max_delete or []),
            min_age=options.age(min_age),
            yes=yes and not dry_run,
            ask=ask_to_delete if console.at_terminal() and not dry_run else None,
            show=show_plan,
            accept_shrunk=accept_shrunk,
            until=order.until,
            lock_secs=options.lock_seconds(lock_lifetime),
            plan_dir=plan_dir,
            local=order.local,
            address=address,
            config=order.config,
        )
    asked = selection.model_dump(mode="json", exclude_defaults=True)
    done: list[ExportSummary] = []

    def copying(file: ReportFile, stop: ShutdownSignal) -> ExportSummary:
        done.append(Export(endpoints, order, file, stop).select(wanted, asked))
        return done[0]

    def mirroring(file: ReportFile, stop: ShutdownSignal) -> DeletionSummary | None:
        if not done or done[0].code:  # nothing is deleted where not all was copied
            return None
        # Nor where nothing was to be copied yet: what would be deleted is planned only.
        own = deleting if done[0].applied else replace(deleting, yes=False, ask=None)
        return _mirror(endpoints, selection, own, file, stop)

    works: list[tuple[str, Work]] = [("the export", copying)]
    if mirror:
        works.append(("the mirror", mirroring))
    inputs = [("--lmcache-config", lmcache_config), ("--prompts", selection.prompts)]
    inputs += [("--keys-from", path) for path in selection.keys_from]
    CommandSession(report, metrics_textfile, inputs).run(works)


def _mirror(
    endpoints: tuple[EndpointSpec, EndpointSpec],
    selection: Selection,
    order: DeletionOrder,
    file: ReportFile,
    stop: ShutdownSignal,
) -> DeletionSummary:
    source, destination = endpoints[0].named, endpoints[1].named
    if source is None or destination is None:
        raise ConfigError("--mirror works between two instances")
    order = replace(order, neighbours=handles_of((source, destination)))
    with InstanceEnd(source.name, source.settings).opened() as end:
        candidates = NotAtSource(end, selection, order.min_age)
        order = replace(order, local=True, source=end)
        return DeletionJob(MIRROR, destination, order, file, stop).select(
            candidates, {"source": endpoints[0].place.record()}
        )


def mirror_source(plan: DeletePlan, config: Path | None, l2_adapters: Sequence[str]) -> InstanceConfig:
    """The source of a mirror whose plan is to be carried out.

    Args:
        plan: The plan.
        config: The LMCache YAML; None for none.
        l2_adapters: The JSON of MP adapters.

    Raises:
        ConfigError: The plan names none, or another place than the configuration does.
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


def apply_export(
    plan: Path,
    lmcache_config: Path | None,
    l2_adapters: list[str] | None,
    order: ExportOrder,
    session: CommandSession,
) -> NoReturn:
    """Carry out a plan of an export, or the rest of it.

    Args:
        plan: The plan.
        lmcache_config: The LMCache YAML; None for the one that the plan names.
        l2_adapters: The JSON of MP adapters.
        order: How it is to be done.
        session: Reports it.
    """
    with options_checked():
        opened = ExportPlanFile.open(plan, ours=True)
        header = opened.header
        config = lmcache_config or (None if header.config is None else Path(header.config))
        found = [
            endpoint(place.instance or place.where, option, config, l2_adapters or [])
            for place, option in ((header.source, "the plan's source"), (header.destination, "the plan's destination"))
        ]
        order = replace(order, believe_files=header.believe_files, renames=header.renames, mode=header.mode)

    def work(file: ReportFile, stop: ShutdownSignal) -> ExportSummary:
        return Export((found[0], found[1]), order, file, stop).resume(opened)

    session.run([("the export", work)])


def _one_of(text: str, option: str, known: tuple[str, ...]) -> str:
    if text not in known:
        raise ConfigError(f"{option} {text!r}: must be one of {', '.join(known)}")
    return text


def _window(text: str) -> int:
    try:
        size = parse_bytes(text)
    except ValueError as error:
        raise ConfigError(f"--window {text!r}: {error}") from None
    if not size:
        raise ConfigError(f"--window {text!r}: must be more than nothing")
    return size
