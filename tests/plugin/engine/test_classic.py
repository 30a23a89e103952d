import asyncio
import threading
import time
from types import SimpleNamespace

import pytest
import torch
import yaml
from lmcache.v1.health_monitor.checks.remote_backend_check import RemoteBackendHealthCheck
from lmcache.v1.memory_management import MemoryFormat

from hfbucket_plugin.core import telemetry
from hfbucket_plugin.core.buffers import RevocableBuffer
from hfbucket_plugin.core.keys import encode_name
from hfbucket_plugin.core.telemetry import MemorySink
from hfbucket_plugin.errors import HFBucketError, PartialFailureError
from localhub.faults import Fault
from tests.support.buckets import download, paths, upload
from tests.support.lmcache_classic import OURS, Rig, engine_config, engine_metadata, key, running_loop, taken
from tests.support.waiting import eventually

BOUND = 15.0
"""What has a deadline of a second or less ends before this many seconds, however slow the machine is."""

NO_BUCKET = {"X-Error-Code": "RepoNotFound"}


@pytest.fixture(scope="module")
def loop():
    with running_loop() as one:
        yield one


@pytest.fixture
def rigs(hub, bucket, loop, tmp_path, monkeypatch):
    """Makes engines' remote backends over the bucket of the test, as LMCache makes them from its configuration."""
    made = []

    def make(prefix="v1", metadata=None, cpu_gb=0.05, blocking_secs=10, endpoint=hub.endpoint, **settings):
        tally = MemorySink()
        monkeypatch.setattr("hfbucket_plugin.engine.classic.default_sink", lambda: tally)
        values = {
            "bucket_handle": f"hf://buckets/{bucket}/{prefix}",
            "endpoint": endpoint,
            "download_tmp_dir": str(tmp_path / "tmp"),
            "fingerprint": "off",  # its calls would be counted with those of the work
        }
        extra = {f"remote_storage_plugin.hfbucket.{name}": v for name, v in (OURS | values | settings).items()}
        text = yaml.safe_dump(
            {
                "local_cpu": False,
                "max_local_cpu_size": cpu_gb,
                "save_unfull_chunk": False,
                "blocking_timeout_secs": blocking_secs,
                "remote_storage_plugins": ["hfbucket"],
                "extra_config": extra,
            }
        )
        config = engine_config(tmp_path / f"lmcache-{len(made)}.yaml", text)
        made.append(Rig(config, "hfbucket", loop, metadata=metadata, tally=tally))
        return made[-1]

    yield make
    hub.control.clear_faults()
    for rig in made:
        rig.close()


@pytest.fixture
def rig(rigs):
    return rigs()


def requests(hub, route):
    return hub.control.counters().route(route).requests


def object_path(number, prefix="v1"):
    return f"{prefix}/{encode_name(key(number).to_string())}"


def get(rig, numbers):
    """What an engine's retrieve gets, in its own way."""
    return taken(rig.remote.batched_get_blocking([key(number) for number in numbers]))


# --- what LMCache asks of a connector ------------------------------------------------------------------------------------


def test_it_says_what_it_can(rig):
    one = rig.connection

    assert one.support_batched_get()
    assert one.support_batched_put()
    assert one.support_batched_contains()
    assert one.support_batched_async_contains()
    assert one.support_batched_get_non_blocking()
    assert one.support_ping()
    assert "hf://buckets/" in repr(rig.connector)


def test_what_was_put_comes_back_and_goes(hub, bucket, rig):
    memory_obj = rig.chunk(1)
    rig.remote.submit_put_task(key(1), memory_obj).result(60)

    assert rig.remote.contains(key(1))
    assert rig.connection.exists_sync(key(1))
    assert not rig.connection.exists_sync(key(2))
    assert taken([rig.remote.get_blocking(key(1))]) == [rig.content(1)]
    assert rig.remote.get_blocking(key(2)) is None
    assert rig.run(rig.connection.list()) == [key(1).to_string()]
    assert download(hub.endpoint, bucket, object_path(1)) == rig.content(1), "no header, no padding"
    assert rig.run(rig.connection.ping()) == 0
    assert rig.remote.remove(key(1))
    assert not rig.connection.exists_sync(key(1))
    assert paths(hub.endpoint, bucket) == []
    assert rig.remote.remove(key(1)), "what is gone is gone"


def test_batches(rig):
    rig.put(range(8))

    assert rig.connection.batched_contains([key(n) for n in range(8)]) == 8
    assert rig.connection.batched_contains([key(n) for n in (0, 1, 99, 2)]) == 2
    assert rig.run(rig.connection.batched_async_contains("x", [key(n) for n in (0, 1, 2, 99)])) == 3
    assert get(rig, [3, 99, 5]) == [rig.content(3), None, rig.content(5)]
    found = rig.run(rig.connection.batched_get_non_blocking("x", [key(n) for n in (0, 1, 99, 2)]))
    assert taken(found) == [rig.content(0), rig.content(1)]
    assert rig.run(rig.connection.batched_get([])) == []
    assert rig.run(rig.connection.batched_get_non_blocking("x", [])) == []
    assert rig.connection.batched_contains([]) == 0
    assert sorted(rig.run(rig.connection.list())) == sorted(key(n).to_string() for n in range(8))


def test_keys_with_tags_and_any_model_name(rig):
    odd = [key(1, "a model/ü 模型", user="50%=x y%"), key(-5), key(2**200)]
    rig.run(rig.connection.batched_put(odd, [rig.chunk(n) for n in range(3)]))

    assert rig.connection.batched_contains(odd) == 3
    assert sorted(rig.run(rig.connection.list())) == sorted(one.to_string() for one in odd)
    assert taken(rig.run(rig.connection.batched_get(odd))) == [rig.content(n) for n in range(3)]


@pytest.mark.parametrize(("layers", "hidden"), [(1, 1), (3, 5), (1, 3), (2, 1024)])
def test_chunks_of_any_size_whether_or_not_pages_divide_it(rigs, layers, hidden):
    rig = rigs(metadata=engine_metadata(layers, hidden))
    assert rig.connector._chunk_size() == 4 * layers * hidden * 256

    rig.put([1, 2])

    assert get(rig, [1, 2]) == [rig.content(1), rig.content(2)]


def test_mla(rigs):
    rig = rigs(metadata=engine_metadata(use_mla=True))
    rig.put([1])

    assert rig.connector.meta_fmt is MemoryFormat.KV_MLA_FMT
    assert rig.connector._chunk_size() == 2 * 2 * 8 * 256
    assert get(rig, [1]) == [rig.content(1)]


def test_groups_that_register_after_the_connection_change_the_size_of_a_chunk(rig):
    before = rig.connector._chunk_size()
    rig.put([1])
    group = SimpleNamespace(
        dtype=torch.bfloat16, shape_desc=SimpleNamespace(kv_size=2), num_layers=3, hidden_dim_size=8
    )
    other = SimpleNamespace(dtype=torch.uint8, shape_desc=SimpleNamespace(kv_size=2), num_layers=1, hidden_dim_size=4)
    rig.metadata.kv_layer_groups_manager = SimpleNamespace(kernel_groups=[group, other], num_kernel_groups=2)

    assert rig.connector._chunk_size() == 2 * 3 * 256 * 8 * 2 + 2 * 256 * 4 != before
    rig.put([2])
    assert get(rig, [1, 2]) == [None, rig.content(2)]
    assert rig.count("get", "size") == 1


# --- references ----------------------------------------------------------------------------------------------------------


def test_references_are_exact_after_a_put(hub, rig):
    whole = rig.free_chunks()
    memory_obj = rig.chunk(1)
    rig.run(rig.connector.put(key(1), memory_obj))
    assert eventually(lambda: memory_obj.get_ref_count() == 1), "the caller's own is left alone"

    hub.control.add_fault(Fault(route="paths-info", status=403))
    with pytest.raises(PartialFailureError):
        rig.run(rig.connector.put(key(2), memory_obj))
    assert eventually(lambda: memory_obj.get_ref_count() == 1)
    memory_obj.ref_count_down()

    rig.put([3, 4])  # through LMCache's wrapper, which drops the references and swallows the error
    assert eventually(lambda: rig.free_chunks() == whole)
    assert rig.count("put", "denied") == 3


def test_references_are_exact_after_gets_of_every_outcome(hub, bucket, rig):
    whole = rig.free_chunks()
    rig.put(range(4))
    upload(hub.endpoint, bucket, {object_path(50): b"too short"})

    assert get(rig, [0, 99, 50, 1])[1:3] == [None, None]
    rig.remote.batched_get_blocking([key(99)])
    found = rig.run(rig.connection.batched_get_non_blocking("x", [key(0), key(99), key(1)]))
    assert len(taken(found)) == 1
    hub.control.add_fault(Fault(route="reconstruction", status=500))
    assert get(rig, [2, 3]) == [None, None]

    assert eventually(lambda: rig.free_chunks() == whole)


def test_a_batch_of_unequal_lengths_is_refused_and_keeps_nothing(rig):
    whole = rig.free_chunks()
    memory_obj = rig.chunk(1)

    for keys, memory_objs in (([key(1), key(2)], [memory_obj]), ([], [memory_obj]), ([key(1)], [memory_obj] * 2)):
        with pytest.raises(ValueError, match="their numbers must be equal"):
            rig.run(rig.connector.batched_put(keys, memory_objs))

    assert memory_obj.get_ref_count() == 1
    memory_obj.ref_count_down()
    assert rig.free_chunks() == whole


def test_a_get_that_was_cancelled_gives_everything_back(hub, rigs):
    rig = rigs(blocking_secs=3)
    rig.put(range(4))
    whole = rig.free_chunks()
    waiting = hub.control.add_fault(Fault(route="xorb-data", hang=True))

    future = asyncio.run_coroutine_threadsafe(rig.connection.batched_get([key(n) for n in range(4)]), rig.loop)
    eventually(lambda: hub.control.hits(waiting))
    future.cancel()
    hub.control.clear_faults()

    eventually(lambda: rig.free_chunks() == whole)
    assert get(rig, range(4)) == [rig.content(n) for n in range(4)]


def test_gets_that_are_cancelled_at_any_moment_give_everything_back(rig):
    rig.put(range(4))
    whole = rig.free_chunks()
    get(rig, range(4))

    for number in range(40):
        future = asyncio.run_coroutine_threadsafe(rig.connection.batched_get([key(n) for n in range(4)]), rig.loop)
        time.sleep(0.0005 * number)
        if not future.cancel():
            taken(future.result(0))

    eventually(lambda: rig.free_chunks() == whole)


def test_puts_that_are_cancelled_before_they_began_or_after_give_everything_back(hub, rigs):
    rig = rigs(put_timeout_secs=2)
    whole = rig.free_chunks()
    waiting = hub.control.add_fault(Fault(route="batch", hang=True))
    futures = [
        asyncio.run_coroutine_threadsafe(rig.connection.put(key(number), rig.chunk(number)), rig.loop)
        for number in range(8)
    ]
    eventually(lambda: hub.control.hits(waiting))

    for future in futures:
        future.cancel()
    hub.control.clear_faults()

    eventually(lambda: rig.free_chunks() == whole)


def test_more_puts_than_may_wait_are_refused_and_give_everything_back(hub, rigs):
    rig = rigs(put_timeout_secs=2, max_waiting_put_bytes=3 * 16_384)
    whole = rig.free_chunks()
    hub.control.add_fault(Fault(route="paths-info", hang=True))
    memory_objs = [rig.chunk(number) for number in range(8)]
    futures = [
        asyncio.run_coroutine_threadsafe(rig.connector.put(key(number), memory_obj), rig.loop)
        for number, memory_obj in enumerate(memory_objs)
    ]

    failures = [future.exception(30) for future in futures]

    assert all(isinstance(failure, PartialFailureError) for failure in failures)
    assert sum(failure.failures[0].kind == "not_taken" for failure in failures) == 5
    assert rig.count("put", "not_taken") == 5
    eventually(lambda: {memory_obj.get_ref_count() for memory_obj in memory_objs} == {1})
    for memory_obj in memory_objs:
        memory_obj.ref_count_down()
    assert rig.free_chunks() == whole


def test_without_memory_a_get_is_a_miss_and_never_waits(rigs):
    rig = rigs(cpu_gb=0.001)
    rig.put([1, 2, 3])
    held = []
    while (memory_obj := rig.allocate()) is not None:
        held.append(memory_obj)
    started = time.monotonic()

    assert get(rig, [1, 2, 3]) == [None] * 3
    assert time.monotonic() - started < BOUND
    assert rig.count("get", "allocation") == 3

    held.pop().ref_count_down()
    assert get(rig, [1, 2, 3]) == [rig.content(1), None, None]
    for memory_obj in held:
        memory_obj.ref_count_down()
    assert get(rig, [1, 2, 3]) == [rig.content(n) for n in (1, 2, 3)]


def test_an_allocator_that_raises_is_a_miss_and_leaks_nothing(rig, monkeypatch):
    rig.put(range(4))
    whole = rig.free_chunks()
    real, calls = rig.memory.allocate, []

    def allocate(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("no more")
        return real(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(rig.memory, "allocate", allocate)
        assert get(rig, range(4)) == [rig.content(0), rig.content(1), None, None]

    assert rig.free_chunks() == whole


# --- the engine's event loop ---------------------------------------------------------------------------------------------


def test_nothing_of_ours_allocates_copies_or_waits_on_the_engines_loop(rig, monkeypatch):
    threads = {"allocate": set(), "write": set(), "feed": set(), "request": set(), "start": set()}
    real_allocate, real_write = rig.memory.allocate, RevocableBuffer.write
    store = rig.connector._store
    real_feed, real_request = RevocableBuffer.read, store.bucket._hub.request

    def noted(name, function):
        def run(*args, **kwargs):
            threads[name].add(threading.get_ident())
            return function(*args, **kwargs)

        return run

    memory_objs = [rig.chunk(n) for n in range(4)]
    monkeypatch.setattr(rig.memory, "allocate", noted("allocate", real_allocate))
    monkeypatch.setattr(RevocableBuffer, "write", noted("write", real_write))
    monkeypatch.setattr(RevocableBuffer, "read", noted("feed", real_feed))
    monkeypatch.setattr(store.bucket._hub, "request", noted("request", real_request))
    # Starting a thread waits for it: up to 5 ms while others hold the GIL.
    monkeypatch.setattr(threading.Thread, "start", noted("start", threading.Thread.start))

    async def on_the_loop():
        keys = [key(n) for n in range(4)]
        await rig.connection.batched_put(keys, memory_objs)
        assert await rig.connection.exists(keys[0])
        await rig.connection.batched_async_contains("x", keys)
        found = await rig.connection.batched_get(keys)
        found += await rig.connection.batched_get_non_blocking("x", keys)
        await rig.connection.list()
        await rig.connection.ping()
        await rig.connection.close()
        return threading.get_ident(), found

    loop_thread, found = rig.run(on_the_loop())

    assert len(taken(found)) == 8
    assert all(threads.values()), "each of them was seen"
    assert all(loop_thread not in seen for seen in threads.values())


def test_the_loop_stays_free_while_the_hub_hangs(hub, rigs):
    rig = rigs(blocking_secs=1, lookup_timeout_secs=1)
    rig.put([1])
    hub.control.add_fault(Fault(route="*", hang=True))

    async def beats_while(coroutine):
        task = asyncio.ensure_future(coroutine)
        beats = 0
        while not task.done():
            await asyncio.sleep(0.01)
            beats += 1
        return beats, task.result()

    beats, found = rig.run(beats_while(rig.connection.batched_get([key(1), key(2)])))

    assert found == [None, None]
    assert beats > 10


def test_many_calls_at_once(rig):
    rig.put(range(8))

    async def all_at_once():
        gets = [rig.connection.batched_get([key(n % 8), key((n + 1) % 8)]) for n in range(48)]
        lookups = [rig.connection.batched_async_contains("x", [key(n % 8)]) for n in range(48)]
        return await asyncio.gather(*gets), await asyncio.gather(*lookups)

    found, hits = rig.run(all_at_once())

    assert hits == [1] * 48
    assert [taken(one) for one in found] == [[rig.content(n % 8), rig.content((n + 1) % 8)] for n in range(48)]


# --- deadlines -----------------------------------------------------------------------------------------------------------


def test_a_get_returns_what_arrived_before_lmcache_loses_patience(hub, rigs):
    rig = rigs(blocking_secs=1)
    rig.put(range(4))
    whole = rig.free_chunks()
    get(rig, [0])
    contents = rig.connector._store._existence.contents([key(2).to_string()], _soon())
    hub.control.add_fault(Fault(route="reconstruction", path=contents[key(2).to_string()].xet_hash, hang=True))
    started = time.monotonic()

    assert get(rig, range(4)) == [rig.content(0), rig.content(1), None, rig.content(3)]

    assert time.monotonic() - started < BOUND
    hub.control.clear_faults()
    assert eventually(lambda: rig.free_chunks() == whole)


def _soon():
    from hfbucket_plugin.core.deadline import Deadline

    return Deadline.after(30)


def test_lookups_and_deletes_end_within_their_time_though_the_hub_hangs(hub, rigs):
    rig = rigs(lookup_timeout_secs=0.5)
    rig.put([1])
    hub.control.add_fault(Fault(route="*", hang=True))
    started = time.monotonic()

    assert rig.connection.batched_contains([key(2)]) == 0
    assert not rig.connection.exists_sync(key(3))
    assert not rig.remote.contains(key(4))
    assert rig.run(rig.connection.batched_async_contains("x", [key(5)])) == 0
    assert not rig.remote.remove(key(1))

    assert time.monotonic() - started < 2 * BOUND
    assert rig.count("lookup", "deadline") + rig.count("lookup", "breaker") == 4


def test_lookups_and_pings_do_not_wait_behind_gets_that_hang(hub, rigs):
    rig = rigs(lookup_timeout_secs=5)
    rig.put([1])
    waiting = hub.control.add_fault(Fault(route="xorb-data", hang=True))
    gets = [asyncio.run_coroutine_threadsafe(rig.connection.get(key(1)), rig.loop) for _ in range(40)]
    eventually(lambda: hub.control.hits(waiting))
    eventually(lambda: len([t for t in threading.enumerate() if t.name.startswith("hfbucket-call-")]) >= 32)

    assert rig.run(rig.connection.ping(), 5) == 0
    assert rig.run(rig.connection.exists(key(1)), 5)

    assert not any(future.done() for future in gets)
    hub.control.clear_faults()
    assert sum(memory_obj is not None for memory_obj in [future.result(30) for future in gets]) == 40
    for future in gets:
        future.result().ref_count_down()


@pytest.mark.parametrize("route", ["paths-info", "xorb-upload", "shard-upload", "batch"])
def test_close_is_bounded_though_the_hub_hangs(hub, rigs, route):
    rig = rigs(close_timeout_secs=0.5)
    whole = rig.free_chunks()
    waiting = hub.control.add_fault(Fault(route=route, hang=True))
    put = asyncio.run_coroutine_threadsafe(rig.connector.put(key(1), memory_obj := rig.chunk(hash(route))), rig.loop)
    eventually(lambda: hub.control.hits(waiting))
    started = time.monotonic()

    rig.run(rig.connector.close())

    assert time.monotonic() - started < BOUND
    hub.control.clear_faults()
    assert isinstance(put.exception(90), (PartialFailureError, type(None)))
    eventually(lambda: memory_obj.get_ref_count() == 1)
    memory_obj.ref_count_down()
    assert rig.free_chunks() == whole


def test_close_waits_for_puts_that_are_about_to_end(hub, bucket, rigs):
    rig = rigs(close_timeout_secs=60)
    hub.control.add_fault(Fault(route="batch", delay_s=0.5))
    put = asyncio.run_coroutine_threadsafe(rig.connection.put(key(1), rig.chunk(1)), rig.loop)
    eventually(lambda: rig.connector._store.puts.pending)

    rig.run(rig.connector.close())

    assert put.result(30) is None
    assert paths(hub.endpoint, bucket) == [object_path(1)]


def test_after_close_everything_is_a_miss(rig):
    rig.put([1])
    rig.run(rig.connector.close())
    rig.run(rig.connector.close())

    assert not rig.remote.contains(key(1))
    assert rig.connection.batched_contains([key(1)]) == 0
    assert rig.remote.get_blocking(key(1)) is None
    assert get(rig, [1]) == [None]
    assert not rig.remote.remove(key(1))
    rig.put([2])
    assert rig.run(rig.connector.ping()) != 0


def test_threads_of_a_closed_connector_end(rigs):
    before = set(threading.enumerate())
    rig = rigs()
    rig.put([1])
    get(rig, [1])
    rig.run(rig.connection.ping())
    rig.run(rig.connector.close())

    def left():
        return [t for t in set(threading.enumerate()) - before if t.name.startswith("hfbucket-")]

    eventually(lambda: not left())


# --- faults: told apart, never raised ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ({"status": 401}, "denied"),
        ({"status": 403}, "denied"),
        ({"status": 404, "headers": NO_BUCKET}, "bucket_missing"),
        ({"status": 429, "headers": {"Retry-After": "3600"}}, "throttled"),
        ({"status": 500}, "transport"),
    ],
    ids=str,
)
def test_each_failure_has_its_kind_and_none_is_raised(hub, rig, fault, kind):
    hub.control.add_fault(Fault(route="paths-info", **fault))

    assert rig.connection.batched_contains([key(1), key(2)]) == 0
    assert not rig.run(rig.connection.exists(key(1)))
    assert rig.run(rig.connection.batched_async_contains("x", [key(1)])) == 0
    assert rig.run(rig.connection.get(key(1))) is None
    assert rig.run(rig.connection.batched_get([key(1), key(2)])) == [None, None]
    assert rig.run(rig.connection.batched_get_non_blocking("x", [key(1)])) == []

    asked = 3 if kind == "transport" else 6
    assert rig.count("lookup", kind) + rig.count("lookup", "breaker") == 4
    assert rig.count("get", kind) + rig.count("get", "breaker") == 4
    if kind != "throttled":  # then the Hub is not asked again before it said
        assert rig.tally.get(telemetry.HUB_REQUESTS, route="paths-info", outcome=kind) >= asked
    for operation in ("lookup", "get"):
        assert rig.count(operation, "missing") == rig.count(operation, "hit") == 0


def test_a_put_that_partly_fails_names_what_failed_and_stores_the_rest(hub, bucket, rig):
    hub.control.add_fault(Fault(route="batch", items=encode_name(key(2).to_string()), items_error="no room"))
    memory_objs = [rig.chunk(n) for n in range(4)]

    with pytest.raises(PartialFailureError) as failed:
        rig.run(rig.connector.batched_put([key(n) for n in range(4)], memory_objs))

    assert [(failure.item, failure.kind) for failure in failed.value.failures] == [(key(2).to_string(), "hub")]
    assert "1 of 4" in str(failed.value)
    assert "no room" in str(failed.value)
    assert paths(hub.endpoint, bucket) == sorted(object_path(n) for n in (0, 1, 3))
    assert rig.count("put", "hub") == 1
    for memory_obj in memory_objs:
        memory_obj.ref_count_down()


def test_a_partial_chunk_is_refused_while_the_rest_of_its_batch_is_stored(hub, bucket, rig):
    shape = list(rig.metadata.get_shapes()[0])
    shape[2] = 100
    partial = rig.memory.allocate(torch.Size(shape), torch.bfloat16, rig.connector.meta_fmt, busy_loop=False)
    memory_objs = [rig.chunk(0), partial, rig.chunk(2)]

    with pytest.raises(PartialFailureError) as failed:
        rig.run(rig.connector.batched_put([key(n) for n in range(3)], memory_objs))

    assert [(failure.item, failure.kind) for failure in failed.value.failures] == [(key(1).to_string(), "refused")]
    assert paths(hub.endpoint, bucket) == sorted(object_path(n) for n in (0, 2))
    for memory_obj in memory_objs:
        memory_obj.ref_count_down()


def test_a_ping_answers_for_the_connector_and_asks_the_hub_nothing(hub, rig):
    eventually(lambda: hub.control.counters().route("xet-read-token").statuses)  # what an engine that starts asks for
    hub.control.add_fault(Fault(route="*", hang=True))
    hub.control.reset_counters()

    assert rig.run(rig.connection.ping(), BOUND) == 0
    assert hub.control.counters().total.requests == 0

    rig.run(rig.connector.close())
    assert rig.run(rig.connector.ping()) != 0


def test_a_list_that_does_not_come_is_an_error(hub, rig):
    hub.control.add_fault(Fault(route="tree", status=403))

    with pytest.raises(HFBucketError):
        rig.run(rig.connection.list())


def test_a_hub_that_is_gone_and_comes_back(rigs, hub_factory, bucket):
    from huggingface_hub import HfApi

    hub = hub_factory(faults=True)
    HfApi(endpoint=hub.endpoint, token=False).create_bucket(bucket)
    rig = rigs(endpoint=hub.endpoint, metadata_cache_ttl_secs=0)
    rig.put([1])
    assert get(rig, [1]) == [rig.content(1)]

    hub.stop()
    assert rig.connection.batched_contains([key(1)]) == 0
    assert get(rig, [1]) == [None]
    assert rig.run(rig.connection.ping()) == 0
    assert not rig.remote.remove(key(1))
    rig.put([2])
    assert rig.count("put", "transport") + rig.count("put", "breaker") == 1

    hub.restart()
    assert eventually(lambda: get(rig, [1]) == [rig.content(1)])
    rig.put([2])
    assert get(rig, [2]) == [rig.content(2)]


# --- LMCache's health monitor ----------------------------------------------------------------------------------------------


def test_the_health_check_passes_and_its_probe_recovers_each_time(hub, rig):
    check = RemoteBackendHealthCheck(rig.remote)
    whole = rig.free_chunks()

    assert check.check()
    for number in range(3):
        hub.control.reset_counters()
        assert check._put_and_get_check()
        assert requests(hub, "batch") == 1, f"round {number}: the probe is written though it is there"
    assert rig.free_chunks() == whole
    assert rig.run(rig.connection.list()) == ["test@1@0@0@bfloat16"]


def test_the_health_check_passes_while_the_bucket_is_denied(hub, rig):
    check = RemoteBackendHealthCheck(rig.remote)
    hub.control.add_fault(Fault(route="*", status=403))

    for number in range(12):
        assert rig.remote.get_blocking(key(number)) is None
    assert check.check()
