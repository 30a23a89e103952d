import json
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from hfbucket_plugin.errors import RefusedError
from warmer.cluster.ray import Node
from warmer.report import summary as report
from warmer.report.outcomes import INTERRUPTED, Copied, Failed, PlanLostError, Present
from warmer.report.summary import FailureLog, RunReport, Share, TierRun, combined

TASK = TierRun("hfbucket.us", "hf://buckets/ns/b", "fs.warm", {"prefix": ["org/"]}, selected=3, selected_bytes=60)
NODES = [Node("id-a", "a"), Node("id-b", "b")]


@pytest.fixture
def log():
    one = FailureLog(None)
    yield one
    one.close()
    if one.path:
        one.path.unlink()


@pytest.fixture
def run(log):
    return RunReport(TASK, NODES, log)


def complete(run, *nodes):
    for node in nodes:
        for outcome in (Copied("k1", 10), Copied("k2", 20), Present("k3", 30)):
            run.ended(node, outcome)


def test_a_complete_run(run):
    run.started("id-a", 1.23456, 0.25)
    complete(run, "id-a", "id-b")
    summary = run.summary(stopped=False)
    assert (summary["result"], summary["exit_code"]) == ("complete", 0)
    assert (summary["copied"], summary["present"], summary["failed"], summary["unfinished"]) == (4, 2, 0, 0)
    assert summary["bytes"] == 60
    assert summary["nodes"][0] == {
        "id": "id-a", "name": "a", "copied": 2, "received": 0, "reused": 0, "present": 1, "failed": 0, "bytes": 30,
        "present_bytes": 30, "selected": 3, "selected_bytes": 60, "ranks": None, "error": None, "replaced_by": None,
        "start_secs": 1.235, "open_secs": 0.25,
    }  # fmt: skip
    assert json.loads(json.dumps(summary)) == summary


def test_a_run_that_ends_before_all_chunks_have_is_not_complete(run):
    complete(run, "id-a")
    summary = run.summary(stopped=False)
    assert (summary["result"], summary["exit_code"], summary["unfinished"]) == ("failed", 3, 3)


def test_a_node_is_to_hold_its_own_share(log):
    run = RunReport(TASK, NODES, log, {"id-a": Share(1, 10, "0-3")})
    assert run.expected == 4
    run.ended("id-a", Copied("k1", 10))
    complete(run, "id-b")
    summary = run.summary(stopped=True)
    assert (summary["result"], summary["unfinished"]) == ("complete", 0)
    assert [node["selected"] for node in summary["nodes"]] == [1, 3]
    assert [node["ranks"] for node in summary["nodes"]] == ["0-3", None]


def test_several_tiers_are_one_summary(log):
    tiers = [RunReport(TASK, NODES, log), RunReport(replace(TASK, tier="fs.cold"), NODES, log)]
    for tier in tiers:
        complete(tier, "id-a")
    complete(tiers[0], "id-b")
    tiers[1].ended("id-b", Failed("k1", 10, "tier", "k1: no such disk"))
    one = combined([tiers[0].summary(stopped=False)])
    assert one["tier"] == "fs.warm"
    both = combined([tier.summary(stopped=False) for tier in tiers])
    assert (both["result"], both["exit_code"], both["tier"]) == ("failed", 3, ["fs.warm", "fs.cold"])
    assert (both["copied"], both["present"], both["failed"], both["unfinished"]) == (6, 3, 1, 2)
    assert [tier["result"] for tier in both["tiers"]] == ["complete", "failed"]
    assert [failure["tier"] for failure in both["failures"]] == ["fs.cold"]
    assert combined([tier.summary(stopped=True) for tier in tiers])["result"] == "interrupted"
    assert json.loads(json.dumps(both)) == both


@pytest.mark.parametrize(
    ("error", "code"), [(RefusedError("plan 'p' was changed"), 4), (PlanLostError("plan 'p' cannot be read"), 3)]
)
def test_a_run_whose_plan_is_not_what_it_was_ends_early_and_says_what_was_copied(log, error, code):
    tiers = [RunReport(replace(TASK, tier=name), NODES, log) for name in ("fs.warm", "fs.cold")]
    complete(tiers[0], "id-a", "id-b")
    tiers[1].ended("id-a", Copied("k1", 10))
    tiers[1].cut_short = error
    alone = tiers[1].summary(stopped=False)
    assert (alone["exit_code"], alone["copied"], alone["unfinished"], alone["message"]) == (code, 1, 5, str(error))
    both = combined([tier.summary(stopped=False) for tier in tiers])
    assert (both["exit_code"], both["copied"], both["message"]) == (code, 5, str(error))


def test_a_failed_chunk_is_named(run):
    complete(run, "id-a")
    run.ended("id-b", Failed("k1", 10, "integrity", "k1: wrong"))
    summary = run.summary(stopped=False)
    assert (summary["result"], summary["exit_code"], summary["failed_by_kind"]) == ("failed", 3, {"integrity": 1})
    assert summary["failures"] == [
        {"tier": "fs.warm", "node": "id-b", "node_name": "b", "key": "k1", "kind": "integrity", "message": "k1: wrong"}
    ]


def test_a_stopped_run_is_interrupted_unless_everything_had_ended(run):
    complete(run, "id-a")
    run.ended("id-b", Failed("k1", 10, INTERRUPTED, "told to stop"))
    summary = run.summary(stopped=True)
    assert (summary["result"], summary["exit_code"]) == ("interrupted", 5)
    assert (summary["failed"], summary["unfinished"]) == (0, 3)
    complete(run, "id-b")
    assert run.summary(stopped=True)["exit_code"] == 0


@pytest.mark.parametrize(
    ("more", "result"),
    [(Present("k2", 20), "refused"), (Copied("k2", 20), "failed"), (Failed("k2", 20, "transport", "no"), "failed")],
)
def test_a_run_that_found_no_room_at_all_is_refused(run, more, result):
    run.ended("id-a", Present("k1", 10))
    run.ended("id-b", Failed("k1", 10, "no_room", "k1: 10 bytes do not fit"))
    run.ended("id-b", more)
    summary = run.summary(stopped=False)
    assert (summary["result"], summary["exit_code"]) == (result, 4 if result == "refused" else 3)


def test_one_tier_without_room_is_a_failure_and_all_of_them_are_a_refusal(log):
    full = RunReport(TASK, NODES, log)
    full.ended("id-a", Failed("k1", 10, "no_room", "k1: 10 bytes do not fit"))
    full, complete = full.summary(stopped=False), RunReport(TASK, [], log).summary(stopped=False)
    assert [combined(tiers)["exit_code"] for tiers in ([full, full], [full, complete], [complete, complete])] == [
        4,
        3,
        0,
    ]
    assert combined([full, full])["result"] == "refused"


def test_a_lost_node_says_why(run):
    run.lost("id-b", "node_lost", "gone")
    assert run.summary(stopped=False)["nodes"][1]["error"] == "node_lost: gone"


def test_a_run_whose_node_was_lost_after_its_last_chunk_is_not_complete(run):
    complete(run, "id-a", "id-b")
    run.lost("id-b", "node_lost", "gone")
    assert run.summary(stopped=False)["exit_code"] == 3


def test_what_came_from_another_node_or_another_tier_is_told_apart(run):
    run.ended("id-a", Copied("k1", 10, received=True))
    run.ended("id-a", Copied("k2", 10))
    run.ended("id-a", Copied("k3", 10, reused=True))
    summary = run.summary(stopped=False)
    assert (summary["copied"], summary["received"], summary["reused"]) == (3, 1, 1)


def test_a_node_that_was_replaced_is_not_waited_for(run):
    complete(run, "id-a")
    run.ended("id-b", Copied("k1", 10))
    run.lost("id-b", "node_lost", "gone")
    run.replaced("id-b", Node("id-c", "c"))
    assert run.summary(stopped=True)["unfinished"] == 3
    complete(run, "id-c")
    summary = run.summary(stopped=False)
    assert (summary["result"], summary["unfinished"]) == ("complete", 0)
    assert [node["replaced_by"] for node in summary["nodes"]] == [None, "id-c", None]


def test_every_failure_is_named_in_a_file_when_they_are_too_many(run, log, monkeypatch):
    monkeypatch.setattr(report, "NAMED_FAILURES", 3)
    for number in range(5):
        assert (log.path is None) == (number < 4)
        run.ended("id-a", Failed(f"k{number}", 1, "transport", "no answer"))
    summary = run.summary(stopped=False)
    log.close(summary)
    lines = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert [line["key"] for line in lines[:-1]] == [f"k{number}" for number in range(5)]
    assert lines[-1]["event"] == "summary"
    assert "failures" not in lines[-1]
    assert [failure["key"] for failure in summary["failures"]] == ["k0", "k1", "k2"]
    assert summary["failures_file"] == str(log.path)


def test_a_report_that_was_asked_for_is_written_whatever_happened(run, tmp_path):
    asked = FailureLog(tmp_path / "report.jsonl")
    asked.close(run.summary(stopped=False))
    assert json.loads((tmp_path / "report.jsonl").read_text())["event"] == "summary"


@pytest.mark.parametrize("asked", [True, False])
def test_a_full_disk_costs_the_file_of_failures_and_not_the_summary(asked, monkeypatch, caplog, tmp_path):
    full = Path("/dev/full")
    if not asked:
        monkeypatch.setattr(report, "NAMED_FAILURES", 3)
        monkeypatch.setattr(tempfile, "NamedTemporaryFile", lambda *_, **__: full.open("w"))
    log = FailureLog(full if asked else None)
    run = RunReport(TASK, NODES, log)
    for number in range(2000):
        run.ended("id-a", Failed(f"k{number}", 1, "transport", "no answer"))
    summary = run.summary(stopped=False)
    log.close(summary)
    log.close()
    assert (summary["failed"], summary["exit_code"], summary["failures_file"]) == (2000, 3, None)
    assert len(summary["failures"]) == (1000 if asked else 3)
    assert caplog.text.count("cannot be written") == 1


def test_a_disk_that_is_full_at_the_end_is_a_warning(run, caplog):
    log = FailureLog(Path("/dev/full"))
    log.close(run.summary(stopped=False))
    assert "cannot be written" in caplog.text


def test_a_run_that_ends_before_its_report_has_a_line_leaves_the_last_one(tmp_path):
    path = tmp_path / "report.jsonl"
    path.write_text("last")
    log = FailureLog(path)
    log.close()
    assert path.read_text() == "last"
    assert [one.name for one in tmp_path.iterdir()] == ["report.jsonl"]


def test_what_was_found_wrong_is_counted_named_and_said(tmp_path, caplog):
    log = FailureLog(tmp_path / "report.jsonl")
    run = RunReport(TASK, NODES[:1], log)
    run.ended("id-a", Copied("k1", 10, repaired=("fs.warm", "fs.two")))
    run.ended("id-a", Copied("k2", 10, repaired=("fs.warm",)))
    run.ended("id-a", Present("k3", 30))
    summary = run.summary(stopped=False)
    assert (summary["exit_code"], summary["repaired"], summary["left_wrong"]) == (0, 3, 0)
    assert [(one["tier"], one["key"], one["repaired"]) for one in summary["wrong"]] == [
        ("fs.warm", "k1", True), ("fs.two", "k1", True), ("fs.warm", "k2", True),
    ]  # fmt: skip
    assert caplog.text.count("held something else in its place, which was replaced") == 3
    log.close(summary)
    lines = [json.loads(line) for line in (tmp_path / "report.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["wrong"] * 3 + ["summary"]


def test_what_stays_wrong_is_no_success(run):
    complete(run, "id-a")
    run.ended("id-b", Copied("k1", 10, left=("tier 'fs.warm' holds something else in its place",)))
    run.ended("id-b", Present("k2", 20))
    run.ended("id-b", Present("k3", 30))
    summary = run.summary(stopped=False)
    assert (summary["result"], summary["exit_code"], summary["left_wrong"]) == ("failed", 3, 1)
    assert summary["wrong"][0]["repaired"] is False
