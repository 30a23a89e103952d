"""Snapshots are made in bounded memory, published in one step, and made of what is there."""

import mmap
import time
from datetime import UTC, datetime

import numpy as np
import pytest

from hfbucket_plugin.core.deadline import Deadline
from hfbucket_plugin.core.keys import ContentId
from hfbucket_plugin.errors import HFBucketError, IntegrityError, MissingError
from hfbucket_plugin.index import build as index_build
from hfbucket_plugin.index.format import Pointer, changes_of, snapshot_of, to_bytes
from hfbucket_plugin.index.journal import JournalWriter
from hfbucket_plugin.index.overlay import LocalOverlay
from hfbucket_plugin.index.store import JOURNALS, LATE_SECS, POINTER, SNAPSHOTS, IndexStore, JournalName
from hfbucket_plugin.index.table import (
    CHANGE,
    DELETED,
    PUT,
    ROW,
    Absent,
    Table,
    View,
    applied,
    digests_of,
    in_order,
    last_of_each,
    newest,
)
from localhub.faults import Fault
from tests.support.buckets import download, noise, opened, paths, upload
from tests.support.indexes import SECS, build, index_of
from tests.support.surface import PREFIX, path_of

HASH = "ab" * 32


def random_rows(count, seed, dtype=ROW):
    chance = np.random.default_rng(seed)
    rows = np.zeros(count, dtype)
    for name in ("digest_hi", "digest_lo"):
        rows[name] = chance.integers(0, 2**63, count, dtype=np.uint64) * np.uint64(2) + np.uint64(seed % 2)
    rows["size"] = chance.integers(0, 2**40, count)
    return rows


@pytest.mark.parametrize("block", [7, 1000])
def test_what_is_sorted_on_disk_is_what_would_be_sorted_in_memory(tmp_path, monkeypatch, block):
    monkeypatch.setattr(index_build, "_BLOCK_ROWS", block)
    rows = random_rows(3000, 1)
    again = rows[:500].copy()
    again["size"] = 7
    changes = random_rows(200, 2, CHANGE)
    changes["kind"], changes["at"] = PUT, 5
    deleted = changes[:50].copy()
    deleted["kind"], deleted["at"] = DELETED, 6
    for name in ("digest_hi", "digest_lo"):
        deleted[name][:25] = rows[name][600:625]

    with index_build.SnapshotFile(tmp_path) as file:
        for start in range(0, 3000, 100):
            file.add(rows[start : start + 100])
        file.add(again)
        file.change(deleted)
        file.change(changes)
        keys = file.write(tmp_path / "it.npy")

    listed = last_of_each(in_order(np.concatenate([rows, again])))
    expected = applied(listed, newest(changes, deleted))
    data = (tmp_path / "it.npy").read_bytes()
    assert data == to_bytes(expected)
    assert len(snapshot_of(data, "it")) == keys == len(expected)
    assert [path.name for path in tmp_path.iterdir()] == ["it.npy"]


def test_a_snapshot_holds_the_first_level_and_nothing_of_others(hub, bucket, surfaces):
    surface = surfaces()
    surface.put([0])
    odd = {f"{PREFIX}/README": b"no key", f"{PREFIX}/deep/x": b"nested", f"{PREFIX}0/y": b"another prefix"}
    upload(hub.endpoint, bucket, odd | {f"{PREFIX}/.hfbucket/bad/x.json": b"{}", "z": b"outside"})

    pointer = build(hub.endpoint, bucket)

    rows = snapshot_of(download(hub.endpoint, bucket, f"{PREFIX}/{SNAPSHOTS}/{pointer.snapshot}"), "it").rows
    names = [path_of(surface, 0).removeprefix(f"{PREFIX}/"), "README"]
    assert sorted(Table(rows).find(digests_of(names)).tolist()) == [0, 1]
    assert len(rows) == 2
    assert abs(int(rows["uploaded_at"][0]) - time.time()) < 600


def test_an_empty_instance_has_an_empty_index(hub, bucket):
    assert build(hub.endpoint, bucket).keys == 0


def test_the_pointer_is_written_last(hub, bucket):
    hub.control.add_fault(Fault(route="batch", items=POINTER))

    with pytest.raises(HFBucketError, match=r"current\.json"):
        build(hub.endpoint, bucket)

    (left,) = paths(hub.endpoint, bucket)
    assert f"/{SNAPSHOTS}/" in left


def test_what_the_store_took_is_compared_before_it_is_published(hub, bucket, tmp_path, monkeypatch):
    with opened(hub.endpoint, bucket, PREFIX) as bucket_client:
        store = IndexStore(bucket_client, "builder")
        built = index_build.from_listing(bucket_client, tmp_path, SECS)
        monkeypatch.setattr(index_build, "xet_hashes", lambda _: ["00" * 32])

        with pytest.raises(IntegrityError, match="not published"):
            index_build.publish(store, built, Deadline.after(SECS))

    assert not any(path.endswith("current.json") for path in paths(hub.endpoint, bucket))


def test_there_is_nothing_to_go_on_from_without_a_snapshot(hub, bucket):
    with pytest.raises(MissingError, match="jobs index --full"):
        build(hub.endpoint, bucket, incremental=True)


def test_a_journal_that_does_not_arrive_is_not_claimed_to_be_covered(hub, bucket, surfaces):
    build(hub.endpoint, bucket)
    writer = surfaces(index="snapshot", index_refresh_secs=3600, index_journal_secs=3600)
    index_of(writer).refresh()
    writer.put([0])
    assert index_of(writer).flush()
    (journal,) = [path for path in paths(hub.endpoint, bucket) if f"{JOURNALS}/" in path]
    with opened(hub.endpoint, bucket) as bucket_client:
        xet_hash = bucket_client.stat([journal], Deadline.after(SECS))[journal].content.xet_hash
    before = download(hub.endpoint, bucket, f"{PREFIX}/{POINTER}")
    hub.control.add_fault(Fault(path_regex=f"reconstructions/{xet_hash}", status=404))

    with pytest.raises(HFBucketError):
        build(hub.endpoint, bucket, incremental=True)

    hub.control.clear_faults()
    assert download(hub.endpoint, bucket, f"{PREFIX}/{POINTER}") == before


def test_columns_of_a_later_version_are_kept_when_journals_are_added(hub, bucket, tmp_path):
    dtype = np.dtype([*ROW.descr, ("heat", "u1")])
    rows = last_of_each(in_order(random_rows(100, 3, dtype)))
    rows["heat"] = 9
    path = tmp_path / "later.npy"
    path.write_bytes(to_bytes(rows))
    (tmp_path / "work").mkdir()
    with opened(hub.endpoint, bucket, PREFIX) as bucket_client:
        store = IndexStore(bucket_client, "builder")
        index_build.publish(store, index_build.BuiltSnapshot(path, len(rows), 10.0, 5.0, 3.0), Deadline.after(SECS))

        built = index_build.from_journals(bucket_client, store, tmp_path / "work", SECS)

    kept = np.load(built.path)
    assert kept.dtype == dtype
    assert kept.tobytes() == rows.tobytes()
    assert (built.full, built.listed, built.covers > 10) == (3.0, built.covers - LATE_SECS, True)


# --- journals, notes and views ---------------------------------------------------------------------------------------


def entries_of(draft, at=1000.0):
    return [(int(row["kind"]), round(float(row["at"]), 3)) for row in changes_of(draft.data, at, "it")]


def test_a_writer_rewrites_its_last_journal_until_it_is_full():
    writer = JournalWriter(entries=3, waiting=100)
    for number in range(2):
        writer.note(bytes([number]) * 16, ContentId(HASH, 5), at=number)
    first = writer.draft(now=10.0)
    writer.written(first)
    writer.note(b"x" * 16, None, at=11.0)
    second = writer.draft(now=12.0)
    writer.written(second)
    writer.note(b"y" * 16, None, at=13.0)
    third = writer.draft(now=14.0)

    assert entries_of(first) == [(PUT, 990.0), (PUT, 991.0)]
    assert entries_of(second) == [(PUT, 988.0), (PUT, 989.0), (DELETED, 999.0)]
    assert (first.instead_of, second.instead_of, third.instead_of) == (None, first.name.text, None)
    assert entries_of(third) == [(DELETED, 999.0)]
    assert [draft.name.seq for draft in (first, second, third)] == [2, 3, 4]


def test_what_one_journal_told_is_not_undone_by_how_long_it_took():
    """A put is told by a journal that took a second, and a delete that came meanwhile by one that took none."""
    now = 100.0
    writer = JournalWriter(1, 10)
    digest = digests_of(["a"])[0].tobytes()
    writer.note(digest, ContentId("ab" * 32, 7), now)
    put = writer.draft(now + 0.1)
    writer.note(digest, None, now + 0.2)
    writer.attempted(now + 1.1)
    writer.written(put)
    delete = writer.draft(now + 1.1)

    one = changes_of(put.data, now + 1.05, "put")
    other = changes_of(delete.data, now + 1.1, "delete")
    assert newest(one, other)["kind"].tolist() == [DELETED]
    assert newest(other, one)["kind"].tolist() == [DELETED]


def test_of_one_key_a_journal_tells_the_last_alone():
    now = 100.0
    writer = JournalWriter(10, 10)
    first, second = (digests_of([name])[0].tobytes() for name in "ab")
    for digest, content in ((first, ContentId("ab" * 32, 7)), (second, None), (first, None)):
        writer.note(digest, content, now)
    reported = changes_of(writer.draft(now).data, now, "journal")
    assert sorted(reported["kind"].tolist()) == [DELETED, DELETED]


def test_what_was_not_written_is_told_with_the_next_journal():
    writer = JournalWriter(entries=10, waiting=100)
    writer.note(b"x" * 16, None, at=1.0)
    lost = writer.draft(now=2.0)
    writer.note(b"y" * 16, None, at=3.0)

    draft = writer.draft(now=4.0)

    assert (draft.instead_of, draft.fresh) == (None, 2)
    assert lost.name.text < draft.name.text
    writer.written(draft)
    assert writer.draft(now=5.0) is None


def test_names_go_on_in_order_when_the_clock_is_set_back():
    writer = JournalWriter(entries=10, waiting=100)
    names = []
    for number, year in enumerate((2030, 2026, 2031)):
        writer.note(bytes([number]) * 16, None, at=1.0)
        draft = writer.draft(2.0, datetime(year, 1, 1, tzinfo=UTC))
        writer.written(draft)
        names.append(draft.name.text)

    assert names == sorted(names)
    assert all(JournalName.parse(name).writer == writer.writer for name in names)


def test_what_is_covered_is_forgotten():
    writer = JournalWriter(entries=10, waiting=100)
    writer.note(b"x" * 16, None, at=1.0)
    writer.written(writer.draft(now=2.0))
    writer.note(b"y" * 16, None, at=3.0)
    writer.note(b"z" * 16, None, at=5.0)

    assert writer.forget_before(4.0) == 1

    draft = writer.draft(now=6.0)
    assert (draft.instead_of, len(draft.entries)) == (None, 1)


def change(name, at, content=None):
    row = np.zeros(1, CHANGE)
    row["digest_hi"], row["digest_lo"] = digests_of([name])[0]
    row["at"], row["kind"] = at, DELETED if content is None else PUT
    if content is not None:
        row["size"], row["xet_hash"][0] = content.size, np.frombuffer(bytes.fromhex(content.xet_hash), np.uint8)
    return row


def test_of_a_put_and_a_delete_the_later_one_counts_whichever_is_told_first():
    view = View(Table(np.zeros(0, ROW)), 0.0, 0.0)
    put, deleted = change("x", 10.0, ContentId(HASH, 5)), change("x", 20.0)
    back = change("x", 30.0, ContentId(HASH, 6))

    assert view.folded(put).folded(deleted).look_up(digests_of(["x"])) == [Absent.DELETED]
    assert view.folded(deleted).folded(put).look_up(digests_of(["x"])) == [Absent.DELETED]
    assert view.folded(back, put).folded(deleted).look_up(digests_of(["x"])) == [ContentId(HASH, 6)]
    assert view.look_up(digests_of(["x"])) == [Absent.UNKNOWN]


def test_what_happened_before_the_listing_does_not_overrule_it():
    view = View(Table(np.zeros(0, ROW)), covers=100.0, listed=100.0)

    assert view.folded(change("x", 99.9, ContentId(HASH, 5))) is view
    assert view.folded(change("x", 100.0, ContentId(HASH, 5))).look_up(digests_of(["x"])) == [ContentId(HASH, 5)]


def test_notes_are_bounded_and_the_oldest_go_first():
    recent = LocalOverlay(most=2)
    for number in range(3):
        recent.did(bytes([number]) * 16, None, 1, 0.0, 0.0)

    assert recent.get(bytes(16)) is None
    assert len(recent) == 2


def test_an_answer_to_a_question_from_before_an_own_write_is_not_believed():
    recent = LocalOverlay()
    recent.did(b"x" * 16, ContentId(HASH, 5), 1, mono=10.0, hub=110.0)

    recent.reported(b"x" * 16, None, asked=9.0, mono=11.0, hub=111.0)
    assert recent.get(b"x" * 16).content == ContentId(HASH, 5)

    recent.reported(b"x" * 16, None, asked=10.5, mono=11.0, hub=111.0)
    assert recent.get(b"x" * 16).content is None


def test_what_was_told_goes_when_a_journal_tells_something_newer_and_no_sooner():
    recent = LocalOverlay()
    digest = digests_of(["x"]).tobytes()
    recent.reported(digest, None, asked=0.0, mono=1.0, hub=100.0)

    recent.overruled(Table(change("x", 99.0, ContentId(HASH, 5))))
    assert recent.get(digest) is not None

    recent.overruled(Table(change("x", 101.0, ContentId(HASH, 5))))
    assert recent.get(digest) is None


def test_a_snapshot_is_uploaded_from_a_map_and_not_from_memory(hub, bucket, tmp_path, monkeypatch):
    mapped = []
    original = mmap.mmap

    def watched(*args, **kwargs):
        mapped.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(index_build.mmap, "mmap", watched)
    upload(hub.endpoint, bucket, {f"{PREFIX}/x": noise(10)})

    build(hub.endpoint, bucket)

    assert len(mapped) == 1
    assert Pointer.parse(download(hub.endpoint, bucket, f"{PREFIX}/{POINTER}"), "it").keys == 1
