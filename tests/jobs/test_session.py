"""A command as a whole: reports that cannot be written, and orders to stop between two jobs."""

import json
import os
import signal
import sqlite3

import pytest

from hfbucket_plugin.core.deadline import Deadline
from hfbucket_plugin.core.keys import encode_name
from hfbucket_plugin.errors import ConfigError, TransportError
from hfbucket_plugin.hub.bucket import Bucket
from hfbucket_plugin.tools import exit_codes
from hfbucket_plugin.tools.signals import ShutdownSignal
from jobs.deletion.job import DeletionJob
from jobs.report import OutcomeTally, ReportFile, failure_of
from tests.support.buckets import DAY, INSTANCE, NEW, OLD, ExportRig, noise


def test_a_report_on_a_full_disk_holds_nothing_up_and_is_told(stocked):
    metrics = stocked.directory / "jobs.prom"
    ran = stocked.cleanup("--max-age", "14d", "--yes", "--report", "/dev/full", "--metrics-textfile", str(metrics))

    summary = ran.summary
    assert (summary["exit_code"], summary["result"]) == (3, "failed")
    assert "--report '/dev/full' is not whole" in summary["message"]
    assert 'hfbucket_jobs_exit_code{instance="hfbucket.us",job_name="cleanup"} 3.0' in metrics.read_text()
    assert (ran.code, ran.counts("deleted", "unfinished")) == (3, [4, 0])
    assert "--report '/dev/full' is not whole: No space left" in ran.stderr
    assert stocked.left() == stocked.paths_of(NEW)
    assert not [path for path in stocked.all_paths() if "/locks/" in path]


def test_metrics_take_the_place_of_no_link(stocked, tmp_path):
    target, link = tmp_path / "target.prom", tmp_path / "jobs.prom"
    link.symlink_to(target)
    assert stocked.cleanup("--max-age", "14d", "--metrics-textfile", str(link)).code == 0
    assert link.is_symlink()
    assert "hfbucket_jobs_exit_code" in target.read_text()


def test_a_report_goes_silent_at_its_first_error(tmp_path):
    file = ReportFile(tmp_path / "report.jsonl")

    class Full:
        def write(self, _):
            raise OSError(28, "No space left on device")

        def close(self):
            raise OSError(5, "Input/output error")

        commit = discard = close

    whole, file._out = file._out, Full()
    whole.discard()
    file.write({})
    file.write({})
    file.close()
    assert file.problem.endswith("is not whole: No space left on device")


def test_a_job_that_is_refused_leaves_the_last_report(stocked):
    report = stocked.directory / "report.jsonl"
    report.write_text("last\n")
    refused = stocked.cleanup("--max-age", "14d", "--yes", "--max-delete", "1", "--report", str(report))
    assert refused.code == exit_codes.REFUSED
    assert report.read_text() == "last\n"
    assert stocked.cleanup("--max-age", "14d", "--yes", "--report", str(report)).code == exit_codes.COMPLETE
    lines = [json.loads(line) for line in report.read_text().splitlines()]
    assert [line["record"] for line in lines] == ["report", *["object"] * 4, "summary"]


@pytest.mark.parametrize("option", ["--report", "--metrics-textfile"])
@pytest.mark.parametrize("read", ["--key-file", "--policy", "plan"])
def test_what_a_command_reads_is_not_written_to(stocked, option, read):
    given = stocked.directory / "given"
    if read == "--key-file":
        given.write_text(f"{OLD[0]}\n")
        ran = stocked.run("rm", "--key-file", str(given), "--yes", option, str(given))
    elif read == "--policy":
        given.write_text("default: {max_age: 14d}\n")
        ran = stocked.cleanup("--policy", str(given), "--yes", option, str(given))
    else:
        plans = stocked.directory / "plans"
        stocked.cleanup("--max-age", "14d", "--dry-run", "--plan-dir", str(plans))
        (made,) = plans.glob("*.jsonl")
        given = made.rename(given)
        link = stocked.directory / "link"
        link.hardlink_to(given)
        ran = stocked.run("apply", str(given), "--yes", option, str(link))
    before = given.read_text()
    assert ran.code == exit_codes.USAGE
    assert option in ran.stderr
    assert read in ran.stderr
    assert given.read_text() == before
    assert before
    assert stocked.left() == stocked.paths_of([*OLD, *NEW])


def stopped_after(monkeypatch, objects):
    """SIGTERM arrives when so many objects have ended: with the last one of a job."""
    add, ended = OutcomeTally.add, []

    def adding(tally, one):
        add(tally, one)
        ended.append(one)
        if len(ended) == objects:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(OutcomeTally, "add", adding)


def test_an_order_to_stop_with_the_last_batch_of_an_instance_names_the_others(stocked, monkeypatch):
    stocked.others = {"hfbucket.eu": "kv/eu"}
    stopped_after(monkeypatch, 4)

    ran = stocked.cleanup("--all-instances", "--max-age", "14d", "--yes")

    assert ran.code == 5, ran.stderr
    assert [one["result"] for one in ran.lines] == ["complete"]
    assert "told to stop; not done: hfbucket.eu" in ran.stderr


def test_an_order_to_stop_with_the_last_batch_of_all_is_no_failure(stocked, monkeypatch):
    stopped_after(monkeypatch, 4)
    assert stocked.cleanup("--max-age", "14d", "--yes").code == 0


def test_an_order_to_stop_with_the_last_copy_names_the_mirror(hub, new_bucket, tmp_path, monkeypatch):
    rig = ExportRig.on(hub, tmp_path, new_bucket(), new_bucket())
    rig.us.put({one: noise(500, number) for number, one in enumerate(OLD)})
    stopped_after(monkeypatch, 4)

    ran = rig.export("--mirror", "--yes")

    assert (ran.code, [one["job"] for one in ran.lines]) == (5, ["export"])
    assert "not done: the mirror" in ran.stderr


def broken_off(error, *, told_to_stop):
    stop = ShutdownSignal()
    with stop.listening(), stop.orderly():
        if told_to_stop:
            os.kill(os.getpid(), signal.SIGTERM)

    return failure_of(error, stop, Deadline.after(60))


def test_what_breaks_off_after_an_order_to_stop_is_interrupted_even_if_it_was_taken_for_a_failure():
    lost = TransportError("listing: RuntimeError: release unlocked lock")
    assert broken_off(lost, told_to_stop=False) == (exit_codes.FAILED, str(lost))
    assert broken_off(lost, told_to_stop=True) == (exit_codes.INTERRUPTED, f"told to stop; {lost}")
    assert broken_off(OSError(28, "full"), told_to_stop=True)[0] == exit_codes.INTERRUPTED
    assert broken_off(ConfigError("unknown setting"), told_to_stop=True) == (exit_codes.USAGE, "unknown setting")


@pytest.mark.parametrize(
    ("error", "code", "reported"),
    [
        (MemoryError(), 3, "there was not enough memory"),
        (sqlite3.OperationalError("database or disk is full"), 3, "set TMPDIR to another directory"),
        (OSError(28, "No space left on device"), 3, "set TMPDIR to another directory"),
        (OSError(28, "No space left on device", "/x/plan"), 3, "'/x/plan'"),
        (RecursionError("too deep"), 3, "please report it: RecursionError at "),
        (ValueError("negative count"), 3, "please report it: ValueError at "),
        (ConfigError("unknown setting"), 2, "unknown setting"),
    ],
    ids=lambda one: type(one).__name__ if isinstance(one, Exception) else None,
)
def test_whatever_one_instance_meets_the_others_are_done(stocked, monkeypatch, error, code, reported):
    stocked.others = {"hfbucket.eu": "kv/eu"}
    stocked.put_paths({f"kv/eu/{encode_name(one)}": b"x" for one in OLD}, age=20 * DAY)
    own = Bucket.list_objects

    def failing(self, prefix, *more):
        if self.handle.prefix == stocked.prefix and ".hfbucket" not in prefix:
            raise error
        return own(self, prefix, *more)

    monkeypatch.setattr(Bucket, "list_objects", failing)

    ran = stocked.cleanup("--all-instances", "--max-age", "14d", "--max-delete", "100%", "--yes")

    assert ran.code == code, ran.stderr
    assert [one["exit_code"] for one in ran.lines] == [code, 0]
    assert reported in ran.lines[0]["message"]
    assert "Traceback" not in ran.stderr
    status = stocked.run("status", "--all-instances", "--json")
    assert status.code == code
    assert [one["instance"] for one in status.lines] == ["hfbucket.eu"]
    assert reported in status.stderr


def test_what_breaks_outside_of_a_job_is_named_and_the_others_are_done(stocked, monkeypatch):
    stocked.others = {"hfbucket.eu": "kv/eu"}
    stocked.put_paths({f"kv/eu/{encode_name(one)}": b"x" for one in OLD}, age=20 * DAY)
    own = DeletionJob.select

    def breaking(self, *arguments):
        if self._named.name == INSTANCE:
            raise MemoryError
        return own(self, *arguments)

    monkeypatch.setattr(DeletionJob, "select", breaking)

    ran = stocked.cleanup("--all-instances", "--max-age", "14d", "--max-delete", "100%", "--yes")

    assert (ran.code, [one["instance"] for one in ran.lines]) == (3, ["hfbucket.eu"])
    assert f"{INSTANCE}: there was not enough memory" in ran.stderr


@pytest.mark.parametrize("command", ["status", "cleanup --max-age 14d", "index", "rm key", "fingerprint show"])
def test_no_command_ends_with_a_traceback(stocked, monkeypatch, command):
    def full(*_, **__):
        raise MemoryError

    for name in ("jobs.options.named_instances",):
        monkeypatch.setattr(name, full)

    ran = stocked.run(command)

    assert (ran.code, "there was not enough memory" in ran.stderr) == (3, True)
