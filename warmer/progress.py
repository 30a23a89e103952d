"""How far a run is: a live display for people, JSON lines for machines. Both on stderr: stdout is the summary's."""

from __future__ import annotations

import json
import sys
import time
from typing import IO, TYPE_CHECKING, Final, Protocol

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

if TYPE_CHECKING:
    from warmer.report import RunReport

LINE_SECS: Final = 5.0
"""Seconds between JSON lines."""

_SHOWN_NODES: Final = 20
"""Nodes with a bar of their own; beyond that a terminal shows the whole only."""


class Display(Protocol):
    """Shows a run while it goes on."""

    def show(self, report: RunReport) -> None:
        """Show how far it is; called a few times a second."""

    def close(self) -> None:
        """Show nothing any more."""


class JsonLines:
    """One line every few seconds.

    Args:
        out: Where to.
        every_secs: Seconds between lines.
    """

    def __init__(self, out: IO[str], every_secs: float = LINE_SECS) -> None:
        self._out = out
        self._every_secs = every_secs
        self._next = time.monotonic() + every_secs

    def show(self, report: RunReport) -> None:
        """Print a line when it is time."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + self._every_secs
        line = {
            "event": "progress",
            "seconds": round(report.seconds, 1),
            "nodes": sum(node.error is None for node in report.nodes.values()),
            "chunks_ended": report.total("ended"),
            "chunks_expected": report.expected,
            "chunks_failed": report.total("failed"),
            "bytes_copied": report.total("bytes"),
        }
        print(json.dumps(line), file=self._out, flush=True)

    def close(self) -> None:
        """Nothing is left to do."""


class Bars:
    """A live display in a terminal.

    Args:
        console: Where to.
    """

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}
        self._progress.start()

    def show(self, report: RunReport) -> None:
        """Move the bars."""
        nodes = list(report.nodes.values())
        for node in nodes if len(nodes) <= _SHOWN_NODES else []:
            failed = f"{node.failed} failed" if node.failed else ""
            self._bar(
                f"{node.name} {node.id[:6]}", node.selected_bytes, node.bytes + node.present_bytes, node.error or failed
            )
        done = report.total("bytes") + report.total("present_bytes")
        note = f"{report.total('ended')}/{report.expected} chunks"
        self._bar("all nodes", report.expected_bytes, done, note)

    def _bar(self, name: str, total: int, done: int, note: str) -> None:
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=total, note=note)
        self._progress.update(self._tasks[name], completed=done, note=note)

    def close(self) -> None:
        """Leave the last picture in the terminal."""
        self._progress.stop()


def choose_display() -> Display:
    """Bars when stderr is a terminal, else JSON lines."""
    console = Console(stderr=True)
    return Bars(console) if console.is_terminal else JsonLines(sys.stderr)
