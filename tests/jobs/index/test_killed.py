"""Builders of an index that are killed, that lose their lock, or meet each other: some whole snapshot is always in use."""

import signal

import pytest

from hfbucket_plugin.core.deadline import Deadline
from hfbucket_plugin.hub.client import HubClient
from hfbucket_plugin.index import build as index_build
from hfbucket_plugin.index.store import JOURNALS, SNAPSHOTS
from jobs.lock.claims import INDEXING
from jobs.lock.lock import BucketLock
from localhub.faults import Fault
from tests.support.buckets import PREFIX, ended, key
from tests.support.indexes import Writer, bucket_client, build_job, listed, objects, of_index, pointer, seen, strangers
from tests.support.waiting import eventually

KEYS = [key(number) for number in range(6)]
LOCKS = f"{PREFIX}/{INDEXING.directory}/"


class KilledError(BaseException):
    """As if the process had been killed: nothing that runs on reaches the Hub any more."""


@pytest.fixture
def stocked(depot):
    depot.put(KEYS)
    depot.put_paths({"elsewhere/of-somebody-else": b"x", f"{PREFIX}/nested/object": b"z"})
    return depot


@pytest.fixture
def killed_at(monkeypatch):
    """Makes every call to the Hub fail from the n-th on; None for never. Says how many there were."""
    real, calls, last = HubClient.request, [0], [None]

    def request(self, *arguments, **more):
        calls[0] += 1
        if last[0] is not None and calls[0] > last[0]:
            raise KilledError
        return real(self, *arguments, **more)

    def order(number):
        calls[0], last[0] = 0, number
        return calls

    monkeypatch.setattr(HubClient, "request", request)
    return order


def take_locks_away(depot):
    locks = [path for path in depot.all_paths() if path.startswith(LOCKS)]
    if locks:
        with bucket_client(depot) as (bucket, _):
            bucket.delete(locks, Deadline.after(30))
    return locks


# The first calls are the same ones: the lock, and what there is.
@pytest.mark.parametrize("how", [([], 0, 1), (["--full"], 6, 2)], ids=["journals", "listing"])
def test_a_builder_that_is_killed_at_any_call_leaves_an_index_that_is_right(stocked, killed_at, monkeypatch, how):
    more, first, step = how
    monkeypatch.setattr("hfbucket_plugin.index.build.CLOCK_MARGIN_SECS", 0.0)
    options = [*more, "--keep", "1", "--grace", "0s"]
    build_job(stocked)
    writer = Writer(stocked)
    keys = [*KEYS, *(key(100 + number) for number in range(60))]
    for number in range(first, 60, step):
        writer.put(key(100 + number))
        writer.delete(key(100 + number - step) if number > first else KEYS[0])
        writer.tell()
        before = strangers(stocked)
        calls = killed_at(number)
        try:
            ran = stocked.run("index", *options)
        except KilledError:
            ran = None
        finally:
            made = calls[0]
            killed_at(None)
        assert seen(stocked, keys) == listed(stocked, keys), f"killed at call {number}"
        assert strangers(stocked) == before
        if ran is not None and ran.code == 0 and made <= number:
            break
        take_locks_away(stocked)
    else:
        pytest.fail("there was a call beyond the sixtieth")
    assert number > 10
    assert len(of_index(stocked, SNAPSHOTS)) == 1


def test_a_builder_that_is_killed_outright_keeps_others_out_for_a_while(stocked):
    build_job(stocked)
    first = pointer(stocked)
    stocked.put([key(70)], age=0)
    there = "|".join(content for content, _ in objects(stocked).values())
    stocked.hub.control.add_fault(Fault(path_regex=f"reconstructions/(?!{there})", hang=True))
    process = stocked.started("index", "--full", "--lock-lifetime", "4s")
    eventually(lambda: len(of_index(stocked, SNAPSHOTS)) == 2)  # it is uploaded, and about to be read back

    process.send_signal(signal.SIGKILL)
    assert ended(process).code == -signal.SIGKILL
    stocked.hub.control.clear_faults()

    assert pointer(stocked) == first
    assert set(seen(stocked, KEYS)) == set(KEYS)
    refused = []

    def built():
        ran = stocked.run("index", "--full")
        refused.extend([ran.stderr] * (ran.code == 4))
        return ran.code == 0

    eventually(built)
    assert all("index on " in reported and f"pid {process.pid}" in reported for reported in refused)
    assert key(70) in seen(stocked, [key(70)])
    assert not take_locks_away(stocked)


def test_one_that_is_told_to_stop_publishes_nothing_and_releases_the_lock(stocked):
    build_job(stocked)
    first = pointer(stocked)
    stocked.hub.control.add_fault(Fault(route="tree", path_regex=r"/tree/kv(%2F|/)us(%2F|/)$", hang=True))
    process = stocked.started("index", "--full")
    eventually(lambda: stocked.hub.control.counters().route("tree").requests and any(
        path.startswith(LOCKS) for path in stocked.all_paths()
    ))  # fmt: skip

    process.send_signal(signal.SIGTERM)
    ran = ended(process)
    stocked.hub.control.clear_faults()

    assert ran.code == 5, ran.stderr
    assert pointer(stocked) == first
    assert not take_locks_away(stocked)


def test_two_builders_do_not_work_at_one_time_and_a_cleanup_goes_by_them(stocked):
    stocked.put([key(n) for n in range(80, 90)], age=0)
    with bucket_client(stocked) as (bucket, _), BucketLock(bucket, "index", kind=INDEXING).held():
        ran = build_job(stocked, code=4)
        assert "is locked by index on" in ran.stderr
        assert stocked.cleanup("--max-age", "1d", "--max-delete", "90%", "--yes").code == 0
    with bucket_client(stocked) as (bucket, _), BucketLock(bucket, "cleanup").held():
        build_job(stocked)
    assert pointer(stocked).keys == 10


def test_a_builder_whose_lock_was_lost_publishes_nothing(stocked, monkeypatch):
    build_job(stocked)
    first = pointer(stocked)
    stocked.put([key(71)], age=0)
    real = index_build.put

    def put(*arguments):
        made = real(*arguments)
        assert take_locks_away(stocked)
        return made

    monkeypatch.setattr(index_build, "put", put)

    ran = build_job(stocked, "--full", code=4)

    assert "our lock was taken away: nothing more is published" in ran.stderr
    assert pointer(stocked) == first


def test_a_snapshot_that_cannot_be_read_back_is_not_pointed_to(stocked):
    build_job(stocked)
    first = pointer(stocked)
    stocked.put([key(72)], age=0)
    stocked.hub.control.add_fault(Fault(route="xorb-data", flip_every=50))

    ran = stocked.run("index", "--full", "--max-duration", "20s")
    stocked.hub.control.clear_faults()

    assert ran.code == 3, ran.stderr
    assert pointer(stocked) == first
    assert set(seen(stocked, KEYS)) == set(KEYS)


def test_a_snapshot_before_that_is_lost_is_replaced_by_one_of_a_listing(stocked):
    build_job(stocked)
    stocked.put([key(73)], age=0)
    with bucket_client(stocked) as (bucket, _):
        info = next(iter(bucket.list_objects(f"{PREFIX}/.hfbucket/index/snapshots/", 30)))
    stocked.hub.control.add_fault(Fault(path_regex=f"reconstructions/{info.content.xet_hash}", status=404))

    ran = eventually(lambda: (ran := stocked.run("index")).code == 0 and ran)  # hf_xet may not know why it got nothing

    assert ran.summary["made_of"] == "listing"
    assert "cannot be read" in ran.summary["why"]
    assert key(73) in seen(stocked, [key(73)])


def test_old_snapshots_and_covered_journals_go_and_nothing_else(stocked):
    build_job(stocked)
    (first,) = of_index(stocked, SNAPSHOTS)
    writer = Writer(stocked)
    snapshots = []
    for number in range(3):
        writer.put(key(200 + number))
        writer.tell()
        build_job(stocked)
        snapshots.append(pointer(stocked).snapshot)
    index = f"{PREFIX}/.hfbucket/index"
    own = [*of_index(stocked, SNAPSHOTS), *of_index(stocked, JOURNALS)]
    assert len(own) == 5  # none is older than the grace period
    strange = {
        f"{index}/snapshots/notes.txt": b"a",
        f"{index}/journal/of-another-kind.npy": b"b",
        f"{index}/more": b"c",
    }
    stocked.put_paths(strange, age=2 * 3600)
    for number, name in enumerate([f"{index}/snapshots/{one}" for one in snapshots]):
        stocked.make_older([name], (8 - number) * 3600)
    stocked.make_older(of_index(stocked, JOURNALS), 2 * 3600)
    stocked.make_older([first], 9 * 3600)
    other = Writer(stocked)
    other.put(key(210))
    fresh = other.tell()
    before = strangers(stocked)

    reported = build_job(stocked).summary

    assert (reported["deleted"]["objects"], reported["failed"]["objects"], reported["strange"]) == (4, 0, 2)
    left = {path.removeprefix(f"{index}/") for path in stocked.all_paths() if path.startswith(f"{index}/")}
    assert left == {
        "current.json",
        f"snapshots/{pointer(stocked).snapshot}",
        f"snapshots/{snapshots[-1]}",
        fresh.removeprefix(f"{index}/"),
        *(path.removeprefix(f"{index}/") for path in strange),
    }
    assert strangers(stocked) == before
    keys = [*KEYS, *(key(200 + number) for number in range(3)), key(210)]
    assert seen(stocked, keys) == listed(stocked, keys)


def test_what_cannot_be_deleted_is_left_and_told_and_the_index_is_published(stocked, monkeypatch):
    monkeypatch.setattr("jobs.batch.apply._BACKOFF_SECS", 0.01)
    build_job(stocked)
    (old,) = of_index(stocked, SNAPSHOTS)
    stocked.make_older([old], 2 * 3600)
    stocked.put([key(74)], age=0)
    stocked.hub.control.add_fault(Fault(route="batch", items=old))

    reported = build_job(stocked, "--full", "--keep", "1", code=3).summary

    assert (reported["published"], reported["failed"]["objects"]) == (True, 1)
    assert reported["failures"][0]["path"] == old
    assert key(74) in seen(stocked, [key(74)])


def test_nothing_is_pruned_when_somebody_else_has_published(stocked, monkeypatch):
    build_job(stocked)
    old = of_index(stocked, SNAPSHOTS)
    stocked.make_older(old, 2 * 3600)
    stocked.put([key(75)], age=0)
    monkeypatch.setattr("jobs.index.build.IndexBuilder.expect", lambda _self, to: to.content)

    ran = build_job(stocked, "--full", "--keep", "1", code=4)

    assert "was written by somebody else" in ran.stderr
    assert set(old) < set(of_index(stocked, SNAPSHOTS))
