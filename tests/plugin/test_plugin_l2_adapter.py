"""MP mode's adapter: what is its own beside what both surfaces share (`test_plugin_conformance.py`)."""

import gc
import itertools
import json
import os
import re
import select
import subprocess
import sys
import threading
import time
import weakref
import zlib
from argparse import Namespace

import prometheus_client
import pytest
import torch
from huggingface_hub import HfApi
from lmcache.v1.distributed.api import MemoryLayoutDesc
from lmcache.v1.distributed.config import EvictionConfig, L1ManagerConfig, L1MemoryManagerConfig, StorageManagerConfig
from lmcache.v1.distributed.internal_api import L1MemoryDesc, L2AdapterListener
from lmcache.v1.distributed.l2_adapters import create_l2_adapter
from lmcache.v1.distributed.l2_adapters import hfbucket_l2_adapter as built_in
from lmcache.v1.distributed.l2_adapters.config import parse_args_to_l2_adapters_config
from lmcache.v1.distributed.quota_manager import QuotaManager
from lmcache.v1.distributed.storage_controllers.eviction_controller import L2AdapterEvictionState, L2EvictionController
from lmcache.v1.distributed.storage_manager import StorageManager
from lmcache.v1.platform import consume_fd
from lmcache.v1.storage_backend.connector.hfbucket_connector import HFBucketClient
from plugin_support import eventually, in_threads, noise, paths, unused_port, upload
from surfaces import Controller, MPSurface, bits, layout, mp_key, mp_memory

from hfbucket_plugin.errors import ConfigError, HFBucketError
from hfbucket_plugin.keys import encode_name
from hfbucket_plugin.l2_adapter import HFBucketL2Adapter, HFBucketL2AdapterConfig
from hfbucket_plugin.l2_keys import key_string
from hfbucket_plugin.metrics import Tally
from localhub.faults import Fault

SIZE = 4096
GIB = 1024**3
BOUND = 6.0
"""What has a deadline of a second or less ends before this many seconds, however slow the machine is."""


@pytest.fixture
def adapters(hub, bucket, tmp_path, monkeypatch):
    """Makes adapters over the bucket of the test, driven as LMCache drives them: ours, or the built-in one."""
    monkeypatch.setattr("hfbucket_plugin.l2_usage_listing._SETTLE_SECS", 0.02)
    monkeypatch.setattr(
        HFBucketClient, "__init__", lambda self, token: setattr(self, "_api", HfApi(endpoint=hub.endpoint, token=False))
    )
    made = []

    def make(prefix="v1", *, theirs=False, **params):
        values = {"bucket_handle": f"hf://buckets/{bucket}/{prefix}", "download_tmp_dir": str(tmp_path / "tmp")}
        tally = Tally()
        if theirs:
            adapter = built_in.HFBucketL2Adapter(built_in.HFBucketL2AdapterConfig.from_dict(values | params))
        else:
            values |= {"endpoint": hub.endpoint, "metadata_cache_ttl_secs": 0}
            adapter = HFBucketL2Adapter(HFBucketL2AdapterConfig.from_dict(values | params), sink=tally)
        made.append(MPSurface(adapter, SIZE, prefix, tally))
        return made[-1]

    yield make
    hub.control.clear_faults()
    for one in made:
        one.close()


def put(surface, keys, size=SIZE):
    return surface.controller.store(
        list(keys), [mp_memory(noise(size, zlib.crc32(key_string(key).encode()))) for key in keys]
    )


def lookup(surface, keys):
    """Look up and lock."""
    return surface.controller.lookup(list(keys), {0: layout(SIZE)})


def path_of(key, prefix="v1"):
    return f"{prefix}/{encode_name(key_string(key))}"


def there(hub, bucket, keys):
    held = set(paths(hub.endpoint, bucket))
    return [key for key in keys if path_of(key) in held]


class Listener(L2AdapterListener):
    """Remembers what it was told."""

    def __init__(self):
        self.stored, self.accessed, self.deleted = [], [], []

    def on_l2_keys_stored(self, keys, sizes):
        self.stored += zip(keys, sizes, strict=True)

    def on_l2_keys_accessed(self, keys):
        self.accessed += keys

    def on_l2_keys_deleted(self, keys):
        self.deleted += keys


# --- made by LMCache --------------------------------------------------------------------------------------------------------


def json_spec(hub, bucket, tmp_path, **params):
    """What an operator writes after `--l2-adapter`."""
    values = {
        "bucket_handle": f"hf://buckets/{bucket}/v1",
        "endpoint": hub.endpoint,
        "download_tmp_dir": str(tmp_path / "tmp"),
    }
    return {
        "type": "plugin",
        "module_path": "hfbucket_plugin.l2_adapter",
        "class_name": "HFBucketL2Adapter",
        "adapter_params": values | params,
    }


def parsed(*specs):
    """LMCache's own configuration of such texts."""
    return parse_args_to_l2_adapters_config(Namespace(l2_adapter=[json.dumps(spec) for spec in specs]))


def test_lmcache_makes_the_adapter_from_json_and_its_numbers_are_in_the_registry_it_serves(hub, bucket, tmp_path):
    name = f"hfbucket.{bucket.rsplit('/')[-1]}"
    spec = json_spec(hub, bucket, tmp_path, name=name, num_workers=4, put_window_secs=0)
    adapter = create_l2_adapter(parsed(spec).adapters[0], l1_memory_desc=L1MemoryDesc(0, 1 << 20, 4096))
    surface = MPSurface(adapter, SIZE, "v1")
    try:
        assert type(adapter) is HFBucketL2Adapter
        put(surface, [mp_key(1)])
        assert lookup(surface, [mp_key(1), mp_key(2)]) == [True, False]
        assert surface.get([1]) == [noise(SIZE, zlib.crc32(surface.name(1).encode()))]
    finally:
        surface.close()

    told = prometheus_client.generate_latest().decode()
    for line in (
        f'hfbucket_chunks_total{{instance="{name}",operation="put",outcome="stored"}} 1.0',
        f'hfbucket_chunks_total{{instance="{name}",operation="lookup",outcome="hit"}} 1.0',
        f'hfbucket_chunks_total{{instance="{name}",operation="lookup",outcome="missing"}} 1.0',
        f'hfbucket_chunks_total{{instance="{name}",operation="get",outcome="hit"}} 1.0',
        f'hfbucket_bytes_total{{direction="write",instance="{name}"}} {float(SIZE)}',
        f'hfbucket_breaker_open{{instance="{name}",part="read"}} 0.0',
        f'hfbucket_waiting_put_bytes{{instance="{name}"}} 0.0',
    ):
        assert line in told.splitlines()


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"bucket_handel": "x"}, "did you mean 'bucket_handle'"),
        ({"max_capacity": 3}, "did you mean 'max_capacity_gb'"),
        ({"max_capacity_gb": -1}, "adapter_params.max_capacity_gb"),
        ({"usage_refresh_secs": "often"}, "adapter_params.usage_refresh_secs"),
        ({"object_sizes": "some"}, "adapter_params.object_sizes"),
        ({"role": "reader"}, "adapter_params.role"),
        ({"bucket_handle": "my-org/kv"}, "adapter_params.bucket_handle"),
        ({"name": "two words"}, "adapter_params.name"),
        ({"eviction": {"eviction_policy": "LRU"}}, "eviction must stand beside adapter_params"),
        ({"serde": {"type": "fp8"}, "shared": True}, "serde, shared must stand beside adapter_params"),
        ({"max_parallel_reads": 0, "max_parallel_writs": 1}, "did you mean 'max_parallel_writes'"),
    ],
    ids=str,
)
def test_a_wrong_setting_stops_the_server_and_is_named(hub, bucket, tmp_path, params, words):
    config = parsed(json_spec(hub, bucket, tmp_path, **params)).adapters[0]

    with pytest.raises(ValueError, match=re.escape(words)) as raised:
        create_l2_adapter(config)

    assert isinstance(raised.value, ConfigError)


def test_without_a_bucket_there_is_no_adapter(hub, bucket, tmp_path):
    spec = json_spec(hub, bucket, tmp_path)
    del spec["adapter_params"]["bucket_handle"]

    with pytest.raises(ConfigError, match=r"adapter_params\.bucket_handle: is required"):
        create_l2_adapter(parsed(spec).adapters[0])


def test_the_help_names_every_setting():
    told = HFBucketL2AdapterConfig.help()

    for name in ("bucket_handle", "max_capacity_gb", "usage_refresh_secs", "put_window_secs", "role"):
        assert f"\n- {name}: " in told


def test_lmcaches_own_check_passes_in_every_row(hub, bucket, tmp_path):
    spec = json_spec(hub, bucket, tmp_path)
    text = json.dumps(spec)
    command = [sys.executable, "-m", "lmcache.v1.basic_check", "--mode", "test_l2_adapter"]
    done = subprocess.run(
        [*command, "--obj-size", "12345", "--l2-adapter", text],
        env=os.environ | {"HF_HOME": str(tmp_path / "home")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )

    rows = dict(re.findall(r"^\| ([A-Z][^|]*?) *\|.*?\| +(\d+/\d+) \| +100\.0% \|", done.stdout, re.MULTILINE))
    assert rows == {"LOOKUP (absent)": "5/5", "STORE": "5/5", "LOOKUP (exist)": "5/5", "LOAD": "5/5"}, done.stdout
    assert "(HFBucketL2Adapter)" in done.stdout
    assert "hfbucket_plugin" not in done.stderr or "Traceback" not in done.stderr
    assert len(paths(hub.endpoint, bucket)) == 5, "it was our Hub that answered"


# --- a bad start ----------------------------------------------------------------------------------------------------------


BAD_STARTS = {
    "nobody listens": ({}, {"endpoint": "unused"}),
    "denied": ({"status": 401}, {}),
    "no such bucket": ({}, {"bucket_handle": "hf://buckets/nobody/nothing"}),
    "broken": ({"status": 500}, {}),
    "throttled": ({"status": 429, "headers": {"Retry-After": "3600"}}, {}),
    "garbage": ({"status": 200, "body": "<html>"}, {}),
    "hanging": ({"hang": True}, {}),
    "no temporary directory": ({}, {"download_tmp_dir": "/dev/null/none"}),
    "a token that cannot be sent": ({}, {"token": "two\nlines"}),
}


@pytest.mark.parametrize("case", BAD_STARTS)
def test_a_server_starts_whatever_the_network_does_and_every_task_ends(hub, adapters, monkeypatch, case):
    fault, params = BAD_STARTS[case]
    if params.get("endpoint") == "unused":
        params = {"endpoint": f"http://127.0.0.1:{unused_port()}"}
    if fault:
        hub.control.add_fault(Fault(**fault))
    monkeypatch.setattr("hfbucket_plugin.l2_listing._PAGE_SECS", 0.3)
    monkeypatch.setattr("hfbucket_plugin.l2_adapter._DELETE_SECS", 0.3)
    started = time.monotonic()

    surface = adapters(lookup_timeout_secs=0.3, get_timeout_secs=0.3, put_timeout_secs=0.3, max_capacity_gb=1, **params)
    surface.adapter.register_listener(Listener())
    assert time.monotonic() - started < BOUND

    works = case == "no temporary directory"
    assert put(surface, [mp_key(1)]).is_successful() == works
    assert lookup(surface, [mp_key(1)]) == [works]
    assert surface.controller.load([mp_key(1)], [mp_memory(bytes(SIZE))]) == [works]
    if not works:
        surface.adapter.delete([mp_key(1)])
        with pytest.raises(HFBucketError):
            surface.adapter.list_l2_keys()
    assert used(surface) == (SIZE if works else 0)
    assert json.dumps(surface.adapter.report_status())
    started = time.monotonic()
    surface.close()
    assert time.monotonic() - started < BOUND


def test_a_bucket_that_is_missing_is_made_by_the_first_store(hub, adapters, caplog):
    bucket_id = "tests/made-by-the-first-store"
    surface = adapters(bucket_handle=f"hf://buckets/{bucket_id}", create_bucket_if_missing=True, prefix="")

    assert lookup(surface, [mp_key(1)]) == [False]
    assert put(surface, [mp_key(1)]).is_successful()
    assert lookup(surface, [mp_key(1)]) == [True]
    assert paths(hub.endpoint, bucket_id) == [encode_name(key_string(mp_key(1)))]


def test_without_a_token_the_log_says_so(adapters, monkeypatch, caplog):
    adapters(name="hfbucket.none", token_env="SOME_VARIABLE")
    assert "[hfbucket.none] no token: the environment variable SOME_VARIABLE" in caplog.text
    caplog.clear()

    monkeypatch.setenv("SOME_VARIABLE", "hf_loopback")
    adapters(name="hfbucket.some", token_env="SOME_VARIABLE")
    assert "no token" not in caplog.text


# --- status ----------------------------------------------------------------------------------------------------------------


def test_the_status_of_an_adapter_that_is_well(hub, bucket, adapters):
    surface = adapters(name="hfbucket.eu", role="read-only", max_capacity_gb=2)
    status = surface.adapter.report_status()

    assert status["is_healthy"]
    assert status["reasons"] == status["breakers_open"] == []
    assert status["instance"] == "hfbucket.eu"
    assert status["bucket"] == f"hf://buckets/{bucket}/v1"
    assert status["role"] == "read-only"
    assert status["max_capacity_bytes"] == 2 * GIB
    assert json.loads(json.dumps(status)) == status


def test_the_status_says_why_a_breaker_is_open_and_when_it_is_closed_again(hub, adapters):
    surface = adapters(breaker_failures=2, breaker_probe_secs=0.05, breaker_max_probe_secs=0.1)
    put(surface, [mp_key(1)])
    hub.control.add_fault(Fault(route="paths-info", status=503, body="out for lunch"))
    for _ in range(2):
        lookup(surface, [mp_key(1)])

    status = surface.adapter.report_status()
    assert not status["is_healthy"]
    assert status["breakers_open"] == ["lookup"]
    [reason] = status["reasons"]
    assert reason.startswith("lookup is given up for now: ")
    assert "503 (out for lunch)" in reason

    hub.control.clear_faults()
    eventually(lambda: surface.adapter.report_status()["is_healthy"])
    assert surface.adapter.report_status()["reasons"] == []
    assert lookup(surface, [mp_key(1)]) == [True]


def test_the_status_tells_of_a_quota_that_is_used_up_and_calls_nothing_ill(hub, adapters):
    surface = adapters()
    hub.control.add_fault(Fault(route="paths-info", status=429, headers={"Retry-After": "200"}))
    lookup(surface, [mp_key(1)])

    status = surface.adapter.report_status()
    assert status["is_healthy"]
    assert len(status["reasons"]) == 1
    assert re.fullmatch(
        r"the Hub told this token to wait (19\d|200) s more: its quota is used up", status["reasons"][0]
    )


def test_the_status_counts_what_is_under_way_and_tells_of_the_end(hub, adapters):
    surface = adapters(put_timeout_secs=30, lookup_timeout_secs=30, close_timeout_secs=0.1)
    late = hub.control.add_fault(Fault(route="paths-info", hang=True))
    adapter = surface.adapter
    adapter.submit_store_task([mp_key(1)], [mp_memory(noise(SIZE))])
    adapter.submit_lookup_and_lock_task([mp_key(2)], {})
    adapter.submit_load_task([mp_key(3)], [mp_memory(bytes(SIZE))])
    eventually(lambda: hub.control.hits(late) == 3)

    status = adapter.report_status()
    assert status["tasks"] == {"store": 1, "lookup": 1, "load": 1}
    assert status["waiting_put_bytes"] == SIZE
    surface.close()
    status = adapter.report_status()
    assert not status["is_healthy"]
    assert "the adapter is closed" in status["reasons"]


def test_closing_waits_for_stores_that_are_about_to_end_and_lets_go_of_the_descriptors(hub, bucket, adapters):
    surface = adapters(close_timeout_secs=30)
    adapter = surface.adapter
    fds = adapter.get_store_event_fd(), adapter.get_lookup_and_lock_event_fd(), adapter.get_load_event_fd()
    slow = hub.control.add_fault(Fault(route="batch", delay_s=0.3))
    surface.controller.stop()
    adapter.submit_store_task([mp_key(1)], [mp_memory(noise(SIZE))])
    eventually(lambda: hub.control.hits(slow))

    adapter.close()
    adapter.close()

    assert there(hub, bucket, [mp_key(1)]) == [mp_key(1)]
    for fd in fds:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
    assert adapter.pop_completed_store_tasks() == {}
    surface._closed = True


def test_threads_of_a_closed_adapter_end(adapters):
    before = set(threading.enumerate())
    surface = adapters()
    put(surface, [mp_key(1)])
    lookup(surface, [mp_key(1)])
    surface.controller.load([mp_key(1)], [mp_memory(bytes(SIZE))])
    surface.close()

    eventually(lambda: not [one for one in set(threading.enumerate()) - before if one.name.startswith("hfbucket-")])


# --- tasks ----------------------------------------------------------------------------------------------------------------


def test_no_two_descriptors_are_the_same_even_of_two_adapters(adapters):
    fds = [
        fd
        for adapter in (adapters().adapter, adapters().adapter)
        for fd in (
            adapter.get_store_event_fd(),
            adapter.get_lookup_and_lock_event_fd(),
            adapter.get_load_event_fd(),
        )
    ]

    assert len(set(fds)) == 6
    for fd in fds:
        assert select.select([fd], [], [], 0)[0] == [], "nothing has ended yet"


def test_each_kind_of_task_signals_its_own_descriptor(adapters):
    surface = adapters()
    surface.controller.stop()
    adapter, key = surface.adapter, mp_key(1)
    waits = {
        adapter.get_store_event_fd(): lambda: adapter.submit_store_task([key], [mp_memory(noise(SIZE))]),
        adapter.get_lookup_and_lock_event_fd(): lambda: adapter.submit_lookup_and_lock_task([key], {}),
        adapter.get_load_event_fd(): lambda: adapter.submit_load_task([key], [mp_memory(bytes(SIZE))]),
    }

    for fd, submit in waits.items():
        submit()
        ready = select.select(list(waits), [], [], 30)[0]
        assert ready == [fd]
        consume_fd(fd)
    surface.controller = Controller(adapter)


def test_a_result_is_given_once_and_only_for_a_task_that_there_was(adapters):
    surface = adapters()
    surface.controller.stop()
    adapter, keys = surface.adapter, [mp_key(1), mp_key(2)]
    store = adapter.submit_store_task(keys, [mp_memory(noise(SIZE, n)) for n in range(2)])
    assert eventually(adapter.pop_completed_store_tasks) == {store: 2 * SIZE}
    assert adapter.pop_completed_store_tasks() == {}

    lookup_task = adapter.submit_lookup_and_lock_task([*keys, mp_key(3)], {})
    found = eventually(lambda: adapter.query_lookup_and_lock_result(lookup_task))
    assert bits(found, 3) == [True, True, False]
    assert adapter.query_lookup_and_lock_result(lookup_task) is None

    load = adapter.submit_load_task(keys, [mp_memory(bytes(SIZE)) for _ in keys])
    assert bits(eventually(lambda: adapter.query_load_result(load)), 2) == [True, True]
    assert adapter.query_load_result(load) is None
    for unknown in (0, -1, 10**9):
        assert adapter.query_load_result(unknown) is None
        assert adapter.query_lookup_and_lock_result(unknown) is None
    surface.controller = Controller(adapter)


def test_task_numbers_are_unique_and_every_task_ends_whichever_thread_submitted_it(adapters):
    surface = adapters(lookup_timeout_secs=30)
    surface.controller.stop()
    adapter = surface.adapter
    put(adapters(theirs=True), [mp_key(1)])

    def submit(number):
        return [
            (
                adapter.submit_store_task([mp_key(100 + number)], [mp_memory(noise(SIZE, number))]),
                adapter.submit_lookup_and_lock_task([mp_key(1), mp_key(2)], {}),
                adapter.submit_load_task([mp_key(1)], [mp_memory(bytes(SIZE))]),
            )
            for _ in range(5)
        ]

    tasks = [three for many in in_threads(8, submit) for three in many]

    for ids in zip(*tasks, strict=True):
        assert len(set(ids)) == 40
    stored = {}
    eventually(lambda: stored.update(adapter.pop_completed_store_tasks()) or len(stored) == 40)
    assert set(stored) == {store for store, _, _ in tasks}
    assert sum(stored.values()) == 8 * SIZE, "each object was written once"
    for _, looked_up, loaded in tasks:
        found = eventually(lambda task=looked_up: adapter.query_lookup_and_lock_result(task))
        assert bits(found, 2) == [True, False]
        assert bits(eventually(lambda task=loaded: adapter.query_load_result(task)), 1) == [True]
    surface.controller = Controller(adapter)


def test_memory_that_nobody_else_holds_any_more_is_held_until_its_task_ends(hub, adapters):
    surface = adapters()
    key = mp_key(1)
    put(surface, [key])
    late = hub.control.add_fault(Fault(route="xorb-data", hang=True))
    memory = [mp_memory(bytes(SIZE))]
    there_still = weakref.ref(memory[0])

    loading = surface.controller.submit("load", surface.adapter.submit_load_task, [key], memory)
    del memory
    eventually(lambda: hub.control.hits(late))
    gc.collect()
    assert there_still() is not None, "it would be written into, whoever it is given to next"

    hub.control.clear_faults()
    assert bits(loading.result(30), 1) == [True]
    eventually(lambda: gc.collect() is not None and there_still() is None)


def test_batches_of_unequal_lengths_are_refused_before_they_begin(adapters):
    adapter = adapters().adapter

    for keys, objects in (([mp_key(1)], []), ([], [mp_memory(bytes(SIZE))])):
        with pytest.raises(ValueError, match="zip"):
            adapter.submit_store_task(keys, objects)
        with pytest.raises(ValueError, match="zip"):
            adapter.submit_load_task(keys, objects)

    assert not any(adapter.report_status()["tasks"].values())


def test_layouts_are_per_group_and_an_unknown_group_takes_any_size(adapters):
    surface = adapters()
    small, large = mp_key(1, group=0), mp_key(1, group=1)
    put(surface, [small], SIZE)
    put(surface, [large], 3 * SIZE)
    two_tensors = MemoryLayoutDesc([torch.Size([SIZE]), torch.Size([SIZE])], [torch.uint8, torch.bfloat16])

    for layouts, found in (
        ({0: layout(SIZE), 1: layout(3 * SIZE)}, [True, True]),
        ({0: layout(SIZE), 1: two_tensors}, [True, True]),
        ({0: layout(3 * SIZE), 1: layout(SIZE)}, [False, False]),
        ({0: layout(SIZE)}, [True, True]),
        ({}, [True, True]),
    ):
        assert surface.controller.lookup([small, large], layouts) == found


def test_adapters_with_a_serde_take_objects_of_any_size(adapters):
    surface = adapters(object_sizes="any")
    put(surface, [mp_key(1)], 3 * SIZE)

    assert lookup(surface, [mp_key(1)]) == [True]
    assert surface.controller.load([mp_key(1)], [mp_memory(bytes(SIZE))]) == [False], (
        "the buffer's size is looked at still"
    )


# --- locks ----------------------------------------------------------------------------------------------------------------


def test_what_is_locked_is_not_deleted_until_every_lock_is_taken_back(hub, bucket, adapters):
    surface = adapters()
    keys = [mp_key(1), mp_key(2)]
    put(surface, keys)
    for _ in range(2):
        assert lookup(surface, [keys[0]]) == [True]
    assert surface.adapter.report_status()["locked_key_count"] == 1

    surface.adapter.delete(keys)
    assert there(hub, bucket, keys) == [keys[0]]
    surface.adapter.submit_unlock([keys[0]])
    surface.adapter.delete(keys)
    assert there(hub, bucket, keys) == [keys[0]]
    surface.adapter.submit_unlock([keys[0]])
    assert surface.adapter.report_status()["locked_key_count"] == 0
    surface.adapter.delete(keys)
    assert there(hub, bucket, keys) == []


def test_unlocking_always_succeeds_and_more_unlocks_than_locks_count_for_nothing(hub, bucket, adapters):
    surface = adapters()
    key = mp_key(1)
    put(surface, [key])

    surface.adapter.submit_unlock([])
    surface.adapter.submit_unlock([key, key, mp_key(99), mp_key(99)])
    assert lookup(surface, [key]) == [True]
    surface.adapter.delete([key])
    assert there(hub, bucket, [key]) == [key], "the unlocks before it did not use this lock up"
    surface.adapter.submit_unlock([key, key, key])
    surface.adapter.delete([key])
    assert there(hub, bucket, [key]) == []


def test_a_key_that_was_not_found_is_not_locked(adapters):
    surface = adapters()

    assert lookup(surface, [mp_key(1)] * 3) == [False] * 3
    assert surface.adapter.report_status()["locked_key_count"] == 0
    put(surface, [mp_key(1)])
    surface.adapter.delete([mp_key(1)])
    assert lookup(surface, [mp_key(1)]) == [False]


def test_locks_survive_threads_that_lock_and_unlock_at_once(hub, bucket, adapters):
    surface = adapters(lookup_timeout_secs=30, metadata_cache_ttl_secs=600)
    key = mp_key(1)
    put(surface, [key])

    def work(_number):
        for _ in range(10):
            assert lookup(surface, [key]) == [True]
            surface.adapter.delete([key])
            surface.adapter.submit_unlock([key])

    lookup(surface, [key])  # so that nobody can delete it
    assert in_threads(6, work) == [None] * 6

    assert surface.adapter.report_status()["locked_key_count"] == 1
    assert there(hub, bucket, [key]) == [key]
    surface.adapter.submit_unlock([key])
    surface.adapter.delete([key])
    assert there(hub, bucket, [key]) == []


# --- listeners -------------------------------------------------------------------------------------------------------------


def test_listeners_are_told_of_what_really_changed(adapters):
    surface, listener = adapters(usage_refresh_secs=0), Listener()
    surface.adapter.register_listener(listener)
    keys = [mp_key(n) for n in range(3)]
    put(adapters(theirs=True), keys[:1])

    put(surface, keys)
    assert listener.stored == [(key, SIZE) for key in keys[1:]], "one was there already"
    put(surface, keys)
    assert len(listener.stored) == 2

    lookup(surface, [*keys[:2], mp_key(9)])
    assert listener.accessed == keys[:2]

    surface.adapter.submit_unlock(keys[:2])
    surface.adapter.delete([*keys[:2], mp_key(9)])
    assert sorted(listener.deleted, key=key_string) == sorted([*keys[:2], mp_key(9)], key=key_string)


class RaisingListener(L2AdapterListener):
    def on_l2_keys_stored(self, keys, sizes):
        raise RuntimeError("told of a store")

    def on_l2_keys_accessed(self, keys):
        raise RuntimeError("told of an access")

    def on_l2_keys_deleted(self, keys):
        raise RuntimeError("told of a delete")


def test_a_listener_that_raises_changes_no_result(hub, bucket, adapters, caplog):
    put(adapters(theirs=True), [mp_key(9)])
    surface, listener = adapters(usage_refresh_secs=0.05), Listener()
    surface.adapter.register_listener(RaisingListener())
    surface.adapter.register_listener(listener)
    key = mp_key(1)

    assert put(surface, [key]).is_successful()
    eventually(lambda: (mp_key(9), SIZE) in listener.stored)
    put(adapters(theirs=True), [mp_key(10)])
    eventually(lambda: (mp_key(10), SIZE) in listener.stored)
    assert lookup(surface, [key]) == [True], "what is locked is told as found, or it would be locked for ever"
    assert surface.adapter.report_status()["locked_key_count"] == 1
    surface.adapter.submit_unlock([key])
    surface.adapter.delete([key])
    assert there(hub, bucket, [key]) == []
    assert used(surface) == 2 * SIZE
    assert "a listener failed" in caplog.text


# --- usage ------------------------------------------------------------------------------------------------------------------


def used(surface):
    usage = surface.adapter.get_usage()
    assert usage.total_bytes_used == sum(usage.bytes_by_cache_salt.values())
    return usage.total_bytes_used


def test_own_writes_and_deletes_count_at_once_and_by_salt(adapters):
    surface = adapters(usage_refresh_secs=0, max_capacity_gb=10 * SIZE / GIB)
    keys = [mp_key(1), mp_key(2, "ada"), mp_key(3, "ada"), mp_key(4, "bob")]
    put(surface, keys)
    usage = surface.adapter.get_usage()

    assert usage.bytes_by_cache_salt == {"": SIZE, "ada": 2 * SIZE, "bob": SIZE}
    assert usage.usage_fraction == 0.4
    assert usage.total_capacity_bytes == 10 * SIZE
    put(surface, keys)
    assert used(surface) == 4 * SIZE, "what was there already is not counted twice"
    surface.adapter.delete([mp_key(2, "ada"), mp_key(4, "bob"), mp_key(99)])
    assert surface.adapter.get_usage().bytes_by_cache_salt == {"": SIZE, "ada": SIZE}
    assert surface.adapter.report_status()["object_count"] == 2
    assert usage.bytes_by_cache_salt["bob"] == SIZE, "what was given is a snapshot"


def test_others_objects_count_after_a_listing(hub, bucket, adapters):
    theirs = adapters(theirs=True)
    put(theirs, [mp_key(n) for n in range(3)])
    put(theirs, [mp_key(5, "ada")], 3 * SIZE)
    foreign = {"v1/foreign": b"x", "v1/.hfbucket/lock": b"x", "v10/" + path_of(mp_key(1)).removeprefix("v1/"): b"x"}
    upload(hub.endpoint, bucket, foreign)

    surface = adapters()
    eventually(lambda: used(surface) == 6 * SIZE)
    assert surface.adapter.get_usage().bytes_by_cache_salt == {"": 3 * SIZE, "ada": 3 * SIZE}
    status = surface.adapter.report_status()
    assert (status["object_count"], status["usage_is_complete"]) == (4, True)
    put(surface, [mp_key(6)])
    assert used(surface) == 7 * SIZE


def test_a_listing_comes_again_when_its_time_is_over(adapters):
    surface, theirs = adapters(usage_refresh_secs=0.05), adapters(theirs=True)
    eventually(lambda: surface.adapter.report_status()["usage_is_complete"])

    put(theirs, [mp_key(1)])
    eventually(lambda: used(surface) == SIZE)
    theirs.adapter.delete([mp_key(1)])
    eventually(lambda: used(surface) == 0)


def test_without_refresh_nothing_is_listed(hub, adapters):
    put(adapters(theirs=True), [mp_key(1)])
    hub.control.reset_counters()
    surface = adapters(usage_refresh_secs=0)

    put(surface, [mp_key(2)])

    assert used(surface) == SIZE
    assert not surface.adapter.report_status()["usage_is_complete"]
    assert hub.control.counters().route("tree").requests == 0


def test_an_object_that_is_written_over_at_another_size_counts_once(hub, bucket, adapters):
    key = mp_key(1, "ada")
    upload(hub.endpoint, bucket, {path_of(key): noise(3 * SIZE)})
    surface = adapters()
    eventually(lambda: used(surface) == 3 * SIZE)

    assert put(surface, [key]).is_successful()

    assert used(surface) == SIZE
    assert surface.adapter.get_usage().bytes_by_cache_salt == {"ada": SIZE}
    assert surface.adapter.report_status()["object_count"] == 1
    surface.adapter.delete([key])
    assert used(surface) == 0
    assert surface.adapter.report_status()["object_count"] == 0


def test_an_object_that_cannot_be_served_and_is_written_anew_counts_once(hub, bucket, adapters):
    key = mp_key(1)
    put(adapters(theirs=True), [key])
    surface = adapters(verify="hash")
    eventually(lambda: used(surface) == SIZE)
    hub.control.add_fault(Fault(route="xorb-data", flip_every=100))
    assert surface.controller.load([key], [mp_memory(bytes(SIZE))]) == [False]
    hub.control.clear_faults()

    assert surface.controller.store([key], [mp_memory(noise(SIZE, 4711))]) == SIZE, "it was written"

    assert used(surface) == SIZE
    assert surface.adapter.report_status()["object_count"] == 1


def test_a_store_that_failed_does_not_count_and_one_that_partly_failed_counts_in_part(hub, adapters):
    surface, listener = adapters(usage_refresh_secs=0), Listener()
    surface.adapter.register_listener(listener)
    keys = [mp_key(n) for n in range(3)]
    hub.control.add_fault(Fault(route="batch", items=encode_name(key_string(keys[1]))))

    result = put(surface, keys)

    assert not result.is_successful()
    assert used(surface) == 2 * SIZE
    assert [key for key, _ in listener.stored] == [keys[0], keys[2]]


def test_a_delete_that_fails_leaves_the_account_as_it_is(hub, bucket, adapters, caplog):
    surface, listener = adapters(usage_refresh_secs=0), Listener()
    surface.adapter.register_listener(listener)
    keys = [mp_key(1), mp_key(2)]
    put(surface, keys)

    for fault in ({"status": 403}, {"items": encode_name(key_string(keys[0]))}):
        hub.control.add_fault(Fault(route="batch", **fault))
        surface.adapter.delete(keys)
        hub.control.clear_faults()

    assert there(hub, bucket, keys) == [keys[0]]
    assert used(surface) == SIZE
    assert listener.deleted == [keys[1]]
    assert "were not deleted" in caplog.text
    surface.adapter.delete(keys)
    assert used(surface) == 0


def test_without_a_capacity_a_listing_reads_so_many_pages_and_says_that_there_is_more(hub_factory, adapters):
    hub = hub_factory(page_size=2)
    HfApi(endpoint=hub.endpoint, token=False).create_bucket("tests/pages")
    where = {"bucket_handle": "hf://buckets/tests/pages/v1", "endpoint": hub.endpoint}
    put(adapters(**where), [mp_key(n) for n in range(7)])

    bounded = adapters(**where, usage_max_pages=2)
    eventually(lambda: used(bounded) == 4 * SIZE)
    assert not bounded.adapter.report_status()["usage_is_complete"]
    exact = adapters(**where, usage_max_pages=2, max_capacity_gb=1)
    eventually(lambda: used(exact) == 7 * SIZE)
    assert exact.adapter.report_status()["usage_is_complete"]


def test_objects_of_the_classic_engine_count_and_are_never_evicted(hub, bucket, adapters):
    classic = f"v1/{encode_name('org/model@1@0@ab@bfloat16')}"
    upload(hub.endpoint, bucket, {classic: bytes(SIZE)})
    put(adapters(theirs=True), [mp_key(1)])
    surface = adapters(max_capacity_gb=SIZE / GIB)
    state = states(surface.adapter, "LRU", trigger_watermark=0.1, eviction_ratio=1.0)
    eventually(lambda: used(surface) == 2 * SIZE)
    eventually(lambda: state.eviction_policy.get_num_tracked_keys() == 1)

    for _ in range(3):
        L2EvictionController([state])._check_and_evict(state)

    assert paths(hub.endpoint, bucket) == [classic]
    assert used(surface) == SIZE


# --- eviction -------------------------------------------------------------------------------------------------------------


def states(adapter, policy, **options):
    return L2AdapterEvictionState(0, adapter, EvictionConfig(policy, **options))


def test_objects_of_others_are_evicted_oldest_first_until_below_the_watermark(hub, bucket, adapters):
    theirs = adapters(theirs=True)
    keys = [mp_key(number) for number in (5, 3, 9, 1, 7, 2, 8, 4, 6, 0)]
    for key in keys:
        put(theirs, [key])
    ours = adapters(max_capacity_gb=10 * SIZE / GIB)
    state = states(ours.adapter, "LRU", trigger_watermark=0.8, eviction_ratio=0.2)
    controller = L2EvictionController([state])
    eventually(lambda: state.eviction_policy.get_num_tracked_keys() == 10)
    assert ours.adapter.get_usage().usage_fraction == 1.0

    for _ in range(5):
        controller._check_and_evict(state)

    assert ours.adapter.get_usage().usage_fraction == 0.7
    assert there(hub, bucket, keys) == keys[3:]
    assert state.eviction_policy.get_num_tracked_keys() == 7


def test_own_objects_are_evicted_before_those_used_since(hub, bucket, adapters):
    surface = adapters(max_capacity_gb=10 * SIZE / GIB, usage_refresh_secs=0)
    state = states(surface.adapter, "LRU", trigger_watermark=0.5, eviction_ratio=0.5)
    keys = [mp_key(n) for n in range(6)]
    for key in keys:
        put(surface, [key])
    lookup(surface, [keys[0]])
    surface.adapter.submit_unlock([keys[0]])

    L2EvictionController([state])._check_and_evict(state)

    assert there(hub, bucket, keys) == [keys[0], *keys[4:]]


def test_what_is_locked_outlives_an_eviction(hub, bucket, adapters):
    surface = adapters(max_capacity_gb=4 * SIZE / GIB, usage_refresh_secs=0)
    state = states(surface.adapter, "LRU", trigger_watermark=0.1, eviction_ratio=1.0)
    keys = [mp_key(n) for n in range(4)]
    put(surface, keys)
    lookup(surface, [keys[2]])

    controller = L2EvictionController([state])
    for _ in range(2):
        controller._check_and_evict(state)
    assert there(hub, bucket, keys) == [keys[2]]

    surface.adapter.submit_unlock([keys[2]])
    controller._check_and_evict(state)
    assert there(hub, bucket, keys) == []


def test_quotas_evict_by_salt(hub, bucket, adapters):
    theirs = adapters(theirs=True)
    keys = {salt: [mp_key(n, salt) for n in range(5)] for salt in ("over", "under", "unknown")}
    for of_salt in keys.values():
        for key in of_salt:
            put(theirs, [key])
    surface = adapters()
    quotas = QuotaManager()
    quotas.set_quota("over", 4 * SIZE)
    quotas.set_quota("under", 100 * SIZE)
    state = states(surface.adapter, "IsolatedLRU", trigger_watermark=1.0, eviction_ratio=0.4)
    controller = L2EvictionController([state], quota_manager=quotas)
    eventually(lambda: used(surface) == 15 * SIZE)
    eventually(lambda: sum(map(len, state.eviction_policy._per_salt_order.values())) == 15)

    for _ in range(3):
        controller._check_and_evict(state)

    assert surface.adapter.get_usage().bytes_by_cache_salt == {"over": 3 * SIZE, "under": 5 * SIZE}
    assert there(hub, bucket, itertools.chain(*keys.values())) == [*keys["over"][2:], *keys["under"]]


def test_a_storage_manager_of_lmcaches_made_from_json_evicts_what_others_wrote(hub, bucket, adapters, tmp_path):
    theirs = adapters(theirs=True)
    keys = [mp_key(n) for n in range(5)]
    for key in keys:
        put(theirs, [key])
    spec = json_spec(hub, bucket, tmp_path, max_capacity_gb=5 * SIZE / GIB) | {
        "eviction": {"eviction_policy": "LRU", "trigger_watermark": 0.8, "eviction_ratio": 0.4}
    }
    config = StorageManagerConfig(
        L1ManagerConfig(L1MemoryManagerConfig(1 << 20, use_lazy=False, shm_name="")),
        EvictionConfig("noop"),
        parsed(spec),
    )

    manager = StorageManager(config)
    try:
        assert isinstance(manager.l2_adapters()[0][1], HFBucketL2Adapter)
        eventually(lambda: there(hub, bucket, keys) == keys[2:])
        eventually(lambda: manager.get_l2_usages()[0][0] == 3 * SIZE)
    finally:
        manager.close()
