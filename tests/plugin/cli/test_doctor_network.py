"""`doctor` and what a network does: no bucket, no Hub, no answer, another time."""

import json
import threading
import time
from email.utils import formatdate

import pytest

from hfbucket_plugin.hub.bucket import Bucket
from hfbucket_plugin.hub.transfer import Transfer
from localhub.faults import Fault
from tests.support.buckets import HEAD, NEEDS_HUB, PATIENT, Desk, key, noise, well_kept
from tests.support.hubs import Recorder
from tests.support.waiting import unused_port


@pytest.fixture(autouse=True)
def _well_kept(monkeypatch):
    well_kept(monkeypatch)


@pytest.fixture
def desk(hub, new_bucket, tmp_path):
    """An instance with nothing to fix: a private bucket with chunks in it."""
    desk = Desk(hub.endpoint, new_bucket(private=True, region="eu"), tmp_path)
    desk.put({key(number): noise(50_000, number) for number in range(3)})
    return desk


# --- the way to the Hub ----------------------------------------------------------------------------------------------


def test_a_bucket_that_is_not_there(hub, tmp_path):
    ran = Desk(hub.endpoint, "tests/nowhere", tmp_path).doctor()

    assert ran.code == 3
    assert ran.findings["bucket"]["severity"] == "error"
    assert "the bucket does not exist" in ran.reported("bucket")
    assert ran.skipped == {"right to read", "right to write", "listing", "throughput", "records", "fingerprint"}


def test_a_bucket_that_the_first_put_creates(hub, tmp_path):
    desk = Desk(hub.endpoint, "tests/nowhere", tmp_path, {"create_bucket_if_missing": True})
    ran = desk.doctor("--probe-write")

    assert ran.code == 1
    assert "the first put creates it" in ran.reported("bucket")
    assert "probe" in ran.skipped


def test_a_hub_that_cannot_be_reached(tmp_path):
    endpoint = f"http://127.0.0.1:{unused_port()}"
    ran = Desk(endpoint, "org/bucket", tmp_path).doctor()

    assert ran.code == 3
    reported = ran.reported("endpoint")
    assert reported.startswith(f"error: {endpoint} does not answer: info: the Hub at {endpoint} cannot be reached")
    assert reported.endswith(f"; look at the network, and at {HEAD}endpoint or HF_ENDPOINT")
    assert ran.skipped == set(NEEDS_HUB) - {"endpoint"}
    assert ran.findings["temp dir"]["severity"] == "ok"


def test_a_server_that_is_no_hub(tmp_path):
    with Recorder() as server:
        ran = Desk(server.endpoint, "org/bucket", tmp_path).doctor()

    assert ran.code == 3
    assert "the Hub's answer is not a record" in ran.reported("bucket")


def test_a_hub_that_hangs(hub, desk):
    hub.control.add_fault(Fault(hang=True))
    ran = desk.doctor("--timeout", "0.3")

    assert ran.code == 3
    assert f"{desk.endpoint} does not answer: info: no answer within 0.3 s" in ran.reported("endpoint")
    assert ran.skipped == set(NEEDS_HUB) - {"endpoint"}


def test_a_hub_that_answers_and_then_hangs(hub, desk, monkeypatch):
    greet = Bucket.greet

    def once(self, deadline):
        answer = greet(self, deadline)
        hub.control.add_fault(Fault(route="bucket-info", hang=True, times=1))
        return answer

    monkeypatch.setattr(Bucket, "greet", once)
    ran = desk.doctor("--timeout", PATIENT)

    assert ran.findings["endpoint"]["severity"] == "warning"
    assert "answered 1 time, and then: " in ran.reported("endpoint")
    assert ran.findings["throughput"]["severity"] == "ok"


@pytest.mark.parametrize(
    ("route", "check", "also_skipped"),
    [
        ("xet-read-token", "right to read", {"throughput"}),
        ("xet-write-token", "right to write", set()),
        ("tree", "listing", {"throughput"}),
        ("reconstruction", "throughput", set()),
        ("xorb-data", "throughput", set()),
    ],
)
def test_what_hangs_ends_one_check_and_not_the_others(hub, desk, route, check, also_skipped):
    hub.control.add_fault(Fault(route=route, hang=True))
    ran = desk.doctor("--timeout", PATIENT)

    assert ran.code == 3
    assert ran.findings[check]["severity"] == "error"
    assert any(words in ran.reported(check) for words in (f"{PATIENT} s", "Network error"))  # hf_xet has timeouts too
    assert ran.skipped == also_skipped
    bad = {name for name, severity in ran.severities().items() if severity == "error"}
    assert bad <= {check, "records", "fingerprint"}  # these are listings too


def test_what_no_client_timeout_bounds_is_abandoned(desk, monkeypatch):
    for_ever = threading.Event()
    monkeypatch.setattr(Transfer, "warm_up", lambda *_: for_ever.wait())  # such as a name that is being resolved
    ran = desk.doctor("--timeout", PATIENT)
    for_ever.set()

    assert f"no answer within {PATIENT} s; the call was abandoned" in ran.reported("throughput")


def test_a_quota_that_is_used_up_is_a_warning(hub, desk):
    hub.control.add_fault(Fault(route="tree", status=429, headers={"Retry-After": "60"}))
    ran = desk.doctor()

    assert ran.code == 1
    assert "429" in ran.reported("listing")
    assert "wait 60 s" in ran.reported("listing")
    assert f"{HEAD}max_hub_calls_per_minute" in ran.reported("listing")


def test_a_mistake_in_a_check_does_not_hide_the_others(desk, monkeypatch):
    monkeypatch.setattr(Bucket, "check_right", lambda *_: 1 / 0)
    ran = desk.doctor()

    assert ran.code == 3
    assert "ZeroDivisionError" in ran.reported("right to read")
    assert ran.findings["listing"]["severity"] == "ok"


# --- the clock -------------------------------------------------------------------------------------------------------


def tell_time(hub, desk, moment):
    record = {"id": desk.bucket_id, "private": True, "size": 150_000, "totalFiles": 3}
    headers = {"Date": formatdate(moment, usegmt=True), "Content-Type": "application/json"}
    hub.control.add_fault(Fault(route="bucket-info", status=200, headers=headers, body=json.dumps(record)))


@pytest.mark.parametrize(("ahead", "words"), [(-300, "behind"), (300, "ahead of")])
def test_a_clock_that_is_wrong(hub, desk, ahead, words):
    tell_time(hub, desk, time.time() - ahead)
    ran = desk.doctor()

    assert ran.code == 1
    assert ran.findings["clock"]["severity"] == "warning"
    assert f"s {words} the Hub's" in ran.reported("clock")
    assert "NTP" in ran.reported("clock")


def test_a_clock_that_is_right(hub, desk):
    tell_time(hub, desk, time.time())
    ran = desk.doctor()

    assert ran.code == 0
    assert ran.findings["clock"]["severity"] == "ok"
