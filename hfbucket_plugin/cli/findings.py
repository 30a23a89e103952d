"""What the checks of `doctor` find, and how errors become findings."""

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
    """How bad a finding is."""

    OK = 0
    NOTE = 1
    WARNING = 2
    ERROR = 3

    def __str__(self) -> str:
        return self.name.lower()


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found.

    Attributes:
        check: The check's name, stable.
        severity: How bad it is.
        found: What was found, in words.
        fix: What to do about it, with the name of the setting; empty where there is nothing to do.
    """

    check: str
    severity: Severity
    found: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.severity}: {self.check}: {self.found}" + (f"; {self.fix}" if self.fix else "")

    def cleaned(self) -> Finding:
        """The same for people's eyes: without tokens, should a server have repeated one, and on one line; see `texts`."""
        return replace(self, found=texts.shown(self.found), fix=texts.shown(self.fix))


def ok(check: str, found: str) -> Finding:
    """All is well."""
    return Finding(check, Severity.OK, found)


def note(check: str, found: str, fix: str = "") -> Finding:
    """Worth knowing, and nothing that must be fixed."""
    return Finding(check, Severity.NOTE, found, fix)


def warning(check: str, found: str, fix: str) -> Finding:
    """The instance works, and not as it should."""
    return Finding(check, Severity.WARNING, found, fix)


def error(check: str, found: str, fix: str) -> Finding:
    """The instance does not do what it is configured for."""
    return Finding(check, Severity.ERROR, found, fix)


def skipped(check: str, why: str) -> Finding:
    """Not looked at."""
    return note(check, f"skipped: {why}")


def from_error(check: str, caught: HFBucketError, named: InstanceConfig) -> Finding:
    """What a check found that could not be carried out. The Hub's client words most advice in its messages itself."""
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
    """What ended a listing, in one line that names the instance, what was wrong, and what to do."""
    finding = from_error("", caught, named)
    if isinstance(caught, ThrottledError):
        finding = replace(finding, fix="give --timeout as many seconds to wait for it, or come back later")
    named.settings.resolve_token()  # so that it is known, and cut
    finding = finding.cleaned()
    return f"instance {named.name!r}: {finding.found}" + (f"; {finding.fix}" if finding.fix else "")


def exit_code(findings: Iterable[Finding]) -> int:
    """The code that tells the worst of some findings."""
    worst = max((finding.severity for finding in findings), default=Severity.OK)
    return {Severity.WARNING: exit_codes.WARNINGS, Severity.ERROR: exit_codes.ERRORS}.get(worst, exit_codes.OK)
