"""`doctor --probe-write`: whatever fails, nothing is left behind, or its path is told."""

import os
import signal

import pytest

from hfbucket_plugin.cli.checks import probe_write
from hfbucket_plugin.errors import AccessDeniedError, ItemFailure, TransportError
from hfbucket_plugin.hub.bucket import Bucket
from hfbucket_plugin.tools.signals import EndingSignals
from localhub.faults import Fault
from tests.support.buckets import HEAD, PATIENT, PREFIX, Desk, paths, well_kept

PLACE = f"{PREFIX}/.hfbucket/probe/"


@pytest.fixture(autouse=True)
def _well_kept(monkeypatch):
    well_kept(monkeypatch)


@pytest.fixture
def desk(hub, new_bucket, tmp_path):
    desk = Desk(hub.endpoint, new_bucket(private=True), tmp_path)
    desk.put_objects({"bystander": b"x"})
    return desk


def left(desk):
    everything = paths(desk.endpoint, desk.bucket_id)
    assert f"{PREFIX}/bystander" in everything
    return [path for path in everything if path != f"{PREFIX}/bystander"]


@pytest.fixture
def stored(monkeypatch):
    """The paths that were named in the bucket."""
    named = []
    add = Bucket.add

    def noted(self, files, deadline):
        named.extend(files)
        return add(self, files, deadline)

    monkeypatch.setattr(Bucket, "add", noted)
    return named


def test_it_stores_reads_back_compares_and_deletes(desk, stored):
    ran = desk.doctor("--probe-write")

    assert ran.code == 0
    assert ran.findings["probe"]["severity"] == "ok"
    assert "64.0 KiB stored, read back, compared and deleted" in ran.reported("probe")
    (path,) = stored
    assert path.startswith(PLACE)
    assert left(desk) == []


def test_two_probes_do_not_meet(desk, stored):
    desk.doctor("--probe-write")
    desk.doctor("--probe-write")

    assert len(set(stored)) == 2


def test_a_role_that_stores_nothing_refuses(desk, stored):
    desk.settings["role"] = "read-only"
    ran = desk.doctor("--probe-write")

    assert ran.code == 1
    assert "refused: role is read-only" in ran.reported("probe")
    assert f"{HEAD}role" in ran.reported("probe")
    assert stored == []


def test_without_the_right_to_read_it_is_not_read_back(desk, hub):
    desk.settings["role"] = "write-only"
    hub.control.add_fault(Fault(route="xet-read-token", status=403))
    ran = desk.doctor("--probe-write")

    assert ran.code == 0
    assert "stored and deleted, not read back" in ran.reported("probe")
    assert left(desk) == []


@pytest.mark.parametrize(
    ("fault", "step"),
    [
        (Fault(route="xorb-upload", status=500), "upload"),
        (Fault(route="xorb-upload", reset=True), "upload"),
        (Fault(route="shard-upload", hang=True), "upload"),
        (Fault(route="batch", items="/probe/", items_error="no room", times=1), "naming it in the bucket"),
        (Fault(route="batch", status=403, times=1), "naming it in the bucket"),
        (Fault(route="batch", hang=True, times=1), "naming it in the bucket"),
        (Fault(route="batch", truncate_at=0, times=2), "naming it in the bucket"),
        (Fault(route="paths-info", status=500), "reading it back"),
        (Fault(route="paths-info", hang=True), "reading it back"),
        (Fault(route="paths-info", status=200, body="[]"), "reading it back"),
        (Fault(route="reconstruction", hang=True), "reading it back"),
        (Fault(route="xorb-data", status=404), "reading it back"),
        (Fault(route="xorb-data", flip_at=(5000,)), "reading it back"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.route}-{'-'.join(sorted(value.model_fields_set))}",
)
def test_nothing_is_left_whatever_fails(desk, hub, fault, step):
    hub.control.add_fault(fault)
    ran = desk.doctor("--probe-write", "--timeout", PATIENT)
    hub.control.clear_faults()

    assert ran.code == 3
    assert ran.findings["probe"]["severity"] == "error"
    assert ran.findings["probe"]["found"].startswith(f"{step} failed: ")
    assert left(desk) == []


def test_an_answer_that_was_lost_is_told(desk, hub):
    hub.control.add_fault(Fault(route="batch", truncate_at=0, times=2))
    ran = desk.doctor("--probe-write")

    assert "should " in ran.reported("probe")
    assert PLACE in ran.findings["probe"]["mend"]


def failing_deletes(monkeypatch, error, times):
    """Let so many deletes fail before the request is made."""
    delete = Bucket.delete
    calls = []

    def flaky(self, asked, deadline):
        calls.append(asked)
        if len(calls) <= times:
            if isinstance(error, Exception):
                raise error
            return {path: ItemFailure(path, "hub", error) for path in asked}
        return delete(self, asked, deadline)

    monkeypatch.setattr(Bucket, "delete", flaky)
    return calls


def test_a_delete_is_tried_again(desk, monkeypatch):
    failing_deletes(monkeypatch, TransportError("lost"), 2)
    ran = desk.doctor("--probe-write")

    assert ran.code == 0
    assert left(desk) == []


@pytest.mark.parametrize(
    ("error", "calls"),
    [(TransportError("lost"), 3), (AccessDeniedError("you may not", 403), 1), ("it is locked", 1)],
)
def test_what_cannot_be_deleted_is_named(desk, monkeypatch, stored, error, calls):
    made = failing_deletes(monkeypatch, error, 99)
    ran = desk.doctor("--probe-write")

    (path,) = left(desk)
    assert stored == [path]
    assert ran.code == 3
    assert ran.findings["probe"]["mend"] == f"delete {path} yourself"
    assert "it could not be deleted: " in ran.reported("probe")
    assert len(made) == calls


# --- told to end meanwhile ---------------------------------------------------------------------------------------------


@pytest.fixture
def obeyed():
    """Signals as in a terminal: what runs in the background or under nohup is born deaf to two of them."""
    before = {
        number: signal.signal(number, handler)
        for number, handler in (
            (signal.SIGINT, signal.default_int_handler),
            (signal.SIGTERM, signal.SIG_DFL),
            (signal.SIGHUP, signal.SIG_DFL),
        )
    }
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("obeyed")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_and_nothing_is_left(desk, monkeypatch, stored, number):
    monkeypatch.setattr(probe_write._Probe, "compare", lambda _: os.kill(os.getpid(), number))
    before = signal.getsignal(number)
    ran = desk.doctor("--probe-write")

    assert ran.code == 128 + number
    assert len(stored) == 1
    assert left(desk) == []
    assert signal.getsignal(number) is before


def test_a_signal_while_it_gets_its_name_is_heard_afterwards(desk, monkeypatch):
    add = Bucket.add

    def told_to_end(self, files, deadline):
        os.kill(os.getpid(), signal.SIGTERM)
        return add(self, files, deadline)

    monkeypatch.setattr(Bucket, "add", told_to_end)
    ran = desk.doctor("--probe-write")

    assert ran.code == 128 + signal.SIGTERM
    assert left(desk) == []


def test_a_signal_does_not_end_the_cleaning_up(desk, monkeypatch):
    delete = Bucket.delete

    def told_to_end(self, asked, deadline):
        os.kill(os.getpid(), signal.SIGTERM)
        return delete(self, asked, deadline)

    monkeypatch.setattr(Bucket, "delete", told_to_end)
    ran = desk.doctor("--probe-write")

    assert ran.code == 128 + signal.SIGTERM
    assert left(desk) == []


def test_a_signal_and_a_delete_that_fails_name_what_is_left(desk, monkeypatch):
    monkeypatch.setattr(probe_write._Probe, "compare", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    failing_deletes(monkeypatch, AccessDeniedError("you may not", 403), 99)
    ran = desk.doctor("--probe-write")

    (path,) = left(desk)
    assert f"hfbucket: {path} is left in the bucket: you may not" in ran.stderr


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with EndingSignals():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_signals_are_as_before_when_nothing_comes():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    with EndingSignals() as signals, signals.held():
        assert signal.getsignal(signal.SIGTERM) != before[signal.SIGTERM]

    assert {number: signal.getsignal(number) for number in before} == before
