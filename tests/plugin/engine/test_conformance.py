"""One suite that both engine surfaces pass: LMCache's classic engine, and MP mode's L2 adapter, over one core."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from hfbucket_plugin.core.keys import encode_name
from localhub.faults import Fault
from tests.support.buckets import download, noise, paths, upload
from tests.support.lmcache_classic import Classic
from tests.support.surface import CHUNK_BYTES, PREFIX, Limits, chunks_counted, content, path_of, store_of
from tests.support.waiting import eventually

ALL = range(6)
_numbers = itertools.count(1)


@pytest.fixture
def surface(surfaces):
    return surfaces()


def test_what_is_put_is_found_got_and_listed_and_lies_there_as_it_is(hub, bucket, surface, surfaces):
    assert surface.lookup(ALL) == [False] * 6
    assert surface.get(ALL) == [None] * 6

    assert surface.put(ALL) is not False

    for one in (surface, surfaces()):
        assert one.lookup(ALL) == [True] * 6
        assert one.get(ALL) == [content(number) for number in ALL]
        assert sorted(one.list()) == sorted(one.name(number) for number in ALL)
    assert paths(hub.endpoint, bucket) == sorted(path_of(surface, number) for number in ALL)
    assert download(hub.endpoint, bucket, path_of(surface, 3)) == content(3)


def test_a_missing_chunk_is_a_miss_among_hits(surface):
    surface.put([0, 1, 3])

    assert surface.get(range(4)) == [content(0), content(1), None, content(3)]
    assert surface.lookup(range(3)) == [True, True, False]
    assert chunks_counted(surface.instance, "get")["missing"] == 1


def test_an_object_of_another_size_is_refused_and_rewritten(hub, bucket, surface):
    for size in (1, CHUNK_BYTES - 1, CHUNK_BYTES + 1):
        upload(hub.endpoint, bucket, {path_of(surface, 0): noise(size, size)})

        assert surface.lookup([0]) == [False]
        assert surface.get([0]) == [None]

    assert chunks_counted(surface.instance, "lookup") == {"size": 3}
    assert chunks_counted(surface.instance, "get") == {"size": 3}
    surface.put([0])
    assert surface.get([0]) == [content(0)]


def test_what_is_there_is_not_written_again(hub, surface):
    surface.put(ALL)
    hub.control.reset_counters()

    surface.put(ALL)

    for route in ("xorb-upload", "shard-upload", "batch", "xet-write-token"):
        assert hub.control.counters().route(route).requests == 0
    assert chunks_counted(surface.instance, "put") == {"stored": 6, "present": 6}


def test_a_delete_takes_what_is_named_and_nothing_else(hub, bucket, surface):
    surface.put(ALL)

    assert surface.delete([2])

    assert surface.get(range(4)) == [content(0), content(1), None, content(3)]
    assert path_of(surface, 2) not in paths(hub.endpoint, bucket)
    assert len(paths(hub.endpoint, bucket)) == 5


def test_objects_of_others_are_neither_listed_nor_touched(hub, bucket, surface):
    others = {
        f"{PREFIX}0/{encode_name(surface.name(1))}": b"a longer prefix",
        f"{PREFIX}/deep/{encode_name(surface.name(2))}": b"nested",
        f"{PREFIX}/.hfbucket/bad/x.json": b"{}",
        f"{PREFIX}/README": b"no key",
        encode_name(surface.name(3)): b"outside",
    }
    upload(hub.endpoint, bucket, others)
    surface.put([0])

    assert surface.list() == [surface.name(0)]
    assert surface.get([1, 2, 3]) == [None] * 3
    assert set(others) < set(paths(hub.endpoint, bucket))


def test_a_read_only_instance_reads_and_writes_nothing(hub, bucket, surfaces):
    surfaces().put([0])
    reader = surfaces(role="read-only")

    assert reader.lookup([0]) == [True]
    assert reader.get([0]) == [content(0)]
    assert reader.put([1]) is not True
    assert not reader.delete([0])

    assert paths(hub.endpoint, bucket) == [path_of(reader, 0)]
    assert chunks_counted(reader.instance, "put") == {"role": 1}


def test_a_write_only_instance_writes_and_finds_nothing(hub, surfaces):
    writer = surfaces(role="write-only")
    writer.put([0])
    hub.control.reset_counters()

    assert writer.lookup([0]) == [False]
    assert writer.get([0]) == [None]

    assert hub.control.counters().total.requests == 0
    assert surfaces().get([0]) == [content(0)]


def test_keys_twice_in_one_call(surface):
    surface.put([0, 1, 0])

    assert surface.lookup([0, 0, 1]) == [True] * 3
    assert surface.get([1, 0, 1]) == [content(1), content(0), content(1)]
    assert chunks_counted(surface.instance, "put") == {"stored": 2, "under_way": 1}
    assert surface.delete([1, 1])
    assert surface.list() == [surface.name(0)]


def test_nothing_asked_for_is_answered_with_nothing_and_costs_no_request(hub, surface):
    eventually(lambda: store_of(surface).bucket.transfer.ready)  # made at the start, for the first read
    hub.control.reset_counters()

    surface.put([])
    assert surface.lookup([]) == []
    assert surface.get([]) == []
    surface.delete([])

    asked = hub.control.counters()
    assert [asked.route(route).requests for route in ("paths-info", "batch", "reconstruction")] == [0] * 3


def test_what_was_deleted_is_gone_at_once_though_lookups_are_remembered(hub, bucket, surfaces):
    surface = surfaces(metadata_cache_ttl_secs=600, miss_cache_ttl_secs=600)
    assert surface.lookup(range(3)) == [False] * 3
    surface.put(range(3))
    assert surface.lookup(range(3)) == [True] * 3, "a miss that is remembered gives way to a put of ours"

    assert surface.delete([0, 2])
    assert surface.delete([2, 99]), "what is not there is as it should be"

    assert surface.lookup([1, 0]) == [True, False]
    assert surface.get(range(3)) == [None, content(1), None]
    assert paths(hub.endpoint, bucket) == [path_of(surface, 1)]
    assert surface.put([2]) is not False
    assert surface.get([2]) == [content(2)]


def test_many_threads_at_once(surface):
    def work(number):
        mine = [10 + number, 40 + number % 3]
        surface.put(mine)
        return surface.lookup(mine), surface.get(mine) == [content(one) for one in mine]

    with ThreadPoolExecutor(12) as threads:
        assert list(threads.map(work, range(24))) == [([True, True], True)] * 24


def test_after_close_everything_is_a_miss_and_nothing_is_asked(hub, surfaces):
    surface = surfaces()
    surface.put([0])
    surface.close()
    surface.close()
    hub.control.reset_counters()

    assert not surface.delete([0])
    if isinstance(surface, Classic):
        assert surface.lookup([0]) == [False]
        assert surface.get([0]) == [None]
    else:  # nobody polls a closed adapter's events; submitting raises nothing into a controller's loop
        assert surface.adapter.submit_lookup_and_lock_task([], {}) > 0
        assert surface.adapter.submit_store_task([], []) > 0
        surface.adapter.submit_unlock([])
    assert hub.control.counters().total.requests == 0


@pytest.mark.parametrize("verify", ["size", "hash"])
def test_flipped_bytes(hub, surfaces, verify):
    surfaces().put(ALL)
    reader = surfaces(verify=verify)
    hub.control.add_fault(Fault(route="xorb-data", flip_every=5000))

    found = reader.get(ALL)

    if verify == "hash":
        assert found == [None] * 6
        assert chunks_counted(reader.instance, "get") == {"integrity": 6}
    else:  # as the documents say: what Xet's own decoder does not notice passes
        assert None not in found
        assert found != [content(number) for number in ALL]


def test_an_object_that_two_fetches_show_to_be_bad_is_recorded_and_not_deleted(hub, bucket, surfaces, monkeypatch):
    monkeypatch.setattr("hfbucket_plugin.store.quarantine._FIRST_SECS", 0.0)
    surfaces().put([0])
    reader = surfaces(verify="hash")
    hub.control.add_fault(Fault(route="xorb-data", flip_every=5000))

    assert reader.get([0]) == [None]
    assert not [path for path in paths(hub.endpoint, bucket) if ".hfbucket" in path], "one fetch proves nothing"
    assert reader.get([0]) == [None]

    (record,) = eventually(lambda: [path for path in paths(hub.endpoint, bucket) if "/.hfbucket/bad/" in path])
    hub.control.clear_faults()
    assert reader.name(0).encode() in download(hub.endpoint, bucket, record)
    assert path_of(reader, 0) in paths(hub.endpoint, bucket)
    assert reader.list() == [reader.name(0)], "a record is no chunk"
    assert eventually(lambda: reader.get([0]) == [content(0)])


def test_a_budget_turns_lookups_into_misses_at_once(hub, surfaces):
    surfaces().put(ALL)
    reader = surfaces(max_hub_calls_per_minute=3)
    hub.control.reset_counters()

    found = [reader.lookup([number]) for number in (0, 1, 2, 3, 4, 5)]

    assert [True] in found
    assert found[-1] == [False]
    assert chunks_counted(reader.instance, "lookup")["budget"] >= 2
    calls = hub.control.counters()
    assert sum(calls.route(route).requests for route in ("paths-info", "xet-read-token", "tree")) <= 3


def test_lookups_of_the_same_keys_ask_once(hub, surfaces):
    surfaces().put(ALL)
    reader = surfaces(metadata_cache_ttl_secs=60)
    hub.control.add_fault(Fault(route="paths-info", delay_s=0.5))
    hub.control.reset_counters()

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(lambda _: reader.lookup(ALL), range(8))) == [[True] * 6] * 8

    assert hub.control.counters().route("paths-info").requests == 1


def test_puts_of_several_requests_are_named_together(hub, surfaces):
    """While one is being uploaded, what another has uploaded waits to share its call."""
    surface = surfaces(put_window_secs=20)
    held = hub.control.add_fault(Fault(route="shard-upload", hang=True, times=1))
    hub.control.reset_counters()

    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(surface.put, [100])
        eventually(lambda: hub.control.hits(held) == 1)
        second = threads.submit(surface.put, [101])
        eventually(lambda: hub.control.counters().route("shard-upload").requests == 2)
        hub.control.clear_faults()
        first.result(60)
        second.result(60)

    assert hub.control.counters().route("batch").requests == 1
    assert surface.get([100, 101]) == [content(100), content(101)]


def test_what_is_written_meanwhile_by_another_is_seen(hub, bucket, surface):
    assert surface.lookup([0]) == [False]
    upload(hub.endpoint, bucket, {path_of(surface, 0): content(0)})

    assert surface.lookup([0]) == [True]
    assert surface.get([0]) == [content(0)]


def test_a_bucket_is_made_by_the_first_put(hub, surfaces):
    name = f"tests/lazy-{next(_numbers)}"
    hub.control.reset_counters()
    surface = surfaces(create_bucket_if_missing=True, bucket_handle=f"hf://buckets/{name}/{PREFIX}")
    assert surface.lookup([0]) == [False]
    assert surface.get([0]) == [None]
    assert hub.control.counters().route("bucket-create").requests == 0
    for operation in ("lookup", "get"):
        assert chunks_counted(surface.instance, operation) == {"missing": 1}

    surface.put([0])
    surface.put([1])

    assert surface.get([0]) == [content(0)]
    assert hub.control.counters().route("bucket-create").requests == 1
    assert HfApi(endpoint=hub.endpoint, token=False).bucket_info(name).id == name


def test_temporary_files_do_not_stay(hub, surfaces, tmp_path):
    surfaces().put(ALL)
    reader = surfaces(verify="hash", download_tmp_dir=str(tmp_path / "space"))
    assert reader.get(ALL) == [content(number) for number in ALL]
    assert {path.name for path in Path(tmp_path / "space").rglob("*") if path.is_file()} <= {".lock"}

    reader.close()

    assert [path for path in Path(tmp_path / "space").rglob("*") if path.is_file()] == []


# --- failures ---------------------------------------------------------------------------------------------------------

KINDS = {
    "denied": {"status": 403},
    "bucket_missing": {"status": 404, "headers": {"X-Error-Code": "RepoNotFound"}},
    "throttled": {"status": 429, "headers": {"Retry-After": "3600"}},
    "transport": {"status": 500},
    "deadline": {"hang": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_failure_is_a_miss_that_is_counted_as_what_it_is_and_never_raised(hub, surfaces, kind):
    short = [Limits(lookup=0.3, get=0.3, put=0.3)] if kind == "deadline" else []
    surface = surfaces(*short, breaker_failures=100)
    hub.control.add_fault(Fault(route="paths-info", **KINDS[kind]))

    assert surface.lookup([0, 1]) == [False, False]
    assert surface.get([0, 1]) == [None, None]
    assert surface.put([0, 1]) is not True

    assert chunks_counted(surface.instance, "lookup") == {kind: 2}
    assert chunks_counted(surface.instance, "get") == {kind: 2}
    assert chunks_counted(surface.instance, "put") == {kind: 2}


def test_what_fails_in_a_batch_fails_alone(hub, bucket, surface):
    hub.control.add_fault(Fault(route="batch", items=encode_name(surface.name(1)), items_error="no room"))

    assert surface.put(range(3)) is not True

    assert paths(hub.endpoint, bucket) == sorted(path_of(surface, number) for number in (0, 2))
    assert chunks_counted(surface.instance, "put") == {"stored": 2, "hub": 1}
    hub.control.clear_faults()
    assert surface.put(range(3)) is not False
    assert surface.get(range(3)) == [content(number) for number in range(3)]
