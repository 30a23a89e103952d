"""How far a run is: a live display for people, JSON lines for machines. Both on stderr: stdout is the summary's."""

from __future__ import annotations

import sys
import time
from typing import IO, TYPE_CHECKING, Final, Protocol

from rich.console import Console

from hfbucket_plugin import texts
from warmer.live_table import LiveTable
from warmer.rates import Rate

if TYPE_CHECKING:
    from warmer.report import RunReport

LINE_SECS: Final = 5.0
"""Seconds between JSON lines."""

_SAMPLE_SECS: Final = 1.0


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
        now = time.monotonic()
        self._next = now + every_secs
        self._next_sample = now
        self._rate = Rate(now)
        self._chunks = Rate(now)

    def show(self, report: RunReport) -> None:
        """Print a line when it is time."""
        now = time.monotonic()
        if now >= self._next_sample:
            self._next_sample = now + _SAMPLE_SECS
            self._rate.add(now, report.total("bytes"))
            self._chunks.add(now, report.total("ended"))
        if now < self._next:
            return
        self._next = now + self._every_secs
        there, nodes = report.total("bytes") + report.total("present_bytes"), report.nodes.values()
        left = self._left(report)
        line = {
            "event": "progress",
            "tier": report.task.tier,
            "seconds": round(report.seconds, 1),
            "nodes": sum(node.error is None for node in nodes),
            "nodes_lost": sum(node.error is not None for node in nodes),
            "chunks_ended": report.total("ended"),
            "chunks_expected": report.expected,
            "chunks_failed": report.total("failed"),
            "bytes_copied": report.total("bytes"),
            "bytes_there": there,
            "bytes_expected": report.expected_bytes,
            "bytes_per_second": round(self._rate.per_sec),
            "seconds_left": None if left is None else round(left, 1),
        }
        print(texts.as_json(line), file=self._out, flush=True)

    def _left(self, report: RunReport) -> float | None:
        """How many seconds it will take; None where that cannot be told. Lost nodes are waited for no more."""
        if not report.unfinished:
            return 0.0
        nodes = [node for node in report.nodes.values() if node.error is None]
        if not report.expected_bytes:  # an engine loads by itself, and tells the size afterwards
            return self._chunks.secs_for(sum(node.selected - node.ended for node in nodes))
        return self._rate.secs_for(sum(node.selected_bytes - node.bytes - node.present_bytes for node in nodes))

    def close(self) -> None:
        """Nothing is left to do."""


def choose_display() -> Display:
    """A table when stderr is a terminal, else JSON lines."""
    # Not the console's own word: pipelines set FORCE_COLOR, and are no terminals.
    return LiveTable(Console(stderr=True)) if sys.stderr.isatty() else JsonLines(sys.stderr)
