"""As operators run it: jobs, submitted to a cluster that `ray start` made, and that asks for a token of its own."""

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml
from huggingface_hub import HfApi
from prometheus_client.parser import text_string_to_metric_families

from localhub.faults import Fault
from tests.support.buckets import (
    INSTANCE,
    KEY_PREFIX,
    MODEL,
    SECRET,
    Warehouse,
    classic_key,
    command,
    content,
    environment,
)
from tests.support.hubs import start_on_fresh_port
from tests.support.ray_cluster import PrivateRay

pytestmark = pytest.mark.cluster

BUCKET = "org/kv"


@pytest.fixture(scope="module")
def guarded_hub():
    """A Hub that lets in only who has the token."""
    root = Path(tempfile.mkdtemp(prefix="localhub-"))
    tokens = root / "tokens.yaml"
    tokens.write_text(f"tokens:\n  - {{token: {SECRET}, buckets: {{org/*: write}}}}\n")
    try:
        with start_on_fresh_port(root / "hub", tokens=tokens, faults=True) as running:
            HfApi(endpoint=running.endpoint, token=SECRET).create_bucket(BUCKET)
            yield running
    finally:
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(scope="module")
def ray(guarded_hub):
    with PrivateRay(WARM_TEST_TOKEN=SECRET, RAY_metrics_report_interval_ms="500") as one:
        yield one


@pytest.fixture
def stocked(guarded_hub, tmp_path):
    """Chunks of this test's own, and a `warm.yaml` beside the engines' YAML."""
    directory = tmp_path / "job"
    directory.mkdir()
    one = Warehouse(guarded_hub.endpoint, BUCKET, directory, prefix=tmp_path.name)
    one.put({classic_key(n): content(n) for n in range(20)}, token=SECRET)
    assert one.config.exists()
    wanted = {
        "source": {"lmcache_config": "lmcache.yaml", "instance": INSTANCE},
        "choose": {"prefix": [KEY_PREFIX]},
        "tiers": ["fs.warm"],
    }
    (directory / "warm.yaml").write_text(yaml.safe_dump(wanted))
    return one


@pytest.fixture
def submit(ray, stocked):
    """Runs `python -m warmer submit` from outside of the cluster; returns how it ended, with its record."""

    def run(*arguments, options=(), **variables):
        where = ("--address", ray.dashboard, "--working-dir", str(stocked.directory))
        done = command("submit", *where, *options, "--", *arguments, **{**ray.access, **variables})
        assert SECRET not in done.stdout + done.stderr
        assert ray.access["RAY_AUTH_TOKEN"] not in done.stdout + done.stderr
        return done

    return run


def summary_in(log):
    lines = [line for line in log.splitlines() if line.startswith('{"event": "summary"')]
    assert lines, log
    return json.loads(lines[-1])


def eventually(found):
    end = time.monotonic() + 240
    while not (what := found()):
        assert time.monotonic() < end
        time.sleep(0.2)
    return what


def test_ray_job_submit(ray, stocked):
    note = stocked.directory.parent / "env.yaml"
    note.write_text("env_vars: {WARM_TEST_NOTE: rollout-7}\n")
    options = ("--runtime-env", str(note), "--submission-id", f"once-{stocked.prefix}")
    run = ("python", "-m", "warmer", "run", "--config", "warm.yaml")
    done = ray.submit(run, "--working-dir", str(stocked.directory), *options)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = summary_in(done.stdout)
    assert (summary["copied"], summary["failed"]) == (20, 0)
    assert stocked.in_tier() == stocked.chunks
    assert SECRET not in done.stdout + done.stderr

    # The name is a guard: the job runs once.
    again = ray.submit(run, "--working-dir", str(stocked.directory), *options)
    assert again.returncode == 1
    assert "already exists" in again.stdout + again.stderr

    logs = [path for path in ray.directory.rglob("*") if path.is_file() and not path.is_symlink()]
    assert [path for path in logs if SECRET.encode() in path.read_bytes()] == []


def test_submit_ends_as_the_job_does(submit, stocked):
    options = ("--submission-id", f"mine-{stocked.prefix}", "--runtime-env-json", '{"env_vars": {"NOTE": "1"}}')
    # Ray's own client would let this variable win over the address.
    done = submit("run", "--config", "warm.yaml", options=options, RAY_ADDRESS="http://127.0.0.1:1")
    assert done.code == 0, done.stderr
    record = done.summary
    assert (record["event"], record["submission_id"], record["status"]) == ("submit", options[1], "SUCCEEDED")
    assert (record["exit_code"], record["driver_exit_code"]) == (0, 0)
    assert record["record"] == summary_in(done.stderr)
    assert record["record"]["copied"] == 20

    again = submit("run", "--config", "warm.yaml", options=options)
    assert (again.code, again.stdout) == (4, "")
    assert f"'{options[1]}' was submitted before (SUCCEEDED, exit code 0): a job runs once" in again.stderr


def test_submit_returns_the_code_that_ray_job_submit_hides(submit, stocked):
    # LMCache would read this key back as that of another model, so the chunk fails.
    strange = f"{MODEL}@1@0@{'a' * 8}@bfloat16".replace("/", "-SEP-")
    stocked.put({strange: content(1)}, token=SECRET)
    failed = submit("run", "--config", "warm.yaml", "--prefix", "org")
    assert failed.code == 3, failed.stderr
    assert failed.summary["record"]["failed_by_kind"] == {"key": 1}
    assert (failed.summary["status"], failed.summary["driver_exit_code"]) == ("FAILED", 3)


def test_submit_with_a_wrong_token(submit):
    refused = submit("run", "--config", "warm.yaml", RAY_AUTH_TOKEN="0" * 64)
    assert (refused.code, refused.stdout) == (2, "")
    assert "does not let us in" in refused.stderr
    assert "RAY_AUTH_TOKEN_PATH" in refused.stderr


def test_a_submit_that_is_told_to_stop_stops_the_job(ray, stocked, guarded_hub):
    guarded_hub.control.add_fault(Fault(route="tree", hang=True))
    try:
        job = f"stop-{stocked.prefix}"
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "warmer", "submit", "--address", ray.dashboard, "--submission-id", job),
                *("--working-dir", str(stocked.directory), "--", "run", "--config", "warm.yaml"),
            ],
            env=environment(**ray.access),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for line in process.stderr:
            if "is submitted to" in line:
                break
        process.send_signal(signal.SIGTERM)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        guarded_hub.control.clear_faults()
    assert process.returncode == 5, stderr
    record = json.loads(stdout)
    assert (record["status"], record["exit_code"]) == ("STOPPED", 5)


def fill(tier, chunks):
    """Put chunks into a directory as an earlier run would have."""
    tier.mkdir()
    for key, data in chunks.items():
        (tier / f"{key.replace('/', '-SEP-')}.data").write_bytes(data)


class Metrics:
    """The samples that a cluster's metrics agents tell of the warmer, without those of other runs of this module."""

    def __init__(self, ray):
        self._ray = ray

    def values(self, name, **labels):
        families = text_string_to_metric_families(self._ray.metrics())
        samples = [sample for family in families for sample in family.samples if sample.name == f"ray_warmer_{name}"]
        return [one.value for one in samples if labels.items() <= one.labels.items()]


def test_metrics_and_a_page_of_a_run(ray, stocked, guarded_hub):
    """Three tiers: one that waits for the Hub, one that is full already, and one that no node can have."""
    tiers = {name: stocked.directory / name for name in ("part", "full", "{label:rack}")}
    for name, path in zip(("fs.part", "fs.full", "fs.none"), tiers.values(), strict=True):
        stocked.extra[f"remote_storage_plugin.{name}.base_path"] = str(path)
    config = json.loads(stocked.config.read_text())
    config["remote_storage_plugins"] += ["fs.part", "fs.full", "fs.none"]
    (stocked.directory / "tiers.yaml").write_text(json.dumps(config))
    fill(tiers["full"], stocked.chunks)
    fill(tiers["part"], dict(list(stocked.chunks.items())[:5]))
    # LMCache would read this key back as that of another model, so the chunk fails.
    stocked.put({f"{MODEL}@1@0@{'b' * 8}@bfloat16".replace("/", "-SEP-"): content(1)}, token=SECRET)
    page, metrics, size = stocked.directory / "run.html", Metrics(ray), len(content(0))

    guarded_hub.control.add_fault(Fault(route="xorb-data", hang=True))
    try:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "warmer", "run", "--lmcache-config", str(stocked.directory / "tiers.yaml")),
                *("--instance", INSTANCE, "--prefix", "org", "--address", ray.address, "--report-html", str(page)),
                *("--tier", "fs.part", "--tier", "fs.full", "--tier", "fs.none"),
            ],
            env=environment(WARM_TEST_TOKEN=SECRET, **ray.access),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            eventually(lambda: metrics.values("in_flight_chunks", tier="fs.part") == [21.0])
            eventually(lambda: metrics.values("in_flight_bytes", tier="fs.part") == [21.0 * size])
            eventually(lambda: metrics.values("coverage_ratio", tier="fs.part") == [0.0])  # none has ended yet
        finally:
            guarded_hub.control.clear_faults()
        stdout, stderr = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 3, stderr
    summary = json.loads(stdout)

    # What the driver counted outlives it.
    eventually(lambda: metrics.values("lost_nodes_total", tier="fs.none", kind="config") == [1.0])
    part = {"tier": "fs.part", "instance": INSTANCE, "node_id": summary["nodes"][0]["id"]}
    part["node"] = summary["nodes"][0]["name"]
    reported = {name: metrics.values("chunks_total", outcome=name, **part) for name in ("fetched", "present", "failed")}
    assert reported == {"fetched": [15.0], "present": [5.0], "failed": [1.0]}
    assert metrics.values("bytes_total", outcome="fetched", **part) == [15.0 * size]
    assert metrics.values("failures_total", kind="key", **part) == [1.0]
    assert metrics.values("fetched_chunks_total", tier="fs.part") == [15.0]
    assert metrics.values("fetched_bytes_total", tier="fs.part") == [15.0 * size]
    assert metrics.values("failures_total", kind="config", tier="fs.none") == [21.0]

    text = page.read_text()
    assert text.endswith("</html>\n")
    assert text.count("<svg") == 3
    assert SECRET not in text
    assert "fs.none" in text
