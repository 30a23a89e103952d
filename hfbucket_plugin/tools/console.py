"""Output of the commands: results on stdout, messages on stderr."""

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
    """Print one line of the result; `at_once` flushes it, for results that arrive slowly."""
    sys.stdout.write(f"{texts.shown(text)}\n")
    if at_once:
        sys.stdout.flush()


def json_line(value: Any) -> None:
    """Print one JSON document of the result on one line."""
    sys.stdout.write(f"{texts.as_json(value)}\n")


def print_error(text: str, program: str = "hfbucket") -> None:
    """Write a one-line message to stderr.

    Args:
        text: The line.
        program: Program name to prefix.
    """
    sys.stderr.write(f"{program}: {texts.shown(text)}\n")
    sys.stderr.flush()


def end(text: str, code: int) -> NoReturn:
    """Print an error, and end the command with an exit code."""
    print_error(text)
    raise typer.Exit(code)


@contextlib.contextmanager
def results() -> Iterator[None]:
    """Accept that the reader of the results closes the pipe, as `head` does."""
    for stream in (sys.stdout, sys.stderr):
        # Names in a bucket are any Unicode, which a terminal's encoding may not support.
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes stdout again at exit, and would report an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(exit_codes.OK) from None


def stdout_console() -> Console:
    """Return a console on stdout, which prints names in a bucket without markup and highlighting."""
    return Console(markup=False, highlight=False, emoji=False)


@contextlib.contextmanager
def busy(what: str) -> Iterator[None]:
    """Show a status on stderr during a `with` block, if it is a terminal."""
    errors = Console(stderr=True, markup=False, highlight=False)
    if not errors.is_terminal:
        yield
        return
    with errors.status(what):
        yield


def columns(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Create a table of texts and numbers: the first column is text, and shrinks in a narrow terminal."""
    table = Table(title=Text(texts.shown(title)), title_justify="left", box=SIMPLE_HEAD)
    for number, name in enumerate(header):
        table.add_column(name, justify="right" if number else "left", overflow="fold", no_wrap=bool(number))
    for row in rows:
        table.add_row(*(Text(texts.shown(cell)) for cell in row))
    return table


def at_terminal() -> bool:
    """Return whether the command runs at a terminal, so that it can show a plan and ask."""
    return sys.stdin.isatty() and sys.stderr.isatty()
