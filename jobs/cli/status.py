"""`python -m jobs status`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from hfbucket_plugin.core.deadline import Deadline, patience
from hfbucket_plugin.core.units import age, printable, size
from hfbucket_plugin.hub.connect import LISTING_SECS, PAGE_SECS, REQUEST_SECS, opened
from hfbucket_plugin.tools import console as output
from hfbucket_plugin.tools import console as tables
from hfbucket_plugin.tools import exit_codes
from jobs.cli import options
from jobs.deletion import guards
from jobs.report import note
from jobs.session import as_text, exit_code_of, options_checked
from jobs.status.html import write_page
from jobs.status.status import examine

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hfbucket_plugin.core.units import Extent
    from jobs.status.status import Status

_HEADER = ("", "objects", "bytes")


def status(  # noqa: PLR0917 - Typer makes options of them
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
    max_delete: options.MaxDelete = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    html: options.HtmlFile = None,
) -> None:
    """Say what instances hold, by model, worker, age and last read; how they grew; with a policy, what the next cleanup would do.

    Exits 0, or 2 for a wrong command or configuration, 3 when a listing is not complete.
    """
    with options_checked():
        flags = options.policy_flags(
            policy, max_age, max_idle, max_bytes, max_objects, keep_newest, keep_prefix, keep_model, min_age
        )
        named, _ = options.chosen(lmcache_config, instances, l2_adapters, everything=all_instances)
        policies = {one.name: flags.of(one.name) if flags.given else None for one in named}
        limits = guards.MaxDelete.parse(max_delete or [])
    codes: list[int] = []
    statuses: list[Status] = []
    troubles: list[str] = []
    with output.results(), patience(Deadline.after(LISTING_SECS)):
        for one in named:
            try:
                with tables.busy(f"{one.name}: listing"), opened(one, REQUEST_SECS) as bucket:
                    found = examine(
                        one.name,
                        bucket,
                        policies[one.name],
                        limits,
                        request_secs=REQUEST_SECS,
                        page_secs=PAGE_SECS,
                        without_heat=without_heat,
                    )
            except Exception as error:  # noqa: BLE001 - each instance is shown whatever becomes of the others
                troubles.append(f"{one.name}: no status without a complete listing: {as_text(error)}")
                note(troubles[-1])
                codes.append(exit_code_of(error))
                continue
            statuses.append(found)
            if as_json:
                output.json_line(found.record())
            else:
                _show(found)
    if html is not None:
        with options_checked():
            write_page(html, statuses, troubles)
    raise typer.Exit(exit_codes.worst(codes))


def _show(found: Status) -> None:
    """A table in a terminal, else a line for each of its rows."""
    console, shown = tables.stdout_console(), list(_rows(found))
    if console.is_terminal:
        console.print(tables.columns(f"{found.instance}  {found.bucket}", _HEADER, shown))
    else:
        for name, *cells in shown:
            output.line(f"{found.instance}: {name}: {', '.join(filter(None, cells))}")
    for line in _remarks(found):
        output.line(f"{found.instance}: {line}")


def _rows(found: Status) -> Iterator[tuple[str, str, str]]:
    census, record = found.census, found.record()
    yield _row("all chunks", census.chunks)
    for model, extent in sorted(census.models.items()):
        yield _row(f"model {printable(model)}", extent)
    for (model, world, worker), extent in sorted(census.workers.items()):
        yield _row(f"model {printable(model)}, worker {worker} of {world}", extent)
    for one in record["ages"]:
        name = one["younger_than"]
        yield _row(f"age {name}" if name in ("older", "unknown") else f"age below {name}", census.ages[name])
    for name, extent in found.access_rows:
        yield _row(name, extent)
    for kind, extent in sorted(census.passed_by.items()):
        yield _row(f"not ours: {kind}", extent)
    if found.outlook is not None:
        for (model, reason), extent in sorted(found.outlook.by_reason.items()):
            yield _row(f"next cleanup deletes: {reason}: {printable(model)}", extent)
        yield _row("next cleanup deletes", found.outlook.planned)
        for reason, extent in sorted(found.outlook.kept.items()):
            yield _row(f"next cleanup keeps: {reason}", extent)


def _row(name: str, extent: Extent) -> tuple[str, str, str]:
    return name, f"{extent.objects:,}", size(extent.bytes)


def _remarks(found: Status) -> Iterator[str]:
    if found.index_line:
        yield found.index_line
    if line := found.access_line:
        yield line
    if found.trouble:
        yield f"the last report cannot be read: {found.trouble}"
    growth = found.growth
    if growth is not None and found.last is not None:
        sign = "+" if growth["bytes"] >= 0 else "-"
        when = age(found.last.at, found.census.now)
        yield (
            f"since {found.last.job}, {when} ago: {growth['objects']:+,} objects, {sign}{size(abs(growth['bytes']))} "
            f"({size(abs(growth['bytes_per_day']))} a day)"
        )
    if found.outlook is not None and found.outlook.refused:
        yield f"the next cleanup would be refused: {found.outlook.refused}"
