"""Command line `python -m jobs`. stdout holds only summaries; all other output goes to stderr."""

from __future__ import annotations

import itertools
from collections.abc import Mapping  # noqa: TC003 - Typer evaluates the annotations
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from hfbucket_plugin.config.instances import handles_of
from hfbucket_plugin.errors import ConfigError
from hfbucket_plugin.tools.external_sort import KeySet
from hfbucket_plugin.tools.options import Flag, flags_of, request_of, with_flags
from jobs.cli import fingerprint
from jobs.cli.export import export, mirror_source, resuming
from jobs.cli.index import index
from jobs.cli.session import Commands, CommandSession, asker, options_checked
from jobs.cli.status import status
from jobs.deletion.job import DeletionContext, DeletionJob
from jobs.deletion.plan import MIRROR, DeletionPlanFile
from jobs.deletion.report import ask_to_delete, show_plan
from jobs.deletion.select import ByName, ByPolicy, expect_text, read_keys
from jobs.export.bucket import InstanceEnd
from jobs.export.plan import is_export
from jobs.options import ApplyOptions, CleanupOptions, RemoveOptions, chosen

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pydantic import BaseModel

    from hfbucket_plugin.config.instances import InstanceConfig
    from hfbucket_plugin.tools.signals import ShutdownSignal
    from jobs.cli.session import Work, Works
    from jobs.deletion.report import DeletionSummary
    from jobs.report import ReportFile

_NOTED_KEYS: Final = 100
"""Maximum number of keys from the command that its plan records."""


def _flags(request: type[BaseModel], *without: str) -> list[Flag]:
    """Return the flags of a request, except those that its command does not support."""
    return [flag for flag in flags_of(request) if flag.name not in without]


# Typer's own tracebacks show local variables, and with them a token.
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
@with_flags(flags_of(CleanupOptions))
def cleanup(*, given: Mapping[Flag, Any]) -> None:
    """Delete what the policy of an instance lets go.

    Exits 0 when done or only planned, 2 for a wrong command or configuration, 3 when some objects failed or are left, 4
    when refused as a whole, 5 when told to stop.
    """
    with options_checked():
        request = request_of(CleanupOptions, given)
        works = _cleaning(request)
    CommandSession(request).run(works)


def _cleaning(request: CleanupOptions) -> Works:
    """Return the jobs of a cleanup."""
    named, every = request.chosen()
    policies = {one.name: request.policy_of(one.name) for one in named}
    until, local, ask = request.deadline(), request.runs_here(at_once=request.unasked), asker(ask_to_delete, request)

    def work_of(one: InstanceConfig) -> Work:
        policy = policies[one.name]
        context = DeletionContext("cleanup", policy.min_age, until, local, ask, show_plan, handles_of(every))

        def work(file: ReportFile, stop: ShutdownSignal) -> DeletionSummary:
            return DeletionJob(one, request, context, file, stop).select(ByPolicy(policy), policy.record())

        return work

    return [(one.name, work_of(one)) for one in named]


@app.command()
@with_flags(_flags(RemoveOptions, "--without-heat"))
def rm(
    *,
    keys: Annotated[list[str] | None, typer.Argument(metavar="[KEY]...", help="Whole keys.")] = None,
    given: Mapping[Flag, Any],
) -> None:
    """Delete keys, prefixes, or the keys of a file, by the same plan and guards as `cleanup`.

    Exit codes as those of `cleanup`; keys that are not there are named, and are no failure.
    """
    with options_checked():
        request = request_of(RemoveOptions, given)
        prefixes = request.prefix
        if not keys and request.key_file is None and not prefixes:
            raise ConfigError("name what to delete: keys, --prefix TEXT or --key-file FILE")
        if not all(prefixes):
            raise ConfigError("an empty --prefix would be everything; name at least a model, such as 'org/model@'")
        for text in (*(keys or []), *prefixes):
            expect_text(text)
        first: list[str] = []
        wanted = KeySet(_noted([*(keys or [])], request.key_file, first))
        named, every = request.instances()
        context = DeletionContext(
            "rm",
            request.min_age,
            request.deadline(),
            request.runs_here(at_once=request.unasked),
            asker(ask_to_delete, request),
            show_plan,
            handles_of(every),
        )
    named_by = {name: value for name, value in {"keys": first, "prefixes": [*prefixes]}.items() if value}

    def removing(one: InstanceConfig) -> Work:
        def work(file: ReportFile, stop: ShutdownSignal) -> DeletionSummary:
            selection = ByName(wanted, prefixes, request.min_age)
            summary = DeletionJob(one, request, context, file, stop).select(selection, named_by)
            if summary.plan is None:
                return summary
            return replace(summary, absent=selection.absent, absent_count=selection.absent_count)

        return work

    CommandSession(request).run([(one.name, removing(one)) for one in named])


def _noted(keys: list[str], key_file: Path | None, first: list[str]) -> Iterator[str]:
    """Yield the keys of the command line and of a file, and record the first hundred for the plan."""
    for key in itertools.chain(keys, () if key_file is None else read_keys(key_file)):
        if len(first) < _NOTED_KEYS:
            first.append(key)
        yield key


@app.command()
@with_flags(_flags(ApplyOptions, "--accept-shrunk", "--plan-dir"))
def apply(
    *,
    plan: Annotated[Path, typer.Argument(help="A plan of cleanup, rm or export.")],
    given: Mapping[Flag, Any],
) -> None:
    """Carry out a plan, or the rest of one that was interrupted: what is done is skipped.

    The instance is taken from the LMCache YAML that the plan names, or from the one given here. Exit codes as those of
    `cleanup`.
    """
    with options_checked():
        request = request_of(ApplyOptions, given)
        if is_export(plan):
            if request.model_fields_set & {"max_delete", "min_age", "without_heat"} or request.deletes_foreign:
                raise ConfigError(
                    "--max-delete, --min-age, --foreign and --without-heat are for plans that delete: this one copies"
                )
            works = resuming(plan, request)
        else:
            works = _resuming(plan, request)
    CommandSession(request, [("plan", plan)]).run(works)


def _resuming(plan: Path, request: ApplyOptions) -> Works:
    """Return the job that applies a deletion plan."""
    opened = DeletionPlanFile.open(plan, ours=True, foreign=request.deletes_foreign)
    header = opened.header
    config = request.lmcache_config
    if config is None and not request.l2_adapter and header.config is not None:
        config = Path(header.config)
    only = (header.instance,) if config is not None else ()
    named, every = chosen(config, only, request.l2_adapter, everything=False)
    mine = [one for one in named if one.name == header.instance]
    if not mine:
        raise ConfigError(f"the plan is for instance {header.instance!r}: give the --l2-adapter of that name")
    context = DeletionContext(
        header.job,
        request.min_age if request.min_age is not None else header.min_age,
        request.deadline(),
        request.runs_here(at_once=request.unasked),
        asker(ask_to_delete, request),
        show_plan,
        handles_of(every),
    )
    source = mirror_source(opened, config, request.l2_adapter) if header.job == MIRROR else None

    def work(file: ReportFile, stop: ShutdownSignal) -> DeletionSummary:
        if source is None:
            return DeletionJob(mine[0], request, context, file, stop).resume(opened)
        with InstanceEnd(source.name, source.settings).opened() as end:
            own = replace(context, local=True, source=end)
            return DeletionJob(mine[0], request, own, file, stop).resume(opened)

    return [(header.instance, work)]
