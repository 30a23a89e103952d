import logging
import threading
import time
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi

from hfbucket_plugin.core import telemetry
from hfbucket_plugin.core.buffers import RevocableBuffer
from hfbucket_plugin.core.concurrency import ReadPriority, WorkerPool
from hfbucket_plugin.core.deadline import Deadline
from hfbucket_plugin.core.keys import encode_name
from hfbucket_plugin.core.telemetry import MemorySink
from hfbucket_plugin.errors import HFBucketError, TransportError
from hfbucket_plugin.store.chunk_store import ChunkStore
from localhub.faults import Fault
from tests.support.buckets import SECRET, download, instance_settings, noise, paths, upload
from tests.support.waiting import eventually, in_threads, run_script, unused_port

SIZE = 100_000
BOUND = 15.0
"""What has a deadline of half a second ends before this many seconds, however slow the machine is."""

NO_BUCKET = {"X-Error-Code": "RepoNotFound"}


def key(number, model="org/model"):
    return f"{model}@1@0@{number:x}@bfloat16"


KEYS = [key(number) for number in range(6)]
DATA = {name: noise(SIZE, number) for number, name in enumerate(KEYS)}


def soon(seconds=60.0):
    return Deadline.after(seconds)


class Memory:
    """Memory of an engine's: a buffer or a source that knows how often it was given back."""

    def __init__(self, data, name=""):
        self.key = name
        self.data = bytearray(data)
        self.released = 0

    @property
    def view(self):
        assert not self.released, "used after it was given back"
        return memoryview(self.data)

    @property
    def lease(self):
        return RevocableBuffer(self.view)

    def release(self):
        self.released += 1
        assert self.released == 1, "given back twice"


class Engine:
    """What an engine does with a store, and all the memory that it lent to it."""

    def __init__(self, store, tally):
        self.store, self.tally = store, tally
        self.buffers = []

    def hits(self, keys, size=SIZE):
        return self.store.prefix_hits(keys, size)

    def get(self, keys, size=SIZE, seconds=60.0, memory=1000, **options):
        def open_buffer(_index):
            if len(self.buffers) >= memory:
                return None
            self.buffers.append(Memory(bytes(size)))
            return self.buffers[-1]

        found = self.store.read_many(keys, [size] * len(keys), open_buffer, soon(seconds), **options)
        assert len(found) == len(keys)
        for buffer in self.buffers:
            assert buffer.released == (buffer not in found), "what is not returned is given back, and nothing else"
        self.buffers.clear()
        return [None if buffer is None else bytes(buffer.data) for buffer in found]

    def put(self, data, size=SIZE, seconds=60.0):
        sources = [Memory(content, name) for name, content in data.items()]
        failures = self.store.puts.submit(sources, size, soon(seconds)).result().failures
        eventually(lambda: all(source.released == 1 for source in sources))
        return {failure.item: failure for failure in failures}

    def count(self, operation, outcome):
        return self.tally.get(telemetry.CHUNKS, operation=operation, outcome=outcome)

    def ended(self, operation, outcome):
        return self.tally.get(telemetry.OPERATIONS, operation=operation, outcome=outcome)


@pytest.fixture
def connect(hub, bucket, tmp_path):
    """Makes stores on the bucket of the test, closed at its end."""
    stores = []

    def make(bucket_id=bucket, prefix="v1", get_secs=9.0, endpoint=hub.endpoint, **values):
        values = {"download_tmp_dir": str(tmp_path / "tmp"), "lookup_timeout_secs": 5.0} | values  # of a busy machine
        tally = MemorySink()
        own = instance_settings(endpoint, bucket_id, prefix, **values)
        stores.append(ChunkStore(own, "hfbucket", tally, get_secs))
        return Engine(stores[-1], tally)

    yield make
    for store in stores:
        store.close()


@pytest.fixture
def engine(connect):
    return connect()


@pytest.fixture
def filled(hub, bucket):
    """The bucket of the test with chunks in it that somebody else wrote."""
    upload(hub.endpoint, bucket, {f"v1/{encode_name(name)}": data for name, data in DATA.items()})
    hub.control.reset_counters()
    return bucket


def requests(hub, route):
    return hub.control.counters().route(route).requests


# --- lookup --------------------------------------------------------------------------------------------------------------


def test_a_read_that_ends_as_nobody_expected_gives_all_memory_back(filled, engine, monkeypatch):
    def fail(_reads, _deadline):
        raise KeyError("unexpected")

    monkeypatch.setattr(engine.store.bucket.transfer, "read", fail)

    with pytest.raises(KeyError):
        engine.get(KEYS)
    assert [buffer.released for buffer in engine.buffers] == [1] * len(KEYS)


def test_of_a_lookup_of_thousands_a_page_that_fails_leaves_the_others_known(hub, filled, connect):
    engine = connect(lookup_timeout_secs=3.0)
    many = [*KEYS, *(key(number, "org/none") for number in range(3000))]
    hub.control.add_fault(Fault(route="paths-info", hang=True, times=1))

    found = engine.store.found(many, [SIZE] * len(many))

    assert requests(hub, "paths-info") == 4
    reported = engine.tally
    assert engine.count("lookup", "missing") + sum(found) in (2006, 3000)  # of four pages, whichever hung
    assert reported.get(telemetry.CHUNKS, operation="lookup", outcome="deadline") in (6, 1000)
    assert not engine.store.breakers.status()
    assert engine.store.found(many, [SIZE] * len(many))[:6] == [True] * 6


def test_hits_are_counted_up_to_the_first_gap(hub, filled, engine):
    assert engine.hits(KEYS) == 6
    assert engine.hits([*KEYS[:2], "m@1@0@ff@half", *KEYS[2:]]) == 2
    assert engine.hits(["m@1@0@ff@half", *KEYS]) == 0
    assert engine.hits([]) == 0
    assert engine.hits([KEYS[0]] * 3) == 3
    assert engine.hits(KEYS, size=SIZE + 1) == 0
    assert engine.count("lookup", "hit") == 6 + 2 + 3
    assert engine.count("lookup", "missing") == 2
    assert engine.count("lookup", "behind_a_gap") == 4 + 6
    assert engine.count("lookup", "size") == 6
    assert engine.ended("lookup", "ok") == 6


def test_a_lookup_is_one_request_and_the_next_one_none(hub, filled, engine):
    engine.hits(KEYS)
    engine.hits(KEYS)
    engine.hits(KEYS[2:4])
    engine.get(KEYS[:1])

    assert requests(hub, "paths-info") == 1


def test_keys_are_forgotten_when_their_time_is_over(hub, filled, connect):
    engine = connect(metadata_cache_ttl_secs=0)

    for _ in range(3):
        assert engine.hits(KEYS) == 6

    assert requests(hub, "paths-info") == 3


def test_a_miss_is_believed_for_a_while_only(hub, bucket, connect):
    engine = connect(miss_cache_ttl_secs=0.4)
    assert engine.hits(KEYS[:1]) == 0
    upload(hub.endpoint, bucket, {f"v1/{encode_name(KEYS[0])}": DATA[KEYS[0]]})

    eventually(lambda: engine.hits(KEYS[:1]) == 1)

    assert connect(metadata_cache_ttl_secs=600, miss_cache_ttl_secs=600).hits(KEYS[:1]) == 1


def test_a_miss_is_not_asked_again_at_once(hub, bucket, connect):
    engine = connect(metadata_cache_ttl_secs=600, miss_cache_ttl_secs=600)
    engine.hits(KEYS)
    hub.control.reset_counters()

    assert engine.hits(KEYS) == 0
    assert requests(hub, "paths-info") == 0


def test_lookups_of_some_keys_in_common_ask_each_key_once(hub, filled, connect):
    engine = connect(lookup_timeout_secs=30)
    hub.control.add_fault(Fault(route="paths-info", delay_s=0.5))

    assert in_threads(6, lambda number: engine.hits(KEYS[: number + 1])) == [1, 2, 3, 4, 5, 6]

    assert requests(hub, "paths-info") <= 6


@pytest.fixture
def hasty_quarantine(monkeypatch):
    """What could not be served is offered again at once: a test need not wait for it."""
    monkeypatch.setattr("hfbucket_plugin.store.quarantine._FIRST_SECS", 0.01)


KINDS = {
    "denied": {"status": 401},
    "denied too": {"status": 403},
    "bucket_missing": {"status": 404, "headers": NO_BUCKET},
    "throttled": {"status": 429, "headers": {"Retry-After": "1"}},
    "transport": {"status": 500},
    "transport: garbage": {"status": 200, "body": "<html>"},
    "refused": {"status": 400},
    "deadline": {"hang": True},
}


@pytest.mark.parametrize("case", KINDS)
def test_a_failure_is_no_miss_and_counted_as_what_it_is(hub, filled, connect, caplog, case):
    engine = connect(get_secs=0.5, lookup_timeout_secs=0.5)
    hub.control.add_fault(Fault(route="paths-info", **KINDS[case]))
    kind = case.split()[0].rstrip(":")
    started = time.monotonic()

    assert engine.hits(KEYS) == 0
    assert engine.get(KEYS, seconds=0.5) == [None] * 6

    assert time.monotonic() - started < 2 * BOUND
    for operation in ("lookup", "get"):
        assert engine.count(operation, kind) == 6, engine.tally._counts
        assert engine.ended(operation, kind) == 1
        assert engine.count(operation, "missing") == 0
        assert f"[hfbucket] {operation}: " in caplog.text
    hub.control.clear_faults()
    assert eventually(lambda: engine.hits(KEYS)) == 6, "a failure is not kept"


def test_a_hub_that_is_not_there(connect, filled):
    engine = connect(endpoint=f"http://127.0.0.1:{unused_port()}")

    assert engine.hits(KEYS) == 0
    assert engine.get(KEYS) == [None] * 6
    assert engine.put(DATA).keys() == set(KEYS)
    assert engine.count("lookup", "transport") == engine.count("put", "transport") == 6


def test_a_warning_comes_once_and_does_not_show_the_token(hub, filled, connect, caplog):
    engine = connect(token=SECRET)
    hub.control.add_fault(Fault(route="paths-info", status=500, body=f"Bearer {SECRET}"))

    for _ in range(5):
        engine.hits(KEYS)

    assert caplog.text.count("[hfbucket] lookup: ") == 2, "why it failed, and that it is not tried any more"
    assert SECRET not in caplog.text


def test_a_failing_thread_is_a_failure_and_not_a_crash(filled, engine, monkeypatch):
    monkeypatch.setattr(engine.store.bucket, "stat", lambda *_, **__: {}[1])

    assert engine.hits(KEYS) == 0
    assert engine.get(KEYS) == [None] * 6
    assert engine.put(DATA).keys() == set(KEYS)
    assert engine.count("lookup", "transport") == 6


def test_a_key_that_cannot_be_encoded_is_a_failure_and_not_a_hang(filled, connect):
    engine = connect(lookup_timeout_secs=30)
    odd = "m\ud800@1@0@ab@half"
    started = time.monotonic()

    assert engine.hits([odd]) == 0
    assert engine.get([odd]) == [None]
    assert engine.put({odd: bytes(SIZE)}).keys() == {odd}
    assert time.monotonic() - started < 2 * BOUND


def test_more_lookups_than_the_hub_answers_are_refused_and_not_queued_for_ever(hub, filled, connect):
    engine = connect(lookup_timeout_secs=0.5)
    hub.control.add_fault(Fault(route="paths-info", hang=True))
    started = time.monotonic()

    hits = in_threads(100, lambda number: engine.hits([key(number, "other")]))

    assert hits == [0] * 100
    assert time.monotonic() - started < 2 * BOUND
    hub.control.clear_faults()
    eventually(lambda: engine.hits(KEYS) == 6)


def test_who_has_more_time_is_not_bound_by_a_lookup_of_the_same_key(hub, filled, connect):
    engine = connect(lookup_timeout_secs=0.5)
    hub.control.add_fault(Fault(route="paths-info", hang=True, times=1))
    lookup = threading.Thread(target=engine.hits, args=(KEYS,))
    lookup.start()
    eventually(lambda: requests(hub, "paths-info") == 1)

    assert engine.put(DATA) == {}
    assert engine.count("put", "present") == len(KEYS)

    lookup.join()
    assert engine.count("lookup", "deadline") == len(KEYS)


def test_more_lookups_at_once_than_one_answer_has_time_for_are_all_answered(hub, filled, connect):
    engine = connect(lookup_timeout_secs=3.0, metadata_cache_ttl_secs=0)
    hub.control.add_fault(Fault(route="paths-info", delay_s=0.4))

    # One after the other on eight threads, the last would have less time than the Hub takes.
    hits = in_threads(40, lambda number: engine.hits([KEYS[number % 6]]))

    assert hits == [1] * 40
    assert not engine.store.breakers.status()


def test_a_question_that_was_never_sent_says_nothing_about_the_hub(hub, filled, connect, monkeypatch):
    engine = connect(lookup_timeout_secs=0.2)
    busy, free = threading.Event(), threading.Event()
    pool = WorkerPool("held", 1)
    pool.submit(lambda: (busy.set(), free.wait(60)))
    assert busy.wait(30)
    monkeypatch.setattr(engine.store.bucket._hub, "_threads", pool)

    assert [engine.hits([name]) for name in KEYS] == [0] * 6

    free.set()
    assert requests(hub, "paths-info") == 0
    assert not engine.store.breakers.status()
    assert engine.count("lookup", "deadline") == 6


def test_in_a_pause_lookups_are_misses_at_once_however_many_puts_wait_for_its_end(hub, filled, connect):
    engine = connect(lookup_timeout_secs=20, max_parallel_writes=8)
    quota = {"ratelimit": '"api";r=0;t=30', "ratelimit-policy": '"fixed window";"api";q=1000;w=300'}
    hub.control.add_fault(Fault(route="paths-info", status=429, headers=quota))
    assert engine.hits([key(99)]) == 0
    for number in range(100, 108):
        engine.store.puts.submit([Memory(noise(SIZE, number), key(number))], SIZE, soon())
    eventually(lambda: engine.store._writer._in_progress.keys() == {key(number) for number in range(100, 108)})

    started = time.monotonic()
    assert [engine.hits([name]) for name in KEYS] == [0] * 6

    assert time.monotonic() - started < BOUND
    assert not engine.store.breakers.status()
    assert requests(hub, "paths-info") == 1, "and the Hub was not asked"


# --- get -----------------------------------------------------------------------------------------------------------------


def test_chunks_arrive_in_the_order_of_their_keys(filled, engine):
    wanted = [KEYS[3], "m@1@0@ff@half", KEYS[0], KEYS[5]]

    assert engine.get(wanted) == [DATA[KEYS[3]], None, DATA[KEYS[0]], DATA[KEYS[5]]]
    assert engine.count("get", "hit") == 3
    assert engine.count("get", "missing") == 1
    assert engine.tally.get(telemetry.BYTES, direction="read") == 3 * SIZE
    assert engine.tally.get(f"{telemetry.SECONDS}_count", operation="get") == 1


def test_one_key_asked_for_twice_arrives_twice(filled, engine):
    assert engine.get([KEYS[0], KEYS[0]]) == [DATA[KEYS[0]]] * 2


def test_a_prefix_ends_at_the_first_miss(filled, engine):
    wanted = [KEYS[0], KEYS[1], "m@1@0@ff@half", KEYS[2]]

    assert engine.get(wanted, prefix_only=True) == [DATA[KEYS[0]], DATA[KEYS[1]], None, None]


@pytest.mark.parametrize("size", [1, SIZE - 1, SIZE + 1, 2 * SIZE])
def test_an_object_of_another_size_is_refused(hub, filled, engine, caplog, size):
    upload(hub.endpoint, filled, {f"v1/{encode_name(key(99))}": noise(size)})

    assert engine.get([KEYS[0], key(99), KEYS[1]]) == [DATA[KEYS[0]], None, DATA[KEYS[1]]]
    assert engine.count("get", "size") == 1
    assert engine.count("get", "missing") == 0
    assert f"{size} bytes" in caplog.text
    assert engine.hits([key(99)]) == 0


def test_without_memory_the_rest_are_misses(filled, engine, caplog):
    assert engine.get(KEYS, memory=2) == [DATA[KEYS[0]], DATA[KEYS[1]], None, None, None, None]
    assert engine.count("get", "allocation") == 4
    assert "no memory" in caplog.text


def test_of_a_get_what_is_known_is_served_though_the_rest_cannot_be_looked_up(hub, filled, engine):
    assert engine.hits(KEYS[:5]) == 5
    hub.control.add_fault(Fault(route="paths-info", status=500))

    assert engine.get(KEYS) == [*(DATA[name] for name in KEYS[:5]), None]

    assert engine.count("get", "hit") == 5
    assert engine.count("get", "transport") == 1
    assert engine.ended("get", "transport") == 1


@pytest.mark.parametrize("operation", ["get", "lookup"])
def test_a_page_that_fails_costs_its_own_keys_only_though_nothing_is_cached(filled, connect, monkeypatch, operation):
    engine = connect(metadata_cache_ttl_secs=0)
    bad = f"v1/{encode_name(key(1500, 'org/none'))}"
    real = engine.store.bucket.stat

    def stat(paths, deadline, **options):
        if bad in paths:
            raise TransportError("no answer")
        return real(paths, deadline, **options)

    monkeypatch.setattr(engine.store.bucket, "stat", stat)
    many = [*KEYS, *(key(number, "org/none") for number in range(1994))]

    if operation == "get":
        assert engine.get(many)[:6] == [DATA[name] for name in KEYS]
    else:
        assert sum(engine.store.found(many, [SIZE] * len(many))) == 6

    assert engine.count(operation, "hit") == 6
    assert engine.count(operation, "transport") == 1000


def test_a_get_of_which_nothing_is_known_fails_as_what_it_is(hub, filled, engine):
    hub.control.add_fault(Fault(route="paths-info", status=500))

    assert engine.get(KEYS) == [None] * 6

    assert engine.count("get", "transport") == 6


def test_a_buffer_that_is_larger_than_the_content_is_not_served_with_an_end_that_nobody_filled(filled, engine):
    lent = []

    def open_buffer(index):
        lent.append(Memory(bytes(SIZE + (index == 1))))
        return lent[-1]

    found = engine.store.read_many(KEYS[:3], [SIZE] * 3, open_buffer, soon())

    assert [buffer is not None for buffer in found] == [True, False, True]
    assert [buffer.released for buffer in lent] == [0, 1, 0]
    assert engine.count("get", "size") == 1


def test_an_allocator_that_fails_leaks_nothing(filled, engine):
    lent = []

    def open_buffer(index):
        if index == 3:
            raise RuntimeError("no more")
        lent.append(Memory(bytes(SIZE)))
        return lent[-1]

    found = engine.store.read_many(KEYS, [SIZE] * len(KEYS), open_buffer, soon())

    assert [buffer is not None for buffer in found] == [True, True, True, False, False, False]
    assert [buffer.released for buffer in lent] == [0, 0, 0]
    assert engine.count("get", "allocation") == 3


def test_what_arrived_before_the_deadline_is_served(hub, filled, connect):
    engine = connect(get_secs=0.5)
    engine.get(KEYS[:1])
    contents = engine.store._existence.contents(KEYS, soon())
    for name in KEYS[3:5]:
        hub.control.add_fault(Fault(route="reconstruction", path=contents[name].xet_hash, hang=True))
    started = time.monotonic()

    found = engine.get(KEYS, seconds=0.5)

    assert time.monotonic() - started < BOUND
    assert found == [DATA[name] if name not in KEYS[3:5] else None for name in KEYS]
    assert engine.count("get", "hit") == 1 + 4
    assert engine.count("get", "deadline") + engine.count("get", "transport") == 2


@pytest.mark.parametrize(
    ("fault", "kinds"),
    [
        ({"route": "reconstruction", "status": 404}, {"missing", "transport"}),
        ({"route": "reconstruction", "status": 401}, {"denied", "transport"}),
        ({"route": "xorb-data", "status": 500}, {"transport"}),
        ({"route": "xorb-data", "truncate_at": 100}, {"transport", "integrity"}),
        ({"route": "xet-read-token", "status": 403}, {"denied"}),
        ({"route": "xet-read-token", "status": 429, "headers": {"Retry-After": "1"}}, {"throttled"}),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "-".join(sorted(value)),
)
@pytest.mark.usefixtures("hasty_quarantine")
def test_a_failed_read_is_counted_as_what_it_is_and_service_resumes(hub, filled, engine, fault, kinds):
    hub.control.add_fault(Fault(**fault))

    assert engine.get(KEYS) == [None] * 6

    assert sum(engine.count("get", kind) for kind in kinds) == 6, engine.tally._counts
    assert engine.count("get", "hit") == 0
    hub.control.clear_faults()
    eventually(lambda: engine.get(KEYS) == list(DATA.values()))


def test_a_chunk_found_missing_at_read_time_is_asked_for_again(hub, filled, connect, hasty_quarantine):
    engine = connect(metadata_cache_ttl_secs=600)
    assert engine.hits(KEYS[:1]) == 1
    hub.control.add_fault(Fault(route="reconstruction", status=404))

    def read_as_missing():
        assert engine.get(KEYS[:1]) == [None]
        return engine.count("get", "missing")

    eventually(read_as_missing)
    hub.control.clear_faults()
    hub.control.reset_counters()

    eventually(lambda: engine.get(KEYS[:1]) == [DATA[KEYS[0]]])
    assert requests(hub, "paths-info") == 1


# --- verify --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verify", ["size", "hash"])
def test_flipped_bytes_are_served_by_size_and_refused_by_hash(hub, filled, connect, verify, hasty_quarantine):
    engine = connect(verify=verify)
    hub.control.add_fault(Fault(route="xorb-data", flip_at=(1000,), times=1))

    found = engine.get(KEYS[:1])[0]

    if verify == "size":
        assert found is not None
        assert found != DATA[KEYS[0]]
    else:
        assert found is None
        assert engine.count("get", "integrity") == 1
        eventually(lambda: engine.get(KEYS) == list(DATA.values()))
        hub.control.reset_counters()
        engine.get(KEYS[:1])
        assert requests(hub, "paths-info") == 0


def test_by_size_no_chunk_is_ever_in_a_file(filled, connect, tmp_path):
    engine = connect()
    engine.store.begin(reads=False)

    assert engine.get(KEYS) == list(DATA.values())
    assert engine.put({key(50): noise(SIZE, 50)}) == {}
    kept = [path for path in (tmp_path / "tmp").rglob("*") if path.is_file()]
    assert {path.suffix or path.name for path in kept} <= {".mdb", ".lock"}, "hf_xet's own, and the lock"
    assert sum(path.stat().st_size for path in kept) < SIZE / 10
    engine.store.close()
    assert list((tmp_path / "tmp").iterdir()) == []


def test_without_room_to_compute_a_hash_nothing_is_served(filled, connect, tmp_path):
    (tmp_path / "file").write_text("in the way")
    engine = connect(verify="hash", download_tmp_dir=str(tmp_path / "file"))

    assert engine.get(KEYS) == [None] * 6
    assert engine.count("get", "config") == 6


def test_a_hash_takes_no_longer_than_the_deadline(hub, filled, connect, monkeypatch):
    engine = connect(verify="hash")
    hashed = []

    def slowly(files):
        hashed.extend(files)
        time.sleep(0.4)
        return real(files)

    from hfbucket_plugin.store import read

    real = read.xet_hashes
    monkeypatch.setattr(read, "xet_hashes", slowly)
    engine.hits(KEYS)
    engine.get(KEYS, seconds=0.6)

    assert len(hashed) <= 3
    assert engine.count("get", "deadline") >= 3


# --- put -----------------------------------------------------------------------------------------------------------------


def test_what_was_put_is_there_for_everybody(hub, bucket, engine, connect):
    assert engine.put(DATA) == {}

    assert paths(hub.endpoint, bucket) == sorted(f"v1/{encode_name(name)}" for name in KEYS)
    assert download(hub.endpoint, bucket, f"v1/{encode_name(KEYS[2])}") == DATA[KEYS[2]]
    assert connect().get(KEYS) == list(DATA.values())
    assert engine.count("put", "stored") == 6
    assert engine.tally.get(telemetry.BYTES, direction="write") == 6 * SIZE
    assert engine.ended("put", "ok") == 1


def test_what_is_there_at_another_size_is_written_over(hub, filled, engine):
    new = {KEYS[0]: noise(2 * SIZE, 77)}

    assert engine.put(new, size=2 * SIZE) == {}

    assert download(hub.endpoint, filled, f"v1/{encode_name(KEYS[0])}") == new[KEYS[0]]
    assert engine.hits(KEYS[:1], size=2 * SIZE) == 1


@pytest.mark.parametrize("size", [0, 1, SIZE - 1, SIZE + 1])
def test_a_partial_chunk_is_refused_and_the_rest_of_its_batch_stored(hub, bucket, engine, size):
    failed = engine.put({**DATA, key(99): noise(size)})

    assert {item: failure.kind for item, failure in failed.items()} == {key(99): "refused"}
    assert f"{size} bytes" in failed[key(99)].message
    assert len(paths(hub.endpoint, bucket)) == 6
    assert engine.count("put", "refused") == 1
    assert engine.count("put", "stored") == 6


def test_the_probe_of_lmcache_is_always_written(hub, bucket, engine):
    probe = "test@1@0@0@bfloat16"

    for number in range(3):
        assert engine.put({probe: noise(SIZE, 200 + number)}) == {}
        assert engine.get([probe]) == [noise(SIZE, 200 + number)]
    assert engine.put({probe: noise(SIZE, 202)}) == {}

    assert requests(hub, "batch") == 4
    assert engine.count("put", "stored") == 4


def test_one_key_put_at_once_from_many_threads_is_uploaded_once(hub, bucket, engine):
    hub.control.add_fault(Fault(route="batch", delay_s=0.5))

    results = in_threads(8, lambda _number: engine.put({KEYS[0]: DATA[KEYS[0]]}))

    assert results == [{}] * 8
    assert requests(hub, "batch") == 1
    assert engine.count("put", "stored") == 1
    assert engine.count("put", "under_way") + engine.count("put", "present") == 7


def test_a_put_of_what_another_put_fails_to_store_has_failed_too(hub, bucket, engine):
    hung = hub.control.add_fault(Fault(route="xorb-upload", hang=True))
    new = [noise(SIZE, f"{bucket} {number}") for number in range(2)]  # which the store does not hold yet
    first, second = [Memory(new[0], KEYS[0])], [Memory(new[0], KEYS[0]), Memory(new[1], KEYS[1])]
    failing = engine.store.puts.submit(first, SIZE, soon(3))
    eventually(lambda: hub.control.hits(hung))
    waiting = engine.store.puts.submit(second, SIZE, soon())
    eventually(lambda: second[0].released)
    assert not waiting.done()

    [failure] = failing.result(30).failures
    hub.control.clear_faults()

    assert [one.item for one in waiting.result(30).failures] == [KEYS[0]]
    assert failure.kind == "deadline"
    assert engine.count("put", "under_way") == 0


def test_contents_that_waited_here_to_be_named_say_nothing_about_the_hub(hub, bucket, connect, monkeypatch):
    engine = connect(breaker_failures=1)
    busy, free = threading.Event(), threading.Event()
    pool = WorkerPool("held", 1)
    pool.submit(lambda: (busy.set(), free.wait(60)))
    assert busy.wait(30)
    monkeypatch.setattr(engine.store._writer._committer, "_threads", pool)

    failures = engine.put({KEYS[0]: DATA[KEYS[0]]}, seconds=3)

    free.set()
    assert [failure.kind for failure in failures.values()] == ["deadline"]
    assert not engine.store.breakers.status()


def test_a_put_waits_for_another_put_of_its_key_no_longer_than_it_has(hub, bucket, engine):
    hung = hub.control.add_fault(Fault(route="xorb-upload", hang=True))
    new = noise(SIZE, f"{bucket} late")
    first = engine.store.puts.submit([Memory(new, KEYS[0])], SIZE, soon(20))
    eventually(lambda: hub.control.hits(hung))

    [failure] = engine.store.puts.submit([Memory(new, KEYS[0])], SIZE, soon(0.3)).result(10).failures

    assert failure.kind == "deadline"
    assert "another put" in failure.message
    hub.control.clear_faults()
    engine.store.close()
    first.exception(30)


def test_of_a_put_what_is_known_is_stored_though_the_rest_cannot_be_looked_up(hub, filled, connect):
    engine = connect(lookup_timeout_secs=5)
    assert engine.hits(KEYS[:1]) == 1
    hub.control.add_fault(Fault(route="paths-info", status=500))

    failures = engine.put(DATA)

    assert list(failures) == KEYS[1:]
    assert {failure.kind for failure in failures.values()} == {"transport"}
    assert engine.count("put", "present") == 1


def test_a_partly_failed_batch_is_told_item_by_item_and_may_be_put_again(hub, bucket, engine, caplog):
    hub.control.add_fault(
        Fault(route="batch", items=encode_name(KEYS[2]), items_error="quota of this folder exceeded", times=1)
    )

    failed = engine.put(DATA)

    assert {item: failure.kind for item, failure in failed.items()} == {KEYS[2]: "hub"}
    assert "quota of this folder exceeded" in failed[KEYS[2]].message
    assert engine.count("put", "stored") == 5
    assert engine.count("put", "hub") == 1
    assert "quota of this folder exceeded" in caplog.text
    assert engine.hits(KEYS) == 2
    assert engine.put(DATA) == {}
    assert engine.hits(KEYS) == 6


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ({"route": "paths-info", "status": 401}, "denied"),
        ({"route": "paths-info", "status": 404, "headers": NO_BUCKET}, "bucket_missing"),
        ({"route": "xet-write-token", "status": 403}, "denied"),
        ({"route": "xorb-upload", "status": 500}, "transport"),
        ({"route": "shard-upload", "status": 500}, "transport"),
        ({"route": "batch", "status": 403}, "denied"),
        ({"route": "batch", "status": 413}, "refused"),
        ({"route": "batch", "status": 429, "headers": {"Retry-After": "1"}}, "throttled"),
        ({"route": "batch", "status": 500}, "transport"),
        ({"route": "batch", "status": 200, "body": "<html>"}, "transport"),
    ],
    ids=str,
)
def test_a_put_that_fails_as_a_whole_is_told_counted_and_may_be_repeated(hub, bucket, engine, fault, kind):
    data = {name: noise(SIZE, f"{fault} {name}") for name in KEYS}
    hub.control.add_fault(Fault(**fault))

    failed = engine.put(data, seconds=4.0 if kind == "throttled" else 60.0)  # pauses are waited out until then

    assert {item: failure.kind for item, failure in failed.items()} == dict.fromkeys(KEYS, kind)
    assert engine.count("put", kind) == 6
    assert engine.count("put", "stored") == 0
    assert engine.ended("put", kind) == 1
    hub.control.clear_faults()
    eventually(lambda: engine.put(data) == {})
    assert engine.get(KEYS) == list(data.values())


def test_what_was_done_though_the_answer_was_lost_is_seen_at_once(hub, bucket, connect):
    engine = connect(metadata_cache_ttl_secs=600, miss_cache_ttl_secs=600)
    assert engine.hits(KEYS) == 0
    hub.control.add_fault(Fault(route="batch", truncate_at=0))

    assert engine.put(DATA).keys() == set(KEYS)
    assert engine.hits(KEYS) == 6

    with pytest.raises(HFBucketError):
        engine.store.delete(KEYS, soon())
    assert engine.hits(KEYS) == 0


@pytest.mark.parametrize("route", ["paths-info", "xet-write-token", "xorb-upload", "shard-upload", "batch"])
def test_a_put_ends_at_its_deadline_and_gives_the_memory_back(hub, bucket, connect, route):
    engine = connect(put_timeout_secs=0.5)
    data = {KEYS[0]: noise(SIZE, f"deadline {route}")}
    hub.control.add_fault(Fault(route=route, hang=True))
    started = time.monotonic()

    failed = engine.put(data, seconds=0.5)

    assert time.monotonic() - started < 2 * BOUND
    assert failed[KEYS[0]].kind in {"deadline", "transport"}
    hub.control.clear_faults()
    assert eventually(lambda: engine.put(data) == {})
    assert engine.get(KEYS[:1]) == [data[KEYS[0]]]


def test_puts_are_cut_into_commits_of_bounded_bytes(hub, bucket, connect):
    engine = connect(max_inflight_bytes=1 << 20, max_parallel_writes=1)
    data = {key(number): noise(SIZE, number) for number in range(30)}

    assert engine.put(data) == {}

    assert requests(hub, "batch") == 3  # 1 MiB holds ten chunks of 100 kB
    assert engine.get(list(data)) == list(data.values())


def test_puts_together_stay_within_the_bytes_in_flight(hub, bucket, connect):
    engine = connect(max_inflight_bytes=1 << 20, max_parallel_writes=4)
    waiting = hub.control.add_fault(Fault(route="shard-upload", hang=True))
    puts = [{key(number): noise(400_000, f"together {number}")} for number in range(4)]
    results = []
    threads = [
        threading.Thread(target=lambda data=data: results.append(engine.put(data, size=400_000))) for data in puts
    ]
    for thread in threads:
        thread.start()
    eventually(lambda: hub.control.hits(waiting) == 2)
    time.sleep(0.3)

    assert hub.control.hits(waiting) == 2  # a third would be 1.2 MB
    hub.control.clear_faults()
    for thread in threads:
        thread.join()
    assert results == [{}] * 4


def test_a_long_commit_lets_reads_pass_between_its_chunks(hub, bucket, engine, monkeypatch):
    size = 9 * 1024 * 1024
    passed = []
    monkeypatch.setattr(ReadPriority, "let_reads_pass", lambda _self, _deadline: passed.append(1))

    assert engine.put({key(number): noise(size, number) for number in range(8)}, size=size) == {}

    assert requests(hub, "shard-upload") == 1
    assert len(passed) == 3  # before it began, and after every 32 MiB


def test_one_bad_commit_does_not_spoil_the_others(hub, bucket, connect):
    engine = connect(max_inflight_bytes=1 << 20, max_parallel_writes=1)
    data = {key(number): noise(SIZE, number) for number in range(30)}
    hub.control.add_fault(Fault(route="batch", status=403, times=1))

    failed = engine.put(data)

    assert len(failed) == 10
    assert engine.count("put", "stored") == 20
    assert len(paths(hub.endpoint, bucket)) == 20


def test_a_mistake_of_ours_is_a_failure_told_and_does_not_block_its_keys(bucket, engine, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(engine.store.bucket, "add", lambda *_: {}[1])
        failed = engine.put(DATA)
    assert {failure.kind for failure in failed.values()} == {"transport"}
    assert engine.count("put", "transport") == 6

    assert engine.put(DATA) == {}
    assert engine.count("put", "stored") == 6


# --- create_bucket_if_missing --------------------------------------------------------------------------------------------


def test_many_first_writes_at_once(hub, bucket, connect):
    engine = connect(f"{bucket}-many", create_bucket_if_missing=True)

    results = in_threads(6, lambda number: engine.put({KEYS[number]: DATA[KEYS[number]]}))

    assert results == [{}] * 6
    assert connect(f"{bucket}-many").hits(KEYS) == 6


def test_a_put_of_what_is_there_creates_nothing(hub, filled, connect):
    engine = connect(create_bucket_if_missing=True)

    assert engine.put(DATA) == {}

    assert engine.count("put", "present") == 6
    assert requests(hub, "bucket-create") == 0


def test_without_the_setting_nothing_is_created(hub, bucket, connect, caplog):
    hub.control.reset_counters()
    engine = connect(f"{bucket}-never")

    assert engine.hits(KEYS) == 0
    assert {failure.kind for failure in engine.put(DATA).values()} == {"bucket_missing"}
    assert requests(hub, "bucket-create") == 0
    assert "create_bucket_if_missing" in caplog.text


def test_a_bucket_that_was_deleted_is_created_again_by_the_process_that_created_it(hub, bucket, connect):
    engine = connect(f"{bucket}-again", create_bucket_if_missing=True)
    assert engine.put(DATA) == {}
    HfApi(endpoint=hub.endpoint, token=False).delete_bucket(f"{bucket}-again")

    assert engine.put({key(9): noise(SIZE, 9)}) == {}
    assert engine.put(DATA) == {}, "what was there is not believed to be there"
    assert engine.get(KEYS) == list(DATA.values())


def test_a_bucket_that_is_deleted_while_it_is_written_to_is_created_by_the_next_put(hub, bucket, connect):
    engine = connect(f"{bucket}-lost", create_bucket_if_missing=True)
    assert engine.hits(KEYS) == 0  # now known for a while, and not asked again
    assert engine.put({KEYS[0]: DATA[KEYS[0]]}) == {}
    HfApi(endpoint=hub.endpoint, token=False).delete_bucket(f"{bucket}-lost")

    engine.put({KEYS[1]: DATA[KEYS[1]]})

    assert engine.put({KEYS[1]: DATA[KEYS[1]]}) == {}
    assert engine.get(KEYS[1:2]) == [DATA[KEYS[1]]]


def test_a_bucket_that_may_not_be_created_is_told(hub, bucket, connect):
    engine = connect(f"{bucket}-denied", create_bucket_if_missing=True)
    hub.control.add_fault(Fault(route="bucket-create", status=403, times=1))

    assert {failure.kind for failure in engine.put(DATA).values()} == {"denied"}
    assert engine.put(DATA) == {}


# --- list, delete, close -------------------------------------------------------------------------------------------------


def test_only_keys_of_this_prefix_are_listed(hub, filled, engine, connect):
    upload(
        hub.endpoint,
        filled,
        {
            f"v10/{encode_name(key(10))}": b"x",
            f"v1/.hfbucket/{encode_name(key(11))}": b"x",
            f"v1/nested/{encode_name(key(12))}": b"x",
            f"v1/{key(13).replace('/', '%2f')}": b"x",
            f"v1/{encode_name('no key')}": b"x",
            "v1/README.md": b"x",
            "v1": b"x",
            encode_name(key(14)): b"x",
            f"v1/{encode_name('m@00000001@0@ab')}": b"x",
            f"v1/{encode_name(key(15, 'ü 模型'))}": b"x",
        },
    )

    assert sorted(engine.store.list_keys()) == sorted([*KEYS, "m@00000001@0@ab", key(15, "ü 模型")])
    assert list(connect(prefix="v10").store.list_keys()) == [key(10)]
    assert list(connect(prefix="v1/nested").store.list_keys()) == [key(12)]
    assert list(connect(prefix="v").store.list_keys()) == []
    assert list(connect(prefix="").store.list_keys()) == [key(14)]


def test_a_delete_that_fails_is_told_and_counted(hub, filled, engine):
    hub.control.add_fault(Fault(route="batch", items=encode_name(KEYS[1]), items_error="locked"))
    failed = engine.store.delete(KEYS, soon())
    assert {item: failure.message for item, failure in failed.items()} == {KEYS[1]: "locked"}
    assert engine.count("delete", "deleted") == 5
    assert engine.count("delete", "hub") == 1
    assert engine.hits([KEYS[1]]) == 1

    hub.control.clear_faults()
    hub.control.add_fault(Fault(route="batch", status=403))
    with pytest.raises(HFBucketError):
        engine.store.delete([KEYS[1]], soon())
    assert engine.count("delete", "denied") == 1
    assert engine.hits([KEYS[1]]) == 1


def test_close_waits_for_nothing_and_frees_everybody(hub, filled, connect):
    engine = connect(lookup_timeout_secs=30)
    engine.get(KEYS[:1])
    waiting = hub.control.add_fault(Fault(route="xorb-data", hang=True))
    results = SimpleNamespace(found=None)
    reader = threading.Thread(target=lambda: setattr(results, "found", engine.get(KEYS[1:])))
    reader.start()
    eventually(lambda: hub.control.hits(waiting))
    started = time.monotonic()

    engine.store.close()
    reader.join(30)

    assert time.monotonic() - started < BOUND
    assert results.found == [None] * 5
    hub.control.clear_faults()
    assert engine.hits(KEYS) == 0
    assert engine.get(KEYS) == [None] * 6
    assert engine.put({key(60): noise(SIZE, 60)}).keys() == {key(60)}
    engine.store.close()


FORK = """
import os, sys
from tests.support.buckets import instance_settings
from hfbucket_plugin.store.chunk_store import ChunkStore
from hfbucket_plugin.core.deadline import Deadline
from hfbucket_plugin.core.buffers import RevocableBuffer
from hfbucket_plugin.core.telemetry import MemorySink
from hfbucket_plugin.core.concurrency import ReadPriority

class Memory:
    def __init__(self, data, key=""):
        self.key, self.view = key, memoryview(bytearray(data))
        self.lease = RevocableBuffer(self.view)

    def release(self):
        pass

endpoint, bucket, key, directory = sys.argv[1:]
store = ChunkStore(instance_settings(endpoint, bucket, "v1", download_tmp_dir=directory, verify="hash"), "x", MemorySink(), 9)

def work(name):
    hits = store.prefix_hits([key], 100_000)
    found = store.read_many([key], [100_000], lambda _: Memory(bytes(100_000)), Deadline.after(20))
    own = name + key[1:]
    failed = store.puts.submit([Memory(os.urandom(100_000), own)], 100_000, Deadline.after(20)).result().failures
    print(name, hits, found != [None], failed, store.prefix_hits([own], 100_000), flush=True)

work("before")
closing = os.fork()
if closing == 0:  # what a child inherits is its parent's: closing it neither hangs nor takes it away
    store.close()
    os._exit(0)
os.waitpid(closing, 0)
child = os.fork()
work("child" if child == 0 else "parent")
store.close()
if child:
    os.waitpid(child, 0)
os._exit(0)
"""


def test_a_forked_child_and_its_parent_both_go_on(hub, filled, tmp_path):
    arguments = [hub.endpoint, filled, KEYS[0], str(tmp_path / "tmp")]

    done = run_script(FORK, arguments, tmp_path / "home")

    lines = {"before 1 True [] 1", "child 1 True [] 1", "parent 1 True [] 1"}
    assert set(done.stdout.splitlines()) == lines, done.stdout + done.stderr
    assert list((tmp_path / "tmp").iterdir()) == []


FORK_IN_A_PUT = """
import os, sys, threading
from tests.support.buckets import instance_settings
from tests.support.waiting import eventually
from hfbucket_plugin.store.chunk_store import ChunkStore
from hfbucket_plugin.core.deadline import Deadline
from hfbucket_plugin.core.telemetry import MemorySink

class Memory:
    def __init__(self, key):
        self.key, self.view = key, memoryview(bytearray(os.urandom(100_000)))

    def release(self):
        pass

endpoint, bucket, key, directory = sys.argv[1:]
keys = [key, key[:-1] + "x", key[:-1] + "y"]
store = ChunkStore(instance_settings(endpoint, bucket, "v2", download_tmp_dir=directory, max_inflight_bytes=4 << 20), "x", MemorySink(), 9)
writer = store._writer

def put(*names):
    sources = [Memory(name) for name in names]
    return sorted(store.puts.submit(sources, 100_000, Deadline.after(60)).result().stored)

threading.Thread(target=put, args=(keys[0],), daemon=True).start()  # the first upload hangs
eventually(lambda: any(commit.begun for commit in writer._commits))
locks = [writer._semaphore._changed, writer._committer._lock, writer._lock, store.puts._lock, store._existence.cache._lock,
         writer._read_priority._quiet, store._reader._lock, store.breakers._lock, store._reader._quarantine._lock]
for lock in locks:
    lock.acquire()  # as another thread of the parent may at any moment
child = os.fork()
if child == 0:
    print(writer._semaphore._held, writer._in_progress, writer._committer._uploads, store.puts.waiting_bytes, len(store.puts.pending))
    print(put(*keys) == sorted(keys), flush=True)
    os._exit(0)
os.waitpid(child, 0)
os._exit(0)
"""


def test_a_child_that_is_forked_while_a_put_is_in_progress_starts_without_it(hub, bucket, tmp_path):
    arguments = [hub.endpoint, bucket, KEYS[0], str(tmp_path / "tmp")]
    hub.control.add_fault(Fault(route="xorb-upload", hang=True, times=1))

    done = run_script(FORK_IN_A_PUT, arguments, tmp_path / "home")

    assert done.stdout.splitlines() == ["0 {} 0 0 0", "True"], done.stdout + done.stderr


def test_leftovers_of_dead_processes_are_swept_at_the_start(connect, tmp_path, caplog):
    left = tmp_path / "tmp" / "lmcache-hfbucket-1-dead"
    left.mkdir(parents=True)
    (left / ".lock").write_text("")
    (left / "chunk").write_text("left over")
    with caplog.at_level(logging.INFO):
        connect().store.begin(reads=False)

        eventually(lambda: not left.exists())
