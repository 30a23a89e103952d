"""`--report-html`: one page that loads nothing, from what a run remembered in bounded memory."""

import json
import re
import signal
import sys
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from hfbucket_plugin.errors import ConfigError
from warmer.check.gate import CheckReport
from warmer.cli.app import app
from warmer.cluster.placement import Assignment
from warmer.cluster.ray import Node
from warmer.report.html import (
    BINS,
    DRAWN_NODES,
    LISTED_ROWS,
    NAMED_ROWS,
    History,
    Latencies,
    PageFile,
    TimeBins,
    check_page,
    run_page,
)
from warmer.report.outcomes import Copied, Failed, Missing, Present, Right, Wrong
from warmer.report.summary import FailureLog, RunReport, Share, TierRun, combined

HOSTILE = "<script>alert('$x$')</script>&\"\x1b[31m"
TASK = TierRun("hfbucket.us", "hf://buckets/ns/b", "fs.warm", {"prefix": [HOSTILE]}, selected=3, selected_bytes=60)


class Page(HTMLParser):
    """What a browser would make of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_data(self, data):
        self.words.append(data)


def ran(nodes, history, tiers=("fs.warm",)):
    """A run of which each node copied two chunks, held one, and of which the last failed in part."""
    log = FailureLog(None)
    summaries = []
    for tier in tiers:
        report = RunReport(TierRun(**{**task_fields(), "tier": tier}), nodes, log)
        history.begin(report)
        for number, node in enumerate(nodes):
            last = Failed(f"key-{HOSTILE}", 20, "transport", "no answer")
            for outcome in (
                Copied("k1", 10, seconds=0.02),
                last if node is nodes[-1] else Copied("k2", 20, received=True, seconds=0.3 * number),
                Present("k3", 30),
            ):
                report.ended(node.id, outcome)
                history.ended(report, node.id, outcome)
        summaries.append(report.summary(stopped=False))
    return combined(summaries)


def task_fields():
    return {name: getattr(TASK, name) for name in TierRun.__dataclass_fields__}


def loads_nothing(page):
    assert not {"script", "link", "img", "iframe", "object", "embed", "base"} & set(page.tags)
    for _, name, value in page.attributes:
        if name in {"src", "href", "xlink:href", "action", "data"}:
            assert value.startswith("#")
        if name == "style":
            assert not re.search(r"url\((?!#)", value)


@pytest.mark.parametrize("orders", [1, 2])
def test_an_order_to_stop_while_the_page_is_drawn_changes_no_exit_code(tmp_path, monkeypatch, orders):
    record = {"event": "summary", "exit_code": 3}
    drawn, fell_through = [], []

    def write(*_):
        for _ in range(orders):
            signal.raise_signal(signal.SIGTERM)
        drawn.append(True)

    before = signal.signal(signal.SIGTERM, lambda *_: fell_through.append(True))
    try:
        monkeypatch.setattr(PageFile, "write", write)
        monkeypatch.setattr("warmer.run.run", lambda *_: record)
        done = CliRunner().invoke(app, ["run", "--all", "--report-html", str(tmp_path / "run.html")])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (done.exit_code, json.loads(done.stdout)) == (3, record)
    assert (len(drawn), fell_through) == (2 - orders, [])


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 10_000), st.integers(0, 1000)), max_size=60))
def test_nothing_is_lost_when_bins_grow_wider(added):
    bins = TimeBins(bins=8, width_secs=0.5)
    for name, at, amount in added:
        bins.add(name, at, amount)
    assert all(len(series) == 8 for series in bins.series.values())
    for name, series in bins.series.items():
        assert sum(series) == sum(amount for one, _, amount in added if one == name)
        for place in range(8):
            low, high = place * bins.width_secs, (place + 1) * bins.width_secs
            # int(at / width) may round up to the next bin, by one unit in the last place
            assert series[place] == sum(
                amount for one, at, amount in added if one == name and int(at / bins.width_secs) == place
            ), (low, high)


def test_memory_does_not_grow_with_chunks_or_time():
    bins = TimeBins()
    for second in range(200_000):
        bins.add(str(second % 1000), float(second), 1)
    assert {len(series) for series in bins.series.values()} == {BINS}
    assert sum(sys.getsizeof(series) for series in bins.series.values()) < 1.2 * 2**20


def test_times_fall_into_fixed_buckets():
    times = Latencies()
    assert (times.total, times.quantile(0.5)) == (0, 0.0)
    for seconds in (0.0001, 0.05, 0.05, 5000):
        times.add(seconds)
    assert len(times.counts) == len(Latencies.BOUNDS) + 1
    assert (times.counts[0], times.counts[-1], times.total) == (1, 1, 4)
    assert times.quantile(0.5) == pytest.approx(10**-1.25)
    assert times.quantile(1.0) == float("inf")


def test_a_page_tells_the_run_and_loads_nothing():
    history = History()
    summary = ran([Node("id-a", HOSTILE), Node("id-b", "node-b")], history, ("fs.warm", HOSTILE))
    text = run_page(summary, history)
    page = Page(text)
    loads_nothing(page)
    assert page.tags.count("svg") == 3
    assert ("meta", "content", "width=device-width, initial-scale=1") in page.attributes
    words = " ".join(page.words)
    for reported in ("Failed: hf://buckets/ns/b into fs.warm", "Bytes over time", "How long chunks took", "Coverage before and",
                 "from the Hub", "from other nodes", "transport", "no answer", "node-b"):  # fmt: skip
        assert reported in words
    assert "<script>alert('$x$')</script>" in words
    assert "\x1b" not in text


def test_a_page_of_a_thousand_nodes_is_no_larger_than_one_of_a_hundred():
    sizes = []
    for count in (100, 1000):
        history = History()
        summary = ran([Node(f"id-{number:04}", f"node-{number:04}") for number in range(count)], history)
        text = run_page(summary, history)
        sizes.append(len(text))
        page = Page(text)
        assert len(re.findall(r"node-\d+", " ".join(page.words))) <= DRAWN_NODES + NAMED_ROWS + LISTED_ROWS + 1
        assert f"{count - DRAWN_NODES} others" in page.words
        assert f"{count - NAMED_ROWS} others" in page.words
        assert f"node-{count - 1:04} fs.warm" in page.words  # the one that lacks a chunk
    assert sizes[1] < 1.1 * sizes[0]


def test_a_run_that_copied_nothing_has_a_page():
    history = History()
    report = RunReport(TASK, [Node("id-a", "a")], FailureLog(None), {"id-a": Share(0, 0)})
    history.begin(report)
    text = run_page(report.summary(stopped=False), history)
    assert "Nothing was copied." in text
    loads_nothing(Page(text))


def test_a_check_has_a_page():
    report = CheckReport(0.9)
    node = Node("id-a", HOSTILE)
    watch = report.watch("fs.warm", [Assignment(node)], {"id-a": Share(4, 40)})
    for outcome in (Right("k1", 1), Right("k2", 1), Wrong("k3", 1, "k3: other bytes"), Missing("k4", 1)):
        watch.ended("id-a", outcome)
    page = Page(check_page(report.record(stopped=False)))
    loads_nothing(page)
    assert page.tags.count("svg") == 1
    assert {"The nodes are cold.", "50.00%", "90.00%"} <= set(page.words)


def test_the_file_appears_whole(tmp_path):
    path = tmp_path / "run.html"
    path.write_text("older")
    page = PageFile()
    (history,) = page.open(path)
    assert path.read_text() == "older"
    page.write(ran([Node("id-a", "a"), Node("id-b", "b")], history))
    assert path.read_text().endswith("</html>\n")
    assert [one.name for one in tmp_path.iterdir()] == ["run.html"]


def test_without_a_path_nobody_looks_on_and_nothing_is_written():
    page = PageFile()
    assert page.open(None) == ()
    page.write({"event": "summary"})


def test_a_page_that_cannot_be_written_is_told_before(tmp_path):
    for path, words in ((tmp_path / "no" / "run.html", "No such file"), (tmp_path, "it is a directory")):
        with pytest.raises(ConfigError, match=f"--report-html '{path}' cannot be written: {words}"):
            PageFile().open(path)


def test_a_page_that_cannot_be_written_at_the_end_costs_nothing_else(tmp_path, caplog):
    directory = tmp_path / "gone"
    directory.mkdir()
    page = PageFile()
    (history,) = page.open(directory / "run.html")
    summary = ran([Node("id-a", "a"), Node("id-b", "b")], history)
    directory.rmdir()
    page.write(summary)
    assert "cannot be written" in caplog.text


def test_a_missing_library_is_told_before(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.font_manager", None)
    with pytest.raises(ConfigError, match=r"pip install 'lmcache-hfbucket\[warmer\]'"):
        PageFile().open(tmp_path / "run.html")
