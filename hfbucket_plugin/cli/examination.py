"""The examination of one instance: the checks in their order, and what makes the later ones meaningless."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

from hfbucket_plugin import xet_home
from hfbucket_plugin.cli.checks import (
    access_token,
    bucket,
    endpoint,
    engine,
    environment,
    fingerprint,
    index,
    listing,
    probe_write,
    records,
    rights,
    temp_dir,
    throughput,
)
from hfbucket_plugin.cli.findings import Finding, Severity, error, from_error, skipped
from hfbucket_plugin.errors import HFBucketError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hfbucket_plugin.cli.case import Case

_T = TypeVar("_T")

# What is skipped when the bucket, or the Hub, cannot be asked.
OF_THE_BUCKET: Final = (rights.READ, rights.WRITE, listing.NAME, throughput.NAME, records.NAME, fingerprint.NAME)
OF_THE_HUB: Final = (endpoint.NAME, endpoint.CLOCK, bucket.NAME, *OF_THE_BUCKET)


def examine(case: Case, *, probing: bool = False) -> Iterator[Finding]:
    """Carry out the checks, and yield what each finds as soon as it is found.

    Args:
        case: The instance.
        probing: Store an object, read it back and delete it, too.
    """
    examination = _Examination(case, probing=probing)
    case.settings.resolve_token(case.environ)  # so that it is known, and cut
    for finding in examination.run():
        yield finding.cleaned()


class _Examination:
    """One run of the checks.

    Each check that needs the Hub is carried out by `_try`, so that one that fails says so and the others go on.
    """

    def __init__(self, case: Case, *, probing: bool) -> None:
        self._case = case
        self._probing = probing

    def run(self) -> Iterator[Finding]:
        case = self._case
        yield from engine.check(case.named, case.environ)
        token = access_token.check(case.named, case.environ)
        yield token
        if token.severity is Severity.ERROR:
            yield from self._skip(OF_THE_HUB, "there is no token that can be sent")
        else:
            yield from self._hub()
        yield self._finding(temp_dir.NAME, lambda: temp_dir.check(case.named))
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
        finding, there = self._try(bucket.NAME, lambda: bucket.check(case))
        yield finding
        if there:
            yield from self._content()
        else:
            yield from self._skip(OF_THE_BUCKET, "nothing can be asked of the bucket")

    def _content(self) -> Iterator[Finding]:
        case = self._case
        finding, may_read = self._try(rights.READ, lambda: rights.check(case, "read"))
        yield finding
        finding, may_write = self._try(rights.WRITE, lambda: rights.check(case, "write"))
        yield finding
        finding, chunk = self._try(listing.NAME, lambda: listing.check(case))
        yield finding
        if not case.settings.reads:
            yield skipped(throughput.NAME, f"role is {case.settings.role}")
        elif not may_read:
            yield skipped(throughput.NAME, "the right to read is not there")
        elif chunk is None:
            yield skipped(throughput.NAME, "no chunk is known to read")
        else:
            yield self._finding(throughput.NAME, lambda: throughput.check(case, chunk))
        yield self._finding(records.NAME, lambda: records.check(case))
        yield self._finding(fingerprint.NAME, lambda: fingerprint.check(case))
        if case.settings.index == "snapshot":
            yield self._finding(index.NAME, lambda: index.check(case))
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
        """Carry out a check; what it raises becomes its finding, and its value is None."""
        try:
            return check()
        except HFBucketError as caught:
            return from_error(name, caught, self._case.named), None
        except Exception as caught:  # noqa: BLE001 - a mistake in one check must not hide what the others find
            found = f"the check itself failed: {type(caught).__name__}: {caught}"
            return error(name, found, "please report this"), None

    def _finding(self, name: str, check: Callable[[], Finding]) -> Finding:
        return self._try(name, lambda: (check(), None))[0]
