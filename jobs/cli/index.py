"""`python -m jobs index`."""

from __future__ import annotations

from collections.abc import Mapping  # noqa: TC003 - Typer evaluates the annotations
from typing import TYPE_CHECKING, Any

from hfbucket_plugin.errors import ConfigError
from hfbucket_plugin.tools.options import Flag, flags_of, request_of, with_flags
from jobs.cli.session import CommandSession, options_checked
from jobs.index.build import IndexOrder
from jobs.index.job import IndexJob
from jobs.options import IndexOptions

if TYPE_CHECKING:
    from hfbucket_plugin.config.instances import InstanceConfig
    from hfbucket_plugin.tools.signals import ShutdownSignal
    from jobs.cli.session import Work
    from jobs.index.report import IndexSummary
    from jobs.report import ReportFile


@with_flags(flags_of(IndexOptions))
def index(*, given: Mapping[Flag, Any]) -> None:
    """Build the key index of instances, of the snapshot before and the journals since or of a listing, and prune old ones.

    Exits 0 when done, 2 for a wrong command or configuration, 3 when the Hub did not answer, something old is left or
    --verify found differences, 4 when refused, 5 when told to stop. The snapshot before stays in use meanwhile.
    """
    with options_checked():
        request = request_of(IndexOptions, given)
        if request.verify and (request.full or request.dry_run or request.accept_shrunk):
            raise ConfigError("--verify only compares: give it without --full, --dry-run and --accept-shrunk")
        if request.temp_dir is not None and not request.temp_dir.is_dir():
            raise ConfigError(f"--tmp-dir {str(request.temp_dir)!r} is no directory")
        named, _ = request.chosen()
        order = IndexOrder(
            full=request.full,
            full_every_secs=request.full_every.total_seconds(),
            keep=request.keep,
            grace=request.grace,
            dry_run=request.dry_run,
            accept_shrunk=request.accept_shrunk,
            until=request.deadline(),
            lock_secs=request.lock_secs,
            temp_dir=request.temp_dir,
        )

    def working(one: InstanceConfig) -> Work:
        def work(file: ReportFile, stop: ShutdownSignal) -> IndexSummary:
            job = IndexJob(one, order, file, stop)
            return job.verify() if request.verify else job.run()

        return work

    CommandSession(request).run([(one.name, working(one)) for one in named])
