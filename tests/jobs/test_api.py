"""Cleanups, exports and status for programs, by the examples of `docs/python.md` and beside them."""

import json
import logging
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
from pydantic import ValidationError

import jobs
from hfbucket_plugin import ConfigError, HFBucketError, RefusedError, SafetyError, TransportError
from hfbucket_plugin.core.keys import encode_name
from tests.docs.examples import example
from tests.support.buckets import DAY, INSTANCE, MODEL, NEW, OLD, SECRET

TWO_WEEKS = jobs.Policy(max_age=timedelta(days=14))


def handlers():
    return [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)]


def loggers():
    named = (logging.getLogger(name) for name in (None, "hfbucket_plugin", "warmer", "jobs"))
    return [(list(one.handlers), one.level) for one in named]


@pytest.fixture(autouse=True)
def quiet(capsys):
    """No call writes to stdout or stderr, or changes signal handlers or logging."""
    before = handlers(), loggers()
    yield
    assert (handlers(), loggers()) == before
    assert capsys.readouterr() == ("", "")


@pytest.fixture
def cleanup(stocked):
    def request(**more):
        return jobs.CleanupRequest(
            **{"lmcache_config": stocked.config, "instance": INSTANCE, "policy": TWO_WEEKS} | more
        )

    return request


@pytest.fixture
def documented(monkeypatch, stocked):
    """Runs an example where its `lmcache.yaml` is; returns its variables."""

    def run(title):
        monkeypatch.chdir(stocked.config.parent)
        variables = {}
        exec(example(title), variables)  # noqa: S102 - the documentation's own code
        return variables

    return run


def test_the_example_of_a_cleanup(stocked, documented, capsys):
    summary = documented("Delete by policy")["summary"]

    assert capsys.readouterr().out == f"complete 4 {summary.deleted.bytes} 20\n"
    assert stocked.left() == stocked.paths_of(NEW)


def test_the_example_of_a_copy(stocked, documented, capsys):
    summary = documented("Copy chunks")["summary"]

    assert (summary.result, summary.moved.objects, summary.exit_code) == ("complete", 24, 0)
    assert capsys.readouterr().out.splitlines()[0] == str(summary.planned)
    assert {encode_name(one) for one in [*OLD, *NEW]} <= {
        str(path.relative_to(stocked.directory / "backup")) for path in (stocked.directory / "backup").rglob("*")
    }


def test_the_example_of_a_status(documented, capsys):
    status = documented("See what an instance holds")["status"]

    assert (status.chunks.objects, status.by_model.keys()) == (24, {MODEL})
    assert status.outlook.planned.objects == 4
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_a_cleanup_only_plans_until_it_is_to_be_applied(stocked, cleanup, tmp_path):
    summary = jobs.run_cleanup(cleanup(plan_dir=tmp_path))

    assert (summary.result, summary.exit_code, summary.applied) == ("planned", 0, False)
    assert (summary.planned.objects, summary.deleted.objects) == (4, 0)
    assert summary.plan.path.parent == tmp_path
    assert len(stocked.left()) == 24


def test_a_plan_of_a_program_is_applied_by_the_command(stocked, cleanup, tmp_path, capsys):
    plan = jobs.run_cleanup(cleanup(plan_dir=tmp_path)).plan.path

    assert stocked.run("apply", str(plan), "--yes").code == 0
    assert stocked.left() == stocked.paths_of(NEW)


def test_a_plan_that_deletes_too_much_is_refused_in_the_words_of_the_command(stocked, cleanup, capsys):
    ran = stocked.cleanup("--max-age", "14d", "--max-delete", "3", "--yes")

    with pytest.raises(SafetyError) as caught:
        jobs.run_cleanup(cleanup(max_delete=jobs.MaxDelete(objects=3)), apply=True)

    assert ran.summary["message"] == str(caught.value)
    assert len(stocked.left()) == 24


def test_a_policy_that_deletes_nothing_is_refused(cleanup):
    with pytest.raises(ConfigError, match="policy: this policy deletes nothing"):
        jobs.run_cleanup(cleanup(policy=jobs.Policy(keep_newest=3)))


def test_a_policy_is_read_from_its_file(cleanup, tmp_path):
    (tmp_path / "retention.yaml").write_text("default: {max_age: 14d}")

    assert jobs.run_cleanup(cleanup(policy=tmp_path / "retention.yaml")).planned.objects == 4


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ({"instance": None}, "name the instances: --instance NAME"),
        ({"instance": "hfbucket.eu"}, "hfbucket.eu"),
        ({"lmcache_config": None}, "name a configuration"),
        ({"l2_adapter": "{}"}, "two sources"),
    ],
)
def test_what_deletes_goes_by_no_default(cleanup, named, words):
    with pytest.raises(ConfigError, match=words):
        jobs.run_cleanup(cleanup(**named), apply=True)


def test_a_request_with_an_unknown_field_is_refused(cleanup):
    with pytest.raises(ValidationError, match="max_deletes"):
        cleanup(max_deletes=3)


def test_a_hub_that_does_not_answer_is_raised(stocked, cleanup):
    stocked.settings["endpoint"] = "http://127.0.0.1:9"

    with pytest.raises(HFBucketError):
        jobs.run_cleanup(cleanup(lmcache_config=stocked.config), apply=True)


def test_a_cleanup_that_is_told_to_stop_tells_what_is_left(stocked, cleanup):
    stop = threading.Event()
    stop.set()

    summary = jobs.run_cleanup(cleanup(), apply=True, stop=stop)

    assert (summary.result, summary.exit_code, summary.unfinished.objects) == ("interrupted", 5, 4)
    assert len(stocked.left()) == 24


def test_an_interrupt_passes_and_leaves_no_lock(stocked, cleanup, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("jobs.deletion.job.DeletionJob._apply", interrupt)

    with pytest.raises(KeyboardInterrupt):
        jobs.run_cleanup(cleanup(), apply=True)

    assert not [path for path in stocked.all_paths() if "/locks/" in path]


def test_no_error_or_summary_holds_a_token(stocked, cleanup, monkeypatch, tmp_path):
    monkeypatch.setenv("JOBS_TEST_TOKEN", SECRET)

    def refuse(*_, **__):
        raise TransportError(f"the store repeats {SECRET}")

    monkeypatch.setattr("jobs.deletion.job.DeletionJob._apply", refuse)
    monkeypatch.setattr("jobs.api.examine", refuse)
    calls = [
        lambda: jobs.run_cleanup(cleanup(), apply=True),
        lambda: jobs.read_status(lmcache_config=stocked.config, instance=INSTANCE),
    ]

    for call in calls:
        with pytest.raises(TransportError) as caught:
            call()
        assert (str(caught.value), caught.value.args) == ("the store repeats ***", ("the store repeats ***",))


def test_a_cleanup_runs_in_any_thread(stocked, cleanup):
    with ThreadPoolExecutor() as pool:
        assert pool.submit(jobs.run_cleanup, cleanup(), apply=True).result().deleted.objects == 4

    assert stocked.left() == stocked.paths_of(NEW)


def test_reports_and_metrics_are_those_of_the_command(stocked, cleanup, tmp_path):
    report, metrics = tmp_path / "report.jsonl", tmp_path / "jobs.prom"

    summary = jobs.run_cleanup(cleanup(report=report, metrics_textfile=metrics), apply=True)

    lines = [json.loads(line) for line in report.read_text().splitlines()]
    assert [line["record"] for line in lines] == ["report", *["object"] * 4, "summary"]
    assert lines[-1] == summary.record()
    assert f'hfbucket_jobs_deleted_objects{{instance="{INSTANCE}",job_name="cleanup"}} 4.0' in metrics.read_text()


def test_a_report_that_is_not_whole_makes_a_cleanup_fail(cleanup):
    summary = jobs.run_cleanup(cleanup(report=Path("/dev/full")), apply=True)

    assert (summary.result, summary.exit_code, summary.deleted.objects) == ("failed", 3, 4)
    assert "is not whole" in summary.message


def test_a_report_never_replaces_what_is_read(stocked, cleanup):
    with pytest.raises(ConfigError, match="would be overwritten"):
        jobs.run_cleanup(cleanup(report=stocked.config))


def test_an_export_only_plans_until_it_is_to_be_applied(stocked, tmp_path):
    request = jobs.ExportRequest(
        source=INSTANCE, destination=f"{tmp_path}/copy", lmcache_config=stocked.config, plan_dir=tmp_path
    )

    summary = jobs.run_export(request)

    assert (summary.result, summary.planned.objects, summary.moved.objects) == ("planned", 24, 0)
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize(
    ("more", "error", "words"),
    [
        ({"destination": INSTANCE}, ConfigError, "the same place"),
        ({"select": jobs.Selection(hottest=3)}, ConfigError, "hottest"),
        ({"without_manifest": True}, ConfigError, "--without-manifest"),
        ({"select": jobs.Selection(model=("org/none",))}, RefusedError, "chosen|selected"),
        ({"mode": "copy"}, RefusedError, "between buckets only"),
    ],
)
def test_an_export_that_cannot_be_done_is_refused(stocked, tmp_path, more, error, words):
    values = {"source": INSTANCE, "destination": f"{tmp_path}/copy", "lmcache_config": stocked.config} | more

    with pytest.raises(error, match=words):
        jobs.run_export(jobs.ExportRequest(**values), apply=True)


def test_the_status_of_an_instance_that_is_not_there_is_raised(stocked):
    stocked.settings["endpoint"] = "http://127.0.0.1:9"

    with pytest.raises(HFBucketError):
        jobs.read_status(lmcache_config=stocked.config, instance=INSTANCE)


def test_ages_are_those_of_the_command(stocked):
    stocked.put([OLD[0]], age=40 * DAY)

    status = jobs.read_status(lmcache_config=stocked.config, instance=INSTANCE)

    assert status.outlook is None
    assert status.record()["ages"][-1]["objects"] == 1
