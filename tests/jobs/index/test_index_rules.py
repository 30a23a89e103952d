"""What builds of the key index go by: when a listing is due, and what is no longer needed."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfbucket_plugin.core.deadline import Deadline
from hfbucket_plugin.core.keys import ContentId
from hfbucket_plugin.hub.bucket import ObjectInfo
from hfbucket_plugin.index.format import Pointer
from hfbucket_plugin.index.store import MAX_JOURNALS, Journal, JournalName
from jobs.index import inventory
from jobs.index.build import spare_journals, spare_snapshots, why_listing
from jobs.lock.claims import INDEXING
from jobs.lock.lock import BucketLock, LockLostError, LockRefresher
from tests.support.buckets import opened
from tests.support.indexes import bucket_client
from tests.support.waiting import eventually

NOW = datetime(2030, 1, 1, tzinfo=UTC)
T = NOW.timestamp()
HOUR = timedelta(hours=1)
WRITER = "0123456789abcdef"
CONTENT = ContentId("a" * 64, 10)


def pointer(covers=T - 60, full=T - 600):
    return Pointer("20300101T000000-00000000.npy", "a" * 64, 100, 1, covers, covers, full)


def snapshot(number, hours):
    return ObjectInfo(f"kv/{number:08d}T000000-00000000.npy", CONTENT, NOW - hours * HOUR)


def journal(number, at):
    name = JournalName.make(WRITER, number, NOW)
    return Journal(name, f"kv/{name.text}", CONTENT, at)


@pytest.mark.parametrize(
    ("there", "journals", "why"),
    [
        (pointer(), 3, ""),
        (None, 0, "there is no snapshot yet"),
        (pointer(full=T - 86400), 0, "the last listing is older than --full-every"),
        (pointer(full=T - 86399), MAX_JOURNALS, ""),
        (pointer(), MAX_JOURNALS + 1, "there are more than 20,000 journals"),
        (pointer(covers=T - 6 * 3600), 0, "the present snapshot is older than index_max_age_secs"),
        (pointer(covers=T + 3600), 0, "ahead of the Hub's clock"),
        (pointer(full=T + 3600), 0, "ahead of the Hub's clock"),
    ],
)
def test_when_a_listing_is_due(there, journals, why):
    reported = why_listing(there, T, 86400.0, journals, 6 * 3600.0)

    assert why in reported
    assert bool(reported) == bool(why)


@given(st.lists(st.tuples(st.integers(0, 9), st.floats(0, 5)), max_size=8), st.integers(1, 4), st.floats(0, 3))
def test_snapshots_that_go_are_old_and_beyond_those_that_stay(found, keep, grace):
    snapshots = list({number: snapshot(number, hours) for number, hours in found}.values())
    present = snapshots[0].path if snapshots else ""

    gone = dict(spare_snapshots(snapshots, present, NOW, keep, grace * HOUR))

    left = [one for one in snapshots if one not in gone]
    assert present not in {one.path for one in gone}
    assert all(NOW - at >= grace * HOUR and one.uploaded_at == at for one, at in gone.items())
    assert len(left) >= min(keep, len(snapshots))
    newest_gone = max((at for at in gone.values()), default=None)
    for one in left:
        if one.path != present and newest_gone is not None:
            assert one.uploaded_at >= newest_gone


def test_of_snapshots_only_those_go_that_are_called_as_ours_are():
    others = [ObjectInfo(f"kv/{name}", CONTENT, NOW - 9 * HOUR) for name in ("notes.txt", "20300101T000000-0.npy")]
    undated = ObjectInfo("kv/20300101T000000-00000000.npy", CONTENT, None)

    assert list(spare_snapshots([*others, undated], "", NOW, 1, HOUR)) == []


@given(st.lists(st.floats(-4 * 3600, 0), max_size=8), st.floats(-4 * 3600, 0), st.floats(0, 3))
def test_journals_that_go_are_covered_and_old(ages, covers, grace):
    journals = [journal(number, T + age) for number, age in enumerate(ages)]

    gone = list(spare_journals(journals, T + covers, NOW, grace * HOUR))

    old = (NOW - grace * HOUR).timestamp()
    assert gone == [one for one in journals if one.at < T + covers and one.at <= old]


def test_more_journals_than_are_read_are_counted_and_no_more(depot, monkeypatch):
    monkeypatch.setattr(inventory, "MAX_JOURNALS", 3)
    index = f"{depot.prefix}/.hfbucket/index"
    names = [JournalName.make(WRITER, number, NOW).text for number in range(5)]
    depot.put_paths({f"{index}/journal/{name}": b"x" for name in names})
    depot.put_paths({f"{index}/snapshots/20300101T000000-00000000.npy": b"y", f"{index}/zz": b"z"})

    with bucket_client(depot) as (bucket, store):
        found = inventory.look(bucket, store, 30.0, 30.0, lambda: None)

    assert (len(found.listing.journals), found.journals, found.more_journals) == (3, 5, 2)
    assert (len(found.listing.snapshots), found.strange) == (1, 1)


def test_a_refresher_renews_a_lock_until_it_is_lost(hub, bucket):
    """However long something takes, the lock is held; once it is taken away the refresher says so."""
    with opened(hub.endpoint, bucket, "kv") as one:
        lock = BucketLock(one, "slow", seconds=2, kind=INDEXING)
        with lock.held(), LockRefresher(lock, 2) as refresher:
            began = lock.stops
            eventually(lambda: lock.stops > began)
            refresher.check()
            claims = [info.path for info in one.list_objects(f"kv/{INDEXING.directory}/", 30)]
            one.delete(claims, Deadline.after(30))

            def lost():
                try:
                    refresher.check()
                except LockLostError:
                    return True
                return False

            assert eventually(lost)
