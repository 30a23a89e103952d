"""The lock in the bucket, between real processes on a real local Hub."""

import contextlib
import logging
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfbucket_plugin.errors import RefusedError, TransportError
from jobs.lock.claims import claims_in
from jobs.lock.clock import ServerClock
from jobs.lock.lock import BucketLock, LockHeldError, LockLostError
from localhub.faults import Fault
from tests.support.buckets import opened, paths, upload
from tests.support.models import untimed
from tests.support.waiting import Clock, eventually


class Contender:
    """`lock_holder.py` in a process of its own."""

    def __init__(self, hub, bucket, what_for="cleanup", seconds=600):
        command = [sys.executable, "-m", "tests.jobs.lock.lock_holder", hub.endpoint, bucket, what_for, str(seconds)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )

    def says(self):
        return self._process.stdout.readline().strip()

    def go_on(self):
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    @property
    def pid(self):
        return self._process.pid

    def kill(self):
        self._process.kill()
        self._process.wait()

    def end(self):
        self._process.communicate("\n" if self._process.poll() is None else None, timeout=60)


@pytest.fixture
def contender(hub, bucket):
    with contextlib.ExitStack() as stack:

        def make(**options):
            made = Contender(hub, bucket, **options)
            stack.callback(made.kill)
            return made

        yield make


def test_of_several_at_once_one_works_and_the_others_name_it(hub, bucket, contender):
    contenders = [contender(what_for=f"job {number}") for number in range(3)]
    first = [one.says() for one in contenders]
    for one, said in zip(contenders, first, strict=True):
        if said == "held":
            one.go_on()
    last = [one.says() if said == "held" else said for one, said in zip(contenders, first, strict=True)]

    assert last.count("confirmed") == 1, last
    winner = contenders[last.index("confirmed")]
    for said in last:
        assert said == "confirmed" or f"job {last.index('confirmed')} on" in said, last
        assert said == "confirmed" or f"pid {winner.pid}" in said
    for one in contenders:
        one.end()
    assert paths(hub.endpoint, bucket) == []


def test_a_killed_holder_keeps_others_out_until_its_claim_is_stale(hub, bucket, contender, caplog):
    holder = contender(seconds=2)
    assert holder.says() == "held"
    holder.kill()
    refused = []

    def taken_over():
        try:
            with BucketLock(one, "next").held() as lock:
                return lock.confirm() > 0
        except LockHeldError as error:
            refused.append(str(error))
            return False

    with opened(hub.endpoint, bucket, "kv") as one, caplog.at_level(logging.WARNING, "jobs.lock.lock"):
        assert eventually(taken_over)

    assert all(f"pid {holder.pid}" in reported for reported in refused)
    assert f"pid {holder.pid}, last renewed" in caplog.text
    assert "stale and passed over" in caplog.text
    assert paths(hub.endpoint, bucket) == []


def test_a_holder_that_slept_too_long_finds_its_lock_gone(hub, bucket):
    with opened(hub.endpoint, bucket, "kv") as one:
        sleeper = BucketLock(one, "sleeper", seconds=1)
        with pytest.raises(LockLostError, match="nothing more is deleted"), sleeper.held():  # noqa: PT012 - one story
            eventually(lambda: taken(BucketLock(one, "other")))
            sleeper.confirm()


def taken(lock):
    try:
        with lock.held():
            return True
    except LockHeldError:
        return False


def test_a_holder_stops_by_the_hubs_clock_even_when_its_own_stood_still(hub, bucket):
    clock = Clock()
    with opened(hub.endpoint, bucket, "kv") as one:
        lock = BucketLock(one, "frozen", seconds=600, clock=ServerClock(clock))
        with lock.held():
            assert 0 < lock.confirm() <= 540
            clock.now += 541
            with pytest.raises(LockLostError, match="not renewed in time"):
                lock.confirm()


def test_a_holder_renews_and_keeps_its_place(hub, bucket):
    clock = Clock()
    with opened(hub.endpoint, bucket, "kv") as one:
        lock = BucketLock(one, "long", seconds=600, clock=ServerClock(clock))
        with lock.held():
            before = paths(hub.endpoint, bucket)
            # Only our clock runs ahead, not the Hub's: that the renewal counts shows in the objects.
            clock.now += 300
            lock.confirm()
            after = paths(hub.endpoint, bucket)
            assert set(before) < set(after)
            assert any(path.endswith("@1") for path in after)
            clock.now += 1
            lock.confirm()
            assert len(paths(hub.endpoint, bucket)) == 2
    assert paths(hub.endpoint, bucket) == []


def test_without_an_answer_nothing_is_confirmed(hub, bucket):
    with opened(hub.endpoint, bucket, "kv") as one:
        lock = BucketLock(one, "cut off", request_secs=1)
        with lock.held():
            hub.control.add_fault(Fault(route="tree", status=503))
            with pytest.raises(TransportError):
                lock.confirm()
            hub.control.clear_faults()
            assert lock.confirm() > 0


def test_a_claim_that_nobody_confirmed_is_taken_back(hub, bucket):
    with opened(hub.endpoint, bucket, "kv") as one:
        hub.control.add_fault(Fault(route="tree", status=503, times=5))
        with pytest.raises(TransportError), BucketLock(one, "cut off").held():
            pass
    assert paths(hub.endpoint, bucket) == []


def test_what_is_no_lock_among_the_locks_refuses(hub, bucket):
    upload(hub.endpoint, bucket, {"kv/.hfbucket/locks/of-another-kind": b"x"})
    with opened(hub.endpoint, bucket, "kv") as one:
        with pytest.raises(RefusedError, match="of-another-kind"), BucketLock(one, "new").held():
            pass
        assert paths(hub.endpoint, bucket) == ["kv/.hfbucket/locks/of-another-kind"]
        with pytest.raises(RefusedError, match="of-another-kind"):
            claims_in(one.list_objects("kv/.hfbucket/", 10))


@untimed
@given(
    st.floats(-1e5, 1e5),
    st.lists(st.tuples(st.floats(0, 10), st.floats(0, 10), st.floats(0, 10), st.booleans()), min_size=1, max_size=10),
)
def test_the_hubs_clock_is_within_its_bounds(offset, answers):
    """Whatever the way there and back takes, and however much older than that an object is that was seen."""
    clock = Clock()
    hubs = ServerClock(clock)
    base = datetime(2030, 1, 1, tzinfo=UTC) + timedelta(seconds=offset)

    def time_there():
        return base + timedelta(seconds=clock.now)

    for there, back, later, stamped in [(1.0, 1.0, 0.0, True), *answers]:
        sent = clock.now
        clock.now += there
        moment = time_there()
        clock.now += back
        if stamped:
            hubs.stamped(moment, sent, clock.now)
        else:
            hubs.saw(moment)
        clock.now += later
        slack = timedelta(milliseconds=1)
        assert hubs.earliest() - slack <= time_there() <= hubs.latest() + slack
    assert hubs.known
