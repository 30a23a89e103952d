"""`python -m jobs cleanup` on a real local Hub."""

import json

import pytest

from localhub.faults import Fault
from tests.support.buckets import DAY, HOUR, INSTANCE, MODEL, NEW, OLD, PREFIX, ended, l2_key


def test_old_chunks_go_and_a_report_stays(stocked, tmp_path):
    report, metrics = tmp_path / "report.jsonl", tmp_path / "jobs.prom"

    ran = stocked.cleanup("--max-age", "14d", "--yes", "--report", str(report), "--metrics-textfile", str(metrics))

    assert ran.code == 0, ran.stderr
    assert stocked.left() == stocked.paths_of(NEW)
    assert ran.counts("listed", "planned", "deleted", "left", "gone", "failed") == [24, 4, 4, 20, 0, 0]
    assert ran.summary["by_reason"] == [
        {"model": MODEL, "reason": "expired", "objects": 4, "bytes": sum(map(len, OLD))}
    ]
    assert ran.summary["result"] == "complete"
    assert stocked.all_paths() - stocked.left() == {f"{PREFIX}/.hfbucket/reports/cleanup.json"}
    records = [json.loads(line) for line in report.read_text().splitlines()]
    assert [record["record"] for record in records] == ["report", *["object"] * 4, "summary"]
    assert {record["key"] for record in records[1:-1]} == set(OLD)
    assert {record["outcome"] for record in records[1:-1]} == {"deleted"}
    reported = metrics.read_text()
    assert f'hfbucket_jobs_deleted_objects{{instance="{INSTANCE}",job_name="cleanup"}} 4.0' in reported
    assert f'hfbucket_jobs_exit_code{{instance="{INSTANCE}",job_name="cleanup"}} 0.0' in reported
    assert list((tmp_path / "plans").iterdir()) == []


def test_twice_is_once(stocked):
    assert stocked.cleanup("--max-age", "14d", "--yes").code == 0
    again = stocked.cleanup("--max-age", "14d", "--yes")

    assert (again.code, again.counts("listed", "planned", "deleted")) == (0, [20, 0, 0])


@pytest.mark.parametrize("options", [[], ["--dry-run"], ["--dry-run", "--yes"]])
def test_without_yes_nothing_is_deleted_or_written(stocked, options):
    before = stocked.all_paths()

    ran = stocked.cleanup("--max-age", "14d", *options)

    assert ran.code == 0, ran.stderr
    assert stocked.all_paths() == before
    assert ran.summary["result"] == "planned"
    assert ran.counts("planned", "deleted") == [4, 0]
    assert f"{MODEL}: expired: 4 objects" in ran.stderr
    assert "nothing was deleted: this was only planned" in ran.stderr


@pytest.mark.parametrize(("answer", "left"), [("y\n", 20), ("n\n", 24), ("", 24)])
def test_at_a_terminal_it_asks(stocked, monkeypatch, answer, left):
    monkeypatch.setattr("hfbucket_plugin.tools.console.at_terminal", lambda: True)

    ran = stocked.cleanup("--max-age", "14d", stdin=answer)

    assert ran.code == 0
    assert ran.summary["result"] == ("complete" if left == 20 else "planned")
    assert "Delete 4 objects" in ran.stderr
    assert len(stocked.left()) == left


def test_a_dry_run_at_a_terminal_does_not_ask(stocked, monkeypatch):
    monkeypatch.setattr("hfbucket_plugin.tools.console.at_terminal", lambda: True)

    assert stocked.cleanup("--max-age", "14d", "--dry-run", stdin="y\n").code == 0
    assert len(stocked.left()) == 24


def test_a_plan_is_applied_later_and_only_to_what_is_still_the_same(stocked, tmp_path):
    plans = tmp_path / "kept"
    planned = stocked.cleanup("--max-age", "14d", "--plan-dir", str(plans))
    stocked.put({OLD[0]: b"rewritten"}, age=0)
    stocked.put({OLD[1]: b"other bytes, and a clock that was set back"}, age=20 * DAY)
    stocked.hub.control.reset_counters()
    deleted_by_others = stocked.run("rm", OLD[2], "--yes", "--accept-shrunk")
    assert deleted_by_others.code == 0, deleted_by_others.stderr

    ran = stocked.run("apply", planned.summary["plan"], "--yes")

    assert ran.code == 0, ran.stderr
    assert ran.counts("deleted", "gone", "changed") == [1, 1, 2]
    assert stocked.left() == stocked.paths_of([*OLD[:2], *NEW])
    again = stocked.run("apply", planned.summary["plan"], "--yes")
    assert (again.code, again.counts("deleted", "gone", "changed")) == (0, [0, 2, 2])


def test_a_partly_failed_batch_is_tried_again_for_what_failed_only(stocked):
    stocked.hub.control.add_fault(Fault(route="batch", items="%401000%40", times=2, items_error="try again"))

    ran = stocked.cleanup("--max-age", "14d", "--yes")

    assert ran.code == 0, ran.stderr
    assert ran.counts("deleted", "failed") == [4, 0]


def test_what_goes_on_failing_is_named(stocked, tmp_path, monkeypatch):
    monkeypatch.setattr("jobs.batch.apply._BACKOFF_SECS", 0.01)
    # Locks and reports lie below .hfbucket/, and are let through.
    stocked.hub.control.add_fault(Fault(route="batch", items="%401000%40", items_error="quota of Mars"))

    ran = stocked.cleanup("--max-age", "14d", "--yes", "--plan-dir", str(tmp_path))

    assert ran.code == 3
    assert ran.counts("deleted", "failed", "unfinished") == [3, 1, 0]
    assert ran.summary["failures"] == [{"path": stocked.path(OLD[0]), "message": "quota of Mars"}]
    stocked.hub.control.clear_faults()
    again = stocked.run("apply", ran.summary["plan"], "--yes")
    assert (again.code, again.counts("deleted", "gone")) == (0, [1, 3])


def test_an_answer_that_was_lost_is_looked_up(stocked):
    stocked.hub.control.add_fault(Fault(route="batch", path=stocked.bucket_id, truncate_at=3, times=1))
    # The first batch is the lock's own; it is named again, and the deletes meet no fault.
    ran = stocked.cleanup("--max-age", "14d", "--yes")
    assert ran.code == 0, ran.stderr
    assert ran.counts("deleted") == [4]


def test_throttling_is_waited_out(stocked):
    stocked.hub.control.add_fault(
        Fault(route="paths-info", status=429, headers={"Retry-After": "1"}, times=2, body='{"error": "too many"}')
    )

    ran = stocked.cleanup("--max-age", "14d", "--yes")

    assert ran.code == 0, ran.stderr
    assert ran.counts("deleted", "failed") == [4, 0]


def test_throttling_beyond_max_duration_leaves_a_rest_that_can_be_resumed(stocked):
    stocked.hub.control.add_fault(Fault(route="paths-info", status=429, headers={"Retry-After": "5"}))

    ran = stocked.cleanup("--max-age", "14d", "--yes", "--max-duration", "3s")

    stocked.hub.control.clear_faults()
    assert ran.code == 3
    assert ran.counts("deleted", "unfinished") == [0, 4]
    assert "python -m jobs apply" in ran.stderr
    assert stocked.run("apply", ran.summary["plan"], "--yes").counts("deleted") == [4]


def test_several_instances_each_by_its_own_policy_whatever_becomes_of_the_others(stocked, tmp_path):
    stocked.others = {"hfbucket.eu": "kv/eu", "hfbucket.none": "kv/none"}
    stocked.put_paths({f"kv/eu/{stocked.path(l2_key(n)).split('/')[-1]}": b"x" * n for n in range(1, 11)}, age=5 * HOUR)
    policy = tmp_path / "retention.yaml"
    policy.write_text(
        "default: {max_age: 14d}\ninstances:\n  hfbucket.eu: {max_objects: 8, min_age: 2h}\n  hfbucket.none: {max_age: 1d}\n"
    )

    ran = stocked.cleanup("--all-instances", "--policy", str(policy), "--yes")

    assert ran.code == 4, "the empty one"
    assert [(one["instance"], one["exit_code"], one["deleted"]["objects"]) for one in ran.lines] == [
        (INSTANCE, 0, 4),
        ("hfbucket.eu", 0, 2),
        ("hfbucket.none", 4, 0),
    ]


def test_an_adapters_json_names_an_instance_too(stocked):
    from typer.testing import CliRunner

    from jobs.cli.app import app

    params = {
        "bucket_handle": f"hf://buckets/{stocked.bucket_id}/{PREFIX}",
        "endpoint": stocked.hub.endpoint,
        "name": "mp.us",
    }
    adapter = json.dumps({"type": "hfbucket", **params})

    done = CliRunner().invoke(app, ["cleanup", "--l2-adapter", adapter, "--max-age", "14d"])
    plan = json.loads(done.stdout)["plan"]
    assert CliRunner().invoke(app, ["apply", plan, "--yes"]).exit_code == 2, "the plan does not hold the adapter"
    assert CliRunner().invoke(app, ["apply", plan, "--yes", "--l2-adapter", adapter]).exit_code == 0
    assert stocked.left() == stocked.paths_of(NEW)


@pytest.mark.parametrize(
    ("arguments", "reported"),
    [
        (["--yes"], "name what to keep"),
        (["--max-age", "14"], "--max-age: invalid duration"),
        (["--max-age", "14d", "--policy", "x.yaml"], "not both"),
        (["--policy", "x.yaml"], "cannot be read"),
        (["--max-age", "14d", "--max-delete", "most"], "--max-delete"),
        (["--max-age", "14d", "--foreign", "eat"], "--foreign"),
        (["--max-age", "14d", "--max-duration", "0s"], "--max-duration"),
        (["--max-age", "14d", "--lock-lifetime", "0s"], "--lock-lifetime"),
        (["--max-age", "14d", "--instance", "hfbucket.mars"], "hfbucket.mars"),
        (["--max-age", "14d", "--instance", INSTANCE, "--all-instances"], "not both"),
    ],
)
def test_commands_that_cannot_be_meant(depot, arguments, reported):
    ran = depot.cleanup(*arguments)

    assert ran.code == 2, ran.stderr
    assert reported in ran.stderr
    assert ran.stdout == ""


@pytest.mark.parametrize(
    "command",
    [
        ["cleanup", "--instance", INSTANCE, "--max-age", "14d"],
        ["rm", "--instance", INSTANCE, OLD[0]],
        ["index", "--instance", INSTANCE],
        ["export", "--from", INSTANCE, "--to", "{copies}"],
        ["apply", "{plan}", "--yes"],
    ],
    ids=lambda command: command[0],
)
def test_a_lock_that_would_hold_for_less_than_was_asked_for_is_refused(stocked, command):
    """Others pass over a claim after 600 s, whatever lifetime it was made with."""
    from typer.testing import CliRunner

    from jobs.cli.app import app

    kept = str(stocked.directory / "kept")
    plan = stocked.cleanup("--max-age", "14d", "--dry-run", "--plan-dir", kept).summary["plan"]
    before = stocked.all_paths()
    arguments = [one.format(copies=f"{stocked.directory}/copies/", plan=plan) for one in command]
    where = ["--lmcache-config", str(stocked.config), "--lock-lifetime"]

    refused = CliRunner().invoke(app, [*arguments, *where, "601s"])

    assert (refused.exit_code, refused.stdout, stocked.all_paths()) == (2, "", before)
    assert "--lock-lifetime '601s': no lock holds for longer than 600s" in refused.stderr
    taken = CliRunner().invoke(app, [*arguments, *where, "10min"])
    assert taken.exit_code == 0, taken.stderr


def test_what_deletes_goes_by_no_default(depot):
    from typer.testing import CliRunner

    from jobs.cli.app import app

    done = CliRunner().invoke(app, ["cleanup", "--lmcache-config", str(depot.config), "--max-age", "14d"])

    assert (done.exit_code, "--all-instances" in done.stderr) == (2, True)


def test_a_disk_that_is_full_is_told(stocked, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("jobs.deletion.plan.DeletionPlanWriter.add", full)

    ran = stocked.cleanup("--max-age", "14d", "--yes")

    assert (ran.code, "No space left" in ran.stderr) == (3, True)
    assert len(stocked.left()) == 24
    assert not [path for path in stocked.all_paths() if "/locks/" in path]


def test_a_stopped_run_goes_on_from_its_plan(stocked, tmp_path):
    """SIGTERM while a batch hangs: what was begun ends, the rest is left, the lock is released, the plan goes on."""
    from tests.support.waiting import eventually

    control = stocked.hub.control
    hanging = control.add_fault(Fault(route="paths-info", hang=True))
    process = stocked.started(
        *("cleanup", "--max-age", "14d", "--yes", "--batch-size", "1", "--parallel", "1", "--plan-dir", str(tmp_path))
    )
    eventually(lambda: control.hits(hanging))
    process.terminate()
    control.clear_faults()
    ran = ended(process)

    assert ran.code == 5, ran.stderr
    assert ran.summary["unfinished"]["objects"] >= 1
    assert not [path for path in stocked.all_paths() if "/locks/" in path]
    again = stocked.run("apply", ran.summary["plan"], "--yes")
    assert again.code == 0, again.stderr
    assert stocked.left() == stocked.paths_of(NEW)


def test_a_pause_that_outlasts_the_lock_leaves_a_rest(stocked):
    """No failure of anybody: what is left can be carried out later (3), and no other job is named (4)."""
    throttled = {"status": 429, "headers": {"Retry-After": "3"}, "times": 1}
    stocked.hub.control.add_fault(Fault(route="paths-info", **throttled))

    ran = stocked.cleanup("--max-age", "14d", "--yes", "--lock-lifetime", "2s")

    assert (ran.code, "was not renewed in time" in ran.stderr) == (3, True), ran.stderr
    assert stocked.run("apply", ran.summary["plan"], "--yes").counts("deleted") == [4]
