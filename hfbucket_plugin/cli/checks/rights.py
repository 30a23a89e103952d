"""What the token may do with the content of the bucket."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal

from hfbucket_plugin.cli.findings import Finding, error, note, ok
from hfbucket_plugin.errors import AccessDeniedError, BucketMissingError

if TYPE_CHECKING:
    from hfbucket_plugin.cli.case import Case
    from hfbucket_plugin.named import NamedInstance

READ: Final = "right to read"
WRITE: Final = "right to write"


def check(case: Case, right: Literal["read", "write"]) -> tuple[Finding, bool]:
    """Ask for access to the storage, as the engine does before it reads or writes.

    Returns:
        What was found, and whether the right is there.

    Raises:
        HFBucketError: The Hub does not say.
    """
    try:
        case.ask(f"xet-{right}-token", lambda deadline: case.bucket.check_right(right, deadline))
    except (AccessDeniedError, BucketMissingError) as caught:  # the bucket itself was seen, so a 404 is a refusal
        told = caught.message.removeprefix(f"instance {case.named.name!r}: ")
        return judge(case.named, right, told), False
    return judge(case.named, right, None), True


def judge(named: NamedInstance, right: Literal["read", "write"], refusal: str | None) -> Finding:
    """Whether a right, or its absence, fits the role.

    Args:
        named: The instance.
        right: Which right.
        refusal: The Hub's words; None when it grants the right.
    """
    role = named.settings.role
    name, needed = (READ, named.settings.reads) if right == "read" else (WRITE, named.settings.writes)
    if refusal is not None:
        return _denied(named, name, refusal) if needed else ok(name, f"not granted, and not needed: role is {role}")
    if right == "write" and not needed:
        return note(name, f"granted, though role is {role}", "a token that may only read is safer here")
    return ok(name, "granted")


def _denied(named: NamedInstance, name: str, refusal: str) -> Finding:
    variable = f"{named.settings.token_env} ({named.setting('token_env')})"
    if name == READ:
        return error(
            name, f"denied, so every get is a miss: {refusal}", f"give the token of {variable} the right to read"
        )
    advice = f"give the token of {variable} the right to write, or set {named.setting('role')} to read-only"
    return error(name, f"denied, so nothing can be stored: {refusal}", advice)
