"""Texts of others, made safe to show: one line without escapes, and without the tokens that this process knows.

Everything that a command prints, and every log record of the package, passes through here last: names in a bucket, what a
Hub says, what another process recorded. They may hold line breaks, terminal escapes and marks that reverse the direction
of text; and a Hub may repeat a token, in another spelling than the one that the environment has.
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
"""Variables of the environment whose values are cut from every output."""

LEAST_SECRET: Final = 8
"""A shorter value of a variable such as CI_TOKEN=1 may stand anywhere by chance."""

_LEAST_KNOWN: Final = 3
"""A shorter token that a setting gives is not cut: every second word would be."""

_MOST_KNOWN: Final = 256
"""Tokens that are remembered; one that is rotated each hour fills it in ten days."""

HUB_TOKEN: Final = re.compile(r"(?<![A-Za-z0-9])(?:hf|api_org)_[A-Za-z0-9]{16,}")
_INSTEAD: Final = "***"
_ANY: Final = "surrogatepass"
"""A variable of the environment may hold any bytes."""

_QUOTES: Final = "\"'`"
_BEARER: Final = re.compile(r"^(bearer|token)\s+", re.IGNORECASE)

_known: dict[str, None] = {}


def know(token: str | None) -> None:
    """Cut a token from every output from now on."""
    if token and token not in _known:
        _known[token] = None
        if len(_known) > _MOST_KNOWN:
            del _known[next(iter(_known))]


def printable(text: str) -> str:
    """A text on one line: what is not printable, such as line breaks, escapes and marks of direction, is written as Python does."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def hide(text: str) -> str:
    """A text without the tokens that this process knows, and without what looks like one of the Hub."""
    return HUB_TOKEN.sub(_INSTEAD, _without_known(text))


def _without_known(text: str) -> str:
    pattern = _known_pattern()
    return text if pattern is None else pattern.sub(_INSTEAD, text)


class _Cached(NamedTuple):
    """What was found of which environment, and of which tokens that settings gave."""

    environment: object
    known: tuple[str, ...]
    pattern: re.Pattern[str] | None


_cache: list[_Cached] = []


def _known_pattern() -> re.Pattern[str] | None:
    """All tokens in all spellings; rebuilt where the environment changed. It is asked for each text that is shown."""
    environment, known = getattr(os.environ, "_data", None), tuple(_known)
    cached = _cache[-1] if _cache else None
    if cached is not None and environment is not None and (cached.environment, cached.known) == (environment, known):
        return cached.pattern
    secrets = sorted(_secrets(), key=len, reverse=True)
    pattern = re.compile("|".join(map(_pattern, secrets))) if secrets else None
    _cache[:] = [_Cached(None if environment is None else dict(environment), known, pattern)]
    return pattern


def shown(text: object) -> str:
    """A text as it may be shown to people: on one line, and without tokens."""
    return printable(hide(str(text)))


def shown_lines(text: str) -> str:
    """As `shown`, of a text of several lines that are its own, such as the log of a job."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in hide(text))


def hidden(value: Any) -> Any:
    """A document for JSON without tokens. JSON itself escapes the rest."""
    if isinstance(value, str):
        return hide(value)
    if isinstance(value, dict):
        return {hidden(name): hidden(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [hidden(inner) for inner in value]
    return value


def as_json(value: Any) -> str:
    """A document as one line of JSON, without tokens."""
    return json.dumps(hidden(value))


def _secrets() -> set[str]:
    variables = ((name, os.environ.get(name, "")) for name in os.environ)  # not `items`: another thread may remove one
    named = {
        value
        for name, value in variables
        if SECRET_NAME.search(name) and len(value.strip(_QUOTES + " \t\r\n")) >= LEAST_SECRET
    }
    return set(spellings([*named, *_known]))


def spellings(values: Iterable[str]) -> set[str]:
    """What tokens may look like where somebody repeats them: without quotes around them, in JSON, in an address."""
    found: set[str] = set()
    for value in values:
        for one in (value.strip(), _bare(value)):
            found |= {one, json.dumps(one)[1:-1], quote(one, errors=_ANY), quote(one, safe="", errors=_ANY)}
    return {one for one in found if len(one) >= _LEAST_KNOWN}


def _bare(value: str) -> str:
    """The token in a value that holds more: quotes that `docker --env-file` keeps, the word Bearer, a comment behind it."""
    before, bare = None, value
    while bare != before:
        before = bare
        bare = _BEARER.sub("", bare.split(" #", maxsplit=1)[0].strip()).strip(_QUOTES)
    return bare


def _pattern(secret: str) -> str:
    """A short token is cut where it stands by itself, and not out of words."""
    if len(secret) >= LEAST_SECRET:
        return re.escape(secret)
    return rf"(?<![A-Za-z0-9]){re.escape(secret)}(?![A-Za-z0-9])"


@contextlib.contextmanager
def hide_in_errors() -> Iterator[None]:
    """Let no token pass in the text of an error of ours that leaves the block: programs log errors where they like."""
    try:
        yield
    except HFBucketError as error:
        error.message = shown(error.message)
        error.args = (error.message,)
        raise


class ShownFormatter(logging.Formatter):
    """Formats records for people, on one line each, of all loggers."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        return shown(super().format(record))


def log_to_stderr(command: str) -> None:
    """Have a command's warnings, and those of all libraries, go to stderr, one line each."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(ShownFormatter(f"{command}: %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)


class _Clean(logging.Filter):
    """Makes the texts of a record safe, whatever handler it comes to."""

    def filter(self, record: logging.LogRecord) -> bool:
        try:
            record.msg, record.args = shown(record.getMessage()), None
            if record.exc_info and not record.exc_text:
                record.exc_text = shown_lines(_FORMATTER.formatException(record.exc_info))
        except Exception:  # noqa: BLE001 - a record that cannot be formatted is the handlers' to complain about
            return True
        return True


_FORMATTER: Final = logging.Formatter()
_CLEAN: Final = _Clean()


def clean_logs(package: str, path: Iterable[str]) -> None:
    """Have every logger of a package's modules make the texts of its records safe.

    Each logger gets the filter: those of a parent do not see what children log.

    Args:
        package: Its name.
        path: Its `__path__`.
    """
    for name in (package, *_modules(package, path)):
        logging.getLogger(name).addFilter(_CLEAN)


def _modules(package: str, path: Iterable[str]) -> Iterator[str]:
    """The names of all modules of a package, without an import of any."""
    for found in pkgutil.iter_modules(path, f"{package}."):
        yield found.name
        if found.ispkg:
            yield from _modules(found.name, [f"{place}/{found.name.rpartition('.')[2]}" for place in path])


class _Hiding:
    """A text stream that lets no token pass."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write a text without the tokens that this process knows."""
        self._stream.write(_without_known(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write several."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def hide_in_streams() -> None:
    """Let no token pass to stdout and stderr, from any writer: Typer, Rich, tracebacks. For a command's process alone.

    What only looks like a token is left as it is here: data may hold such a name.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, _Hiding):
            setattr(sys, name, _Hiding(stream))


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.4) -> str:
    """The nearest known name to one that is not known, or all that are known, to follow it in an error.

    Args:
        name: Which is not known.
        known: Those that are.
        cutoff: How near it has to be, from 0 to 1.
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=cutoff)
    return f" (did you mean {near[0]!r}?)" if near else f"; known are {', '.join(names)}"
