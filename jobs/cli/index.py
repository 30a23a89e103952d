"""`python -m jobs index`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from hfbucket_plugin.core.deadline import Deadline
from hfbucket_plugin.core.units import parse_duration
from hfbucket_plugin.errors import ConfigError
from jobs.cli import options
from jobs.index.build import IndexOrder
from jobs.index.job import IndexJob
from jobs.session import CommandSession, options_checked

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import timedelta

    from hfbucket_plugin.config.instances import InstanceConfig
    from hfbucket_plugin.tools.signals import ShutdownSignal
    from jobs.index.report import IndexSummary
    from jobs.report import ReportFile


def index(  # noqa: PLR0917 - Typer makes options of them
    lmcache_config: options.LMCacheConfig = None,
    instances: options.Instances = None,
    all_instances: options.AllInstances = False,
    l2_adapters: options.L2Adapters = None,
    full: Annotated[
        bool, typer.Option("--full", help="Make it of a listing, due or not; also where its pointer cannot be read.")
    ] = False,
    full_every: Annotated[
        str, typer.Option(metavar="TIME", help="Make it of a listing when the last one is older than this.")
    ] = "24h",
    verify: Annotated[
        bool, typer.Option("--verify", help="Only compare it with a listing; exit 3 where they differ.")
    ] = False,
    keep: Annotated[
        int, typer.Option(min=1, metavar="N", help="How many snapshots stay, the present one included.")
    ] = 2,
    grace: Annotated[
        str, typer.Option(metavar="TIME", help="No old snapshot or journal is deleted that is younger.")
    ] = "1h",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Make the snapshot, and write nothing.")] = False,
    accept_shrunk: Annotated[
        bool, typer.Option("--accept-shrunk", help="Believe a listing that is empty or lacks much of what there was.")
    ] = False,
    max_duration: options.MaxDuration = options.DEFAULT_DURATION,
    lock_lifetime: options.LockLifetime = options.DEFAULT_LOCK,
    temp_dir: options.TempDirOption = None,
    report: options.Report = None,
    metrics_textfile: options.MetricsFile = None,
) -> None:
    """Build the key index of instances, of the snapshot before and the journals since or of a listing, and prune old ones.

    Exits 0 when done, 2 for a wrong command or configuration, 3 when the Hub did not answer, something old is left or
    --verify found differences, 4 when refused, 5 when told to stop. The snapshot before stays in use meanwhile.
    """
    with options_checked():
        if verify and (full or dry_run or accept_shrunk):
            raise ConfigError("--verify only compares: give it without --full, --dry-run and --accept-shrunk")
        if temp_dir is not None and not temp_dir.is_dir():
            raise ConfigError(f"--tmp-dir {str(temp_dir)!r} is no directory")
        named, _ = options.chosen(lmcache_config, instances, l2_adapters, everything=all_instances)
        order = IndexOrder(
            full=full,
            full_every_secs=options.seconds(full_every, "--full-every"),
            keep=keep,
            grace=_duration(grace, "--grace"),
            dry_run=dry_run,
            accept_shrunk=accept_shrunk,
            until=Deadline.after(options.seconds(max_duration, "--max-duration")),
            lock_secs=options.lock_seconds(lock_lifetime),
            temp_dir=temp_dir,
        )
    CommandSession(report, metrics_textfile, [("--lmcache-config", lmcache_config)]).run(
        [(one.name, _working(one, order, verify=verify)) for one in named]
    )


def _working(
    named: InstanceConfig, order: IndexOrder, *, verify: bool
) -> Callable[[ReportFile, ShutdownSignal], IndexSummary]:
    def work(file: ReportFile, stop: ShutdownSignal) -> IndexSummary:
        job = IndexJob(named, order, file, stop)
        return job.verify() if verify else job.run()

    return work


def _duration(text: str, option: str) -> timedelta:
    try:
        return parse_duration(text)
    except ValueError as error:
        raise ConfigError(f"{option} {text!r}: {error}") from None
