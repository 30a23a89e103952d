"""Progress of a run: JSON lines, or a live table in a terminal."""

from __future__ import annotations

import heapq
import sys
import time
from collections import deque
from typing import IO, TYPE_CHECKING, Final, Protocol

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hfbucket_plugin.core import texts
from hfbucket_plugin.core.units import printable, size

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from warmer.report.summary import NodeReport, RunReport


WINDOW_SECS: Final = 15.0
"""Time over which rates are measured: long enough to average batches, short enough to show that a node became slow."""

_SAMPLE_SECS: Final = 1.0


class Rate:
    """Growth rate of a total, from one sample a second within a window.

    Args:
        now: Current time, in seconds.
        window_secs: Length of the window in seconds.
    """

    def __init__(self, now: float, window_secs: float = WINDOW_SECS) -> None:
        self._samples: deque[tuple[float, float]] = deque([(now, 0.0)])
        self._window_secs = window_secs
        self._last = (now, 0.0)

    def add(self, now: float, total: float) -> None:
        """Record the present total."""
        self._last = (now, total)
        if now - self._samples[-1][0] >= _SAMPLE_SECS:
            self._samples.append(self._last)
        while len(self._samples) > 1 and self._samples[1][0] <= now - self._window_secs:
            self._samples.popleft()

    @property
    def per_sec(self) -> float:
        """Return the growth of the total per second."""
        then, before = self._samples[0]
        now, total = self._last
        return (total - before) / (now - then) if now > then else 0.0

    def secs_for(self, left: float) -> float | None:
        """Return the seconds until the total has grown by `left` at this rate; None if it does not grow."""
        if left <= 0:
            return 0.0
        return left / self.per_sec if self.per_sec > 0 else None


SHOWN_NODES: Final = 20
"""Maximum number of rows, whatever the number of nodes."""

_OTHER_LINES: Final = 4
"""Further lines of the table: its head, a row for all other nodes, a row for all nodes, and the line below."""

_BAR_WIDTH: Final = 20
_SHOWS_A_SECOND: Final = 4
_MINUTE: Final = 60
_HOUR: Final = 3600


class LiveTable:
    """Live display in a terminal.

    If there are more nodes than rows, the nodes with most left to do have a row each, and one row sums up the others.

    Args:
        console: Console of the terminal.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._rates: dict[str, Rate] = {}
        self._chunks: dict[str, Rate] = {}
        self._next_show = 0.0
        self._last: RunReport | None = None
        self._live = Live(console=console, refresh_per_second=_SHOWS_A_SECOND)
        self._live.start()

    def show(self, report: RunReport) -> None:
        """Update the display; redraws only a few times a second, however often it is called."""
        self._last = report
        now = time.monotonic()
        if now >= self._next_show:
            self._next_show = now + 1 / _SHOWS_A_SECOND
            self._draw(report, now)

    def _draw(self, report: RunReport, now: float) -> None:
        for node in report.nodes.values():
            _rate(self._rates, node.id, now).add(now, node.bytes)
        _rate(self._rates, "", now).add(now, report.total("bytes"))
        if not report.expected_bytes:  # an engine loads by itself, and reports the size only afterwards
            for node in report.nodes.values():
                _rate(self._chunks, node.id, now).add(now, node.ended)
            _rate(self._chunks, "", now).add(now, report.total("ended"))
        self._live.update(self.table(report))

    def table(self, report: RunReport) -> Table:
        """Return the table of the last state shown."""
        table = Table(box=None, pad_edge=False, show_header=True, header_style="dim")
        table.add_column("node", no_wrap=True, overflow="ellipsis", max_width=32)
        table.add_column("", width=_BAR_WIDTH)
        for name in ("chunks", "bytes", "rate", "ETA"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("", no_wrap=True, overflow="ellipsis")
        nodes = list(report.nodes.values())
        shown = behind(nodes, max(1, min(SHOWN_NODES, self._console.height - _OTHER_LINES)))
        for node in shown:
            self._row(table, f"{node.name} {node.id[:6]}", [node], [node.id])
        names = {node.id for node in shown}
        others = [node for node in nodes if node.id not in names]
        if others:
            self._row(table, f"{len(others)} others", others, [node.id for node in others])
        self._row(table, f"all of {report.task.tier}", nodes, [""], report)
        return table

    def _row(
        self, table: Table, name: str, nodes: Sequence[NodeReport], ids: Sequence[str], whole: RunReport | None = None
    ) -> None:
        done = sum(node.bytes + node.present_bytes for node in nodes)
        ended = sum(node.ended for node in nodes)
        of = sum(node.selected for node in nodes) if whole is None else whole.expected
        of_bytes = sum(node.selected_bytes for node in nodes) if whole is None else whole.expected_bytes
        per_sec = _per_sec(self._rates, ids)
        if of_bytes:
            left, speed, bar = of_bytes - done, per_sec, ProgressBar(of_bytes, done, width=_BAR_WIDTH)
        else:
            left, speed = of - ended, _per_sec(self._chunks, ids)
            bar = ProgressBar(max(1, of), ended if of else 1, width=_BAR_WIDTH)
        table.add_row(
            Text(printable(name)),
            bar,
            f"{ended:,}/{of:,}",
            f"{size(done)}/{size(of_bytes)}" if of_bytes else size(done),
            f"{size(per_sec)}/s",
            "-" if ended >= of else time_left_text(left / speed if speed > 0 else None),
            Text(printable(_remark(nodes))),
        )

    def close(self) -> None:
        """Stop the display, and leave the last state in the terminal."""
        if self._last is not None:
            self._draw(self._last, time.monotonic())
        self._live.stop()


def _rate(rates: dict[str, Rate], name: str, now: float) -> Rate:
    if name not in rates:
        rates[name] = Rate(now)
    return rates[name]


def _per_sec(rates: Mapping[str, Rate], names: Sequence[str]) -> float:
    return sum(rates[name].per_sec for name in names if name in rates)


def behind(nodes: Sequence[NodeReport], most: int) -> list[NodeReport]:
    """Return the nodes with most left to do, at most `most`, in the order of their names."""
    chosen = nodes if len(nodes) <= most else heapq.nlargest(most, nodes, key=_left)
    return sorted(chosen, key=lambda node: (node.name, node.id))


def _left(node: NodeReport) -> float:
    """Return the share of a node's bytes that is left to do; failed chunks are not left, like those that are present."""
    if node.replaced_by is not None:
        return 0.0
    if not node.selected_bytes:
        return 1 - node.ended / node.selected if node.selected else 0.0
    return 1 - (node.bytes + node.present_bytes) / node.selected_bytes


def _remark(nodes: Sequence[NodeReport]) -> str:
    if len(nodes) == 1 and nodes[0].error:
        return nodes[0].error
    lost, failed = sum(node.error is not None for node in nodes), sum(node.failed for node in nodes)
    words = [f"{failed:,} failed"] if failed else []
    return ", ".join([*words, f"{lost} lost"] if lost else words)


def time_left_text(seconds: float | None) -> str:
    """Format a remaining time: `4:05`, `1:02:03`; `?` if it is unknown."""
    if seconds is None:
        return "?"
    whole = round(seconds)
    if whole < _HOUR:
        return f"{whole // _MINUTE}:{whole % _MINUTE:02}"
    return f"{whole // _HOUR}:{whole % _HOUR // _MINUTE:02}:{whole % _MINUTE:02}"


LINE_SECS: Final = 5.0
"""Seconds between JSON lines."""


class Display(Protocol):
    """Display of a run in progress."""

    def show(self, report: RunReport) -> None:
        """Show the present state; called a few times a second."""

    def close(self) -> None:
        """End the display."""


class JsonLines:
    """Display that prints a JSON line every few seconds.

    Args:
        out: Destination.
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
        """Print a line if it is due."""
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
        """Return the estimated seconds left, without lost nodes; None if unknown."""
        if not report.unfinished:
            return 0.0
        nodes = [node for node in report.nodes.values() if node.error is None]
        if not report.expected_bytes:  # an engine loads by itself, and reports the size only afterwards
            return self._chunks.secs_for(sum(node.selected - node.ended for node in nodes))
        return self._rate.secs_for(sum(node.selected_bytes - node.bytes - node.present_bytes for node in nodes))

    def close(self) -> None:
        """Do nothing: there is nothing to end."""


class NoDisplay:
    """Display that shows nothing."""

    def show(self, report: RunReport) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def choose_display() -> Display:
    """Return a table if stderr is a terminal, otherwise JSON lines."""
    # The console itself is not asked, because pipelines set FORCE_COLOR, and it then claims to be a terminal.
    return LiveTable(Console(stderr=True)) if sys.stderr.isatty() else JsonLines(sys.stderr)
