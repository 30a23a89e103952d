"""Foreign text made safe to show: one line without escapes, and without the tokens that this process knows.

All output of commands and all log records of the package pass through here: names in a bucket, messages of a Hub,
records of other processes. They may contain line breaks, terminal escapes and marks that reverse the text direction,
and a Hub may repeat a token in another spelling than the environment has.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import logging
import os
import pkgutil
import re
import sys
from typing import IO, TYPE_CHECKING, Any, Final, NamedTuple
from urllib.parse import quote

from hfbucket_plugin.errors import HFBucketError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

SECRET_NAME: Final = re.compile(r"(^|_)(TOKEN|SECRET|PASSWORD|API_KEY)$", re.IGNORECASE)
"""Names of environment variables whose values are removed from all output."""

LEAST_SECRET: Final = 8
"""Minimum length of a variable's secret; shorter values, such as of CI_TOKEN=1, may occur by chance."""

_LEAST_KNOWN: Final = 3
"""Minimum length of a token from a setting; shorter ones would match ordinary words."""

_MOST_KNOWN: Final = 256
"""Maximum number of remembered tokens; hourly rotation reaches it in ten days."""

HUB_TOKEN: Final = re.compile(r"(?<![A-Za-z0-9])(?:hf|api_org)_[A-Za-z0-9]{16,}")
_INSTEAD: Final = "***"
_ANY: Final = "surrogatepass"
"""Error handler for environment variables, which may contain any bytes."""

_QUOTES: Final = "\"'`"
_BEARER: Final = re.compile(r"^(bearer|token)\s+", re.IGNORECASE)

_known: dict[str, None] = {}


def know(token: str | None) -> None:
    """Remove a token from all output from now on."""
    if token and token not in _known:
        _known[token] = None
        if len(_known) > _MOST_KNOWN:
            del _known[next(iter(_known))]


def printable(text: str) -> str:
    """Return a text on one line; line breaks, escapes and direction marks are written as Python escapes."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def hide(text: str) -> str:
    """Return a text without known tokens and without anything that looks like a Hub token."""
    return HUB_TOKEN.sub(_INSTEAD, _without_known(text))


def _without_known(text: str) -> str:
    pattern = _known_pattern()
    return text if pattern is None else pattern.sub(_INSTEAD, text)


class _Cached(NamedTuple):
    """Pattern found for an environment and a set of tokens from settings."""

    environment: object
    known: tuple[str, ...]
    pattern: re.Pattern[str] | None


_cache: list[_Cached] = []


def _known_pattern() -> re.Pattern[str] | None:
    """Return a pattern for all tokens in all spellings, cached because it is needed for each text shown."""
    environment, known = getattr(os.environ, "_data", None), tuple(_known)
    cached = _cache[-1] if _cache else None
    if cached is not None and environment is not None and (cached.environment, cached.known) == (environment, known):
        return cached.pattern
    secrets = sorted(_secrets(), key=len, reverse=True)
    pattern = re.compile("|".join(map(_pattern, secrets))) if secrets else None
    _cache[:] = [_Cached(None if environment is None else dict(environment), known, pattern)]
    return pattern


def shown(text: object) -> str:
    """Return a text that is safe to show: on one line and without tokens."""
    return printable(hide(str(text)))


def shown_lines(text: str) -> str:
    """Return a text with its own line breaks, such as a job's log, made safe like `shown`."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in hide(text))


def hidden(value: Any) -> Any:
    """Return a JSON document without tokens. JSON itself escapes the rest."""
    if isinstance(value, str):
        return hide(value)
    if isinstance(value, dict):
        return {hidden(name): hidden(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [hidden(inner) for inner in value]
    return value


def as_json(value: Any) -> str:
    """Return a document as one line of JSON, without tokens."""
    return json.dumps(hidden(value))


def _secrets() -> set[str]:
    variables = (
        (name, os.environ.get(name, "")) for name in os.environ
    )  # not `items`, because another thread may remove one
    named = {
        value
        for name, value in variables
        if SECRET_NAME.search(name) and len(value.strip(_QUOTES + " \t\r\n")) >= LEAST_SECRET
    }
    return set(spellings([*named, *_known]))


def spellings(values: Iterable[str]) -> set[str]:
    """Return the possible spellings of tokens in foreign text: without quotes, in JSON, in a URL."""
    found: set[str] = set()
    for value in values:
        for one in (value.strip(), _bare(value)):
            found |= {one, json.dumps(one)[1:-1], quote(one, errors=_ANY), quote(one, safe="", errors=_ANY)}
    return {one for one in found if len(one) >= _LEAST_KNOWN}


def _bare(value: str) -> str:
    """Return the token in a longer value: in quotes (as `docker --env-file` keeps), after "Bearer", or with a comment."""
    before, bare = None, value
    while bare != before:
        before = bare
        bare = _BEARER.sub("", bare.split(" #", maxsplit=1)[0].strip()).strip(_QUOTES)
    return bare


def _pattern(secret: str) -> str:
    """Return a token's pattern; a short token matches only as a whole word."""
    if len(secret) >= LEAST_SECRET:
        return re.escape(secret)
    return rf"(?<![A-Za-z0-9]){re.escape(secret)}(?![A-Za-z0-9])"


@contextlib.contextmanager
def hide_in_errors() -> Iterator[None]:
    """Remove tokens from this package's errors that leave the block, because programs may log them anywhere."""
    try:
        yield
    except HFBucketError as error:
        error.message = shown(error.message)
        error.args = (error.message,)
        raise


class ShownFormatter(logging.Formatter):
    """Log formatter for people, with one line per record of any logger."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        return shown(super().format(record))


def log_to_stderr(command: str) -> None:
    """Send the warnings of a command and of all libraries to stderr, one line each."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(ShownFormatter(f"{command}: %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)


class _Clean(logging.Filter):
    """Log filter that makes the texts of a record safe for all handlers."""

    def filter(self, record: logging.LogRecord) -> bool:
        try:
            record.msg, record.args = shown(record.getMessage()), None
            if record.exc_info and not record.exc_text:
                record.exc_text = shown_lines(_FORMATTER.formatException(record.exc_info))
        except Exception:  # noqa: BLE001 - handlers report a record that cannot be formatted
            return True
        return True


_FORMATTER: Final = logging.Formatter()
_CLEAN: Final = _Clean()


def clean_logs(package: str, path: Iterable[str]) -> None:
    """Make the log records of every module of a package safe.

    Each logger gets the filter, because a parent's filters do not see the records of its children.

    Args:
        package: Name of the package.
        path: Its `__path__`.
    """
    for name in (package, *_modules(package, path)):
        logging.getLogger(name).addFilter(_CLEAN)


def _modules(package: str, path: Iterable[str]) -> Iterator[str]:
    """Yield the names of all modules of a package without importing them."""
    for found in pkgutil.iter_modules(path, f"{package}."):
        yield found.name
        if found.ispkg:
            yield from _modules(found.name, [f"{place}/{found.name.rpartition('.')[2]}" for place in path])


class _Hiding:
    """Text stream that removes tokens."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write a text without the tokens that this process knows."""
        self._stream.write(_without_known(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def hide_in_streams() -> None:
    """Remove tokens from stdout and stderr, from any writer (Typer, Rich, tracebacks). Only for a command's process.

    Text that only looks like a token is kept, because data may contain such a name.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, _Hiding):
            setattr(sys, name, _Hiding(stream))


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.4) -> str:
    """Return the known name nearest to an unknown one, or all known names, as the end of an error message.

    Args:
        name: Unknown name.
        known: Known names.
        cutoff: Minimum similarity, from 0 to 1.
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=cutoff)
    return f" (did you mean {near[0]!r}?)" if near else f"; known are {', '.join(names)}"
