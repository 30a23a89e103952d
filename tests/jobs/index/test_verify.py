"""`python -m jobs index --verify`: what differs is found, and what is only young is not taken for it."""

import mmap
import os
import time

import pytest

from hfbucket_plugin.core.deadline import Deadline
from jobs.index import job
from jobs.index.verify import Verification
from tests.support.buckets import DAY, PREFIX, key, upload
from tests.support.indexes import Writer, bucket_client, build_job, forge, unsorted

KEYS = [key(number) for number in range(8)]
IN_NO_TIME = {"index_refresh_secs": 0.01, "index_journal_secs": 0.01}


@pytest.fixture
def stocked(depot):
    depot.put(KEYS)
    depot.settings |= IN_NO_TIME
    build_job(depot)
    return depot


def verify(depot, code=0):
    before = depot.all_paths()
    depot.hub.control.reset_counters()
    ran = depot.run("index", "--verify")
    assert ran.code == code, ran.stderr
    assert depot.all_paths() == before
    assert depot.hub.control.counters().route("batch").requests == 0
    return ran


def test_an_index_that_is_right_has_no_differences(stocked):
    writer = Writer(stocked)
    writer.put(key(20))
    writer.delete(key(0))
    writer.tell()

    found = verify(stocked).summary["differences"]

    assert found == {
        "keys": 8, "listed": 8, "missing": 0, "surplus": 0, "different": 0, "young": 0, "meanwhile": 0, "examples": {},
    }  # fmt: skip


def test_planted_differences_are_counted_and_named(stocked):
    stocked.put([key(30), key(31)], age=2 * DAY)
    upload(stocked.hub.endpoint, stocked.bucket_id, {stocked.path(key(1)): b"something else"})
    with bucket_client(stocked) as (bucket, _):
        bucket.delete([stocked.path(key(2))], Deadline.after(30))

    ran = verify(stocked, code=3)

    found = ran.summary["differences"]
    assert (found["missing"], found["surplus"], found["different"], found["meanwhile"]) == (2, 1, 1, 0)
    assert set(found["examples"]["missing"]) == {stocked.path(key(30)), stocked.path(key(31))}
    assert found["examples"]["different"] == [stocked.path(key(1))]
    assert found["examples"]["surplus"][0].startswith("digest ")
    assert f"missing: {PREFIX}/" in ran.stderr


def test_what_is_younger_than_readers_need_to_know_is_none(stocked):
    stocked.settings |= {"index_refresh_secs": 60.0}
    stocked.put([key(40)], age=0)

    found = verify(stocked).summary["differences"]

    assert (found["missing"], found["young"]) == (0, 1)


def test_what_is_told_while_it_goes_on_is_none(stocked):
    writer = Writer(stocked)
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        if seconds:
            writer.tell()  # of what happened since the view was made

    with bucket_client(stocked) as (bucket, store):
        verification = Verification(
            bucket,
            store,
            stocked.directory / "scratch",
            page_secs=30.0,
            request_secs=30.0,
            window_secs=0.0,
            tell_secs=0.5,
            sleep=sleep,
        )
        (stocked.directory / "scratch").mkdir()
        real = verification._view

        def view():
            made = real()
            writer.delete(key(3))
            writer.put(key(4), data=b"again")
            return made

        verification._view = view
        found = verification.run()

    assert slept == [0.0, 0.5]
    assert (found.total, found.meanwhile) == (0, 2)


def test_without_an_index_nothing_can_be_compared(depot):
    depot.put(KEYS)

    assert "its index has no snapshot yet" in verify(depot, code=3).stderr


def test_it_goes_with_nothing_that_writes(depot):
    ran = depot.run("index", "--verify", "--full")

    assert ran.code == 2
    assert "--verify only compares" in ran.stderr


def test_the_metrics_tell_of_builds_and_differences(stocked):
    path = stocked.directory / "metrics.prom"
    build_job(stocked, "--metrics-textfile", str(path))
    text = path.read_text()
    assert 'hfbucket_jobs_objects{instance="hfbucket.us",job_name="index"} 8.0' in text
    covers = next(
        line for line in text.splitlines() if line.startswith("hfbucket_jobs_index_covers_timestamp_seconds{")
    )
    assert abs(float(covers.split()[-1]) - time.time()) < 3600

    stocked.put([key(50)], age=DAY)
    assert stocked.run("index", "--verify", "--metrics-textfile", str(path)).code == 3
    assert 'hfbucket_jobs_index_differences{instance="hfbucket.us",job_name="index"} 1.0' in path.read_text()


def test_a_snapshot_that_engines_refuse_is_refused_here_too_and_healed_by_the_next_build(stocked):
    forge(stocked.hub.endpoint, stocked.bucket_id, unsorted, stocked.prefix)
    ran = verify(stocked, code=3)
    assert "not in the order of their digests" in ran.stderr

    assert build_job(stocked).summary["made_of"] == "listing"
    assert verify(stocked).summary["differences"]["examples"] == {}


def test_a_pointer_of_the_future_is_refused_here_too(stocked):
    forge(stocked.hub.endpoint, stocked.bucket_id, lambda rows: rows, stocked.prefix, covers=time.time() + 1e6)
    assert "its covers (" in verify(stocked, code=3).stderr


@pytest.mark.parametrize("keys", [8, 2**40])
def test_the_size_of_a_pointer_is_believed_by_nobody_before_the_hub_has_confirmed_it(stocked, monkeypatch, keys):
    forge(stocked.hub.endpoint, stocked.bucket_id, lambda rows: rows, stocked.prefix, size=2**41, keys=keys)
    truncated = []
    real = mmap.mmap

    def mapped(descriptor, length, *args, **more):
        truncated.append(os.fstat(descriptor).st_size)
        return real(descriptor, length, *args, **more)

    monkeypatch.setattr(mmap, "mmap", mapped)
    verify(stocked, code=3)
    assert build_job(stocked, "--full").summary["made_of"] == "listing"
    verify(stocked)
    assert max(truncated, default=0) < 2**20


def test_in_a_large_fleet_it_waits_for_as_long_as_writers_need_to_tell(stocked, monkeypatch):
    asked = {}
    real = job.Verification

    def watched(*args, **more):
        asked.update(more)
        return real(*args, **more)

    monkeypatch.setattr(job, "Verification", watched)
    monkeypatch.setattr(job, "writers_of", lambda _listing: 1000)
    verify(stocked)
    assert (asked["tell_secs"], asked["window_secs"]) == (1.5 * 300, 2 * 300 + 300)
