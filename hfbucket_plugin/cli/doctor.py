"""Examination of one instance: the order of the checks, and which results make later ones meaningless."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar

import typer
from rich.table import Table
from rich.text import Text

from hfbucket_plugin.cli.checks import access, bucket, endpoint, engine, environment, metadata, probe_write
from hfbucket_plugin.cli.context import CheckContext
from hfbucket_plugin.cli.findings import Finding, Severity, error, exit_code, from_error, skipped
from hfbucket_plugin.core import texts
from hfbucket_plugin.errors import HFBucketError
from hfbucket_plugin.hub import xet_home
from hfbucket_plugin.hub.connect import opened
from hfbucket_plugin.tools import console as output
from hfbucket_plugin.tools import console as tables
from hfbucket_plugin.tools import options

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from hfbucket_plugin.config.instances import InstanceConfig


_T = TypeVar("_T")

# Checks that are skipped if the bucket or the Hub is not available.
OF_THE_BUCKET: Final = (
    access.READ,
    access.WRITE,
    bucket.LISTING,
    bucket.THROUGHPUT,
    bucket.RECORDS,
    metadata.FINGERPRINT,
)
OF_THE_HUB: Final = (endpoint.NAME, endpoint.CLOCK, bucket.BUCKET, *OF_THE_BUCKET)


def examine(case: CheckContext, *, probing: bool = False) -> Iterator[Finding]:
    """Run the checks, and yield each finding as soon as it is known.

    Args:
        case: The instance.
        probing: Whether also to store an object, read it back and delete it.
    """
    examination = _Examination(case, probing=probing)
    case.settings.resolve_token(case.environ)  # registers the token, so that it is redacted
    for finding in examination.run():
        yield finding.cleaned()


class _Examination:
    """Run of the checks on one instance.

    `_try` runs each check that needs the Hub, so that a failure becomes a finding and the other checks still run.
    """

    def __init__(self, case: CheckContext, *, probing: bool) -> None:
        self._case = case
        self._probing = probing

    def run(self) -> Iterator[Finding]:
        case = self._case
        yield from engine.check_engine(case.named, case.environ)
        token = access.check_token(case.named, case.environ)
        yield token
        if token.severity is Severity.ERROR:
            yield from self._skip(OF_THE_HUB, "there is no token that can be sent")
        else:
            yield from self._hub()
        yield self._finding(engine.NAME, lambda: engine.check_temp_dir(case.named))
        around = xet_home.started_with(case.environ)
        for name, check in environment.CHECKS:
            yield self._finding(name, partial(check, case.named, around))

    def _hub(self) -> Iterator[Finding]:
        case = self._case
        finding, greeting = self._try(endpoint.NAME, lambda: endpoint.check(case))
        yield finding
        if greeting is None:
            yield from self._skip(OF_THE_HUB[1:], "the Hub does not answer")
            return
        yield endpoint.judge_clock(greeting)
        finding, there = self._try(bucket.BUCKET, lambda: bucket.check_bucket(case))
        yield finding
        if there:
            yield from self._content()
        else:
            yield from self._skip(OF_THE_BUCKET, "nothing can be asked of the bucket")

    def _content(self) -> Iterator[Finding]:
        case = self._case
        finding, may_read = self._try(access.READ, lambda: access.check_rights(case, "read"))
        yield finding
        finding, may_write = self._try(access.WRITE, lambda: access.check_rights(case, "write"))
        yield finding
        finding, chunk = self._try(bucket.LISTING, lambda: bucket.check_listing(case))
        yield finding
        if not case.settings.reads:
            yield skipped(bucket.THROUGHPUT, f"role is {case.settings.role}")
        elif not may_read:
            yield skipped(bucket.THROUGHPUT, "the right to read is not there")
        elif chunk is None:
            yield skipped(bucket.THROUGHPUT, "no chunk is known to read")
        else:
            yield self._finding(bucket.THROUGHPUT, lambda: bucket.check_throughput(case, chunk))
        yield self._finding(bucket.RECORDS, lambda: bucket.check_records(case))
        yield self._finding(metadata.FINGERPRINT, lambda: metadata.check_fingerprint(case))
        if case.settings.index == "snapshot":
            yield self._finding(metadata.INDEX, lambda: metadata.check_index(case))
        yield from self._probe(may_read=bool(may_read), may_write=bool(may_write))

    def _probe(self, *, may_read: bool, may_write: bool) -> Iterator[Finding]:
        if not self._probing:
            return
        if not self._case.settings.writes:
            yield probe_write.refusal(self._case.named)
        elif not may_write:
            yield skipped(probe_write.NAME, "the right to write is not there")
        else:
            yield self._finding(probe_write.NAME, lambda: probe_write.check(self._case, read_back=may_read))

    def _skip(self, names: tuple[str, ...], why: str) -> Iterator[Finding]:
        for name in names:
            yield skipped(name, why)
        if self._probing:
            yield skipped(probe_write.NAME, why)

    def _try(self, name: str, check: Callable[[], tuple[Finding, _T]]) -> tuple[Finding, _T | None]:
        """Run a check; an error becomes its finding, with the value None."""
        try:
            return check()
        except HFBucketError as caught:
            return from_error(name, caught, self._case.named), None
        except Exception as caught:  # noqa: BLE001 - a bug in one check must not hide the findings of the others
            found = f"the check itself failed: {type(caught).__name__}: {caught}"
            return error(name, found, "please report this"), None

    def _finding(self, name: str, check: Callable[[], Finding]) -> Finding:
        return self._try(name, lambda: (check(), None))[0]


def doctor(  # noqa: PLR0917 - Typer makes options of them
    lmcache_config: options.LMCacheConfig = None,
    instances: options.Instances = None,
    l2_adapters: options.L2Adapters = None,
    probe_write: Annotated[
        bool, typer.Option("--probe-write", help="Also store a small object, read it back and delete it.")
    ] = False,
    as_json: options.AsJson = False,
    timeout: options.Timeout = options.DEFAULT_TIMEOUT_SECS,
) -> None:
    """Say whether instances do what they are configured for; where not, what to fix.

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


def _examined(named: InstanceConfig, timeout: float, *, probe_write: bool, show: bool) -> list[Finding]:
    """Examine an instance, and show the findings: a table in a terminal, otherwise a line for each as it is known."""
    console = tables.stdout_console()
    found = []
    with tables.busy(f"{named.name}: looking"), opened(named, timeout, few_calls=True) as bucket:
        for finding in examine(CheckContext(named, bucket, timeout), probing=probe_write):
            found.append(finding)
            if show and not console.is_terminal:
                output.line(f"{named.name}: {finding}", at_once=True)
    if show and console.is_terminal:
        console.print(findings_table(f"{named.name}  {named.settings.bucket_handle}", found))
    return found


def _record(named: InstanceConfig, found: Sequence[Finding]) -> dict[str, Any]:
    return {
        "instance": named.name,
        "mode": named.mode,
        "bucket_handle": str(named.settings.bucket_handle),
        "endpoint": named.settings.endpoint,
        "findings": [
            {"check": one.check, "severity": str(one.severity), "found": one.found, "mend": one.fix} for one in found
        ],
    }


_STYLES: Final = {Severity.OK: "green", Severity.NOTE: "cyan", Severity.WARNING: "yellow", Severity.ERROR: "bold red"}


def findings_table(title: str, found: Sequence[Finding]) -> Table:
    """Return the table of an instance's findings."""
    table = Table(title=Text(texts.shown(title)), title_justify="left", expand=True)
    table.add_column("check", no_wrap=True)
    table.add_column("result", no_wrap=True)
    table.add_column("what was found, and what to do", ratio=1, overflow="fold")
    for one in found:
        text = Text(texts.shown(one.found))
        if one.fix:
            text.append(f"\n→ {texts.shown(one.fix)}", style="dim" if one.severity < Severity.WARNING else "")
        table.add_row(one.check, Text(str(one.severity), style=_STYLES[one.severity]), text)
    return table
