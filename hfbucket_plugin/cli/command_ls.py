"""`ls`: the keys of instances."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from hfbucket_plugin.cli import options, output, tables
from hfbucket_plugin.cli.case import opened
from hfbucket_plugin.cli.findings import in_words
from hfbucket_plugin.cli.key_rows import HEADER, Keys, aligned, record, row
from hfbucket_plugin.errors import HFBucketError

if TYPE_CHECKING:
    from hfbucket_plugin.named import NamedInstance


def ls(  # noqa: PLR0917 - Typer makes options of them
    lmcache_config: options.LMCacheConfig = None,
    instances: options.Instances = None,
    l2_adapters: options.L2Adapters = None,
    model: options.Model = None,
    prefix: options.Prefix = None,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="Stop after so many keys.")] = None,
    as_json: options.AsJson = False,
    timeout: options.Timeout = options.DEFAULT_TIMEOUT_SECS,
) -> None:
    """List the keys of instances, as they come; with --json, one line each. What is no key is counted on stderr.

    Exits 0, or 1 when --model or --prefix selects nothing, 2 for a wrong command or configuration, 3 when a listing is
    not complete.
    """
    start = options.key_prefix(model, prefix)
    chosen = options.chosen(lmcache_config, instances, l2_adapters)
    shown = _Shown(limit, model, as_json=as_json)
    with output.results():
        if not as_json and tables.console().is_terminal:
            output.line(aligned(HEADER))
        for named in chosen:
            if not shown.enough:
                shown.add(named, start, timeout)
    raise typer.Exit(options.listing_code(start, failed=shown.failed, empty=not shown.keys))


class _Shown:
    """What is shown of several instances.

    Attributes:
        keys: How many keys were shown.
        failed: Whether a listing is not complete.
    """

    def __init__(self, limit: int | None, model: str | None, *, as_json: bool) -> None:
        self._limit = limit
        self._model = model
        self._as_json = as_json
        self.keys = 0
        self.failed = False

    @property
    def enough(self) -> bool:
        """Whether the limit is reached."""
        return self.keys == self._limit

    def add(self, named: NamedInstance, start: str, timeout: float) -> None:
        """Show the keys of an instance."""
        now = datetime.now(UTC)
        with opened(named, timeout) as bucket:
            keys = Keys(bucket, start, timeout, self._model)
            try:
                for listed, chunk in keys:
                    if self._as_json:
                        output.json_line(record(named.name, listed.kind, chunk, now))
                    else:
                        output.line(aligned(row(named.name, listed.kind, chunk, now)))
                    self.keys += 1
                    if self.enough:
                        break
            except HFBucketError as error:
                self.failed = True
                output.complain(f"the listing is not complete: {in_words(error, named)}")
        if keys.passed_by:
            told = ", ".join(kind.counted(number) for kind, number in sorted(keys.passed_by.items()))
            output.complain(f"instance {named.name!r}: objects that are no keys: {told}")
