"""`python -m jobs`: the command line. stdout holds summaries and nothing else; everything for people is on stderr."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from hfbucket_plugin.config.instances import handles_of
from hfbucket_plugin.core.deadline import Deadline
from hfbucket_plugin.errors import ConfigError
from hfbucket_plugin.tools import console
from hfbucket_plugin.tools.external_sort import KeySet
from jobs.batch.apply import in_process
from jobs.cli import fingerprint, options
from jobs.cli.export import apply_export, export, mirror_source
from jobs.cli.index import index
from jobs.cli.status import status
from jobs.deletion import guards
from jobs.deletion.job import DeletionJob
from jobs.deletion.plan import MIRROR, DeletionOrder, DeletionPlanFile
from jobs.deletion.report import ask_to_delete, show_plan
from jobs.deletion.select import ByName, ByPolicy, expect_text, read_keys
from jobs.export.bucket import InstanceEnd
from jobs.export.plan import ExportOrder, is_export
from jobs.export.report import ask_to_replace
from jobs.retention.policy import MIN_AGE
from jobs.session import Commands, CommandSession, options_checked, record_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hfbucket_plugin.config.instances import InstanceConfig
    from hfbucket_plugin.tools.signals import ShutdownSignal
    from jobs.deletion.report import DeletionSummary
    from jobs.report import ReportFile
    from jobs.retention.policy import Policy

_NOTED_KEYS: Final = 100
"""Keys of the command that its plan names."""

# Tracebacks of Typer's show local variables, and with them a token.
app = typer.Typer(
    cls=Commands, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None
)


@app.callback()
def main() -> None:
    """Keep LMCache's bucket instances in order. What deletes only plans, unless it is told --yes or asked at a terminal."""


app.command("status")(status)
app.command("export")(export)
app.command("index")(index)
app.add_typer(fingerprint.app, name="fingerprint")


@app.command()
def cleanup(  # noqa: PLR0917 - Typer makes options of them
    lmcache_config: options.LMCacheConfig = None,
    instances: options.Instances = None,
    all_instances: options.AllInstances = False,
    l2_adapters: options.L2Adapters = None,
    policy: options.PolicyFile = None,
    max_age: options.MaxAge = None,
    max_idle: options.MaxIdle = None,
    max_bytes: options.MaxBytes = None,
    max_objects: options.MaxObjects = None,
    keep_newest: options.KeepNewest = None,
    keep_prefix: options.KeepPrefix = None,
    keep_model: options.KeepModel = None,
    min_age: options.OwnMinAge = None,
    without_heat: options.WithoutHeat = False,
    yes: options.Yes = False,
    dry_run: options.DryRun = False,
    max_delete: options.MaxDelete = None,
    foreign: options.Foreign = "keep",
    accept_shrunk: options.AcceptShrunk = False,
    max_duration: options.MaxDuration = options.DEFAULT_DURATION,
    lock_lifetime: options.LockLifetime = options.DEFAULT_LOCK,
    parallel: options.Parallel = 4,
    batch_size: options.BatchSize = 1000,
    local: options.Local = False,
    address: options.Address = None,
    plan_dir: options.PlanDir = None,
    report: options.Report = None,
    metrics_textfile: options.MetricsFile = None,
) -> None:
    """Delete what the policy of an instance lets go.

    Exits 0 when done or only planned, 2 for a wrong command or configuration, 3 when some objects failed or are left, 4
    when refused as a whole, 5 when told to stop.
    """
    with options_checked():
        flags = options.policy_flags(
            policy, max_age, max_idle, max_bytes, max_objects, keep_newest, keep_prefix, keep_model, min_age
        )
        named, every = options.chosen(lmcache_config, instances, l2_adapters, everything=all_instances)
        policies = {one.name: flags.of(one.name) for one in named}
        order = _order(
            yes, dry_run, max_delete, max_duration, lock_lifetime, parallel, batch_size, local, address, plan_dir
        )
        order = replace(
            order,
            foreign=options.foreign(foreign),
            accept_shrunk=accept_shrunk,
            config=_absolute(lmcache_config),
            neighbours=handles_of(every),
            without_heat=without_heat,
        )
    inputs = (("--lmcache-config", lmcache_config), ("--policy", policy))
    CommandSession(report, metrics_textfile, inputs).run(
        [(one.name, _cleaning(one, policies[one.name], order)) for one in named]
    )


def _cleaning(
    named: InstanceConfig, policy: Policy, order: DeletionOrder
) -> Callable[[ReportFile, ShutdownSignal], DeletionSummary]:
    def work(file: ReportFile, stop: ShutdownSignal) -> DeletionSummary:
        own = replace(order, min_age=policy.min_age)
        return DeletionJob("cleanup", named, own, file, stop).select(ByPolicy(policy), policy.record())

    return work


@app.command()
def rm(  # noqa: PLR0917 - Typer makes options of them
    keys: Annotated[list[str] | None, typer.Argument(metavar="[KEY]...", help="Whole keys.")] = None,
    prefix: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="Starts of keys. Repeatable.")] = None,
    key_file: Annotated[Path | None, typer.Option(metavar="FILE", help="A key a line.")] = None,
    lmcache_config: options.LMCacheConfig = None,
    instances: options.Instances = None,
    l2_adapters: options.L2Adapters = None,
    min_age: options.MinAge = options.DEFAULT_MIN_AGE,
    yes: options.Yes = False,
    dry_run: options.DryRun = False,
    max_delete: options.MaxDelete = None,
    foreign: options.Foreign = "keep",
    accept_shrunk: options.AcceptShrunk = False,
    max_duration: options.MaxDuration = options.DEFAULT_DURATION,
    lock_lifetime: options.LockLifetime = options.DEFAULT_LOCK,
    parallel: options.Parallel = 4,
    batch_size: options.BatchSize = 1000,
    local: options.Local = False,
    address: options.Address = None,
    plan_dir: options.PlanDir = None,
    report: options.Report = None,
    metrics_textfile: options.MetricsFile = None,
) -> None:
    """Delete keys, prefixes, or the keys of a file, by the same plan and guards as `cleanup`.

    Exit codes as those of `cleanup`; keys that are not there are named, and are no failure.
    """
    with options_checked():
        if not keys and key_file is None and not prefix:
            raise ConfigError("name what to delete: keys, --prefix TEXT or --key-file FILE")
        if not all(prefix or []):
            raise ConfigError("an empty --prefix would be everything; name at least a model, such as 'org/model@'")
        for text in (*(keys or []), *(prefix or [])):
            expect_text(text)
        first: list[str] = []
        wanted = KeySet(_noted([*(keys or [])], key_file, first))
        named, every = options.chosen(lmcache_config, instances, l2_adapters, everything=False)
        order = _order(
            yes, dry_run, max_delete, max_duration, lock_lifetime, parallel, batch_size, local, address, plan_dir
        )
        order = replace(
            order,
            min_age=options.age(min_age),
            foreign=options.foreign(foreign),
            accept_shrunk=accept_shrunk,
            config=_absolute(lmcache_config),
            neighbours=handles_of(every),
        )
    reported = record_of({"keys": first, "prefixes": prefix})

    def removing(one: InstanceConfig) -> Callable[[ReportFile, ShutdownSignal], DeletionSummary]:
        def work(file: ReportFile, stop: ShutdownSignal) -> DeletionSummary:
            selection = ByName(wanted, prefix or (), order.min_age)
            summary = DeletionJob("rm", one, order, file, stop).select(selection, reported)
            if summary.plan is None:
                return summary
            return replace(summary, absent=selection.absent, absent_count=selection.absent_count)

        return work

    inputs = (("--lmcache-config", lmcache_config), ("--key-file", key_file))
    CommandSession(report, metrics_textfile, inputs).run([(one.name, removing(one)) for one in named])


def _noted(keys: list[str], key_file: Path | None, first: list[str]) -> Iterator[str]:
    """The keys of the command line and of a file; the first hundred are noted for the plan."""
    for key in itertools.chain(keys, () if key_file is None else read_keys(key_file)):
        if len(first) < _NOTED_KEYS:
            first.append(key)
        yield key


@app.command()
def apply(  # noqa: PLR0917 - Typer makes options of them
    plan: Annotated[Path, typer.Argument(help="A plan of cleanup, rm or export.")],
    lmcache_config: options.LMCacheConfig = None,
    l2_adapters: options.L2Adapters = None,
    yes: options.Yes = False,
    dry_run: options.DryRun = False,
    max_delete: options.StricterMaxDelete = None,
    min_age: options.StricterMinAge = None,
    foreign: options.ForeignAgain = "keep",
    without_heat: options.WithoutHeat = False,
    max_duration: options.MaxDuration = options.DEFAULT_DURATION,
    lock_lifetime: options.LockLifetime = options.DEFAULT_LOCK,
    parallel: options.Parallel = 4,
    batch_size: options.BatchSize = 1000,
    local: options.Local = False,
    address: options.Address = None,
    report: options.Report = None,
    metrics_textfile: options.MetricsFile = None,
) -> None:
    """Carry out a plan, or the rest of one that was interrupted: what is done is skipped.

    The instance is taken from the LMCache YAML that the plan names, or from the one given here. Exit codes as those of
    `cleanup`.
    """
    with options_checked():
        exporting = is_export(plan)
        again = options.foreign(foreign)
        if exporting and (max_delete or min_age or without_heat or again):
            raise ConfigError(
                "--max-delete, --min-age, --foreign and --without-heat are for plans that delete: this one copies"
            )
    if exporting:
        with options_checked():
            own = ExportOrder(
                dry_run=dry_run,
                yes=yes,
                ask=ask_to_replace if console.at_terminal() and not dry_run else None,
                until=Deadline.after(options.seconds(max_duration, "--max-duration")),
                local=in_process(address, local=local),
                address=address,
                parallel=parallel,
            )
        apply_export(plan, lmcache_config, l2_adapters, own, CommandSession(report, metrics_textfile, [("plan", plan)]))
    with options_checked():
        opened = DeletionPlanFile.open(plan, ours=True, foreign=again)
        header = opened.header
        if lmcache_config is None and not l2_adapters and header.config is not None:
            lmcache_config = Path(header.config)
        only = [header.instance] if lmcache_config is not None else []
        named, every = options.chosen(lmcache_config, only, l2_adapters, everything=False)
        mine = [one for one in named if one.name == header.instance]
        if not mine:
            raise ConfigError(f"the plan is for instance {header.instance!r}: give the --l2-adapter of that name")
        order = _order(yes, dry_run, None, max_duration, lock_lifetime, parallel, batch_size, local, address, None)
        order = replace(
            order,
            max_delete=guards.MaxDelete.parse(max_delete) if max_delete else guards.MaxDelete(),
            min_age=options.age(min_age) if min_age else header.min_age,
            neighbours=handles_of(every),
            without_heat=without_heat,
        )
        source = mirror_source(opened, lmcache_config, l2_adapters or []) if header.job == MIRROR else None

    def work(file: ReportFile, stop: ShutdownSignal) -> DeletionSummary:
        if source is None:
            return DeletionJob(header.job, mine[0], order, file, stop).resume(opened)
        with InstanceEnd(source.name, source.settings).opened() as end:
            own = replace(order, local=True, source=end)
            return DeletionJob(header.job, mine[0], own, file, stop).resume(opened)

    inputs = (("plan", plan), ("--lmcache-config", lmcache_config))
    CommandSession(report, metrics_textfile, inputs).run([(header.instance, work)])


def _order(  # noqa: PLR0917 - as the options come
    yes: bool,
    dry_run: bool,
    max_delete: list[str] | None,
    max_duration: str,
    lock_lifetime: str,
    parallel: int,
    batch_size: int,
    local: bool,
    address: str | None,
    plan_dir: Path | None,
) -> DeletionOrder:
    return DeletionOrder(
        max_delete=guards.MaxDelete.parse(max_delete or []),
        min_age=MIN_AGE,
        yes=yes and not dry_run,
        ask=ask_to_delete if console.at_terminal() and not dry_run else None,
        show=show_plan,
        until=Deadline.after(options.seconds(max_duration, "--max-duration")),  # of the command, whatever it does
        lock_secs=options.lock_seconds(lock_lifetime),
        plan_dir=plan_dir,
        local=in_process(address, local=local, at_once=yes and not dry_run),
        address=address,
        parallel=parallel,
        batch_size=batch_size,
    )


def _absolute(path: Path | None) -> str | None:
    return None if path is None else str(path.absolute())
