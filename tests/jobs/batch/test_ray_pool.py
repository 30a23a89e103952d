"""As a schedule runs it: `ray job submit`, on a cluster that `ray start` made, with batches on actors."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from localhub.faults import Fault
from tests.support.buckets import DAY, INSTANCE, SECRET, Depot, ended, key
from tests.support.waiting import eventually

OLD = [key(number) for number in range(12)]
NEW = [key(number) for number in range(100, 140)]


def command(*more):
    where = ("--lmcache-config", "lmcache.yaml", "--instance", INSTANCE)
    return [
        "python",
        "-m",
        "jobs",
        "cleanup",
        *where,
        "--max-age",
        "14d",
        "--yes",
        "--plan-dir",
        "plans",  # in the job's own directory, which goes with the cluster
        "--batch-size",
        "3",
        "--parallel",
        "2",
        *more,
    ]


def export(*more):
    ends = ("--from", INSTANCE, "--to", "hfbucket.eu", "--lmcache-config", "lmcache.yaml")
    bounds = ("--window", "1KB", "--parallel", "2", "--plan-dir", "plans")
    return ["python", "-m", "jobs", "export", *ends, "--mode", "stream", *bounds, *more]


def exit_codes(ray):
    """`JobDetails.driver_exit_code` of the jobs that were submitted, in their order."""
    code = (
        "import sys\nfrom ray.job_submission import JobSubmissionClient\n"
        "jobs = [job for job in JobSubmissionClient(sys.argv[1]).list_jobs() if job.submission_id]\n"
        "print(*[job.driver_exit_code for job in sorted(jobs, key=lambda job: job.start_time)])"
    )
    command = [sys.executable, "-c", code, ray.dashboard]
    return subprocess.run(
        command, env=ray.client_environment(), capture_output=True, text=True, check=True
    ).stdout.split()


def busy_carriers(ray):
    """The processes of actors of a cluster that are at a batch; its token tells them from those of other clusters."""
    found = set()
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            ours = ray.access["RAY_AUTH_TOKEN"].encode() in (path / "environ").read_bytes()
            if ours and (path / "cmdline").read_bytes().startswith(b"ray::_Copier.attempt"):
                found.add(int(path.name))
    return found


def drivers_that_streamed(ray):
    """The drivers whose metrics, of those that the cluster tells, count objects as streamed."""
    counters = re.findall(r"^ray_jobs_objects_total\{(.+)\}", ray.metrics(), re.MULTILINE)
    return {re.search(r'WorkerId="(\w+)"', tags)[1] for tags in counters if 'outcome="streamed"' in tags}


def check_that_a_lost_actor_is_made_up_for(ray, hub, directory):
    """An export from outside of the cluster, through actors of which one is killed, told by the cluster's own metrics."""

    def until(condition):
        assert eventually(lambda: condition() or process.poll() is not None, 120)
        assert process.poll() is None, process.communicate()

    before = drivers_that_streamed(ray)
    assert len(before) == 1
    hub.control.clear_faults()
    # The first batch gets its names. The others are in a pause of the Hub, which is no try of theirs, however long this takes.
    hub.control.add_fault(Fault(route="batch", trickle_bytes=65536, times=1))
    paused = Fault(route="batch", status=429, headers={"Retry-After": "1"})
    pause = hub.control.add_fault(paused)
    command = export("--rename", "org/model@=org/again@", "--address", ray.address)
    process = subprocess.Popen(
        [sys.executable, *command[1:]],
        cwd=directory,
        env=ray.client_environment(JOBS_TEST_TOKEN=SECRET, PYTHONWARNINGS="ignore"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        until(lambda: drivers_that_streamed(ray) > before)
        until(lambda: len(busy_carriers(ray)) == 2)
        # Both are asking for names when one of them is killed.
        hang = hub.control.add_fault(Fault(route="batch", hang=True))
        hub.control.clear_fault(pause)
        until(lambda: hub.control.hits(hang) >= 2)
        both = busy_carriers(ray)
        killed = min(both)
        os.kill(killed, signal.SIGKILL)
        hub.control.add_fault(paused)
        hub.control.clear_fault(hang)
        until(lambda: len(now := busy_carriers(ray)) == 2 and now - both)
        assert killed not in busy_carriers(ray)
        hub.control.clear_faults()
        ran = ended(process)
    finally:
        process.kill()
    assert ran.code == 0, ran.stderr
    assert SECRET not in ran.stdout + ran.stderr
    return ran.summary


def summary_in(log):
    lines = [line for line in log.splitlines() if line.startswith('{"record": "summary"')]
    assert lines, log
    return json.loads(lines[-1])


@pytest.mark.cluster
def test_ray_job_submit(hub_factory, tmp_path):
    from huggingface_hub import HfApi

    from tests.support.ray_cluster import PrivateRay

    tokens = tmp_path / "tokens.yaml"
    tokens.write_text(f"tokens:\n  - {{token: {SECRET}, buckets: {{'org/*': write}}}}\n")
    hub = hub_factory(tokens=tokens, faults=True)
    api = HfApi(endpoint=hub.endpoint, token=SECRET)
    api.create_bucket("org/kv")
    directory = tmp_path / "job"
    directory.mkdir()
    depot = Depot(hub, "org/kv", directory, others={"hfbucket.eu": "kv/eu"})
    assert depot.config.exists()
    api.batch_bucket_files("org/kv", add=[(one.encode(), depot.path(one)) for one in OLD + NEW])
    depot.make_older(depot.paths_of(OLD), 20 * DAY)
    depot.make_older(depot.paths_of(NEW), 1 * DAY)

    with PrivateRay(JOBS_TEST_TOKEN=SECRET, RAY_metrics_report_interval_ms="500") as ray:
        hub.control.add_fault(Fault(route="batch", items="%401000%40", items_error="not today"))
        failed = ray.submit(command(), "--working-dir", str(directory))
        assert failed.returncode == 1
        assert "exit code 3" in failed.stdout
        summary = summary_in(failed.stdout)
        assert (summary["deleted"]["objects"], summary["failed"]["objects"]) == (11, 1)
        assert summary["failures"] == [{"path": depot.path(OLD[0]), "message": "not today"}]

        listed = {item.path for item in api.list_bucket_tree("org/kv", recursive=True)}
        assert listed == depot.paths_of([OLD[0], *NEW]) | {f"{depot.prefix}/.hfbucket/reports/cleanup.json"}

        exported = ray.submit(export("--max-bytes", "1KiB"), "--working-dir", str(directory))
        assert exported.returncode == 0, exported.stdout
        summary = summary_in(exported.stdout)
        assert (summary["how"], summary["streamed"], summary["failed"]["objects"]) == ("stream", summary["chosen"], 0)
        listed = {item.path: item.xet_hash for item in api.list_bucket_tree("org/kv", recursive=True)}
        there = {path: found for path, found in listed.items() if path.startswith("kv/eu/")}
        assert len(there) == summary["chosen"]["objects"] > 10
        assert all(listed[path.replace("kv/eu/", "kv/us/")] == found for path, found in there.items())
        assert SECRET not in failed.stdout + exported.stdout
        assert exit_codes(ray) == ["3", "0"]

        again = check_that_a_lost_actor_is_made_up_for(ray, hub, directory)
        assert (again["how"], again["failed"]["objects"], again["unfinished"]["objects"]) == ("stream", 0, 0)
        assert again["streamed"]["objects"] + again["same"]["objects"] == again["chosen"]["objects"] == 41
        listed = {item.path: item.xet_hash for item in api.list_bucket_tree("org/kv", recursive=True)}
        copies = {path: found for path, found in listed.items() if path.startswith("kv/eu/org%2Fagain")}
        assert len(copies) == 41
        assert all(
            listed[path.replace("kv/eu/org%2Fagain", "kv/us/org%2Fmodel")] == found for path, found in copies.items()
        )
        logs = [path for path in ray.directory.rglob("*") if path.is_file() and not path.is_symlink()]
        assert [path for path in logs if SECRET.encode() in path.read_bytes()] == []
