"""What MP mode's listeners are told, what counts as used, and what LMCache's eviction makes of both."""

import json
from argparse import Namespace
from datetime import timedelta

import pytest
from huggingface_hub import HfApi
from lmcache.v1.distributed.config import EvictionConfig, L1ManagerConfig, L1MemoryManagerConfig, StorageManagerConfig
from lmcache.v1.distributed.internal_api import L2AdapterListener
from lmcache.v1.distributed.l2_adapters.config import parse_args_to_l2_adapters_config
from lmcache.v1.distributed.quota_manager import QuotaManager
from lmcache.v1.distributed.storage_controllers.eviction_controller import L2AdapterEvictionState, L2EvictionController
from lmcache.v1.distributed.storage_manager import StorageManager

from hfbucket_plugin.core.keys import encode_name
from hfbucket_plugin.engine.mp import HFBucketL2Adapter
from hfbucket_plugin.engine.mp_tasks import key_string
from localhub.faults import Fault
from tests.support.buckets import noise, upload
from tests.support.lmcache_mp import (
    GIB,
    SIZE,
    Listener,
    await_result,
    load,
    lookup,
    mp_key,
    mp_memory,
    path_of,
    put,
    there,
    used,
)
from tests.support.waiting import eventually


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    monkeypatch.setattr("hfbucket_plugin.engine.mp_usage._SETTLE_SECS", 0.02)


def by_others(hub, bucket, keys, size=SIZE):
    for key in keys:  # one after the other, so that each has a time of its own
        upload(hub.endpoint, bucket, {path_of(key): noise(size, int.from_bytes(key.chunk_hash, "big"))})


def complete(mp):
    eventually(lambda: mp.adapter.report_status()["usage_is_complete"])


# --- listeners --------------------------------------------------------------------------------------------------------


def test_listeners_are_told_of_what_really_changed(hub, bucket, l2_adapters):
    mp, listener = l2_adapters(), Listener()
    mp.adapter.register_listener(listener)
    keys = [mp_key(n) for n in range(3)]
    by_others(hub, bucket, keys[:1])

    put(mp, keys)
    assert listener.stored == [(key, SIZE) for key in keys[1:]], "one was there already"
    put(mp, keys)
    assert len(listener.stored) == 2

    lookup(mp, [*keys[:2], mp_key(9)])
    assert listener.accessed == keys[:2]

    mp.adapter.submit_unlock(keys[:2])
    mp.adapter.delete([*keys[:2], mp_key(9)])
    assert set(listener.deleted) == {*keys[:2], mp_key(9)}


class RaisingListener(L2AdapterListener):
    def on_l2_keys_stored(self, keys, sizes):
        raise RuntimeError("told of a store")

    def on_l2_keys_accessed(self, keys):
        raise RuntimeError("told of an access")

    def on_l2_keys_deleted(self, keys):
        raise RuntimeError("told of a delete")


def test_a_listener_that_raises_changes_no_result(hub, bucket, l2_adapters, caplog):
    mp, key = l2_adapters(), mp_key(1)
    mp.adapter.register_listener(RaisingListener())

    assert put(mp, [key]).is_successful()
    assert lookup(mp, [key]) == [True], "what is locked is told as found, or it would be locked for ever"
    assert mp.adapter.report_status()["locked_key_count"] == 1
    mp.adapter.submit_unlock([key])
    mp.adapter.delete([key])
    assert there(hub, bucket, [key]) == []
    assert used(mp) == 0
    assert "a listener failed" in caplog.text


# --- usage ------------------------------------------------------------------------------------------------------------


def test_own_writes_and_deletes_count_at_once_and_by_salt(l2_adapters):
    mp = l2_adapters(max_capacity_gb=10 * SIZE / GIB)
    keys = [mp_key(1), mp_key(2, "ada"), mp_key(3, "ada"), mp_key(4, "bob")]
    put(mp, keys)
    usage = mp.adapter.get_usage()

    assert usage.bytes_by_cache_salt == {"": SIZE, "ada": 2 * SIZE, "bob": SIZE}
    assert usage.usage_fraction == 0.4
    assert usage.total_capacity_bytes == 10 * SIZE
    put(mp, keys)
    assert used(mp) == 4 * SIZE, "what was there already is not counted twice"
    mp.adapter.delete([mp_key(2, "ada"), mp_key(4, "bob"), mp_key(99)])
    assert used(mp) == 2 * SIZE
    assert {salt: size for salt, size in mp.adapter.get_usage().bytes_by_cache_salt.items() if size} == {
        "": SIZE,
        "ada": SIZE,
    }
    assert mp.adapter.report_status()["object_count"] == 2
    assert usage.bytes_by_cache_salt["bob"] == SIZE, "what was given is a snapshot"


def test_others_objects_count_after_a_listing_and_what_is_no_chunk_does_not(hub, bucket, l2_adapters):
    by_others(hub, bucket, [mp_key(n) for n in range(3)])
    by_others(hub, bucket, [mp_key(5, "ada")], 3 * SIZE)
    longer = "v10/" + path_of(mp_key(1)).removeprefix("v1/")
    upload(hub.endpoint, bucket, {"v1/foreign": b"x", "v1/.hfbucket/lock": b"x", longer: b"x"})

    mp = l2_adapters(usage_refresh_secs=60, max_capacity_gb=1)
    complete(mp)

    assert used(mp) == 6 * SIZE
    assert mp.adapter.report_status()["object_count"] == 4
    put(mp, [mp_key(6)])
    assert used(mp) == 7 * SIZE


def test_without_refresh_nothing_is_listed(hub, bucket, l2_adapters):
    by_others(hub, bucket, [mp_key(1)])
    hub.control.reset_counters()
    mp = l2_adapters(usage_refresh_secs=0)
    mp.adapter.register_listener(Listener())

    put(mp, [mp_key(2)])

    assert used(mp) == SIZE
    assert not mp.adapter.report_status()["usage_is_complete"]
    assert hub.control.counters().route("tree").requests == 0


def test_an_object_that_is_written_over_at_another_size_counts_once(hub, bucket, l2_adapters):
    key = mp_key(1, "ada")
    by_others(hub, bucket, [key], 3 * SIZE)
    mp = l2_adapters(usage_refresh_secs=60, max_capacity_gb=1)
    complete(mp)
    assert used(mp) == 3 * SIZE

    assert put(mp, [key]).is_successful()

    assert used(mp) == SIZE
    assert mp.adapter.report_status()["object_count"] == 1
    mp.adapter.delete([key])
    assert used(mp) == 0
    assert mp.adapter.report_status()["object_count"] == 0


def test_an_object_that_cannot_be_served_and_is_rewritten_counts_once(hub, bucket, l2_adapters):
    key = mp_key(1)
    by_others(hub, bucket, [key])
    mp = l2_adapters(verify="hash", usage_refresh_secs=60, max_capacity_gb=1)
    complete(mp)
    hub.control.add_fault(Fault(route="xorb-data", flip_every=100))
    assert load(mp, [key]) == [None]
    hub.control.clear_faults()

    task = mp.adapter.submit_store_task([key], [mp_memory(noise(SIZE, 4711))])
    result = await_result(mp.adapter.get_store_event_fd(), lambda: mp._stored(task))

    assert result.is_successful()
    assert result == SIZE, "it was written"
    assert used(mp) == SIZE
    assert mp.adapter.report_status()["object_count"] == 1


def test_a_store_that_partly_failed_counts_in_part(hub, l2_adapters):
    mp, listener = l2_adapters(), Listener()
    mp.adapter.register_listener(listener)
    keys = [mp_key(n) for n in range(3)]
    hub.control.add_fault(Fault(route="batch", items=encode_name(key_string(keys[1]))))

    result = put(mp, keys)

    assert not result.is_successful()
    assert used(mp) == 2 * SIZE
    assert [key for key, _ in listener.stored] == [keys[0], keys[2]]


def test_a_delete_that_fails_leaves_the_account_as_it_is(hub, bucket, l2_adapters, caplog):
    mp, listener = l2_adapters(), Listener()
    mp.adapter.register_listener(listener)
    keys = [mp_key(1), mp_key(2)]
    put(mp, keys)

    for fault in ({"status": 403}, {"items": encode_name(key_string(keys[0]))}):
        hub.control.add_fault(Fault(route="batch", **fault))
        mp.adapter.delete(keys)
        hub.control.clear_faults()

    assert there(hub, bucket, keys) == [keys[0]]
    assert used(mp) == SIZE
    assert listener.deleted == [keys[1]]
    assert "were not deleted" in caplog.text
    mp.adapter.delete(keys)
    assert used(mp) == 0


def test_without_a_capacity_nothing_is_listed(hub, bucket, l2_adapters, monkeypatch):
    by_others(hub, bucket, [mp_key(n) for n in range(3)])
    hub.control.reset_counters()
    mp = l2_adapters(usage_refresh_secs=60)
    mp.adapter.register_listener(Listener())
    put(mp, [mp_key(5)])

    assert mp.adapter._usage_listing._thread is None
    assert used(mp) == SIZE
    assert not mp.adapter.report_status()["usage_is_complete"]
    routes = hub.control.counters().routes
    assert "tree" not in routes
    assert "info" not in routes


def test_what_is_written_over_counts_once_by_salt(l2_adapters):
    mp, key = l2_adapters(), mp_key(1, "ada")
    for size in (3 * SIZE, 2 * SIZE, SIZE):
        assert put(mp, [key], size).is_successful()

    assert mp.adapter.get_usage().bytes_by_cache_salt == {"ada": SIZE}
    mp.adapter.delete([key])
    assert mp.adapter.get_usage().bytes_by_cache_salt == {}


def delete_by_others(hub, bucket, keys):
    HfApi(endpoint=hub.endpoint, token=False).batch_bucket_files(bucket, delete=[path_of(key) for key in keys])


def test_a_lookup_corrects_the_account_of_what_others_deleted_and_replaced(hub, bucket, l2_adapters):
    mp, listener = l2_adapters(object_sizes="any"), Listener()
    mp.adapter.register_listener(listener)
    keys = [mp_key(n, "ada") for n in range(3)]
    put(mp, keys)
    delete_by_others(hub, bucket, keys[:1])
    by_others(hub, bucket, keys[1:2], 3 * SIZE)

    assert lookup(mp, [*keys, mp_key(9, "ada")]) == [False, True, True, False]

    eventually(lambda: mp.adapter.get_usage().bytes_by_cache_salt == {"ada": 4 * SIZE})
    eventually(lambda: listener.deleted == keys[:1])


def test_a_lookup_of_others_objects_counts_them_only_where_a_capacity_bounds_the_whole(hub, bucket, l2_adapters):
    by_others(hub, bucket, [mp_key(1, "ada")])
    own, whole = l2_adapters(), l2_adapters(max_capacity_gb=1)
    for mp in (own, whole):
        assert lookup(mp, [mp_key(1, "ada")]) == [True]

    eventually(lambda: used(whole) == SIZE)
    assert used(own) == 0
    assert whole.adapter.get_usage().bytes_by_cache_salt == {}, "it is not this process's"


# --- eviction ---------------------------------------------------------------------------------------------------------


def states(mp, policy, **options):
    return L2AdapterEvictionState(0, mp.adapter, EvictionConfig(policy, **options))


def test_own_objects_are_evicted_before_those_used_since(hub, bucket, l2_adapters):
    mp = l2_adapters(max_capacity_gb=10 * SIZE / GIB)
    state = states(mp, "LRU", trigger_watermark=0.5, eviction_ratio=0.5)
    keys = [mp_key(n) for n in range(6)]
    for key in keys:
        put(mp, [key])
    lookup(mp, [keys[0]])
    mp.adapter.submit_unlock([keys[0]])

    L2EvictionController([state])._check_and_evict(state)

    assert there(hub, bucket, keys) == [keys[0], *keys[4:]]


def test_what_is_locked_outlives_an_eviction(hub, bucket, l2_adapters):
    mp = l2_adapters(max_capacity_gb=4 * SIZE / GIB)
    state = states(mp, "LRU", trigger_watermark=0.1, eviction_ratio=1.0)
    keys = [mp_key(n) for n in range(4)]
    put(mp, keys)
    lookup(mp, [keys[2]])

    controller = L2EvictionController([state])
    for _ in range(2):
        controller._check_and_evict(state)
    assert there(hub, bucket, keys) == [keys[2]]

    mp.adapter.submit_unlock([keys[2]])
    controller._check_and_evict(state)
    assert there(hub, bucket, keys) == []


def test_quotas_evict_own_objects_by_salt_and_leave_others_alone(hub, bucket, l2_adapters):
    others = [mp_key(n, salt) for n, salt in enumerate(["over", "under", "unknown"])]
    by_others(hub, bucket, others)
    mp = l2_adapters(usage_refresh_secs=60)
    quotas = QuotaManager()
    quotas.set_quota("over", 4 * SIZE)
    quotas.set_quota("under", 100 * SIZE)
    state = states(mp, "IsolatedLRU", trigger_watermark=1.0, eviction_ratio=0.4)
    controller = L2EvictionController([state], quota_manager=quotas)
    own = {salt: [mp_key(10 + n, salt) for n in range(5)] for salt in ("over", "under", "unknown")}
    for n in range(5):
        put(mp, [keys[n] for keys in own.values()])

    for _ in range(3):
        controller._check_and_evict(state)

    assert there(hub, bucket, others) == others
    assert there(hub, bucket, own["over"]) == own["over"][2:]
    assert there(hub, bucket, own["under"]) == own["under"]
    assert there(hub, bucket, own["unknown"]) == [], "LMCache's rule: who has no quota may hold nothing"


def watched(mp, **options):
    state = states(mp, "LRU", trigger_watermark=0.8, eviction_ratio=0.2, **options)
    return state, L2EvictionController([state])


def rested(mp):
    """Wait until the account was listed again."""
    eventually(lambda: mp.adapter._usage_listing.settled)


def test_five_servers_with_one_bucket_evict_down_to_the_watermark_and_no_further(hub, bucket, l2_adapters):
    keys = [mp_key(n) for n in range(100)]
    put(l2_adapters(), keys)
    capacity = 100 * SIZE / 0.85 / GIB
    servers = []
    for n in range(5):
        mp = l2_adapters(usage_refresh_secs=3600, max_capacity_gb=capacity)
        servers.append((mp, *watched(mp)))
        complete(mp)
        mp.adapter.submit_unlock(keys[n * 5 : n * 5 + 20] if any(lookup(mp, keys[n * 5 : n * 5 + 20])) else [])

    for _ in range(4):
        for _mp, state, controller in servers:
            controller._check_and_evict(state)
        for mp, _state, _controller in servers:
            rested(mp)

    assert len(there(hub, bucket, keys)) == 80
    assert {used(mp) for mp, *_ in servers} == {80 * SIZE}


def test_a_quota_is_not_used_up_by_what_others_deleted(hub, bucket, l2_adapters):
    mp = l2_adapters(usage_refresh_secs=3600)
    quotas = QuotaManager()
    quotas.set_quota("ada", 10 * SIZE)
    state = states(mp, "IsolatedLRU", trigger_watermark=0.8, eviction_ratio=0.2)
    controller = L2EvictionController([state], quota_manager=quotas)
    live, dead = [mp_key(n, "ada") for n in range(4)], [mp_key(10 + n, "ada") for n in range(6)]
    for key in [dead[0], *live, *dead[1:]]:  # most of what is gone was used after what is there
        put(mp, [key])
    delete_by_others(hub, bucket, dead)

    for _ in range(5):
        controller._check_and_evict(state)
        rested(mp)

    assert mp.adapter.get_usage().bytes_by_cache_salt == {"ada": len(there(hub, bucket, live)) * SIZE}
    assert len(there(hub, bucket, live)) >= 3, "the first pass may take what it cannot know to be too much"
    assert state.eviction_policy.get_num_tracked_keys("ada") == len(there(hub, bucket, live))


def test_more_objects_than_eviction_is_told_of_are_evicted_oldest_first(hub, bucket, l2_adapters, monkeypatch):
    monkeypatch.setattr("hfbucket_plugin.engine.mp_usage._MOST_TOLD", 5)
    monkeypatch.setattr("hfbucket_plugin.engine.mp_usage._SLACK", timedelta(0))
    keys = [mp_key((n * 7) % 20) for n in range(20)]  # their age is not the order of their paths
    by_others(hub, bucket, keys)
    mp = l2_adapters(usage_refresh_secs=3600, max_capacity_gb=10 * SIZE / GIB)
    state, controller = watched(mp)
    complete(mp)

    def pass_once():
        controller._check_and_evict(state)
        eventually(
            lambda: mp.adapter._usage_listing._progress is None and not mp.adapter._usage_listing._wanted.is_set()
        )
        return used(mp) < 8 * SIZE

    eventually(pass_once)

    assert there(hub, bucket, keys) == keys[13:]
    fresh = [mp_key(100)]
    put(mp, fresh)
    pass_once()
    assert there(hub, bucket, fresh) == fresh


def test_an_eviction_waits_for_a_listing_where_the_files_are_fewer(hub, bucket, l2_adapters, monkeypatch):
    keys = [mp_key(n) for n in range(10)]
    by_others(hub, bucket, keys)
    mp = l2_adapters(usage_refresh_secs=3600, max_capacity_gb=10 * SIZE / GIB)
    state, controller = watched(mp)
    complete(mp)
    rested(mp)
    delete_by_others(hub, bucket, keys[7:])  # the newest: eviction would not find them gone
    hub.control.reset_counters()

    controller._check_and_evict(state)
    assert hub.control.counters().route("batch").requests == 0
    rested(mp)
    controller._check_and_evict(state)

    assert there(hub, bucket, keys) == keys[:7]
    assert used(mp) == 7 * SIZE


def test_a_storage_manager_of_lmcaches_made_from_json_evicts_what_others_wrote(hub, bucket, tmp_path):
    keys = [mp_key(n) for n in range(5)]
    by_others(hub, bucket, keys)
    spec = {
        "type": "plugin",
        "module_path": "hfbucket_plugin.l2_adapter",
        "class_name": "HFBucketL2Adapter",
        "adapter_params": {
            "bucket_handle": f"hf://buckets/{bucket}/v1",
            "endpoint": hub.endpoint,
            "download_tmp_dir": str(tmp_path / "tmp"),
            "max_capacity_gb": 5 * SIZE / GIB,
        },
        "eviction": {"eviction_policy": "LRU", "trigger_watermark": 0.8, "eviction_ratio": 0.4},
    }
    config = StorageManagerConfig(
        L1ManagerConfig(L1MemoryManagerConfig(1 << 20, use_lazy=False, shm_name="")),
        EvictionConfig("noop"),
        parse_args_to_l2_adapters_config(Namespace(l2_adapter=[json.dumps(spec)])),
    )

    manager = StorageManager(config)
    try:
        assert isinstance(manager.l2_adapters()[0][1], HFBucketL2Adapter)
        eventually(lambda: there(hub, bucket, keys) == keys[2:])
        eventually(lambda: manager.get_l2_usages()[0][0] == 3 * SIZE)
    finally:
        manager.close()
