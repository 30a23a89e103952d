"""Report of a run or of a check as one HTML page."""

from __future__ import annotations

import heapq
import logging
import time
from array import array
from bisect import bisect_left
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from hfbucket_plugin.core.files import expect_writable, write_whole
from hfbucket_plugin.core.units import size
from hfbucket_plugin.errors import ConfigError
from hfbucket_plugin.tools import html
from hfbucket_plugin.tools.html import document, expect_library, paragraph, text
from warmer.report.observers import Observer
from warmer.report.outcomes import Copied

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from warmer.report.outcomes import Outcome
    from warmer.report.summary import RunReport


BINS: Final = 120
"""Number of intervals of a run of any duration, as many as a plot on a phone can show."""

_FIRST_WIDTH_SECS: Final = 0.1


class TimeBins:
    """Sums over time by name, in a fixed number of bins that double in width when the time exceeds the last bin.

    The memory is proportional to names times bins: 1 MiB for 1,000 nodes.

    Args:
        bins: Number of bins; even.
        width_secs: Initial width of a bin in seconds.

    Attributes:
        width_secs: Present width of a bin in seconds.
        series: Sum in each bin, by name.
    """

    def __init__(self, bins: int = BINS, width_secs: float = _FIRST_WIDTH_SECS) -> None:
        self._bins = bins
        self.width_secs = width_secs
        self.series: dict[str, array[int]] = {}

    def add(self, name: str, at_secs: float, amount: int) -> None:
        """Add an amount to the bin of a time in seconds since the start of the first bin."""
        while (place := int(at_secs / self.width_secs)) >= self._bins:
            self._widen()
        series = self.series.get(name)
        if series is None:
            series = self.series[name] = array("q", bytes(8 * self._bins))
        series[place] += amount

    def _widen(self) -> None:
        self.width_secs *= 2
        for name, series in self.series.items():
            halves = [one + other for one, other in zip(series[::2], series[1::2], strict=True)]
            self.series[name] = array("q", halves + [0] * (self._bins - len(halves)))


class Latencies:
    """Distribution of durations, in fixed buckets, four for each power of ten from 1 ms to 1000 s.

    Attributes:
        counts: Count in each bucket; the last one is for durations beyond all bounds.
    """

    BOUNDS: Final = tuple(10 ** (step / 4) for step in range(-12, 13))
    """Upper bound of each bucket except the last, in seconds."""

    def __init__(self) -> None:
        self.counts = [0] * (len(self.BOUNDS) + 1)

    def add(self, seconds: float) -> None:
        """Count one duration."""
        self.counts[bisect_left(self.BOUNDS, seconds)] += 1

    @property
    def total(self) -> int:
        """Number of durations counted."""
        return sum(self.counts)

    def quantile(self, share: float) -> float:
        """Return the upper bound of the bucket that reaches a share of all, in seconds; 0 if empty, infinite beyond the bounds."""
        wanted, seen = share * self.total, 0
        for bound, count in zip(self.BOUNDS, self.counts, strict=False):
            seen += count
            if seen >= wanted:
                return bound if self.total else 0.0
        return float("inf")


class History(Observer):
    """Observer that records a run for the page.

    Attributes:
        began: Time at which the first tier began.
        reports: Reports of the tiers, in order.
        bytes: Bytes copied over time, by node id, over all tiers.
        from_hub: Durations of chunks that came from the Hub.
        from_nodes: Durations of chunks that came from other nodes.
    """

    def __init__(self) -> None:
        self.began = datetime.now(UTC)
        self.reports: list[RunReport] = []
        self.bytes = TimeBins()
        self.from_hub = Latencies()
        self.from_nodes = Latencies()
        self._since: float | None = None

    def begin(self, report: RunReport) -> None:
        """Record the start of a tier; time counts from the start of the first one."""
        self.reports.append(report)
        if self._since is None:
            self._since = time.monotonic()

    def ended(self, _report: RunReport, node: str, outcome: Outcome) -> None:
        """Record a chunk that was copied."""
        if isinstance(outcome, Copied) and self._since is not None:
            self.bytes.add(node, time.monotonic() - self._since, outcome.size)
            if not outcome.reused:
                (self.from_nodes if outcome.received else self.from_hub).add(outcome.seconds)

    def loaded(self, _report: RunReport, node: str, size: int) -> None:
        """Record chunks that an engine loaded, without durations, which the engine does not report."""
        if size and self._since is not None:
            self.bytes.add(node, time.monotonic() - self._since, size)

    def names(self) -> dict[str, str]:
        """Return the names of the nodes, by id."""
        return {node.id: node.name for report in self.reports for node in report.nodes.values()}


DRAWN_NODES: Final = 10
"""Maximum number of nodes with a colour of their own in the plot over time."""

NAMED_ROWS: Final = 20
"""Maximum number of bars, one for each tier of a node."""

LISTED_ROWS: Final = 100
"""Maximum number of table rows, one for each tier of a node."""

LISTED_FAILURES: Final = 100

_STYLE: Final = """
svg { display: block; width: 100%; height: auto } svg text { font-family: inherit !important }
.wide { overflow-x: auto } .key { display: flex; flex-wrap: wrap; gap: .1rem 1rem; padding: 0; margin: .3rem 0; list-style: none }
.key i { display: inline-block; width: .8em; height: .8em; margin-right: .35em } dl { display: grid; grid-template-columns:
  max-content 1fr; gap: .1rem 1rem } dt { color: var(--faint) } dd { margin: 0; overflow-wrap: anywhere }
"""

_PARTS: Final = ("right", "missing", "wrong", "unknown")
_PART_COLOURS: Final = (html.COLOURS[2], html.COLOURS[10], html.COLOURS[1], html.COLOURS[3])
_SHOWN: Final = (
    "selected", "copied", "received", "reused", "present", "failed", "unfinished", "fetched", "refetched", "fetched_alone", "for_nobody",
)  # fmt: skip
_OF_A_NODE: Final = ("selected", "copied", "received", "reused", "present", "failed")


def run_page(summary: Mapping[str, Any], history: History) -> str:
    """Return the HTML page of a run.

    Args:
        summary: Summary as printed; see `docs/warm.md`.
        history: Recorded history of the run.
    """
    tiers = summary.get("tiers") or [summary]
    rows = [(tier["tier"], node) for tier in tiers for node in tier["nodes"]]
    return document(
        "Warm-up",
        [
            _verdict(summary, ", ".join(str(tier["tier"]) for tier in tiers)),
            paragraph(f"{history.began:%Y-%m-%d %H:%M:%S} UTC, {summary['seconds']:,.1f} s", "faint"),
            _facts(_run_facts(summary)),
            *_failures(summary),
            *_over_time(history, {node["id"]: _left(node) for _, node in rows}),
            *_latencies(history),
            *_coverage(rows),
            *_nodes(rows),
        ],
        _STYLE,
    )


def check_page(record: Mapping[str, Any]) -> str:
    """Return the HTML page of a check.

    Args:
        record: Record as printed; see `docs/warm.md`.
    """
    nodes = record["nodes"]
    named, others = _chosen(nodes, NAMED_ROWS, lambda node: 1 - node["share"])
    drawn = [(f"{node['name']} {node['tier']}", _shares([node])) for node in named]
    if others:
        drawn.append((f"{len(others)} others", _shares(others)))
    words = {"result": record["result"], "share": f"{record['share']:.2%}", "require": f"{record['require']:.2%}"}
    return document(
        "Check of tiers",
        [
            paragraph(f"The nodes are {record['result']}.", "" if record["exit_code"] == 0 else "warn"),
            _facts([*words.items(), ("for_nobody", record["for_nobody"])]),
            "<h2>What is there</h2>\n",
            *([_key(_PARTS, _PART_COLOURS), html.parts(drawn, _PART_COLOURS)] if drawn else []),
            *_table(
                ("node", "tier", "selected", "right", "wrong", "missing", "unknown", ""),
                (
                    (one["name"], one["tier"], *(one[name] for name in ("selected", "right", "wrong", "missing", "unknown")),
                     one["error"] or "")
                    for one in _chosen(nodes, LISTED_ROWS, lambda node: 1 - node["share"])[0]
                ),
            ),
            _left_out(len(nodes), LISTED_ROWS),
            *_engines(record["canary"]),
        ],
        _STYLE,
    )  # fmt: skip


def _engines(canary: Mapping[str, Any] | None) -> Iterator[str]:
    if canary is None:
        return
    engines = canary["engines"]
    yield "<h2>What engines took from the cache</h2>\n"
    yield from _table(
        ("engine", "prompts", "tokens", "cached", "coldest prompt", ""),
        (
            (
                one["engine"],
                one["prompts"],
                one["tokens"],
                one["cached_tokens"],
                f"{one['share']:.2%}",
                one["error"] or "",
            )
            for one in _chosen(engines, LISTED_ROWS, lambda one: (one["error"] is not None, 1 - one["share"]))[0]
        ),
    )
    yield _left_out(len(engines), LISTED_ROWS)


def _verdict(summary: Mapping[str, Any], tiers: str) -> str:
    words = f"{summary['result']}: {summary['bucket']} into {tiers}"
    return paragraph(words[:1].upper() + words[1:], "" if summary["exit_code"] == 0 else "warn")


def _run_facts(summary: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    yield "exit code", summary["exit_code"]
    yield "instance", summary["instance"]
    yield "choice", ", ".join(f"{name}: {value}" for name, value in summary["choice"].items())
    for name in _SHOWN:
        yield name.replace("_", " "), f"{summary[name]:,}"
    yield "copied bytes", size(summary["bytes"])
    yield "from the Hub", size(summary["fetched_bytes"])
    if summary["seconds"]:
        yield "rate", f"{size(summary['bytes'] / summary['seconds'])}/s into all nodes"


def _facts(facts: Iterable[tuple[str, object]]) -> str:
    return f"<dl>{''.join(f'<dt>{text(name)}</dt><dd>{text(value)}</dd>' for name, value in facts)}</dl>\n"


def _failures(summary: Mapping[str, Any]) -> Iterator[str]:
    if not summary["failed_by_kind"]:
        return
    yield "<h2>Failures</h2>\n"
    yield from _table(("kind", "chunks"), sorted(summary["failed_by_kind"].items()))
    failures = summary["failures"][:LISTED_FAILURES]
    yield from _table(
        ("node", "tier", "kind", "chunk", "what was wrong"),
        ((one["node_name"], one["tier"], one["kind"], one["key"], one["message"]) for one in failures),
    )
    if summary["failed"] > len(failures):
        where = f"; all are in {summary['failures_file']}" if summary["failures_file"] else ""
        yield paragraph(f"{len(failures)} of {summary['failed']:,} failures are shown{where}", "faint")


def _over_time(history: History, left: Mapping[str, float]) -> Iterator[str]:
    series = {name: list(bins) for name, bins in history.bytes.series.items()}
    yield "<h2>Bytes over time</h2>\n"
    if not series:
        yield paragraph("Nothing was copied.", "faint")
        return
    most = max(place for bins in series.values() for place, amount in enumerate(bins) if amount) + 1
    # Draw the nodes that took longest or did not get all their chunks, which are the ones that readers look for.
    last = {name: max(place for place, amount in enumerate(bins) if amount) for name, bins in series.items()}
    chosen, others = _chosen(list(series), DRAWN_NODES, lambda name: (left.get(name, 0.0), last[name]))
    drawn = [series[name][:most] for name in chosen]
    names = history.names()
    labels = [f"{names.get(name, name)} {name[:6]}" for name in chosen]
    if others:
        drawn.append([sum(series[name][place] for name in others) for place in range(most)])
        labels.append(f"{len(others)} others")
    yield _key(labels, html.COLOURS)
    yield html.bytes_over_time(history.bytes.width_secs, drawn)


def _latencies(history: History) -> Iterator[str]:
    reported = {"from the Hub": history.from_hub, "from other nodes": history.from_nodes}
    reported = {name: one for name, one in reported.items() if one.total}
    if not reported:
        return
    yield "<h2>How long chunks took</h2>\n"
    yield paragraph(
        "From when their node turned to them until they were in the tier, checked; retries included.", "faint"
    )
    yield _key(list(reported), html.COLOURS)
    yield html.latencies(history.from_hub.BOUNDS, {name: one.counts for name, one in reported.items()})
    yield from _table(
        ("", "chunks", "half within", "99 % within"),
        (
            (name, f"{one.total:,}", _secs(one.quantile(0.5)), _secs(one.quantile(0.99)))
            for name, one in reported.items()
        ),
    )


def _coverage(rows: Sequence[tuple[Any, Mapping[str, Any]]]) -> Iterator[str]:
    kept = [row for row in rows if row[1]["replaced_by"] is None]
    if not kept:
        return
    named, others = _chosen(kept, NAMED_ROWS, lambda row: _left(row[1]))
    drawn = [(f"{node['name']} {tier}", *_before_and_after([node])) for tier, node in named]
    if others:
        drawn.append((f"{len(others)} others", *_before_and_after([node for _, node in others])))
    yield "<h2>Coverage before and after</h2>\n"
    yield _key(("there before", "there after"), (html.COLOURS[10], html.COLOURS[2]))
    yield html.coverage(drawn)


def _nodes(rows: Sequence[tuple[Any, Mapping[str, Any]]]) -> Iterator[str]:
    yield "<h2>Nodes</h2>\n"
    yield from _table(
        ("node", "tier", *_OF_A_NODE, "bytes", ""),
        (
            (node["name"], tier, *(f"{node[name]:,}" for name in _OF_A_NODE),
             size(node["bytes"]), _said(node))
            for tier, node in _chosen(rows, LISTED_ROWS, lambda row: (row[1]["error"] is not None, _left(row[1])))[0]
        ),
    )  # fmt: skip
    yield _left_out(len(rows), LISTED_ROWS)


def _said(node: Mapping[str, Any]) -> str:
    words = [node["error"]] if node["error"] else []
    return "; ".join([*words, f"{node['replaced_by']} took its place"] if node["replaced_by"] else words)


def _chosen(rows: Sequence[Any], most: int, worth: Any) -> tuple[list[Any], list[Any]]:
    """Return the rows that are worth most, in their order, and the other rows."""
    if len(rows) <= most:
        return list(rows), []
    best = set(heapq.nlargest(most, range(len(rows)), key=lambda at: worth(rows[at])))
    return [rows[at] for at in sorted(best)], [row for at, row in enumerate(rows) if at not in best]


def _left(node: Mapping[str, Any]) -> float:
    """Return the share of a node's chunks that is absent."""
    return 1 - (node["copied"] + node["present"]) / node["selected"] if node["selected"] else 0.0


def _before_and_after(nodes: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    selected = sum(node["selected"] for node in nodes)
    if not selected:
        return 1.0, 1.0
    before = sum(node["present"] for node in nodes)
    return before / selected, (before + sum(node["copied"] for node in nodes)) / selected


def _shares(nodes: Sequence[Mapping[str, Any]]) -> list[float]:
    selected = sum(node["selected"] for node in nodes)
    return [sum(node[name] for node in nodes) / selected if selected else 0.0 for name in _PARTS]


def _secs(value: float) -> str:
    return f"{value * 1000:,.0f} ms" if value < 1 else f"{value:,.1f} s"


def _key(labels: Sequence[str], colours: Sequence[str]) -> str:
    parts = (
        f'<li><i style="background:{colours[at % len(colours)]}"></i>{text(label)}</li>'
        for at, label in enumerate(labels)
    )
    return f'<ul class="key">{"".join(parts)}</ul>\n'


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> Iterator[str]:
    yield f'<div class="wide"><table>\n<tr>{"".join(f"<th>{text(name)}</th>" for name in head)}</tr>\n'
    for row in rows:
        yield f"<tr>{''.join(f'<td>{text(cell)}</td>' for cell in row)}</tr>\n"
    yield "</table></div>\n"


def _left_out(there: int, most: int) -> str:
    return paragraph(f"The {most} of {there:,} that lack most.", "faint") if there > most else ""


_log = logging.getLogger(__name__)

OPTION: Final = "--report-html"


class PageFile:
    """Page file of a run or of a check, if one was requested."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._history = History()

    def open(self, path: Path | None) -> tuple[Observer, ...]:
        """Check that the page can be written and drawn.

        Args:
            path: Path of the page; None for no page.

        Returns:
            The observers that the page needs.

        Raises:
            ConfigError: The file cannot be written, or the library that draws the plots is not installed.
        """
        if path is None:
            return ()
        expect_writable(path, OPTION)
        expect_library()
        self._path = path
        return (self._history,)

    def write(self, record: Mapping[str, Any]) -> None:
        """Write the page of a summary or of a check's record; a failure does not affect the result of the command."""
        if self._path is None:
            return
        try:
            write_whole(
                self._path,
                run_page(record, self._history) if record["event"] == "summary" else check_page(record),
                OPTION,
            )
        except ConfigError as error:
            _log.warning("%s", error)
        except Exception:  # noqa: BLE001 - a plot that cannot be drawn must not change the exit code of the run
            _log.exception("%s: the page could not be drawn", OPTION)
