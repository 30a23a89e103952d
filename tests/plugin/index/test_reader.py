"""The key index on both engine surfaces: what it saves, what it never does, and what happens without one."""

import time
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi

from hfbucket_plugin.core import telemetry
from hfbucket_plugin.errors import ItemFailure
from hfbucket_plugin.hub.client import Answer
from hfbucket_plugin.index.store import JOURNALS, POINTER, SNAPSHOTS, IndexStore
from localhub.faults import Fault
from tests.support.buckets import noise, paths, upload
from tests.support.indexes import answers, build, counted_by_outcome, gauge, in_use, index_of
from tests.support.surface import CHUNK_BYTES, PREFIX, chunks_counted, content, fresh, path_of
from tests.support.waiting import eventually

SIXTEEN = range(16)
NEVER = 3600.0  # a thread that does nothing by itself: the test does it
BY_HAND = {"index": "snapshot", "index_refresh_secs": NEVER, "index_journal_secs": NEVER}


one_surface = pytest.mark.parametrize("surfaces", ["mp"], indirect=True)
"""For what lies below both surfaces and does not meet them."""


@pytest.fixture
def indexed(surfaces, hub, bucket):
    """Makes surfaces with an index in use, over what is there by then."""

    def make(**values):
        build(hub.endpoint, bucket)
        surface = surfaces(**(BY_HAND | values))
        in_use(surface)
        return surface

    return make


def hub_calls(hub):
    counters = hub.control.counters()
    return {
        route: counters.route(route).requests
        for route in ("paths-info", "batch", "tree", "info")
        if counters.route(route).requests
    }


def test_a_miss_costs_no_call_and_a_hit_none_either(hub, surfaces, indexed):
    surfaces().put(SIXTEEN)
    reader = indexed()
    hub.control.reset_counters()

    assert reader.lookup(fresh(16)) == [False] * 16
    hits, got = reader.retrieve(SIXTEEN)

    assert (hits, got) == ([True] * 16, [content(number) for number in SIXTEEN])
    assert hub_calls(hub) == {}
    assert answers(reader) == {"miss": 16, "hit": 32}


def test_a_key_that_is_asked_for_twice_is_answered_twice_and_counted_once(surfaces, indexed):
    number = SIXTEEN[0]
    surfaces().put([number])
    reader = indexed()

    assert reader.get([number, number]) == [content(number)] * 2
    assert answers(reader) == {"hit": 1}


def test_a_key_that_is_not_there_is_asked_for_where_that_is_wanted(hub, surfaces, indexed):
    writer = surfaces()
    writer.put([0])
    reader = indexed(index_miss="ask")
    writer.put([1])
    hub.control.reset_counters()

    assert reader.lookup([0, 1, 2]) == [True, True, False]

    assert hub_calls(hub) == {"paths-info": 1}


def test_own_writes_and_deletes_are_seen_at_once(hub, indexed):
    surface = indexed()
    assert surface.lookup([0, 1]) == [False, False]

    surface.put([0, 1])
    hub.control.reset_counters()
    assert surface.lookup([0, 1]) == [True, True]
    assert surface.get([0, 1]) == [content(0), content(1)]
    assert hub_calls(hub) == {}

    assert surface.delete([0])
    hub.control.reset_counters()
    assert surface.lookup([0]) == [False]
    assert surface.get([0, 1]) == [None, content(1)]
    assert hub_calls(hub) == {}


def test_what_is_put_and_deleted_elsewhere_is_seen_with_the_next_refresh(hub, bucket, indexed):
    writer, reader = indexed(), indexed()
    writer.put([0, 1, 2])
    writer.delete([1])
    assert reader.lookup([0]) == [False]

    assert index_of(writer).flush()
    index_of(reader).refresh()
    hub.control.reset_counters()

    assert reader.lookup([0]) == [True]
    assert reader.get([0, 1, 2]) == [content(0), None, content(2)]
    assert hub_calls(hub) == {}
    assert counted_by_outcome(writer, telemetry.INDEX_JOURNALS)["written"] == 1
    assert counted_by_outcome(reader, telemetry.INDEX_JOURNALS)["folded"] == 1


@one_surface
def test_puts_and_hits_are_told_of_by_one_call(hub, indexed):
    surface = indexed(heat_secs=0.001)
    surface.put([0])
    assert surface.get([0]) == [content(0)]
    hub.control.reset_counters()

    assert index_of(surface).flush()

    assert hub_calls(hub) == {"batch": 1}
    assert counted_by_outcome(surface, telemetry.INDEX_JOURNALS)["written"] == 2


@one_surface
def test_of_two_journals_of_one_call_the_one_that_failed_is_written_again(hub, bucket, indexed, monkeypatch):
    surface = indexed(heat_secs=0.001)
    surface.put([0])
    assert surface.get([0]) == [content(0)]
    index = index_of(surface)
    replace = index._bucket.replace

    def refused(old, files, deadline):
        hits = next(path for path in files if path.endswith("-hits.npy"))
        failed = replace(old, {path: content for path, content in files.items() if path != hits}, deadline)
        return failed | {hits: ItemFailure(hits, "hub", "no room")}

    monkeypatch.setattr(index._bucket, "replace", refused)
    assert index.flush()  # what comes of hits holds nothing up
    monkeypatch.undo()
    assert [path.endswith("-hits.npy") for path in paths(hub.endpoint, bucket) if f"{JOURNALS}/" in path] == [False]
    assert index.flush()
    assert {path.endswith("-hits.npy") for path in paths(hub.endpoint, bucket) if f"{JOURNALS}/" in path} == {
        False,
        True,
    }


@one_surface
def test_hits_that_wait_are_told_of_at_the_end(hub, bucket, surfaces, indexed):
    surfaces().put([0])
    surface = indexed()
    assert surface.get([0]) == [content(0)]

    index_of(surface).finish(20.0)

    assert any(path.endswith("-hits.npy") for path in paths(hub.endpoint, bucket))


@one_surface
def test_a_journal_grows_and_there_is_one_until_it_is_full(hub, bucket, indexed):
    writer = indexed(index_journal_entries=3)
    reader = indexed()
    for number in range(5):
        writer.put([number])
        assert index_of(writer).flush()

    journals = [path for path in paths(hub.endpoint, bucket) if f"{JOURNALS}/" in path]
    index_of(reader).refresh()

    assert len(journals) == 2
    assert reader.get(range(5)) == [content(number) for number in range(5)]


@one_surface
def test_own_entries_stay_known_when_their_journal_was_folded_in(hub, indexed):
    surface = indexed()
    surface.put([0])
    index_of(surface).flush()
    surface.delete([0])
    surface.put([1])

    index_of(surface).refresh()  # which reads of the put, and not yet of the delete
    hub.control.reset_counters()

    assert surface.lookup([0]) == [False]
    assert surface.lookup([1]) == [True]
    assert hub_calls(hub) == {}
    index_of(surface).flush()
    index_of(surface).refresh()
    assert (surface.lookup([0]), surface.lookup([1])) == ([False], [True])
    assert len(index_of(surface)._recent) == 0


@one_surface
def test_what_a_snapshot_covers_is_not_told_again(hub, bucket, indexed, monkeypatch):
    monkeypatch.setattr("hfbucket_plugin.index.build.CLOCK_MARGIN_SECS", -2.0)
    writer = indexed()
    writer.put([0])
    index_of(writer).flush()
    writer.put([1])

    build(hub.endpoint, bucket)
    index_of(writer).refresh()

    assert len(index_of(writer)._recent) == 0
    assert len(index_of(writer)._journal) == 0
    assert len(index_of(writer)._view.changes) == 0
    assert writer.get([0, 1]) == [content(0), content(1)]


@one_surface
def test_the_hubs_time_is_known_however_long_a_snapshot_takes_to_load(hub, bucket, indexed, monkeypatch):
    """What happened before a snapshot's listing is told no more, so a clock that is behind loses what came after it."""
    index = index_of(indexed())
    build(hub.endpoint, bucket)
    late = 0.0

    def clock():
        return time.monotonic() + late

    def slowly(store, pointer, deadline):
        nonlocal late
        late = 120.0  # a slow line
        return quickly(store, pointer, deadline)

    quickly = IndexStore.read_snapshot
    monkeypatch.setattr(IndexStore, "read_snapshot", slowly)
    monkeypatch.setattr(Answer, "date", property(lambda _: datetime.now(UTC)))  # which the real Hub says everywhere
    monkeypatch.setattr("hfbucket_plugin.index.reader.time", SimpleNamespace(monotonic=clock, time=time.time))
    index._clock = clock

    index.refresh()

    assert late
    assert abs(index._hub_now() - (time.time() + late)) < late / 2


def test_what_a_process_put_last_is_known_when_it_has_ended(surfaces, indexed):
    reader = indexed()
    writer = surfaces(**BY_HAND)
    in_use(writer)
    writer.put([0])

    writer.close()
    index_of(reader).refresh()

    assert reader.lookup([0]) == [True]


@one_surface
def test_a_process_ends_in_time_though_its_last_journal_cannot_be_written(hub, indexed):
    writer = indexed(close_timeout_secs=0.5)
    writer.put([0])
    hub.control.add_fault(Fault(route="batch", hang=True))
    began = time.monotonic()

    writer.close()

    assert time.monotonic() - began < 30


@one_surface
def test_what_others_put_while_the_hub_answered_is_believed(surfaces, indexed):
    reader, writer = indexed(), surfaces(**BY_HAND)
    in_use(writer)
    asked = time.monotonic()
    writer.put([0])
    assert index_of(writer).flush()
    index_of(reader).refresh()

    index_of(reader).reported({reader.name(0): None}, asked - 1)  # an answer that is late
    index_of(reader).refresh()

    assert reader.lookup([0]) == [True]


@one_surface
def test_a_forked_child_tells_by_journals_of_its_own_and_waits_for_no_thread_of_its_parents(indexed):
    writer = indexed()
    writer.put([0])
    index = index_of(writer)
    own = index._journal.writer
    index._recent._lock.acquire()  # as another thread may hold it at a fork
    index._start_over()

    writer.put([1])

    assert writer.lookup([0, 1]) == [True, True]
    assert index._journal.writer not in {own, index._hits.writer}
    assert index._source.writer == index._journal.writer
    assert len(index._journal) == 1


@one_surface
def test_a_snapshot_is_made_of_the_one_before_and_the_journals(hub, bucket, surfaces, indexed, monkeypatch):
    surfaces().put([0, 1])
    writer = indexed()
    writer.put([2])
    writer.delete([1])
    index_of(writer).flush()
    surfaces().put([3])  # by nobody that tells
    monkeypatch.setattr("hfbucket_plugin.index.build.CLOCK_MARGIN_SECS", -2.0)

    pointer = build(hub.endpoint, bucket, incremental=True)

    assert pointer.keys == 2
    reader = surfaces(**BY_HAND)
    assert len(in_use(reader)._view.changes) == 0
    assert reader.get(range(4)) == [content(0), None, content(2), None]


def test_an_object_that_is_gone_is_a_miss_and_then_asked_for(hub, bucket, surfaces, indexed):
    surfaces().put([0, 1])
    reader = indexed()
    upload(hub.endpoint, bucket, {path_of(reader, 0): noise(CHUNK_BYTES, 99)})
    hub.control.add_fault(Fault(path_regex="reconstructions", status=404))

    assert reader.lookup([0]) == [True]
    assert reader.get([0]) == [None]
    hub.control.clear_faults()
    hub.control.reset_counters()

    assert reader.lookup([0]) == [True]
    assert hub_calls(hub) == {"paths-info": 1}
    assert reader.get([0]) == [noise(CHUNK_BYTES, 99)]
    assert reader.get([1]) == [content(1)]
    assert hub_calls(hub) == {"paths-info": 3}  # all hits are doubted for a while
    assert chunks_counted(reader.instance, "get")["missing"] == 1


def test_a_doubt_outlasts_a_snapshot_that_no_listing_went_into(hub, bucket, surfaces, indexed, monkeypatch):
    """What no journal tells of is still wrong in the next one that is made of journals, however late it passes over."""
    surfaces().put([0])
    reader = indexed()
    index_of(reader).doubt(reader.name(0))
    monkeypatch.setattr("hfbucket_plugin.index.build.LATE_SECS", -1000.0)
    build(hub.endpoint, bucket, incremental=True)
    index_of(reader).refresh()
    hub.control.reset_counters()

    assert reader.lookup([0]) == [True]

    assert hub_calls(hub) == {"paths-info": 1}


def test_a_deleted_object_is_found_missing_once_and_no_more(hub, surfaces, indexed):
    writer = surfaces()
    writer.put(SIXTEEN)
    reader = indexed()
    for number in SIXTEEN:
        writer.delete([number])
    hub.control.add_fault(Fault(path_regex="reconstructions", status=404))  # as when the store has let it go

    gets = 0
    for number in SIXTEEN:
        hits, _ = reader.retrieve([number])
        gets += any(hits)

    assert gets == 1
    assert reader.healthy()
    assert answers(reader)["miss"] == 0


@one_surface
def test_a_put_asks_the_hub_before_it_writes_over_what_the_index_does_not_know(hub, surfaces, indexed):
    surface = indexed()
    surfaces().put([0])
    hub.control.reset_counters()

    surface.put([0])

    assert chunks_counted(surface.instance, "put") == {"present": 1}
    assert surface.get([0]) == [content(0)]
    assert hub_calls(hub) == {"paths-info": 1}


@one_surface
def test_a_put_of_what_the_index_knows_asks_nothing(hub, surfaces, indexed):
    surfaces().put([0])
    surface = indexed()
    hub.control.reset_counters()

    surface.put([0])

    assert chunks_counted(surface.instance, "put") == {"present": 1}
    assert hub_calls(hub) == {}


def test_an_object_of_another_size_is_no_hit(hub, bucket, surfaces, indexed):
    surface = surfaces()
    upload(hub.endpoint, bucket, {path_of(surface, 0): noise(CHUNK_BYTES - 1)})

    reader = indexed()

    assert reader.lookup([0]) == [False]
    assert reader.get([0]) == [None]
    assert chunks_counted(reader.instance, "lookup") == {"size": 1}


def test_a_reader_without_the_right_to_write_tells_nothing(hub, bucket, surfaces, indexed):
    surfaces().put([0])
    reader = indexed(role="read-only")

    assert reader.put([1]) is not True
    reader.delete([0])

    assert index_of(reader).flush() in {True, False}
    assert not any(f"{JOURNALS}/" in path for path in paths(hub.endpoint, bucket))
    assert reader.get([0]) == [content(0)]


def test_a_writer_that_reads_nothing_loads_nothing_and_tells_all_the_same(hub, bucket, surfaces, indexed):
    reader = indexed()
    writer = surfaces(**BY_HAND, role="write-only")
    eventually(lambda: index_of(writer)._alive)

    writer.put([0])
    assert index_of(writer).flush()
    index_of(reader).refresh()

    assert index_of(writer)._view is None
    assert reader.get([0]) == [content(0)]


def test_without_a_snapshot_everything_is_as_without_an_index_and_nothing_is_written(hub, bucket, surfaces, caplog):
    surface = surfaces(**BY_HAND)
    eventually(lambda: index_of(surface).status()["state"] == "missing")
    surface.put([0])
    hub.control.reset_counters()

    assert surface.lookup([0, 1]) == [True, False]
    assert surface.get([0]) == [content(0)]
    assert not index_of(surface).flush()

    assert hub_calls(hub)["paths-info"] == 2
    assert paths(hub.endpoint, bucket) == [path_of(surface, 0)]
    assert gauge(surface, telemetry.INDEX_STATE, state="missing") == 1
    assert caplog.text.count("there is no snapshot") == 1

    build(hub.endpoint, bucket)
    index_of(surface).refresh()
    hub.control.reset_counters()

    assert surface.lookup([0]) == [True]
    assert hub_calls(hub) == {}
    assert gauge(surface, telemetry.INDEX_STATE, state="missing") == 0
    assert gauge(surface, telemetry.INDEX_STATE, state="usable") == 1
    assert gauge(surface, telemetry.INDEX_KEYS) == 1


@one_surface
def test_what_was_put_before_there_was_a_snapshot_that_lacks_it_is_told_when_there_is(hub, bucket, surfaces, indexed):
    writer = surfaces(**BY_HAND)
    eventually(lambda: index_of(writer).status()["state"] == "missing")
    reader = indexed()  # whose snapshot has nothing
    writer.put([0])

    index_of(writer).refresh()
    assert index_of(writer).flush()
    index_of(reader).refresh()

    assert reader.lookup([0]) == [True]


def test_an_index_that_is_too_old_is_not_used_until_there_is_a_new_one(hub, bucket, surfaces, indexed):
    surfaces().put([0])
    reader = indexed(index_max_age_secs=60)
    index = index_of(reader)
    now = index._clock
    index._clock = lambda: now() + 61
    hub.control.reset_counters()

    assert reader.lookup([0, 1]) == [True, False]
    assert hub_calls(hub) == {"paths-info": 1}
    offset = index._hub_offset
    index.refresh()
    assert gauge(reader, telemetry.INDEX_STATE, state="stale") == 1
    reader.put([2])
    assert not index.flush()

    index._clock, index._hub_offset = now, offset
    index.refresh()
    hub.control.reset_counters()
    assert reader.lookup([0, 1]) == [True, False]
    assert hub_calls(hub) == {}


@one_surface
def test_an_index_that_takes_too_much_memory_is_not_used(hub, surfaces, indexed, bucket):
    surfaces().put([0])
    build(hub.endpoint, bucket)

    surface = surfaces(**BY_HAND, index_max_bytes=100)

    eventually(lambda: index_of(surface).status()["state"] == "too_large")
    assert surface.get([0]) == [content(0)]


DAMAGE = {
    "no pointer": lambda good: b"garbage",
    "a later version": lambda good: good.replace(b'"version": 1', b'"version": 9'),
    "another hash": lambda good: good.replace(b'"xet_hash": "', b'"xet_hash": "00000000')[:-8] + b"}",
    "a missing snapshot": lambda good: good.replace(
        good.split(b'"xet_hash": "')[1][:8], bytes(reversed(good.split(b'"xet_hash": "')[1][:8]))
    ),
    "a truncated snapshot": lambda good: good.replace(b'"size": 1', b'"size": 9'),
    "fewer keys": lambda good: good.replace(b'"keys": 1', b'"keys": 2'),
}


@one_surface
@pytest.mark.parametrize("damage", DAMAGE)
def test_an_index_that_is_broken_is_not_used(hub, bucket, surfaces, damage):
    from tests.support.buckets import download

    writer = surfaces()
    writer.put([0])
    build(hub.endpoint, bucket)
    pointer = f"{PREFIX}/{POINTER}"
    damaged = DAMAGE[damage](download(hub.endpoint, bucket, pointer))
    upload(hub.endpoint, bucket, {pointer: damaged})

    surface = surfaces(**BY_HAND)

    eventually(lambda: index_of(surface).status()["state"] == "failed")
    assert surface.lookup([0]) == [True]
    assert surface.get([0]) == [content(0)]
    assert gauge(surface, telemetry.INDEX_STATE, state="failed") == 1
    build(hub.endpoint, bucket)
    index_of(surface).refresh()
    assert index_of(surface).status()["state"] == "usable"


@one_surface
def test_a_pointer_to_a_broken_snapshot_leaves_the_one_before_in_use(hub, bucket, surfaces, indexed):
    surfaces().put([0])
    reader = indexed()
    upload(hub.endpoint, bucket, {f"{PREFIX}/{POINTER}": b"garbage"})

    index_of(reader).refresh()
    hub.control.reset_counters()

    assert reader.lookup([0, 1]) == [True, False]
    assert hub_calls(hub) == {}
    assert "no pointer" in index_of(reader).status()["problem"]


@one_surface
def test_garbage_among_journals_is_passed_over_and_counted(hub, bucket, indexed):
    writer, reader = indexed(), indexed()
    writer.put([0])
    index_of(writer).flush()
    good = next(path for path in paths(hub.endpoint, bucket) if f"{JOURNALS}/" in path)
    names = [f"20260101T000000000-{'a' * 16}-000000000001.npy", f"20990101T000000000-{'b' * 16}-000000000002.npy"]
    upload(hub.endpoint, bucket, {f"{PREFIX}/{JOURNALS}/{name}": noise(100 + n) for n, name in enumerate(names)})
    upload(hub.endpoint, bucket, {f"{PREFIX}/{JOURNALS}/README": b"?", f"{PREFIX}/{SNAPSHOTS}/x": b"?"})

    index_of(reader).refresh()
    index_of(reader).refresh()

    assert reader.get([0]) == [content(0)]
    assert counted_by_outcome(reader, telemetry.INDEX_JOURNALS) == {"folded": 1, "garbage": 2}
    assert good in paths(hub.endpoint, bucket)


@one_surface
def test_a_hub_that_does_not_answer_leaves_the_index_in_use_and_journals_waiting(hub, surfaces, indexed):
    surfaces().put([0])
    surface = indexed()
    surface.put([1])
    hub.control.add_fault(Fault(path_regex="^/api/buckets/", status=500))

    index_of(surface).refresh()
    assert not index_of(surface).flush()
    assert surface.lookup([0, 1, 2]) == [True, True, False]

    hub.control.clear_faults()
    assert index_of(surface).flush()
    assert counted_by_outcome(surface, telemetry.INDEX_JOURNALS) == {"written": 1, "not_written": 1}


@one_surface
def test_what_waits_is_bounded(hub, bucket, surfaces, indexed):
    writer = indexed(index_journal_waiting=2)
    reader = indexed()
    for number in range(5):
        writer.put([number])

    index_of(writer).flush()
    index_of(reader).refresh()

    assert reader.get(range(5)) == [None, None, None, content(3), content(4)]
    assert writer.get(range(5)) == [content(number) for number in range(5)]


def test_an_index_of_its_own_listing(hub, bucket, surfaces):
    writer = surfaces()
    writer.put([0])
    reader = surfaces(index="listing", index_refresh_secs=NEVER)
    in_use(reader)
    hub.control.reset_counters()

    assert reader.lookup([0, 1]) == [True, False]
    assert reader.get([0]) == [content(0)]
    assert hub_calls(hub) == {}
    reader.put([2])
    writer.put([3])
    assert reader.get([2, 3]) == [content(2), None]

    index_of(reader).refresh()

    assert reader.get([2, 3]) == [content(2), content(3)]
    assert not any(".hfbucket" in path for path in paths(hub.endpoint, bucket))


@one_surface
def test_it_renews_itself_and_tells_others_by_itself(hub, bucket, surfaces):
    build(hub.endpoint, bucket)
    quick = {"index": "snapshot", "index_refresh_secs": 0.05, "index_journal_secs": 0.05}
    writer, reader = surfaces(**quick), surfaces(**quick)
    in_use(writer)
    in_use(reader)

    writer.put([0])

    eventually(lambda: reader.lookup([0]) == [True])
    assert reader.get([0]) == [content(0)]


@one_surface
def test_the_probe_of_lmcaches_health_monitor_never_goes_by_the_index(hub, surfaces, indexed):
    surface = indexed()
    index = index_of(surface)
    key = "test@1@0@0@bfloat16"

    index.wrote(key, None)
    index.deleted(key)

    assert index.known([key], misses=True) == {}
    assert len(index._journal) == 0


@one_surface
def test_names_of_chunks_are_digested_as_they_lie_in_the_bucket(hub, bucket, surfaces, indexed):
    writer = surfaces()
    writer.put([7])
    reader = indexed()

    assert index_of(reader).known([writer.name(7)], misses=True)[writer.name(7)].size == CHUNK_BYTES
    assert index_of(reader).known([writer.name(7) + "@x"], misses=True) == {writer.name(7) + "@x": None}


@one_surface
def test_strangers_below_the_index_cost_few_calls_and_are_said(hub, surfaces, hub_factory, monkeypatch, caplog):
    monkeypatch.setattr("hfbucket_plugin.index.store.MAX_STRANGE", 20)
    small = hub_factory(page_size=10, faults=True)
    HfApi(endpoint=small.endpoint, token=False).create_bucket("tests/crowded")
    handle = {"handle": f"hf://buckets/tests/crowded/{PREFIX}", "endpoint": small.endpoint}
    surfaces(**handle).put([0])
    build(small.endpoint, "tests/crowded")
    upload(small.endpoint, "tests/crowded", {f"{PREFIX}/.hfbucket/index/{one:05d}": b"?" for one in range(300)})
    reader, writer = surfaces(**handle, **BY_HAND), surfaces(**handle, **BY_HAND)
    in_use(reader)
    in_use(writer)
    writer.put([1])
    assert index_of(writer).flush()
    small.control.reset_counters()

    index_of(reader).refresh()

    assert hub_calls(small) == {"paths-info": 1, "tree": 1}
    assert reader.get([0, 1]) == [content(0), content(1)]
    assert "holds more than 20 objects" in caplog.text
