"""Commands against a Hub that pauses at random, for up to 300 s of a clock that the test turns: they end well, or at --max-duration."""

import json
import random
import threading
import time
from dataclasses import replace
from datetime import timedelta
from email.utils import format_datetime

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from hfbucket_plugin.core.dates import http_date, iso_date
from hfbucket_plugin.core.deadline import Deadline, patience
from hfbucket_plugin.errors import ThrottledError
from hfbucket_plugin.hub.client import Answer, HubClient
from jobs.lock.clock import ServerClock
from jobs.lock.lock import BucketLock, LockLostError
from localhub.faults import Fault
from tests.support.buckets import DAY, INSTANCE, NEW, OLD, Depot, ExportRig, opened
from tests.support.waiting import Clock
from warmer.cli.app import app as warmer

few = settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class TurnedHub:
    """A Hub that pauses, and a clock that turns while somebody waits for it; the Hub's own clock turns with it.

    Attributes:
        turned: Seconds by which the clock was turned.
        pauses: How often a pause began.
    """

    def __init__(self, monkeypatch, seed, most_pauses, longest=300, share=0.3):
        self.turned, self.pauses = 0.0, 0
        self._chance, self._most, self._longest = random.Random(seed), most_pauses, longest
        self._share = share
        self._until, self._named = 0.0, {}
        self._lock = threading.Lock()
        self._monotonic, self._sleep, self._answer = time.monotonic, time.sleep, HubClient._answer
        monkeypatch.setattr(time, "monotonic", lambda: self._monotonic() + self.turned)
        monkeypatch.setattr(time, "sleep", self.turn)

        def answer(client, request, address):
            return self.answer(client, request, address)

        monkeypatch.setattr(HubClient, "_answer", answer)

    def turn(self, seconds):
        with self._lock:
            self.turned += seconds
        self._sleep(0.001)

    def answer(self, client, request, address):
        with self._lock:
            left = self._until - self.turned
            if left <= 0 and self.pauses < self._most and self._chance.random() < self._share:
                self.pauses += 1
                left = self._chance.randint(1, self._longest)
                self._until = self.turned + left
        if left > 0:
            return Answer(429, {"retry-after": str(int(left) + 1)}, b"", None, request.room)
        answer = self._answer(client, request, address)
        headers = {name.lower(): value for name, value in answer.headers.items()}
        if at := http_date(headers.get("date", "")):
            headers["date"] = format_datetime(at + timedelta(seconds=self.turned), usegmt=True)
        if address.endswith("/batch"):
            for line in request.body["content"].splitlines():
                self._named[json.loads(line)["path"]] = self.turned
        body = answer.body
        if "/tree" in address or address.endswith("/paths-info"):
            records = json.loads(body)
            for record in records:
                later = timedelta(seconds=self._named.get(record["path"], 0.0))
                record["uploadedAt"] = (iso_date(record["uploadedAt"]) + later).isoformat()
            body = json.dumps(records).encode()
        return replace(answer, headers=headers, body=body)


def run_paused(subject, make, seed, most_pauses, **options):
    """Run a command against a turned Hub; its result, and the clock."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        turned = TurnedHub(monkeypatch, seed, most_pauses, **options)
        return make(subject), turned


def locks_in(depot):
    return [path for path in depot.all_paths() if "/locks/" in path or "/index-locks/" in path]


@few
@given(seed=st.integers(0, 2**32), most_pauses=st.integers(1, 6))
def test_a_cleanup_waits_pauses_out(hub, new_bucket, tmp_path_factory, seed, most_pauses):
    depot = Depot(hub, new_bucket(), tmp_path_factory.mktemp("cleanup"))
    depot.put(OLD, age=20 * DAY)
    depot.put(NEW, age=DAY)

    ran, turned = run_paused(depot, lambda one: one.cleanup("--max-age", "14d", "--yes", "--local"), seed, most_pauses)

    assert ran.code == 0 or "lock" in ran.stderr, (ran.stderr, turned.turned)
    assert locks_in(depot) == []
    if ran.code == 0:
        assert depot.left() == depot.paths_of(NEW)


@few
@given(seed=st.integers(0, 2**32))
def test_an_index_and_a_status_wait_pauses_out(hub, new_bucket, tmp_path_factory, seed):
    depot = Depot(hub, new_bucket(), tmp_path_factory.mktemp("index"))
    depot.put(OLD)

    ran, turned = run_paused(depot, lambda one: one.run("index"), seed, 3, longest=150)
    assert ran.code == 0, (ran.stderr, turned.turned)
    assert locks_in(depot) == []
    ran, turned = run_paused(depot, lambda one: one.run("status", "--json"), seed, 5)
    assert (ran.code, ran.summary["chunks"]["objects"]) == (0, len(OLD)), (ran.stderr, turned.turned)


@few
@given(seed=st.integers(0, 2**32))
def test_an_export_waits_pauses_out(hub, new_bucket, tmp_path_factory, seed):
    rig = ExportRig.on(hub, tmp_path_factory.mktemp("export"), new_bucket(), new_bucket())
    rig.us.put(OLD)

    ran, turned = run_paused(rig, lambda one: one.export("--local"), seed, 6)

    assert ran.code == 0, (ran.stderr, turned.turned)
    assert rig.eu.left() == rig.eu.paths_of(OLD)


@few
@given(seed=st.integers(0, 2**32))
def test_a_plan_of_a_warm_up_waits_pauses_out(hub, new_bucket, tmp_path_factory, seed):
    directory = tmp_path_factory.mktemp("warm")
    depot = Depot(hub, new_bucket(), directory)
    depot.put(OLD)
    document = json.loads(depot.config.read_text())
    document["remote_storage_plugins"].insert(0, "fs.warm")
    document["extra_config"] |= {
        "save_chunk_meta": False,
        "remote_storage_plugin.fs.warm.base_path": str(directory / "tier"),
    }
    config = directory / "warm.json"
    config.write_text(json.dumps(document))
    command = ["plan", "--lmcache-config", str(config), "--all", "--tier", "fs.warm", "--instance", INSTANCE]

    ran, turned = run_paused(
        depot, lambda _: CliRunner().invoke(warmer, [*command, "--out", str(directory / "plan.jsonl")]), seed, 6
    )

    assert ran.exit_code == 0, (ran.output, turned.turned)
    assert (directory / "plan.jsonl").read_text().count("xet_hash") >= len(OLD)


@pytest.mark.parametrize("command", ["cleanup", "index", "export"])
def test_a_pause_that_does_not_end_ends_the_command_at_its_time(hub, new_bucket, tmp_path, command):
    rig = ExportRig.on(hub, tmp_path, new_bucket(), new_bucket())
    rig.us.put(OLD)
    arguments = {"cleanup": ["--max-age", "14d", "--yes", "--local"], "index": [], "export": []}[command]

    def make(one):
        if command == "export":
            return one.export("--local", "--max-duration", "20min")
        return one.us.run(command, *arguments, "--max-duration", "20min")

    ran, turned = run_paused(rig, make, 0, 10**6, share=0.9)

    assert ran.code in (3, 4), ran.stderr
    assert turned.turned <= 20 * 60 + 120, "a request's own time beyond it, at most"
    assert rig.us.left() == rig.us.paths_of(OLD)


@pytest.mark.parametrize("command", ["cleanup", "export"])
def test_a_call_that_the_commands_time_cut_short_says_so(hub, new_bucket, tmp_path, command):
    rig = ExportRig.on(hub, tmp_path, new_bucket(), new_bucket())
    rig.us.put(OLD)
    fault = hub.control.add_fault(Fault(route="tree", path=rig.us.bucket_id, hang=True))

    if command == "export":
        ran = rig.export("--local", "--dry-run", "--max-duration", "1s")
    else:
        ran = rig.us.cleanup("--max-age", "14d", "--max-duration", "1s")
    hub.control.clear_fault(fault)

    assert (ran.code in (3, 4), "--max-duration was over" in ran.stderr) == (True, True), ran.stderr


def test_one_time_is_for_all_instances(hub, new_bucket, tmp_path):
    depot = Depot(hub, new_bucket(), tmp_path, others={"hfbucket.eu": "kv/eu", "hfbucket.ap": "kv/ap"})
    depot.put(OLD, age=20 * DAY)

    ran, turned = run_paused(
        depot,
        lambda one: one.cleanup("--max-age", "14d", "--all-instances", "--max-duration", "10min"),
        0,
        10**6,
        share=0.9,
    )

    assert ran.code in (3, 4), ran.stderr
    assert turned.turned <= 10 * 60 + 120


def test_a_lock_is_released_by_its_names_where_listings_are_refused(hub, bucket):
    with opened(hub.endpoint, bucket, "kv") as bucket_client:
        lock = BucketLock(bucket_client, "cleanup", request_secs=30.0)
        with lock.held():
            assert len(list(bucket_client.list_objects("kv/.hfbucket/locks/", 30))) == 1
            hub.control.add_fault(Fault(route="tree", status=429, headers={"Retry-After": "300"}))
            with pytest.raises(ThrottledError):
                lock.confirm()
        hub.control.clear_faults()
    with opened(hub.endpoint, bucket, "kv") as bucket_client:
        assert list(bucket_client.list_objects("kv/.hfbucket/locks/", 30)) == []


def test_a_lock_that_ends_in_a_pause_while_nothing_is_changed_is_made_again(hub, bucket):
    with opened(hub.endpoint, bucket, "kv") as bucket_client, opened(hub.endpoint, bucket, "kv") as other:
        clock = Clock()
        lock = BucketLock(bucket_client, "cleanup", clock=ServerClock(clock))
        with lock.held():
            first = {info.path for info in bucket_client.list_objects("kv/.hfbucket/locks/", 30)}
            clock.now += 560
            lock.keep_planning()
            second = {info.path for info in bucket_client.list_objects("kv/.hfbucket/locks/", 30)}
            assert (len(second), first & second) == (1, set())
        with BucketLock(other, "rm").held():
            clock.now += 560
            with pytest.raises(LockLostError):
                lock.keep_planning()


def test_what_is_done_after_the_end_has_a_little_time_of_its_own():
    with patience(Deadline.after(0)):
        assert Deadline.patient(5).remaining() > 1
    with patience(Deadline.after(1)):
        assert Deadline.patient(100).remaining() <= 1
    assert Deadline.patient(100).remaining() > 90
