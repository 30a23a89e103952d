"""`python -m jobs status`."""

from __future__ import annotations

from collections.abc import Mapping  # noqa: TC003 - Typer evaluates the annotations
from pathlib import Path  # noqa: TC003 - as above
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hfbucket_plugin.core.deadline import Deadline, patience
from hfbucket_plugin.core.units import age, printable, size
from hfbucket_plugin.hub.connect import LISTING_SECS, PAGE_SECS, REQUEST_SECS, opened
from hfbucket_plugin.tools import console as output
from hfbucket_plugin.tools import console as tables
from hfbucket_plugin.tools import exit_codes
from hfbucket_plugin.tools.options import Flag, flags_of, request_of, with_flags
from jobs.cli.session import options_checked
from jobs.options import StatusOptions
from jobs.report import as_text, exit_code_of, note
from jobs.status.html import write_page
from jobs.status.status import examine

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hfbucket_plugin.core.units import Extent
    from jobs.status.status import Status

_HEADER = ("", "objects", "bytes")


@with_flags(flags_of(StatusOptions))
def status(
    *,
    given: Mapping[Flag, Any],
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON, for programs.")] = False,
    html: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", help="Also write a self-contained HTML page with plots."),
    ] = None,
) -> None:
    """Say what instances hold, by model, worker, age and last read; how they grew; with a policy, what the next cleanup would do.

    Exits 0, or 2 for a wrong command or configuration, 3 when a listing is not complete.
    """
    with options_checked():
        request = request_of(StatusOptions, given)
        named, _ = request.chosen()
        wanted = [(one, request.policy_of(one.name) if request.has_policy else None) for one in named]
    codes: list[int] = []
    statuses: list[Status] = []
    troubles: list[str] = []
    with output.results(), patience(Deadline.after(LISTING_SECS)):
        for one, policy in wanted:
            try:
                with tables.busy(f"{one.name}: listing"), opened(one, REQUEST_SECS) as bucket:
                    found = examine(
                        one.name,
                        bucket,
                        policy,
                        request.max_delete,
                        request_secs=REQUEST_SECS,
                        page_secs=PAGE_SECS,
                        without_heat=request.without_heat,
                    )
            except Exception as error:  # noqa: BLE001 - a failed instance does not stop the others
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
    """Print a table in a terminal, otherwise one line per row."""
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
