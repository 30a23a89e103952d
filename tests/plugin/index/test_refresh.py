"""Where views come from: what fails is done again, whole; what it costs is bounded, and waited for."""

import threading
import tracemalloc
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from hfbucket_plugin.config.settings import load
from hfbucket_plugin.core.keys import BucketHandle, ContentId
from hfbucket_plugin.core.telemetry import MemorySink
from hfbucket_plugin.errors import HFBucketError, MissingError, TransportError
from hfbucket_plugin.hub import records
from hfbucket_plugin.hub.bucket import ObjectInfo
from hfbucket_plugin.index import table
from hfbucket_plugin.index.format import Pointer
from hfbucket_plugin.index.reader import KeyIndex
from hfbucket_plugin.index.refresh import ListingSource, Refreshed, SnapshotSource, TooLargeError
from hfbucket_plugin.index.store import (
    DIRECTORY,
    JOURNALS,
    MAX_STRANGE,
    POINTER,
    IndexListing,
    IndexStore,
    Journal,
    JournalName,
)
from hfbucket_plugin.index.table import CHANGE, DELETED, PUT, Absent, Table, View, digests_of, merged, newest, rows_of

NOW = 1_790_000_000.0
HASH = "c" * 64


def change(name, kind, at=NOW):
    row = np.zeros(1, CHANGE)
    row["digest_hi"], row["digest_lo"] = digests_of([name])[0]
    row["kind"], row["at"], row["size"] = kind, at, 10
    return row


def pointer(name="s.npy", keys=1, covers=NOW - 100):
    return Pointer(name, "d" * 64, 1024 + 60 * keys, keys, covers=covers, listed=covers, full=covers)


def journal(number, *, hits=False, writer=None, at=None):
    name = JournalName.make(writer or f"{number:016x}", 1, datetime.fromtimestamp(NOW, UTC), hits=hits)
    return Journal(name, f"p/{name.text}", ContentId(f"{number:064x}", 100), NOW + number if at is None else at)


class Store:
    """Stands for `IndexStore`; raises what `fails` says at a step of that name."""

    def __init__(self, journals=()):
        self.journals = list(journals)
        self.pointer = pointer()
        self.seen = ObjectInfo("current.json", ContentId("e" * 64, 10), None)
        self.fails = {}
        self.calls = 1
        self.loads = 0

    def _step(self, name):
        if name in self.fails:
            raise self.fails[name]

    def list(self, _deadline):
        self._step("list")
        return IndexListing(pointer=self.seen, journals=list(self.journals), date=NOW)

    def read_pointer(self, _info, _deadline):
        self._step("pointer")
        return self.pointer

    def read_snapshot(self, _pointer, _deadline):
        self.loads += 1
        self._step("snapshot")
        return Table(rows_of([("there", ContentId(HASH, 10), 0.0)]))

    def read_journals(self, journals, _deadline):
        for number, one in enumerate(journals):
            if number == 1:  # as of the second batch of some
                self._step("journals")
            yield one, change("there", DELETED) if one is self.journals[0] else change("other", PUT)


def state_of(view):
    return None if view is None else view.look_up(digests_of(["there", "other"]))


GONE = [Absent.DELETED, ContentId("0" * 64, 10)]
ERRORS = [OSError(24, "Too many open files"), MemoryError(), ValueError("?"), TransportError("no answer")]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("step", ["list", "pointer", "snapshot", "journals"])
@pytest.mark.parametrize("used", [False, True], ids=["first", "in use"])
def test_what_failed_at_any_step_is_done_again_and_named(step, error, used):
    """The view is handed in as `KeyIndex` does: that of the last refresh that did not raise."""
    store = Store()
    source, view = SnapshotSource(store, "w" * 16, 1 << 30), None
    if used:
        view = source.refresh(None).view
        store.seen = ObjectInfo("current.json", ContentId("f" * 64, 10), None)
    store.journals = [journal(0), journal(1)]
    store.fails[step] = error
    try:
        failed = source.refresh(view)
    except type(error):
        assert step in {"list", "journals"}
    else:
        assert failed.problem is not None
        assert isinstance(failed.problem, HFBucketError)
        assert (failed.view is not None) is used
        view = failed.view
    store.fails.clear()
    for _ in range(3):  # what cannot be followed is tried again by the second refresh after it
        again = source.refresh(view)
        view = again.view
    assert (again.problem, state_of(view)) == (None, GONE)
    assert again.folded == 0


def test_what_cannot_be_followed_is_tried_again_less_and_less_often():
    store = Store()
    store.fails["snapshot"] = OSError(24, "Too many open files")
    source = SnapshotSource(store, "w" * 16, 1 << 30)
    tried = []
    for _ in range(20):
        before = store.loads
        source.refresh(None)
        tried.append(store.loads - before)
    assert [number for number, one in enumerate(tried) if one] == [0, 2, 6, 14]


def test_a_pointer_of_the_future_is_not_followed_and_leaves_the_view_before_in_use():
    store = Store()
    source = SnapshotSource(store, "w" * 16, 1 << 30)
    view = source.refresh(None).view
    store.seen = ObjectInfo("current.json", ContentId("f" * 64, 10), None)
    store.pointer = pointer(covers=NOW + 10_000)
    found = source.refresh(view)
    assert found.view is view
    assert "ahead of the Hub's clock" in str(found.problem)


def test_processes_are_counted_by_their_journals_recently():
    store = Store([journal(number) for number in range(3)] + [journal(9, at=NOW - 9000)])
    store.journals += [journal(number, hits=True, writer=f"{number + 50:016x}") for number in range(4)]
    assert SnapshotSource(store, "w" * 16, 1 << 30).refresh(None).writers == 4


# --- the listing of the index ---------------------------------------------------------------------------------------


class Pages:
    """Stands for a bucket: pages of 1000 objects; each is put where `path` sorts."""

    def __init__(self, paths):
        self.handle = BucketHandle.parse("hf://buckets/o/b/p")
        self.paths = sorted(self.handle.join(path) for path in paths)
        self.asked = []
        self.fails_at = None
        self.background_wait_secs = 0.0

    def list_page_dated(self, prefix, cursor, _deadline):
        self.asked.append(prefix)
        if self.fails_at == len(self.asked):
            raise TransportError("no answer")
        some = [path for path in self.paths if path.startswith(prefix)]
        start = int(cursor or 0)
        infos = [ObjectInfo(path, ContentId(HASH, 9), datetime.fromtimestamp(NOW, UTC)) for path in some[start:][:1000]]
        return infos, str(start + 1000) if start + 1000 < len(some) else None, datetime.fromtimestamp(NOW, UTC)

    def stat(self, paths, _deadline, *, patient):
        self.asked.append("stat")
        return {path: ObjectInfo(path, ContentId(HASH, 9), None) for path in paths if path in self.paths}


def own_paths(number):
    return [POINTER, *(f"{JOURNALS}/20260101T000000000-{one:016x}-000000000001.npy" for one in range(number))]


@pytest.mark.parametrize("where", ["a", "journal/a", "journal/0", "journal/x", "snapshots/x", "z"])
def test_strangers_below_the_index_cost_a_bounded_number_of_calls_and_are_said(where, monkeypatch):
    pages = Pages([*own_paths(3), *(f"{DIRECTORY}/{where}{one:05d}" for one in range(20_000))])
    store = IndexStore(pages, "test")
    try:
        first = store.list(None)
        assert first.pointer is not None
        assert store.calls == first.calls == len(pages.asked) <= 6
        pages.asked.clear()
        later = store.list(None)
        assert later.pointer is not None
        assert later.calls == len(pages.asked) <= 3
        assert bool(later.crowded) is where.startswith("journal/")
        assert f"more than {MAX_STRANGE} objects" in later.strangers
        if later.crowded:
            assert f"more than {MAX_STRANGE} objects" in later.crowded
        else:
            assert len(later.journals) == 3
    finally:
        store.close()


def test_without_strangers_it_is_one_call():
    pages = Pages(own_paths(900))
    store = IndexStore(pages, "test")
    assert (len(store.list(None).journals), store.calls, len(pages.asked)) == (900, 1, 1)
    store.close()


# --- a listing of its own -------------------------------------------------------------------------------------------


def listing_of(pages, max_bytes=1 << 30):
    return ListingSource(pages, max_bytes, threading.Event())


def test_a_listing_that_broke_off_goes_on_where_it_did():
    pages = Pages([f"obj{number:05d}" for number in range(5000)])
    source = listing_of(pages)
    pages.fails_at = 4
    with pytest.raises(TransportError):
        source.refresh(None)
    assert source.calls == 4
    pages.fails_at = None
    found = source.refresh(None)
    assert (source.calls, found.view.keys, len(pages.asked)) == (2, 5000, 6)
    assert found.took > 0
    source.refresh(None)
    assert source.calls == 5


def test_a_listing_that_does_not_fit_tells_what_it_cost():
    pages = Pages([f"obj{number:05d}" for number in range(5000)])
    source = listing_of(pages, 68 * 2500)
    with pytest.raises(TooLargeError):
        source.refresh(None)
    assert source.calls == 3


# --- how long is waited ---------------------------------------------------------------------------------------------


class Source:
    def __init__(self):
        self.calls, self.writers, self.error = 1, 1, None

    def refresh(self, _view):
        if self.error is not None:
            raise self.error
        return Refreshed(writers=self.writers, calls=self.calls)


@pytest.fixture
def waits():
    """Makes an index whose source is ours; the wait after a refresh."""
    made = []

    def make(**values):
        name = "remote_storage_plugin.hfbucket.us."
        settings = load(
            {f"{name}{one}": value for one, value in ({"bucket_handle": "hf://buckets/o/b"} | values).items()},
            "hfbucket.us",
        )
        made.append(KeyIndex(SimpleNamespace(handle=settings.bucket_handle), settings, "hfbucket.us", MemorySink()))
        made[-1]._source = Source()
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_a_listing_is_waited_for_by_what_it_cost_whatever_came_of_it(waits):
    index = waits(index="listing", index_refresh_secs=10.0)
    index._source.calls = 30
    index.refresh()
    assert index.refresh_wait_secs == 300.0
    index._source.error = TransportError("no answer")
    index.refresh()
    assert index.refresh_wait_secs == 600.0
    index._source.error = KeyError("?")
    index.refresh()
    assert index.refresh_wait_secs == 1200.0
    assert "KeyError" in index.status()["problem"]
    index._source.error = TooLargeError("too large")
    index.refresh()
    assert index.refresh_wait_secs >= 6 * 3600


@pytest.mark.parametrize(("kind", "least"), [("listing", 300.0), ("snapshot", 15.0)])
def test_the_first_wait_after_a_listing_is_never_shorter_than_what_it_cost(waits, monkeypatch, kind, least):
    index = waits(index=kind)
    index._source.calls = 5 if kind == "listing" else 1
    monkeypatch.setattr("hfbucket_plugin.index.reader.random.uniform", lambda low, _high: low)
    waited = []
    ends = SimpleNamespace(wait=lambda secs: waited.append(secs) or len(waited) == 3)
    with monkeypatch.context() as patched:
        patched.setattr(index, "_closed", ends)
        index._run_refresh()

    assert waited[0] == 0.0
    assert waited[1] == least


def test_refreshes_of_a_fleet_are_spread_by_its_size_and_failures_are_backed_off(waits):
    index = waits(index="snapshot")
    index.refresh()
    assert index.refresh_wait_secs == 60.0
    index._source.writers, index._source.calls = 1000, 3
    index.refresh()
    assert index.refresh_wait_secs == 900.0  # 1000 processes, 3 calls each: 1000 calls in 300 s
    index._source.writers, index._source.calls = 1, 1
    index.refresh()
    index._source.error = MissingError("?")
    waited = []
    for _ in range(8):
        index.refresh()
        waited.append(index.refresh_wait_secs)
    assert waited == [120.0, 240.0, 480.0, 960.0, 1920.0, 1920.0, 1920.0, 1920.0]
    index._source.error = None
    index.refresh()
    assert index.refresh_wait_secs == 60.0


def test_journals_of_a_fleet_are_spread_by_its_size(waits):
    index = waits(index="snapshot")
    assert index._journal_wait_secs == 0.0
    index._source.writers = 1000
    index.refresh()
    assert 250 < index._journal_wait_secs < 350


# --- what it costs ---------------------------------------------------------------------------------------------------


def changes(number, seed):
    chance = np.random.default_rng(seed)
    rows = np.zeros(number, CHANGE)
    for name in ("digest_hi", "digest_lo"):
        rows[name] = chance.integers(0, 2**63, number, dtype=np.uint64)
    rows["kind"], rows["at"] = PUT, NOW
    return rows


def test_a_few_new_changes_are_sorted_alone_however_many_there_are(monkeypatch):
    sorted_rows = []
    real = table.in_order
    monkeypatch.setattr(table, "in_order", lambda rows: sorted_rows.append(len(rows)) or real(rows))
    view = View(Table(rows_of([])), 0.0, 0.0, Table(newest(changes(200_000, 1))))
    sorted_rows.clear()
    for seed in range(2, 42):
        view = view.folded(changes(100, seed))
    assert sum(sorted_rows) <= 10 * 40 * 100
    assert sum(map(len, (view.changes, *view.tiers))) == 204_000


def test_no_step_of_a_merge_takes_more_than_a_block(monkeypatch):
    steps = []
    real = table.newest
    monkeypatch.setattr(table, "newest", lambda *rows: steps.append(sum(map(len, rows))) or real(*rows))
    one, other = (Table(real(changes(number, seed))) for number, seed in ((100_000, 1), (100_000, 2)))
    both = merged(one, other)
    assert len(both) == 200_000
    assert max(steps) <= 3 * table._BLOCK_ROWS


def test_merging_is_what_sorting_all_of_it_is(monkeypatch):
    monkeypatch.setattr(table, "_BLOCK_ROWS", 5)
    chance = np.random.default_rng(7)
    for _ in range(60):
        parts = []
        for size in chance.integers(0, 30, 5):
            rows = np.zeros(size, CHANGE)
            rows["digest_hi"], rows["digest_lo"] = chance.integers(0, 8, size), chance.integers(0, 3, size)
            rows["at"], rows["kind"] = chance.integers(0, 4, size), chance.integers(1, 3, size)
            rows["size"] = rows["xet_hash"][:, 0] = chance.integers(0, 3, size)
            parts.append(rows)
        view = View(Table(rows_of([])), 0.0, 0.0)
        for rows in parts:
            view = view.folded(rows)
        whole = newest(*parts)
        best = {}
        for row in np.concatenate(parts):
            order = (row["at"], -int(row["kind"]), row["size"], row["xet_hash"].tobytes())
            key = (int(row["digest_hi"]), int(row["digest_lo"]))
            best[key] = max(best.get(key, order), order)
        assert [(int(row["digest_hi"]), int(row["digest_lo"])) for row in whole] == sorted(best)
        digests = np.array([(hi, lo) for hi in range(8) for lo in range(3)], np.uint64)
        for digest, row in zip(digests.tolist(), view.changed(digests), strict=True):
            found = None if row is None else (row["at"], -int(row["kind"]), row["size"], row["xet_hash"].tobytes())
            assert found == best.get(tuple(digest))


class Transfer:
    def __init__(self, data):
        self.data = data
        self.renewed = 0

    def read(self, reads, _deadline):
        for read in reads:
            assert read.lease.write(0, self.data)

    def renew(self):
        self.renewed += 1


@pytest.mark.parametrize("size", [100, records._MAPPED_BYTES, 3 * records._MAPPED_BYTES])
def test_what_is_read_is_hashed_where_it_lies_and_descriptors_go(size):
    data = np.random.default_rng(1).bytes(size)
    expected = records.hash_of(bytearray(data))
    transfer = Transfer(data)
    own = records.RecordStore(SimpleNamespace(transfer=transfer), "test")
    try:
        before = len(list(Path("/proc/self/fd").iterdir()))
        tracemalloc.start()
        good, bad = own.read([("it", ContentId(expected, size)), ("other", ContentId(HASH, size))], None)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        own.close()
    assert bytes(good) == data
    assert isinstance(bad, HFBucketError)
    assert transfer.renewed == 1
    del bad
    mapped = size >= records._MAPPED_BYTES
    assert (peak < size) is mapped  # nothing of the table's size in Python's own memory
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + mapped
    if mapped:
        good.close()
