"""Output of the commands: results on stdout, everything for people on stderr."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING, Any, NoReturn

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hfbucket_plugin.core import texts
from hfbucket_plugin.tools import exit_codes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


def line(text: str, *, at_once: bool = False) -> None:
    """One line of the result; `at_once` for those that take a while to come."""
    sys.stdout.write(f"{texts.shown(text)}\n")
    if at_once:
        sys.stdout.flush()


def json_line(value: Any) -> None:
    """One JSON document of the result, on a line of its own."""
    sys.stdout.write(f"{texts.as_json(value)}\n")


def print_error(text: str, program: str = "hfbucket") -> None:
    """Write one line for people to stderr.

    Args:
        text: The line.
        program: Stands before it.
    """
    sys.stderr.write(f"{program}: {texts.shown(text)}\n")
    sys.stderr.flush()


def end(text: str, code: int) -> NoReturn:
    """Complain, and end."""
    print_error(text)
    raise typer.Exit(code)


@contextlib.contextmanager
def results() -> Iterator[None]:
    """While results are written: their reader may stop, as `head` does, and that is no error."""
    for stream in (sys.stdout, sys.stderr):
        # Names in a bucket are any Unicode, a terminal's encoding may not be.
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes stdout once more when it ends, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(exit_codes.OK) from None


def stdout_console() -> Console:
    """Standard output. Names in a bucket are no markup, and are not to be coloured as if they were Python."""
    return Console(markup=False, highlight=False, emoji=False)


@contextlib.contextmanager
def busy(what: str) -> Iterator[None]:
    """Show on stderr that something is being done, where that is a terminal."""
    errors = Console(stderr=True, markup=False, highlight=False)
    if not errors.is_terminal:
        yield
        return
    with errors.status(what):
        yield


def columns(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table of texts and numbers: the first column is text, and gives way where the terminal is narrow."""
    table = Table(title=Text(texts.shown(title)), title_justify="left", box=SIMPLE_HEAD)
    for number, name in enumerate(header):
        table.add_column(name, justify="right" if number else "left", overflow="fold", no_wrap=bool(number))
    for row in rows:
        table.add_row(*(Text(texts.shown(cell)) for cell in row))
    return table


def at_terminal() -> bool:
    """Whether somebody can be shown a plan, and asked."""
    return sys.stdin.isatty() and sys.stderr.isatty()
