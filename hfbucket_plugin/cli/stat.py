"""Command `stat`: how much instances hold."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

import typer

from hfbucket_plugin.cli.findings import as_text
from hfbucket_plugin.errors import HFBucketError
from hfbucket_plugin.hub.connect import opened
from hfbucket_plugin.tools import console as output
from hfbucket_plugin.tools import console as tables
from hfbucket_plugin.tools import options
from hfbucket_plugin.tools.inventory import HEADER, Classifier, InstanceSummary, rows, summarised

if TYPE_CHECKING:
    from hfbucket_plugin.config.instances import InstanceConfig


def stat(  # noqa: PLR0917 - Typer makes options of them
    lmcache_config: options.LMCacheConfig = None,
    instances: options.Instances = None,
    l2_adapters: options.L2Adapters = None,
    model: options.Model = None,
    prefix: options.Prefix = None,
    as_json: options.AsJson = False,
    timeout: options.Timeout = options.DEFAULT_TIMEOUT_SECS,
) -> None:
    """Say how much instances hold, by model, world size and worker. Lists all of it: a request for 1000 objects.

    Exits 0, or 1 when --model or --prefix selects nothing, 2 for a wrong command or configuration, 3 when a listing is
    not complete.
    """
    start = options.key_prefix(model, prefix)
    chosen = options.chosen(lmcache_config, instances, l2_adapters)
    records = []
    empty = True
    with output.results():
        for named in chosen:
            summary = _summary(named, start, timeout, model)
            if summary is None:
                continue
            empty = empty and summary.empty
            records.append({"instance": named.name, "mode": named.mode} | summary.record())
            if not as_json:
                _show(named, summary)
        if as_json:
            output.json_line({"instances": records})
    raise typer.Exit(options.listing_code(start, failed=len(records) < len(chosen), empty=empty))


def _summary(named: InstanceConfig, start: str, timeout: float, model: str | None) -> InstanceSummary | None:
    """Return the summary of an instance; report an incomplete listing, and return None."""
    try:
        with tables.busy(f"{named.name}: listing"), opened(named, timeout) as bucket:
            return summarised(Classifier(bucket).walk(timeout, key_prefix=start, model=model))
    except HFBucketError as error:
        output.print_error(f"no summary without a complete listing: {as_text(error, named)}")
        return None


def _show(named: InstanceConfig, summary: InstanceSummary) -> None:
    """Print a table in a terminal, otherwise one line per row."""
    console, shown = tables.stdout_console(), rows(summary, datetime.now(UTC))
    if console.is_terminal:
        console.print(tables.columns(f"{named.name}  {named.settings.bucket_handle}", HEADER, shown))
        return
    for cells in shown:
        text = ", ".join(f"{name} {cell}" for name, cell in zip(HEADER[1:], cells[1:], strict=True) if cell)
        output.line(f"{named.name}: {cells[0]}: {text}")
