"""Plans and summaries for people, on stderr: stdout is for programs."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import typer
from rich.console import Console

from hfbucket_plugin.core import texts
from hfbucket_plugin.core.units import age, printable, size
from hfbucket_plugin.tools import console as tables
from jobs.export.plan import REPLACED
from jobs.retention.access import line_of

if TYPE_CHECKING:
    from jobs.deletion.plan import PlanFile
    from jobs.export.plan import PlanFile as ExportPlan

_HEADER = ("model", "reason", "objects", "bytes")


def note(line: str) -> None:
    """One line for people."""
    sys.stderr.write(f"jobs: {texts.shown(line)}\n")
    sys.stderr.flush()


def at_terminal() -> bool:
    """Whether somebody can be shown a plan, and asked."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def plan(shown: PlanFile) -> None:
    """Objects and bytes by model and reason: a table in a terminal, else a line for each. Then what it goes by, and both ages."""
    totals, name = shown.totals, shown.header.instance
    rows = [
        (printable(model) if model else "(no chunk)", reason, f"{extent.objects:,}", size(extent.bytes))
        for (model, reason), extent in sorted(totals.by_reason.items())
    ]
    kept = [("", f"kept: {reason}", f"{e.objects:,}", size(e.bytes)) for reason, e in sorted(totals.kept.items())]
    passed = [
        ("", f"not ours: {kind}", f"{e.objects:,}", size(e.bytes)) for kind, e in sorted(totals.passed_by.items())
    ]
    console = Console(stderr=True, markup=False, highlight=False, emoji=False)
    if console.is_terminal:
        rows.append(("", "to be deleted", f"{shown.left.objects:,}", size(shown.left.bytes)))
        title = f"{name}  {shown.header.bucket}: {shown.header.job}"
        console.print(tables.columns(title, _HEADER, rows + kept + passed))
        _ages(shown)
        return
    for model, reason, objects, nbytes in rows + kept + passed:
        note(f"{name}: {model + ': ' if model else ''}{reason}: {objects} objects, {nbytes}")
    _ages(shown)
    note(f"{name}: to be deleted: {shown.left}, of {totals.listed}")


def _ages(shown: PlanFile) -> None:
    name, now = shown.header.instance, shown.header.made_at
    for reason, (put, used) in sorted(shown.totals.latest.items()):
        read = "" if used is None else f", and used {age(used, now)} ago"
        note(f"{name}: {reason}: the last of these was put {age(put, now)} ago{read}")
    if line := line_of(shown.header.heat):
        note(f"{name}: {line}")


def ask(shown: PlanFile) -> bool:
    """Ask whether to carry a plan out; no answer is none."""
    try:
        return typer.confirm(f"Delete {shown.left} from {shown.header.bucket}, for ever?", default=False, err=True)
    except typer.Abort:
        return False


def ask_to_replace(shown: ExportPlan) -> bool:
    """Ask whether to carry out an export that replaces; no answer is none."""
    replaced, destination = shown.left[REPLACED], shown.header.destination.where
    try:
        return typer.confirm(f"Replace {replaced} in {destination}, for ever?", default=False, err=True)
    except typer.Abort:
        return False
