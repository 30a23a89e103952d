"""`doctor`: what is wrong with instances, and how to mend it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from hfbucket_plugin.cli import options, output, tables
from hfbucket_plugin.cli.case import Case, opened
from hfbucket_plugin.cli.examination import examine
from hfbucket_plugin.cli.findings import exit_code

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hfbucket_plugin.cli.findings import Finding
    from hfbucket_plugin.named import NamedInstance


def doctor(  # noqa: PLR0917 - Typer makes options of them
    lmcache_config: options.LMCacheConfig = None,
    instances: options.Instances = None,
    l2_adapters: options.L2Adapters = None,
    probe_write: Annotated[
        bool, typer.Option("--probe-write", help="Store a small object too, read it back and delete it.")
    ] = False,
    as_json: options.AsJson = False,
    timeout: options.Timeout = options.DEFAULT_TIMEOUT_SECS,
) -> None:
    """Say whether instances do what they are configured for; where not, what to mend.

    Exits 0 when all is well, 1 with warnings, 2 for a wrong command or configuration, 3 with errors.
    """
    chosen = options.chosen(lmcache_config, instances, l2_adapters)
    everything: list[Finding] = []
    records = []
    with output.results():
        for named in chosen:
            found = _examined(named, timeout, probe_write=probe_write, show=not as_json)
            everything += found
            records.append(_record(named, found))
        code = exit_code(everything)
        if as_json:
            output.json_line({"exit_code": code, "instances": records})
    raise typer.Exit(code)


def _examined(named: NamedInstance, timeout: float, *, probe_write: bool, show: bool) -> list[Finding]:
    """Examine an instance, and show what is found: a table in a terminal, else lines as they come."""
    console = tables.console()
    found = []
    with tables.busy(f"{named.name}: looking"), opened(named, timeout, few_calls=True) as bucket:
        for finding in examine(Case(named, bucket, timeout), probing=probe_write):
            found.append(finding)
            if show and not console.is_terminal:
                output.line(f"{named.name}: {finding}", at_once=True)
    if show and console.is_terminal:
        console.print(tables.findings(f"{named.name}  {named.settings.bucket_handle}", found))
    return found


def _record(named: NamedInstance, found: Sequence[Finding]) -> dict[str, Any]:
    return {
        "instance": named.name,
        "mode": named.mode,
        "bucket_handle": str(named.settings.bucket_handle),
        "endpoint": named.settings.endpoint,
        "findings": [
            {"check": one.check, "severity": str(one.severity), "found": one.found, "mend": one.mend} for one in found
        ],
    }
