"""Findings of `doctor`, and their creation from errors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum
from typing import TYPE_CHECKING

from hfbucket_plugin.core import texts
from hfbucket_plugin.errors import AccessDeniedError, BucketMissingError, HFBucketError, ThrottledError, TransportError
from hfbucket_plugin.tools import exit_codes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hfbucket_plugin.config.instances import InstanceConfig


class Severity(IntEnum):
    """Severity of a finding."""

    OK = 0
    NOTE = 1
    WARNING = 2
    ERROR = 3

    def __str__(self) -> str:
        return self.name.lower()


@dataclass(frozen=True, slots=True)
class Finding:
    """Result of one check.

    Attributes:
        check: Stable name of the check.
        severity: Its severity.
        found: The result in words.
        fix: What to do, with the name of the setting; empty if there is nothing to do.
    """

    check: str
    severity: Severity
    found: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.severity}: {self.check}: {self.found}" + (f"; {self.fix}" if self.fix else "")

    def cleaned(self) -> Finding:
        """Return the finding for display: on one line, and without tokens repeated by a server; see `texts`."""
        return replace(self, found=texts.shown(self.found), fix=texts.shown(self.fix))


def ok(check: str, found: str) -> Finding:
    """Return a finding that everything is in order."""
    return Finding(check, Severity.OK, found)


def note(check: str, found: str, fix: str = "") -> Finding:
    """Return an informational finding that needs no fix."""
    return Finding(check, Severity.NOTE, found, fix)


def warning(check: str, found: str, fix: str) -> Finding:
    """Return a finding that the instance works, but not as it should."""
    return Finding(check, Severity.WARNING, found, fix)


def error(check: str, found: str, fix: str) -> Finding:
    """Return a finding that the instance does not do what it is configured for."""
    return Finding(check, Severity.ERROR, found, fix)


def skipped(check: str, why: str) -> Finding:
    """Return a finding that a check was skipped."""
    return note(check, f"skipped: {why}")


def from_error(check: str, caught: HFBucketError, named: InstanceConfig) -> Finding:
    """Return the finding of a failed check. Most advice comes from the messages of the Hub's client."""
    found = caught.message.removeprefix(f"instance {named.name!r}: ")
    if isinstance(caught, ThrottledError):
        return warning(check, found, f"wait, or ask less: {named.setting('max_hub_calls_per_minute')}")
    if isinstance(caught, TransportError):
        return error(check, found, f"look at the network, and at {named.setting('endpoint')} or HF_ENDPOINT")
    if isinstance(caught, AccessDeniedError):
        return error(check, found, f"look at {named.setting('token_env')} and at the rights of its token")
    if isinstance(caught, BucketMissingError):
        return error(check, found, f"look at {named.setting('bucket_handle')}, and at what its token may see")
    return error(check, found, "")


def as_text(caught: HFBucketError, named: InstanceConfig) -> str:
    """Return the error of a listing as one line: the instance, the problem, and what to do."""
    finding = from_error("", caught, named)
    if isinstance(caught, ThrottledError):
        finding = replace(finding, fix="give --timeout as many seconds to wait for it, or come back later")
    named.settings.resolve_token()  # so that it is known, and cut
    finding = finding.cleaned()
    return f"instance {named.name!r}: {finding.found}" + (f"; {finding.fix}" if finding.fix else "")


def exit_code(findings: Iterable[Finding]) -> int:
    """Return the exit code of the worst finding."""
    worst = max((finding.severity for finding in findings), default=Severity.OK)
    return {Severity.WARNING: exit_codes.WARNINGS, Severity.ERROR: exit_codes.ERRORS}.get(worst, exit_codes.OK)
