"""Checks of the token and of its permissions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal

from hfbucket_plugin.cli.findings import Finding, Severity, error, note, ok, warning
from hfbucket_plugin.errors import AccessDeniedError, BucketMissingError
from hfbucket_plugin.hub.client import token_problem

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hfbucket_plugin.cli.context import CheckContext
    from hfbucket_plugin.config.instances import InstanceConfig


NAME: Final = "token"


def check_token(named: InstanceConfig, environ: Mapping[str, str]) -> Finding:
    """Find the token in its environment variable. An error means that no request can use it."""
    settings = named.settings
    variable, where = settings.token_env, named.setting("token_env")
    token = settings.resolve_token(environ)
    if token is None:
        severity = Severity.WARNING if settings.writes else Severity.NOTE
        found = f"no token: the environment variable {variable} is not set here; only public buckets can be read"
        return Finding(NAME, severity, found, f"set {variable}, or name another variable with {where}")
    inline = not environ.get(variable, "").strip()
    source = named.setting("token") if inline else f"the environment variable {variable}"
    if (problem := token_problem(token)) is not None:
        return error(NAME, f"the token from {source} {problem}", f"set {source} to the token alone")
    if inline:
        return warning(
            NAME,
            f"the token stands in {source}: LMCache logs its configuration",
            f"set {variable} instead, and remove it",
        )
    if settings.token is not None:
        return note(NAME, f"from {source}; {named.setting('token')} is not used", "remove it: LMCache logs it")
    return ok(NAME, f"from {source}")


READ: Final = "right to read"
WRITE: Final = "right to write"


def check_rights(case: CheckContext, right: Literal["read", "write"]) -> tuple[Finding, bool]:
    """Request access to the storage, as the engine does before it reads or writes.

    Returns:
        The finding, and whether the permission is granted.

    Raises:
        HFBucketError: If the Hub does not answer.
    """
    try:
        case.ask(f"xet-{right}-token", lambda deadline: case.bucket.check_right(right, deadline))
    except (AccessDeniedError, BucketMissingError) as caught:  # the bucket exists, so a 404 is a refusal
        message = caught.message.removeprefix(f"instance {case.named.name!r}: ")
        return judge(case.named, right, message), False
    return judge(case.named, right, None), True


def judge(named: InstanceConfig, right: Literal["read", "write"], refusal: str | None) -> Finding:
    """Check that a granted or refused permission fits the role.

    Args:
        named: The instance.
        right: The permission.
        refusal: The Hub's refusal; None if it grants the permission.
    """
    role = named.settings.role
    name, needed = (READ, named.settings.reads) if right == "read" else (WRITE, named.settings.writes)
    if refusal is not None:
        return _denied(named, name, refusal) if needed else ok(name, f"not granted, and not needed: role is {role}")
    if right == "write" and not needed:
        return note(name, f"granted, though role is {role}", "a token that may only read is safer here")
    return ok(name, "granted")


def _denied(named: InstanceConfig, name: str, refusal: str) -> Finding:
    variable = f"{named.settings.token_env} ({named.setting('token_env')})"
    if name == READ:
        return error(
            name, f"denied, so every get is a miss: {refusal}", f"give the token of {variable} the right to read"
        )
    advice = f"give the token of {variable} the right to write, or set {named.setting('role')} to read-only"
    return error(name, f"denied, so nothing can be stored: {refusal}", advice)
