"""The MP adapter: stores, lookups and loads, and buffers that are taken back."""

import gc
import json
import os
import re
import select
import threading
import weakref
from argparse import Namespace

import prometheus_client
import pytest
import torch
from lmcache.v1.distributed.api import MemoryLayoutDesc
from lmcache.v1.distributed.internal_api import L1MemoryDesc
from lmcache.v1.distributed.l2_adapters import create_l2_adapter
from lmcache.v1.distributed.l2_adapters.config import parse_args_to_l2_adapters_config
from lmcache.v1.platform import consume_fd

from hfbucket_plugin.config.l2 import L2Settings
from hfbucket_plugin.engine.mp import HFBucketL2Adapter, HFBucketL2AdapterConfig
from hfbucket_plugin.errors import ConfigError, HFBucketError
from localhub.faults import Fault
from tests.support.buckets import noise
from tests.support.lmcache_mp import (
    CHUNK_LAYOUTS,
    GIB,
    SIZE,
    Listener,
    await_result,
    chunk_key,
    chunk_memory,
    content_of,
    layout,
    load,
    lookup,
    mp_key,
    mp_memory,
    put,
    there,
    used,
)
from tests.support.surface import CHUNK_BYTES, Limits, content
from tests.support.waiting import eventually, in_threads, unused_port

HASTY = Limits(lookup=0.3, get=0.3, put=0.3)


# --- made by LMCache --------------------------------------------------------------------------------------------------


def made_by_lmcache(hub, bucket, tmp_path, **params):
    """What an operator writes after `--l2-adapter`, read and made by LMCache."""
    values = {
        "bucket_handle": f"hf://buckets/{bucket}/v1",
        "endpoint": hub.endpoint,
        "download_tmp_dir": str(tmp_path / "tmp"),
    }
    spec = {
        "type": "plugin",
        "module_path": "hfbucket_plugin.l2_adapter",
        "class_name": "HFBucketL2Adapter",
        "adapter_params": values | params,
    }
    config = parse_args_to_l2_adapters_config(Namespace(l2_adapter=[json.dumps(spec)]))
    return create_l2_adapter(config.adapters[0], l1_memory_desc=L1MemoryDesc(0, 1 << 20, 4096))


def test_lmcache_makes_it_from_json_and_its_numbers_are_in_the_registry_that_it_serves(hub, bucket, tmp_path):
    name = f"hfbucket.{bucket.rsplit('/')[-1]}"
    adapter = made_by_lmcache(hub, bucket, tmp_path, name=name, num_workers=4, put_window_secs=0)
    try:
        assert type(adapter) is HFBucketL2Adapter
        store = adapter.submit_store_task([mp_key(1)], [mp_memory(content_of(mp_key(1)))])
        assert eventually(adapter.pop_completed_store_tasks)[store].is_successful()
        task = adapter.submit_lookup_and_lock_task([mp_key(1), mp_key(2)], {0: layout(SIZE)})
        found = eventually(lambda: adapter.query_lookup_and_lock_result(task))
        assert [found.test(0), found.test(1)] == [True, False]
    finally:
        adapter.close()

    reported = prometheus_client.generate_latest().decode().splitlines()
    for line in (
        f'hfbucket_chunks_total{{instance="{name}",operation="put",outcome="stored"}} 1.0',
        f'hfbucket_chunks_total{{instance="{name}",operation="lookup",outcome="hit"}} 1.0',
        f'hfbucket_chunks_total{{instance="{name}",operation="lookup",outcome="missing"}} 1.0',
        f'hfbucket_bytes_total{{direction="write",instance="{name}"}} {float(SIZE)}',
        f'hfbucket_breaker_open{{instance="{name}",part="read"}} 0.0',
        f'hfbucket_waiting_put_bytes{{instance="{name}"}} 0.0',
    ):
        assert line in reported


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"bucket_handel": "x"}, "did you mean 'bucket_handle'"),
        ({"max_capacity_gb": -1}, "adapter_params.max_capacity_gb"),
        ({"eviction": {"eviction_policy": "LRU"}}, "eviction must stand beside adapter_params"),
    ],
    ids=str,
)
def test_a_wrong_setting_stops_the_server_and_is_named(hub, bucket, tmp_path, params, words):
    with pytest.raises(ValueError, match=re.escape(words)) as raised:
        made_by_lmcache(hub, bucket, tmp_path, **params)

    assert isinstance(raised.value, ConfigError)


def test_the_help_names_every_setting():
    reported = HFBucketL2AdapterConfig.help()

    assert all(f"\n- {name}: " in reported for name in L2Settings.model_fields)


# --- a bad start ------------------------------------------------------------------------------------------------------

BAD_STARTS = {
    "nobody listens": ({}, {"endpoint": "unused"}),
    "denied": ({"status": 401}, {}),
    "no such bucket": ({}, {"handle": "hf://buckets/nobody/nothing"}),
    "throttled": ({"status": 429, "headers": {"Retry-After": "3600"}}, {}),
    "garbage": ({"status": 200, "body": "<html>"}, {}),
    "hanging": ({"hang": True}, {}),
    "a token that cannot be sent": ({}, {"token": "two\nlines"}),
}


@pytest.mark.parametrize("case", BAD_STARTS)
def test_a_server_starts_whatever_the_network_does_and_every_task_ends(hub, l2_adapters, monkeypatch, case):
    fault, params = BAD_STARTS[case]
    if params.get("endpoint") == "unused":
        params = {"endpoint": f"http://127.0.0.1:{unused_port()}"}
    if fault:
        hub.control.add_fault(Fault(**fault))
    monkeypatch.setattr("hfbucket_plugin.engine.mp_usage._PAGE_SECS", 0.3)
    monkeypatch.setattr("hfbucket_plugin.engine.mp._DELETE_SECS", 0.3)

    mp = l2_adapters(HASTY, max_capacity_gb=1, usage_refresh_secs=60, **params)
    mp.adapter.register_listener(Listener())

    assert not put(mp, [mp_key(1)]).is_successful()
    assert lookup(mp, [mp_key(1)]) == [False]
    assert load(mp, [mp_key(1)]) == [None]
    mp.adapter.delete([mp_key(1)])
    with pytest.raises(HFBucketError):
        mp.adapter.list_l2_keys()
    assert used(mp) == 0
    assert json.dumps(mp.adapter.report_status())


def test_without_a_temporary_directory_all_works_that_needs_none(l2_adapters):
    mp = l2_adapters(download_tmp_dir="/dev/null/none")

    assert put(mp, [mp_key(1)]).is_successful()
    assert lookup(mp, [mp_key(1)]) == [True]
    assert load(mp, [mp_key(1)]) == [content_of(mp_key(1))]


def test_without_a_token_the_log_says_so(l2_adapters, monkeypatch, caplog):
    none = l2_adapters(token_env="SOME_VARIABLE")
    assert f"[{none.instance}] no token: the environment variable SOME_VARIABLE" in caplog.text
    caplog.clear()

    monkeypatch.setenv("SOME_VARIABLE", "hf_loopback")
    l2_adapters(token_env="SOME_VARIABLE")
    assert "no token" not in caplog.text


# --- status -----------------------------------------------------------------------------------------------------------


def test_the_status_of_an_adapter_that_is_well(bucket, l2_adapters):
    mp = l2_adapters(role="read-only", max_capacity_gb=2)
    status = mp.adapter.report_status()

    assert status["is_healthy"]
    assert status["reasons"] == status["breakers_open"] == []
    assert status["instance"] == mp.instance
    assert status["bucket"] == f"hf://buckets/{bucket}/v1"
    assert status["role"] == "read-only"
    assert status["max_capacity_bytes"] == 2 * GIB
    assert json.loads(json.dumps(status)) == status


def test_the_status_says_why_a_breaker_is_open_and_when_it_is_closed_again(hub, l2_adapters):
    mp = l2_adapters(breaker_failures=2, breaker_probe_secs=0.05, breaker_max_probe_secs=0.1)
    put(mp, [mp_key(1)])
    hub.control.add_fault(Fault(route="paths-info", status=503, body="out for lunch"))
    for _ in range(2):
        lookup(mp, [mp_key(1)])

    status = mp.adapter.report_status()
    assert not status["is_healthy"]
    assert status["breakers_open"] == ["lookup"]
    [reason] = status["reasons"]
    assert reason.startswith("lookup is disabled for now: ")
    assert "503 (out for lunch)" in reason

    hub.control.clear_faults()
    eventually(lambda: mp.adapter.report_status()["is_healthy"])
    assert mp.adapter.report_status()["reasons"] == []
    assert lookup(mp, [mp_key(1)]) == [True]


def test_the_status_tells_of_a_quota_that_is_used_up_and_calls_nothing_ill(hub, l2_adapters):
    mp = l2_adapters()
    hub.control.add_fault(Fault(route="paths-info", status=429, headers={"Retry-After": "200"}))
    lookup(mp, [mp_key(1)])

    status = mp.adapter.report_status()
    assert status["is_healthy"]
    [reason] = status["reasons"]
    assert re.fullmatch(r"the Hub asked this token to wait \d+ s more: its quota is used up", reason)


def test_the_status_counts_what_is_in_progress_and_tells_of_the_end(hub, l2_adapters):
    mp = l2_adapters(close_timeout_secs=0.1)
    late = hub.control.add_fault(Fault(route="paths-info", hang=True))
    mp.adapter.submit_store_task([mp_key(1)], [mp_memory(noise(SIZE))])
    mp.adapter.submit_lookup_and_lock_task([mp_key(2)], {})
    mp.adapter.submit_load_task([mp_key(3)], [mp_memory(bytes(SIZE))])
    eventually(lambda: hub.control.hits(late) == 3)

    status = mp.adapter.report_status()
    assert status["tasks"] == {"store": 1, "lookup": 1, "load": 1}
    assert status["waiting_put_bytes"] == SIZE
    mp.close()
    status = mp.adapter.report_status()
    assert not status["is_healthy"]
    assert "the adapter is closed" in status["reasons"]


# --- the end ----------------------------------------------------------------------------------------------------------


def test_closing_waits_for_stores_that_are_about_to_end_and_lets_go_of_the_descriptors(hub, bucket, l2_adapters):
    adapter = l2_adapters(close_timeout_secs=30).adapter
    fds = adapter.get_store_event_fd(), adapter.get_lookup_and_lock_event_fd(), adapter.get_load_event_fd()
    slow = hub.control.add_fault(Fault(route="batch", delay_s=0.3))
    adapter.submit_store_task([mp_key(1)], [mp_memory(noise(SIZE))])
    eventually(lambda: hub.control.hits(slow))

    adapter.close()
    adapter.close()

    assert there(hub, bucket, [mp_key(1)]) == [mp_key(1)]
    for fd in fds:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
    assert adapter.pop_completed_store_tasks() == {}


def test_threads_of_a_closed_adapter_end(l2_adapters):
    before = set(threading.enumerate())
    mp = l2_adapters(usage_refresh_secs=60)
    put(mp, [mp_key(1)])
    lookup(mp, [mp_key(1)])
    load(mp, [mp_key(1)])
    mp.close()

    eventually(lambda: not [one for one in set(threading.enumerate()) - before if one.name.startswith("hfbucket-")])


# --- tasks ------------------------------------------------------------------------------------------------------------


def test_each_kind_of_task_signals_its_own_descriptor(l2_adapters):
    adapter, other, key = l2_adapters().adapter, l2_adapters().adapter, mp_key(1)
    waits = {
        adapter.get_store_event_fd(): lambda: adapter.submit_store_task([key], [mp_memory(noise(SIZE))]),
        adapter.get_lookup_and_lock_event_fd(): lambda: adapter.submit_lookup_and_lock_task([key], {}),
        adapter.get_load_event_fd(): lambda: adapter.submit_load_task([key], [mp_memory(bytes(SIZE))]),
    }
    others = {other.get_store_event_fd(), other.get_lookup_and_lock_event_fd(), other.get_load_event_fd()}
    assert len(waits.keys() | others) == 6

    for fd, submit in waits.items():
        submit()
        assert select.select([*waits, *others], [], [], 30)[0] == [fd]
        consume_fd(fd)


def test_memory_that_nobody_else_holds_any_more_is_held_until_its_task_ends(hub, l2_adapters):
    mp, key = l2_adapters(), mp_key(1)
    put(mp, [key])
    late = hub.control.add_fault(Fault(route="xorb-data", hang=True))
    memory = [mp_memory(bytes(SIZE))]
    there_still = weakref.ref(memory[0])

    task = mp.adapter.submit_load_task([key], memory)
    del memory
    eventually(lambda: hub.control.hits(late))
    gc.collect()
    assert there_still() is not None, "it would be written into, whatever it is given to next"

    hub.control.clear_faults()
    assert await_result(mp.adapter.get_load_event_fd(), lambda: mp.adapter.query_load_result(task)).test(0)
    eventually(lambda: gc.collect() is not None and there_still() is None)


def test_batches_of_unequal_lengths_are_refused_before_they_begin(l2_adapters):
    adapter = l2_adapters().adapter

    for keys, objects in (([mp_key(1)], []), ([], [mp_memory(bytes(SIZE))])):
        with pytest.raises(ValueError, match="zip"):
            adapter.submit_store_task(keys, objects)
        with pytest.raises(ValueError, match="zip"):
            adapter.submit_load_task(keys, objects)

    assert not any(adapter.report_status()["tasks"].values())


@pytest.mark.parametrize("size", [1, 4095, 4097, 3_179_604])
def test_objects_have_any_size(hub, bucket, l2_adapters, size):
    mp, keys = l2_adapters(), [mp_key(1), mp_key(2)]

    assert put(mp, keys, size).is_successful()

    assert lookup(mp, keys, {0: layout(size)}) == [True, True]
    assert load(mp, keys, size) == [content_of(key, size) for key in keys]
    assert load(mp, keys, size + 1) == [None, None]


def test_layouts_are_per_group_and_an_unknown_group_takes_any_size(l2_adapters):
    mp = l2_adapters()
    small, large = mp_key(1, group=0), mp_key(1, group=1)
    put(mp, [small], SIZE)
    put(mp, [large], 3 * SIZE)
    two_tensors = MemoryLayoutDesc([torch.Size([SIZE]), torch.Size([SIZE])], [torch.uint8, torch.bfloat16])

    for layouts, found in (
        ({0: layout(SIZE), 1: layout(3 * SIZE)}, [True, True]),
        ({0: layout(SIZE), 1: two_tensors}, [True, True]),
        ({0: layout(3 * SIZE), 1: layout(SIZE)}, [False, False]),
        ({0: layout(SIZE)}, [True, True]),
        ({}, [True, True]),
    ):
        assert lookup(mp, [small, large], layouts) == found


def test_adapters_with_a_serde_take_objects_of_any_size(l2_adapters):
    mp = l2_adapters(object_sizes="any")
    put(mp, [mp_key(1)], 3 * SIZE)

    assert lookup(mp, [mp_key(1)]) == [True]
    assert load(mp, [mp_key(1)]) == [None], "the buffer's size is looked at still"


# --- locks ------------------------------------------------------------------------------------------------------------


def test_what_was_not_found_is_not_locked_and_unlocking_it_counts_for_nothing(hub, bucket, l2_adapters):
    mp, key = l2_adapters(), mp_key(1)

    assert lookup(mp, [key] * 3) == [False] * 3
    assert mp.adapter.report_status()["locked_key_count"] == 0
    mp.adapter.submit_unlock([])
    mp.adapter.submit_unlock([key, key, mp_key(99)])

    put(mp, [key])
    assert lookup(mp, [key]) == [True]
    mp.adapter.delete([key])
    assert there(hub, bucket, [key]) == [key], "the unlocks before it did not use this lock up"


def test_locks_survive_threads_that_lock_and_unlock_at_once(hub, bucket, l2_adapters):
    mp, key = l2_adapters(metadata_cache_ttl_secs=600), mp_key(1)
    put(mp, [key])
    lookup(mp, [key])  # so that nobody can delete it

    def work(_number):
        for _ in range(5):
            assert lookup(mp, [key]) == [True]
            mp.adapter.delete([key])
            mp.adapter.submit_unlock([key])

    assert in_threads(4, work) == [None] * 4

    assert mp.adapter.report_status()["locked_key_count"] == 1
    assert there(hub, bucket, [key]) == [key]
    mp.adapter.submit_unlock([key])
    mp.adapter.delete([key])
    assert there(hub, bucket, [key]) == []


UNTOUCHED = b"\xa5" * CHUNK_BYTES


@pytest.fixture
def mp(l2_adapters):
    surface = l2_adapters()
    surface.put([0])
    return surface


def locked(mp):
    task = mp.adapter.submit_lookup_and_lock_task([chunk_key(0)], CHUNK_LAYOUTS)
    fd = mp.adapter.get_lookup_and_lock_event_fd()
    assert await_result(fd, lambda: mp.adapter.query_lookup_and_lock_result(task)).test(0)


def loading(hub, mp):
    """A load that the store is asked for and does not answer yet, and its buffer."""
    held = hub.control.add_fault(Fault(route="xorb-data", hang=True))
    memory = chunk_memory(UNTOUCHED)
    task = mp.adapter.submit_load_task([chunk_key(0)], [memory])
    eventually(lambda: hub.control.hits(held))
    return task, memory


def loaded(mp, task):
    return await_result(mp.adapter.get_load_event_fd(), lambda: mp.adapter.query_load_result(task)).test(0)


def bytes_of(memory):
    return bytes(memory.byte_array.cast("B"))


def test_an_unlock_that_leaves_fewer_locks_than_loads_revokes_them(hub, mp):
    locked(mp)
    task, memory = loading(hub, mp)

    mp.adapter.submit_unlock([chunk_key(0)])
    hub.control.clear_faults()

    assert not loaded(mp, task)
    assert bytes_of(memory) == UNTOUCHED


def test_an_unlock_of_another_request_revokes_nothing(hub, mp):
    locked(mp)
    locked(mp)
    task, memory = loading(hub, mp)

    mp.adapter.submit_unlock([chunk_key(0), chunk_key(99)])
    hub.control.clear_faults()

    assert loaded(mp, task)
    assert bytes_of(memory) == content(0)


def test_an_unlock_of_what_another_request_looked_up_and_did_not_load_revokes_nothing(hub, mp):
    locked(mp)
    locked(mp)
    task, memory = loading(hub, mp)

    mp.adapter.submit_unlock([chunk_key(0)])
    hub.control.clear_faults()

    assert loaded(mp, task)
    assert bytes_of(memory) == content(0)


def test_memory_that_is_freed_under_a_load_is_not_written_whosever_the_unlock_was(hub, mp):
    locked(mp)
    locked(mp)
    task, memory = loading(hub, mp)

    mp.adapter.submit_unlock([chunk_key(0)])
    memory.invalidate()  # as the allocator does before it gives the memory to somebody else
    hub.control.clear_faults()

    assert not loaded(mp, task)
    assert bytes(memory.raw_data.numpy().tobytes()) == UNTOUCHED
    assert mp.adapter.report_status()["breakers_open"] == []


def test_memory_that_is_freed_under_a_store_is_not_stored(hub, mp):
    held = hub.control.add_fault(Fault(route="paths-info", delay_s=0.3))
    memory = chunk_memory(content(1))
    task = mp.adapter.submit_store_task([chunk_key(1)], [memory])
    eventually(lambda: hub.control.hits(held))
    memory.invalidate()

    assert not await_result(mp.adapter.get_store_event_fd(), lambda: mp._stored(task)).is_successful()
    assert mp.lookup([1]) == [False]
    assert mp.adapter.report_status()["breakers_open"] == []


def test_the_unlock_after_a_load_revokes_no_other_of_the_same_keys(hub, mp):
    locked(mp)
    locked(mp)
    done = mp.adapter.submit_load_task([chunk_key(0)], [chunk_memory(UNTOUCHED)])
    assert loaded(mp, done)
    task, memory = loading(hub, mp)

    mp.adapter.submit_unlock([chunk_key(0)])
    hub.control.clear_faults()
    assert loaded(mp, task)
    mp.adapter.submit_unlock([chunk_key(0)])

    assert bytes_of(memory) == content(0)
    assert mp.adapter.report_status()["locked_key_count"] == 0


def test_locks_are_counted_and_what_is_locked_is_not_deleted(mp):
    locked(mp)
    locked(mp)
    mp.adapter.submit_unlock([chunk_key(0), chunk_key(99)])

    assert not mp.delete([0])
    assert mp.adapter.report_status()["locked_key_count"] == 1
    mp.adapter.submit_unlock([chunk_key(0)])
    mp.adapter.submit_unlock([chunk_key(0)])
    assert mp.adapter.report_status()["locked_key_count"] == 0
    assert mp.delete([0])
    assert mp.list() == []


def test_loads_that_lmcache_gives_up_say_nothing_about_the_store(hub, mp):
    for _ in range(4):  # one more failure than opens a breaker
        locked(mp)
        task, _ = loading(hub, mp)
        mp.adapter.submit_unlock([chunk_key(0)])
        hub.control.clear_faults()
        assert not loaded(mp, task)

    assert mp.adapter.report_status()["breakers_open"] == []
    locked(mp)
    assert loaded(mp, mp.adapter.submit_load_task([chunk_key(0)], [chunk_memory(UNTOUCHED)]))


def test_a_session_is_not_doubted_for_a_buffer_that_was_taken_back(hub, mp, monkeypatch):
    doubted = []
    monkeypatch.setattr(mp.adapter._store.bucket.transfer._reading, "doubt", doubted.append)
    locked(mp)
    task, _ = loading(hub, mp)
    mp.adapter.submit_unlock([chunk_key(0)])
    hub.control.clear_faults()

    assert not loaded(mp, task)
    assert doubted == []
