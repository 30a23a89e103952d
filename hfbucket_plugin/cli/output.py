"""Where results and complaints go: results to stdout and nothing else, everything for people to stderr."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from hfbucket_plugin import texts
from hfbucket_plugin.cli import exits

if TYPE_CHECKING:
    from collections.abc import Iterator


def line(text: str, *, at_once: bool = False) -> None:
    """One line of the result; `at_once` for those that take a while to come."""
    sys.stdout.write(f"{texts.shown(text)}\n")
    if at_once:
        sys.stdout.flush()


def json_line(value: Any) -> None:
    """One JSON document of the result, on a line of its own."""
    sys.stdout.write(f"{texts.as_json(value)}\n")


def complain(text: str) -> None:
    """One line for people."""
    sys.stderr.write(f"hfbucket: {texts.shown(text)}\n")


def end(text: str, code: int) -> NoReturn:
    """Complain, and end."""
    complain(text)
    raise typer.Exit(code)


@contextlib.contextmanager
def results() -> Iterator[None]:
    """While results are written: whoever reads them may stop, as `head` does, and that is no error."""
    for stream in (sys.stdout, sys.stderr):
        # Names in a bucket are any Unicode, a terminal's encoding may not be.
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes stdout once more when it ends, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(exits.OK) from None
