"""What is shown of a run while it goes on: lines for machines, a table for people, whatever the number of nodes."""

import io
import json
import re
from dataclasses import replace

import pytest
from rich.console import Console

from warmer.cluster.actor_pool import Failure
from warmer.cluster.engine_tiers import EngineRun
from warmer.cluster.ray import Node
from warmer.node.prompts import PromptLoad
from warmer.report import progress
from warmer.report.observers import EventDispatcher
from warmer.report.outcomes import Copied, Failed, Present
from warmer.report.progress import SHOWN_NODES, LiveTable, Rate, behind, time_left_text
from warmer.report.summary import FailureLog, NodeReport, RunReport, TierRun

TASK = TierRun("hfbucket.us", "hf://buckets/ns/b", "fs.warm", {"prefix": ["org/"]}, selected=3, selected_bytes=60)


def a_run(*names):
    return RunReport(TASK, [Node(f"id-{name}", name) for name in names], FailureLog(None))


def complete(run, *nodes):
    for node in nodes:
        for outcome in (Copied("k1", 10), Copied("k2", 20), Present("k3", 30)):
            run.ended(f"id-{node}", outcome)


def shown(run, **options):
    out = io.StringIO()
    table = LiveTable(Console(file=out, force_terminal=True, width=140, **options))
    table.show(run)
    table.close()
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())


def test_a_rate_is_that_recently():
    rate = Rate(0.0, window_secs=10)
    for second in range(1, 101):
        rate.add(float(second), 100.0 * second if second <= 50 else 5000.0 + second - 50)
    assert rate.per_sec == pytest.approx(1.0)
    assert rate.secs_for(30) == pytest.approx(30)
    assert len(rate._samples) <= 12


def test_a_rate_tells_nothing_of_what_does_not_grow():
    rate = Rate(0.0)
    assert (rate.per_sec, rate.secs_for(10), rate.secs_for(0)) == (0.0, None, 0.0)
    rate.add(5.0, 0.0)
    assert rate.secs_for(10) is None


def test_progress_is_json_lines_for_machines():
    run, out = a_run("a", "b"), io.StringIO()
    lines = progress.JsonLines(out, every_secs=0)
    complete(run, "a")
    run.lost("id-b", "node_lost", "gone")
    lines.show(run)
    lines.close()
    line = json.loads(out.getvalue())
    assert line.pop("seconds") >= 0
    assert line.pop("bytes_per_second") > 0
    assert line.pop("seconds_left") == 0  # nobody waits for the lost node
    assert line == {
        "event": "progress", "tier": "fs.warm", "nodes": 1, "nodes_lost": 1, "chunks_ended": 3, "chunks_expected": 6,
        "chunks_failed": 0, "bytes_copied": 30, "bytes_there": 60, "bytes_expected": 120,
    }  # fmt: skip


def test_a_pipeline_that_wants_colours_is_no_terminal(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    display = progress.choose_display()
    display.close()
    assert isinstance(display, progress.JsonLines)


def test_progress_lines_come_every_few_seconds_only():
    run, out = a_run("a"), io.StringIO()
    lines = progress.JsonLines(out, every_secs=3600)
    for _ in range(10):
        lines.show(run)
    assert out.getvalue() == ""


def test_progress_is_a_table_for_people():
    run = a_run("a", "b")
    complete(run, "a")
    run.ended("id-b", Failed("k1", 10, "transport", "no"))
    run.lost("id-b", "node_lost", "gone")
    text = shown(run)
    assert re.search(r"node +chunks +bytes +rate +ETA", text)
    assert re.search(r"a id-a .*3/3 +60 B/60 B .*B/s +-", text)
    assert re.search(r"b id-b .*1/3 +0 B/60 B .* \? +node_lost: gone", text)
    assert re.search(r"all of fs\.warm .*4/6 +60 B/120 B .*1 failed, 1 lost", text)


def test_an_engine_that_loads_by_itself_is_waited_for_by_chunks(monkeypatch):
    """How many bytes they will be, nobody knows before."""
    monkeypatch.setattr(progress, "_SAMPLE_SECS", 0.0)
    task = replace(TASK, selected=30, selected_bytes=0)
    run, out = RunReport(task, [Node("id-a", "a")], FailureLog(None)), io.StringIO()
    run.begin()
    lines = progress.JsonLines(out, every_secs=0)
    lines.show(run)
    assert json.loads(out.getvalue())["seconds_left"] is None
    run.loaded("id-a", copied=10, present=0, size=5000)
    lines.show(run)
    assert json.loads(out.getvalue().splitlines()[-1])["seconds_left"] is not None
    table = LiveTable(Console(file=io.StringIO(), force_terminal=True, width=140))
    table._draw(run, 0.0)
    run.loaded("id-a", copied=10, present=0, size=5000)
    table._draw(run, 10.0)
    row = next(iter(table.table(run).columns[5].cells)), next(iter(table.table(run).columns[3].cells))
    assert row == ("0:05", "9.8 KiB")
    table.close()


class Observer:
    """Keeps what it is told."""

    def __init__(self):
        self.reported = []

    def __getattr__(self, name):
        return lambda _, *words: self.reported.append((name, *words))


def test_what_engines_do_is_told_to_observers():
    run, seen = a_run("a", "b"), Observer()
    engines = EngineRun(None, None, [], EventDispatcher(run, progress.JsonLines(io.StringIO()), [seen]), None)
    engines._take("id-a", 0, [PromptLoad(1, "m", 3, 1, 1, 10, "no_room", "it is full")])
    engines._take("id-b", 0, Failure("engine", "gone"))
    assert seen.reported == [
        ("loaded", "id-a", 10),
        ("lacking", "id-a", 1, "no_room"),
        ("lost", "id-b", "engine"),
        ("lacking", "id-b", 3, "engine"),
    ]
    assert [node.ended for node in run.nodes.values()] == [3, 3]


def test_nodes_beyond_the_rows_are_summed_and_those_that_lack_most_are_shown():
    names = [f"n{number:03}" for number in range(200)]
    run = a_run(*names)
    slow = {"n007", "n150"}
    complete(run, *(name for name in names if name not in slow))
    text = shown(run, height=60)
    rows = [line for line in text.splitlines() if re.match(r"(n\d+ |\d+ others|all of)", line)]
    assert len(rows) == SHOWN_NODES + 2
    assert {name for name in slow if name in text} == slow
    assert re.search(r"180 others .*540/540 +10\.5 KiB/10\.5 KiB", text)
    assert "594/600" in rows[-1]
    assert len(shown(run, height=10).splitlines()) <= 10


def test_a_name_is_no_markup():
    run = a_run("[red]x[/]", "a\x1b[31m\n")
    text = shown(run)
    assert "[red]x[/]" in text
    assert r"a\x1b[31m\n" in text


def test_who_is_behind():
    nodes = [NodeReport(f"id{n}", f"name{n}", bytes=n, selected_bytes=10) for n in range(5)]
    nodes[0].replaced_by = "id9"
    assert [node.name for node in behind(nodes, 2)] == ["name1", "name2"]
    assert len(behind(nodes, 9)) == 5


def test_times_in_words():
    assert [time_left_text(secs) for secs in (None, 0, 65.2, 3725)] == ["?", "0:00", "1:05", "1:02:05"]
