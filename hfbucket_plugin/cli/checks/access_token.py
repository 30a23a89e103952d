"""Whether there is a token, and where it comes from. Never what it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from hfbucket_plugin.cli.findings import Finding, Severity, error, note, ok, warning
from hfbucket_plugin.hub import token_problem

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hfbucket_plugin.named import NamedInstance

NAME: Final = "token"


def check(named: NamedInstance, environ: Mapping[str, str]) -> Finding:
    """Find the token by the name of its variable. An error means that no request can be made with it."""
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
