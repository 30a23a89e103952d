"""Tables for people whose stdout is a terminal."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hfbucket_plugin import texts
from hfbucket_plugin.cli.findings import Finding, Severity

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_STYLES: Final = {Severity.OK: "green", Severity.NOTE: "cyan", Severity.WARNING: "yellow", Severity.ERROR: "bold red"}


def console() -> Console:
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


def findings(title: str, found: Sequence[Finding]) -> Table:
    """What `doctor` found in one instance."""
    table = Table(title=Text(texts.shown(title)), title_justify="left", expand=True)
    table.add_column("check", no_wrap=True)
    table.add_column("result", no_wrap=True)
    table.add_column("what was found, and what to do", ratio=1, overflow="fold")
    for one in found:
        text = Text(texts.shown(one.found))
        if one.mend:
            text.append(f"\n→ {texts.shown(one.mend)}", style="dim" if one.severity < Severity.WARNING else "")
        table.add_row(one.check, Text(str(one.severity), style=_STYLES[one.severity]), text)
    return table


def columns(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table of texts and numbers: the first column is text, and gives way where the terminal is narrow."""
    table = Table(title=Text(texts.shown(title)), title_justify="left", box=SIMPLE_HEAD)
    for number, name in enumerate(header):
        table.add_column(name, justify="right" if number else "left", overflow="fold", no_wrap=bool(number))
    for row in rows:
        table.add_row(*(Text(texts.shown(cell)) for cell in row))
    return table
