"""What holds for both engine surfaces: the classic engine's connector and MP mode's L2 adapter pass the same tests."""

import functools
import threading
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import yaml
from huggingface_hub import HfApi
from lmcache.v1.distributed.l2_adapters import hfbucket_l2_adapter as built_in
from lmcache.v1.storage_backend.connector.hfbucket_connector import HFBucketClient
from lmcache.v1.storage_backend.connector.hfbucket_connector import HFBucketConnector as BuiltInConnector
from plugin_rig import OURS, Rig, engine_config, engine_metadata, running_loop
from plugin_support import download, eventually, in_threads, noise, paths, unused_port, upload
from surfaces import ClassicSurface, MPSurface, object_path

from hfbucket_plugin import connector, engine_memory, l2_adapter
from hfbucket_plugin.connector import HFBucketConnector
from hfbucket_plugin.deadlines import Deadline
from hfbucket_plugin.keys import encode_name
from hfbucket_plugin.l2_adapter import HFBucketL2Adapter, HFBucketL2AdapterConfig
from hfbucket_plugin.leases import Lease, SourceLease
from hfbucket_plugin.metrics import Tally
from hfbucket_plugin.xet import xet_config
from localhub.faults import Fault

BOUND = 6.0
"""What has a deadline of a second or less ends before this many seconds, however slow the machine is."""

LAYOUTS = {68: (1, 1, 17), 1024: (1, 1, 256), 15360: (3, 5, 256), 16384: (2, 8, 256), 3_179_604: (3, 1031, 257)}
"""Bytes of a full chunk to the layers, hidden size and tokens that make it: two are multiples of 4096, one takes two ranges."""

SIZE = 15360
PATTERN = b"\x5a"

NO_SUCH = 999
"""The number of a chunk that nobody wrote."""


def data(number, size=SIZE):
    return noise(size, number)


def chunks(*numbers, size=SIZE):
    return [(number, data(number, size)) for number in numbers]


@pytest.fixture(scope="module")
def loop():
    with running_loop() as one:
        yield one


@pytest.fixture(params=["classic", "mp"])
def kind(request):
    return request.param


@pytest.fixture
def make(hub, bucket, *, loop, kind, tmp_path, monkeypatch):
    """Makes surfaces of one kind over the bucket of the test: ours, or with `theirs` LMCache's built-in one."""
    # The built-in knows no other Hub than the one of HF_ENDPOINT, which is read when a process starts.
    monkeypatch.setattr(
        HFBucketClient, "__init__", lambda self, token: setattr(self, "_api", HfApi(endpoint=hub.endpoint, token=False))
    )
    made = []

    def classic(size, prefix, theirs, settings):
        tally = Tally()
        monkeypatch.setattr("hfbucket_plugin.connector.default_sink", lambda: tally)
        layers, hidden, tokens = LAYOUTS[size]
        values = {name: value for name, value in settings.items() if not theirs or name in BUILT_IN_SETTINGS}
        text = yaml.safe_dump(
            {
                "local_cpu": False,
                "max_local_cpu_size": max(0.004, 24 * size / 2**30),
                "save_unfull_chunk": False,
                "remote_storage_plugins": ["hfbucket"],
                "extra_config": {
                    f"remote_storage_plugin.hfbucket.{name}": value
                    for name, value in (values | ({} if theirs else OURS)).items()
                },
            }
        )
        config = engine_config(tmp_path / f"lmcache-{len(made)}.yaml", text)
        rig = Rig(config, "hfbucket", loop, metadata=engine_metadata(layers, hidden, tokens), tally=tally)
        assert type(rig.connector) is (BuiltInConnector if theirs else HFBucketConnector)
        return ClassicSurface(rig, prefix)

    def mp(size, prefix, theirs, settings):
        if theirs:
            values = {name: value for name, value in settings.items() if name in BUILT_IN_SETTINGS}
            return MPSurface(
                built_in.HFBucketL2Adapter(built_in.HFBucketL2AdapterConfig.from_dict(values)), size, prefix
            )
        tally = Tally()
        config = HFBucketL2AdapterConfig.from_dict(settings)
        return MPSurface(HFBucketL2Adapter(config, sink=tally), size, prefix, tally)

    def surface(size=SIZE, prefix="v1", *, theirs=False, **settings):
        values = {
            "bucket_handle": f"hf://buckets/{bucket}/{prefix}",
            "endpoint": hub.endpoint,
            "download_tmp_dir": str(tmp_path / "tmp"),
            "metadata_cache_ttl_secs": 0,
        } | settings
        made.append({"classic": classic, "mp": mp}[kind](size, prefix, theirs, values))
        assert made[-1].size == size
        return made[-1]

    yield surface
    hub.control.clear_faults()
    for one in made:
        one.end()


BUILT_IN_SETTINGS = {"bucket_handle", "download_tmp_dir", "metadata_cache_ttl_secs"}


@pytest.fixture
def surface(make):
    return make()


@pytest.fixture
def lent(monkeypatch):
    """How often each piece of the engine's memory was given back."""
    released = Counter()
    lock = threading.Lock()

    def counting(cls):
        class Counting(cls):
            def __init__(self, *args):
                super().__init__(*args)
                with lock:
                    released[self] += 0

            def release(self):
                with lock:
                    released[self] += 1
                super().release()

        return Counting

    monkeypatch.setattr(connector, "SourceMemory", counting(engine_memory.SourceMemory))
    monkeypatch.setattr(connector, "TargetMemory", counting(engine_memory.TargetMemory))
    monkeypatch.setattr(l2_adapter, "BorrowedMemory", counting(engine_memory.BorrowedMemory))
    return released


def requests(hub, route):
    return hub.control.counters().route(route).requests


# --- round trips ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", LAYOUTS)
def test_what_was_put_is_found_loaded_and_lies_in_the_bucket_as_it_is(hub, bucket, make, size):
    surface = make(size)

    assert surface.put(chunks(1, 2, size=size))

    assert surface.found([1, 2]) == [True, True]
    assert surface.get([2, 1]) == [data(2, size), data(1, size)]
    assert paths(hub.endpoint, bucket) == sorted(object_path(surface, number) for number in (1, 2))
    assert download(hub.endpoint, bucket, object_path(surface, 1)) == data(1, size), "no header, no padding"
    assert surface.count("put", "stored") == 2
    assert surface.count("get", "hit") == 2
    surface.settle()


def test_missing_chunks_are_misses_and_no_failures(surface):
    assert surface.found([1, 2]) == [False, False]
    assert surface.hits([1, 2]) == 0
    assert surface.get([1, 2]) == [None, None]
    assert surface.count("lookup", "missing") == 4
    assert surface.count("get", "missing") == 2
    surface.settle()


def test_a_gap_ends_the_hits_but_not_what_a_load_returns(surface):
    surface.put(chunks(1, 2, 4))

    assert surface.hits([1, 2, NO_SUCH, 4]) == 2
    assert surface.hits([NO_SUCH, 1]) == 0
    assert surface.hits([4, 2, 1]) == 3
    assert surface.get([1, NO_SUCH, 4]) == [data(1), None, data(4)]
    surface.settle()


def test_nothing_asked_for_is_answered_with_nothing_and_costs_no_request(hub, surface):
    hub.control.reset_counters()

    assert surface.put([])
    assert surface.found([]) == []
    assert surface.hits([]) == 0
    assert surface.get([]) == []
    surface.delete([])

    assert [requests(hub, route) for route in ("paths-info", "batch", "reconstruction", "xorb-upload")] == [0] * 4
    surface.settle()


def test_a_key_may_stand_in_a_call_more_than_once(hub, surface):
    assert surface.put([*chunks(1), *chunks(1), *chunks(2)])

    assert surface.found([1, 1, 2]) == [True] * 3
    assert surface.hits([1, 1, 2, 2]) == 4
    assert surface.get([1, 2, 1]) == [data(1), data(2), data(1)]
    assert surface.count("put", "stored") == 2
    assert surface.count("put", "under_way") == 1
    surface.delete([1, 1])
    assert surface.listed() == [surface.name(2)]
    surface.settle()


def test_many_threads_at_once(make):
    surface = make(lookup_timeout_secs=30)
    surface.put(chunks(*range(4)))

    def work(number):
        shared = number % 4
        return (
            surface.put(chunks(100 + number)),
            surface.put(chunks(50)),  # the same one in all threads
            surface.hits([0, 1, 2, 3, NO_SUCH]),
            surface.get([shared, 100 + number]) == [data(shared), data(100 + number)],
        )

    assert in_threads(12, work) == [(True, True, 4, True)] * 12

    assert surface.get([50]) == [data(50)]
    assert surface.listed() == sorted(surface.name(number) for number in [*range(4), 50, *range(100, 112)])
    surface.settle()


# --- sizes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [SIZE - 1, SIZE + 1, 0, 4096, 2 * SIZE])
def test_an_object_of_another_size_is_neither_found_nor_loaded(hub, bucket, surface, size):
    upload(hub.endpoint, bucket, {object_path(surface, 1): noise(size, 77)})
    surface.put(chunks(2))

    assert surface.found([1, 2]) == [False, True]
    assert surface.hits([2, 1]) == 1
    assert surface.get([1, 2]) == [None, data(2)]

    assert surface.count("lookup", "size") == 2
    assert surface.count("get", "size") == 1
    surface.settle()


def test_an_object_of_another_size_is_written_over(hub, bucket, surface):
    upload(hub.endpoint, bucket, {object_path(surface, 1): b"of another layout"})
    assert surface.found([1]) == [False]

    assert surface.put(chunks(1))

    assert surface.found([1]) == [True]
    assert surface.get([1]) == [data(1)]
    assert download(hub.endpoint, bucket, object_path(surface, 1)) == data(1)
    surface.settle()


def test_what_is_there_is_not_written_again(hub, bucket, make):
    surface = make()
    surface.put(chunks(1, 2))
    hub.control.reset_counters()

    assert surface.put([(1, data(11)), *chunks(2)])
    assert requests(hub, "batch") == requests(hub, "xorb-upload") == requests(hub, "shard-upload") == 0
    assert surface.put([(1, data(11)), *chunks(3)])

    assert requests(hub, "batch") == 1
    assert surface.count("put", "present") == 3
    assert download(hub.endpoint, bucket, object_path(surface, 1)) == data(1)
    surface.settle()


# --- delete, list ----------------------------------------------------------------------------------------------------------


def test_what_was_deleted_is_gone_at_once_and_deleting_it_again_is_fine(hub, bucket, make):
    surface = make(metadata_cache_ttl_secs=600)
    surface.put(chunks(1, 2, 3))
    assert surface.hits([1, 2, 3]) == 3

    surface.delete([1, 3])
    surface.delete([3, NO_SUCH])

    assert surface.found([1, 2, 3]) == [False, True, False]
    assert surface.get([1, 2, 3]) == [None, data(2), None]
    assert paths(hub.endpoint, bucket) == [object_path(surface, 2)]
    assert surface.put(chunks(3))
    assert surface.get([3]) == [data(3)]
    surface.settle()


def test_the_instance_lists_its_own_keys_and_nothing_else(hub, bucket, make):
    surface, longer = make(), make(prefix="v10")
    surface.put(chunks(*range(7)))
    longer.put(chunks(8))
    foreign = {"v1/.hfbucket/lock": b"x", "v1/foreign": b"x", "v1/deep/" + object_path(surface, 9): b"x"}
    upload(hub.endpoint, bucket, foreign)

    assert surface.listed() == sorted(surface.name(number) for number in range(7))
    assert longer.listed() == [surface.name(8)]


def test_an_empty_instance_lists_nothing(surface):
    assert surface.listed() == []


# --- roles ----------------------------------------------------------------------------------------------------------------


def test_a_read_only_instance_reads_and_neither_writes_nor_deletes(hub, bucket, make):
    make().put(chunks(1))
    surface = make(role="read-only")

    surface.put(chunks(1, 2))
    surface.delete([1])

    assert surface.found([1, 2]) == [True, False]
    assert surface.get([1]) == [data(1)]
    assert paths(hub.endpoint, bucket) == [object_path(surface, 1)]
    assert surface.count("put", "role") == 2
    assert surface.count("put", "stored") == 0
    surface.settle()


def test_a_write_only_instance_writes_and_finds_nothing(hub, bucket, make):
    surface = make(role="write-only")
    hub.control.reset_counters()

    assert surface.put(chunks(1, 2))
    written = requests(hub, "paths-info")
    assert surface.found([1, 2]) == [False, False]
    assert surface.hits([1]) == 0
    assert surface.get([1]) == [None]

    assert requests(hub, "paths-info") == written, "what is not read is not asked for"
    assert requests(hub, "xet-read-token") == 0
    assert surface.count("lookup", "role") == 3
    assert surface.count("get", "role") == 1
    assert make().get([1, 2]) == [data(1), data(2)]
    surface.delete([1])
    assert paths(hub.endpoint, bucket) == [object_path(surface, 2)]
    surface.settle()


# --- LMCache's built-in backend -------------------------------------------------------------------------------------------


PAGES = 16384
"""The built-in connector refuses chunks that are no multiples of 4096."""


def test_the_built_in_reads_what_ours_wrote(make):
    ours, theirs = make(PAGES), make(PAGES, theirs=True)
    ours.put(chunks(1, 2, size=PAGES))

    assert theirs.found([1, 2, NO_SUCH]) == [True, True, False]
    assert theirs.get([2, 1]) == [data(2, PAGES), data(1, PAGES)]


def test_ours_reads_lists_and_deletes_what_the_built_in_wrote(make):
    ours, theirs = make(PAGES), make(PAGES, theirs=True)
    assert theirs.put(chunks(1, 2, size=PAGES))

    assert ours.found([1, 2, NO_SUCH]) == [True, True, False]
    assert ours.get([2, NO_SUCH, 1]) == [data(2, PAGES), None, data(1, PAGES)]
    assert ours.listed() == sorted(ours.name(number) for number in (1, 2))
    assert ours.put([(1, data(9, PAGES))])
    assert theirs.get([1]) == [data(1, PAGES)], "it was there, and was not written again"
    ours.delete([1])
    assert theirs.found([1, 2]) == [False, True]
    assert theirs.get([2]) == [data(2, PAGES)]


# --- failures -------------------------------------------------------------------------------------------------------------

KINDS = {
    "denied": {"status": 403},
    "bucket_missing": {"status": 404, "headers": {"X-Error-Code": "RepoNotFound"}},
    "throttled": {"status": 429, "headers": {"Retry-After": "3600"}},
    "transport": {"status": 500},
    "deadline": {"hang": True},
}


@pytest.mark.parametrize("outcome", KINDS)
def test_a_failure_is_reported_in_time_counted_as_what_it_is_and_never_raised(hub, make, outcome):
    surface = make(get_timeout_secs=0.3, lookup_timeout_secs=0.3, put_timeout_secs=0.3, breaker_failures=100)
    hub.control.add_fault(Fault(route="paths-info", **KINDS[outcome]))
    started = time.monotonic()

    assert surface.found([1]) == [False]
    assert surface.hits([1, 2]) == 0
    assert surface.get([1, 2]) == [None, None]
    assert not surface.put(chunks(1, 2))

    assert time.monotonic() - started < 3 * BOUND
    told = "deadline" if outcome == "throttled" else outcome  # a put is patient: it waits for the pause
    assert surface.count("put", outcome) + surface.count("put", told) >= 2
    for operation, count in (("lookup", 3), ("get", 2)):
        assert surface.count(operation, outcome) == count
        assert surface.count(operation, "missing") == surface.count(operation, "hit") == 0
    surface.settle()


def test_a_hub_that_is_not_there(make):
    surface = make(endpoint=f"http://127.0.0.1:{unused_port()}", put_timeout_secs=1)

    assert surface.found([1]) == [False]
    assert surface.get([1]) == [None]
    assert not surface.put(chunks(1))
    assert surface.count("lookup", "transport") == surface.count("get", "transport") == 1
    surface.settle()


def test_what_fails_in_a_batch_fails_alone(hub, bucket, surface):
    hub.control.add_fault(Fault(route="batch", items=encode_name(surface.name(2)), items_error="no room"))

    assert not surface.put(chunks(1, 2, 3))

    assert paths(hub.endpoint, bucket) == sorted(object_path(surface, number) for number in (1, 3))
    assert surface.count("put", "hub") == 1
    assert surface.count("put", "stored") == 2
    hub.control.clear_faults()
    assert surface.put(chunks(1, 2, 3))
    assert surface.get([1, 2, 3]) == [data(1), data(2), data(3)]
    surface.settle()


def test_an_open_breaker_spares_the_time_and_closes_by_itself(hub, make):
    surface = make(breaker_failures=2, breaker_probe_secs=0.05, breaker_max_probe_secs=0.1)
    surface.put(chunks(1))
    hub.control.add_fault(Fault(route="paths-info", status=500))
    for _ in range(2):
        assert surface.found([1]) == [False]
    asked = hub.control.counters().route("paths-info").requests

    assert surface.found([1]) == [False]
    assert surface.count("lookup", "breaker") >= 1
    assert asked >= 2

    hub.control.clear_faults()
    assert eventually(lambda: surface.found([1]) == [True])
    assert surface.get([1]) == [data(1)]


# --- memory that is the engine's again --------------------------------------------------------------------------------------


@pytest.fixture
def deaf_sessions(monkeypatch):
    """Sessions that are patient, and go on when they are aborted: who was given up is not freed, and works on."""
    monkeypatch.setattr("hfbucket_plugin.xet._abort", lambda _session: None)
    monkeypatch.setattr("hfbucket_plugin.transfer.xet_config", lambda _secs, streams: xet_config(60, streams))


@pytest.fixture
def too_late(monkeypatch):
    """Notes each time that a thread came to memory that was not ours any more."""
    noted = []
    real_write, real_read = Lease.write, SourceLease.read

    def write(self, at, piece):
        taken = real_write(self, at, piece)
        if not taken:
            noted.append("write")
        return taken

    def read(self):
        found = real_read(self)
        if found is None:
            noted.append("read")
        return found

    monkeypatch.setattr(Lease, "write", write)
    monkeypatch.setattr(SourceLease, "read", read)
    return noted


LATE_ANSWERS = {
    "trickling": {"route": "xorb-data", "trickle_bytes": 1000, "trickle_interval_s": 0.06},
    "delayed": {"route": "xorb-data", "delay_s": 1.0},
    "held up": {"route": "xorb-data", "hang": True},
    "held up before": {"route": "reconstruction", "hang": True},
}


def scribble(views):
    assert views
    for view in views:
        view[:] = PATTERN * len(view)


def untouched(views):
    return all(view == PATTERN * len(view) for view in views)


def store_of(surface):
    return surface.rig.connector._store if isinstance(surface, ClassicSurface) else surface.adapter._store


def nobody_reads(surface):
    """Whether all threads that read have ended what they did, those that were given up included."""
    pool = store_of(surface).bucket.transfer._workers
    with pool._lock:
        return pool._idle == pool._threads and not pool._waiting


def nobody_writes(surface):
    """The same of those that upload and name."""
    pools = store_of(surface)._putter._threads, store_of(surface).puts._pool
    return all(pool._idle == pool._threads and not pool._waiting for pool in pools)


@pytest.mark.parametrize(("sessions", "fault"), [("aborted", "held up"), *(("deaf", fault) for fault in LATE_ANSWERS)])
def test_what_arrives_after_a_load_failed_is_written_nowhere(hub, make, request, *, too_late, sessions, fault):
    make().put(chunks(1, 2))
    if sessions == "deaf":
        request.getfixturevalue("deaf_sessions")
    surface = make(get_timeout_secs=0.3, breaker_failures=100)
    # With a session at hand the time is the data's alone.
    eventually(lambda: surface.get([NO_SUCH]) == [None] and store_of(surface).bucket.transfer.ready)
    late = hub.control.add_fault(Fault(**LATE_ANSWERS[fault]))

    eventually(lambda: surface.get([1, 2]) == [None, None] and hub.control.hits(late))
    views = surface.take_back()
    scribble(views)

    hub.control.clear_faults()
    eventually(lambda: nobody_reads(surface))
    assert untouched(views)
    if sessions == "deaf":
        assert "write" in too_late, "it did arrive"
    surface.settle()


LATE_PUTS = {
    "before anything": "paths-info",
    "before the session": "xet-write-token",
    "in the upload": "xorb-upload",
    "after the upload": "shard-upload",
    "in the naming": "batch",
}


def fresh(bucket, number):
    """Content that no other test uploads: what the store has already is not uploaded again."""
    return noise(SIZE, zlib.crc32(f"{bucket} {number}".encode()))


def contents(hub, bucket):
    return {path: download(hub.endpoint, bucket, path) for path in paths(hub.endpoint, bucket)}


@pytest.mark.parametrize(("sessions", "when"), [("aborted", "in the upload"), *(("deaf", when) for when in LATE_PUTS)])
def test_bytes_that_change_after_a_put_failed_never_get_into_the_bucket(hub, bucket, make, request, *, sessions, when):
    if sessions == "deaf":
        request.getfixturevalue("deaf_sessions")
    surface = make(put_timeout_secs=0.3, close_timeout_secs=1, breaker_failures=100)
    late = hub.control.add_fault(Fault(route=LATE_PUTS[when], hang=True))
    ours = [(number, fresh(bucket, number)) for number in (1, 2)]

    eventually(lambda: not surface.put(ours) and hub.control.hits(late))
    scribble(surface.take_back())

    hub.control.clear_faults()
    eventually(lambda: nobody_writes(surface))
    surface.settle()
    there = contents(hub, bucket)
    assert there.items() <= {object_path(surface, number): content for number, content in ours}.items()
    assert eventually(lambda: surface.put([(3, fresh(bucket, 3))]))
    surface.settle()


def test_a_source_that_nobody_came_to_before_its_put_failed_is_not_read(hub, bucket, make, deaf_sessions):
    surface = make(put_timeout_secs=0.3, breaker_failures=100)
    late = hub.control.add_fault(Fault(route="xet-write-token", hang=True))
    real_take = store_of(surface).bucket.transfer._writing.borrow
    # A thread that had been given up before it asked would be told so then; this one asks only afterwards.
    store_of(surface).bucket.transfer._writing.borrow = lambda _deadline: real_take(Deadline.after(30))

    assert not surface.put([(1, fresh(bucket, 1))])
    assert hub.control.hits(late)
    scribble(surface.take_back())
    hub.control.clear_faults()

    eventually(lambda: nobody_writes(surface))
    assert paths(hub.endpoint, bucket) == []
    surface.settle()


def test_after_close_every_call_is_a_miss_and_touches_no_memory(hub, bucket, surface):
    surface.put(chunks(1))
    surface.settle()
    surface.close()
    surface.close()
    hub.control.reset_counters()

    assert surface.found([1]) == [False]
    assert surface.hits([1]) == 0
    assert surface.get([1, 1]) == [None, None]
    assert not surface.put(chunks(2))
    surface.delete([1])

    if isinstance(surface, MPSurface):
        assert [bytes(view) for view in surface.take_back()] == [b"\xee" * SIZE] * 2 + [data(2)]
    surface.settle()
    assert paths(hub.endpoint, bucket) == [object_path(surface, 1)]
    assert requests(hub, "xorb-data") == requests(hub, "batch") == 0


@pytest.mark.parametrize("sessions", ["aborted", "deaf"])
def test_close_ends_what_is_under_way_and_nothing_touches_memory_afterwards(
    hub, bucket, make, request, *, monkeypatch, sessions
):
    monkeypatch.setattr("hfbucket_plugin.puts._YIELD_SECS", 0.05)  # the put would wait for the get
    make().put(chunks(1, 2))
    if sessions == "deaf":
        request.getfixturevalue("deaf_sessions")
    surface = make(close_timeout_secs=0.2, get_timeout_secs=2, put_timeout_secs=2)
    late = [hub.control.add_fault(Fault(route=route, hang=True)) for route in ("xorb-data", "xorb-upload")]

    with ThreadPoolExecutor(2) as threads:
        got = threads.submit(surface.get, [1, 2])
        put = threads.submit(surface.put, [(3, fresh(bucket, 3))])
        eventually(lambda: all(hub.control.hits(one) for one in late))
        started = time.monotonic()
        surface.close()
        assert time.monotonic() - started < BOUND
        views = surface.take_back()
        scribble(views)
        hub.control.clear_faults()
        assert got.result(BOUND) == [None, None]
        assert put.result(BOUND) is False

    eventually(lambda: nobody_reads(surface) and nobody_writes(surface))
    assert untouched(views)
    assert contents(hub, bucket) == {object_path(surface, number): data(number) for number in (1, 2)}
    surface.settle()


PUTS = {
    "stored": {},
    "denied": {"route": "xet-write-token", "status": 403},
    "not looked up": {"route": "paths-info", "status": 500},
    "not uploaded": {"route": "shard-upload", "status": 500},
    "not named": {"route": "batch", "status": 500},
    "refused by name": {"route": "batch", "items": ""},
    "late for the lookup": {"route": "paths-info", "hang": True},
    "late for the session": {"route": "xet-write-token", "hang": True},
    "late for the upload": {"route": "xorb-upload", "hang": True},
    "late for the naming": {"route": "batch", "hang": True},
}


@pytest.mark.parametrize("case", [*PUTS, "present", "read-only", "too many", "closed"])
def test_what_a_put_lends_is_given_back_exactly_once(hub, bucket, make, lent, case):
    settings = {"read-only": {"role": "read-only"}, "too many": {"max_waiting_put_bytes": 2 * SIZE}}.get(case, {})
    surface = make(put_timeout_secs=0.3 if PUTS.get(case, {}).get("hang") else 10, **settings)
    if case == "present":
        make().put(chunks(1, 2, 3))
        eventually(lambda: set(lent.values()) == {1})
        lent.clear()
    if case == "closed":
        surface.close()
    if PUTS.get(case):
        hub.control.add_fault(Fault(**PUTS[case]))

    # A key that stands there twice is stored once, and given back twice.
    content = data if case == "present" else functools.partial(fresh, bucket)
    surface.put([(number, content(number)) for number in (1, 2, 3, 3)])

    assert surface.count("put", "stored") == {"stored": 3, "too many": 2}.get(case, 0)
    hub.control.clear_faults()
    eventually(lambda: len(lent) == 4 and set(lent.values()) == {1})
    eventually(lambda: nobody_writes(surface) or case == "closed")
    assert set(lent.values()) == {1}
    surface.settle()


GETS = {
    "served": {},
    "denied": {"route": "reconstruction", "status": 403},
    "broken off": {"route": "xorb-data", "truncate_at": 10},
    "late": {"route": "xorb-data", "hang": True},
}


@pytest.mark.parametrize("case", GETS)
def test_what_a_load_fills_is_given_back_or_handed_on_and_never_both(hub, bucket, make, lent, case):
    make().put(chunks(1, 2))
    surface = make(get_timeout_secs=0.5 if case == "late" else 8)
    eventually(lambda: set(lent.values()) == {1})
    lent.clear()
    upload(hub.endpoint, bucket, {object_path(surface, 3): b"of another layout"})
    if GETS[case]:
        hub.control.add_fault(Fault(**GETS[case]))

    found = surface.get([1, NO_SUCH, 3, 2])

    assert found == ([data(1), None, None, data(2)] if case == "served" else [None] * 4)
    hub.control.clear_faults()
    eventually(lambda: nobody_reads(surface))
    # Memory is asked for only for what there is to be read, where the surface is not given it beforehand.
    handed_on = 2 if case == "served" else 0
    assert sum(lent.values()) == 2 - handed_on
    assert max(lent.values()) <= 1
    surface.settle()
