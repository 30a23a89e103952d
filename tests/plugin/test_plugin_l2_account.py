"""What MP mode's listeners are told, what counts as used, and what LMCache's eviction makes of both."""

import json
from argparse import Namespace

import pytest
from huggingface_hub import HfApi
from l2_support import GIB, SIZE, Listener, load, lookup, mp_key, mp_memory, path_of, put, there, used
from lmcache.v1.distributed.config import EvictionConfig, L1ManagerConfig, L1MemoryManagerConfig, StorageManagerConfig
from lmcache.v1.distributed.internal_api import L2AdapterListener
from lmcache.v1.distributed.l2_adapters.config import parse_args_to_l2_adapters_config
from lmcache.v1.distributed.quota_manager import QuotaManager
from lmcache.v1.distributed.storage_controllers.eviction_controller import L2AdapterEvictionState, L2EvictionController
from lmcache.v1.distributed.storage_manager import StorageManager
from plugin_support import eventually, noise, upload

from faults.mp import _await
from hfbucket_plugin.keys import encode_name
from hfbucket_plugin.l2_adapter import HFBucketL2Adapter
from hfbucket_plugin.l2_keys import key_string
from localhub.faults import Fault


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    monkeypatch.setattr("hfbucket_plugin.l2_usage_listing._SETTLE_SECS", 0.02)


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

    mp = l2_adapters(usage_refresh_secs=60)
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
    mp = l2_adapters(usage_refresh_secs=60)
    complete(mp)
    assert used(mp) == 3 * SIZE

    assert put(mp, [key]).is_successful()

    assert used(mp) == SIZE
    assert mp.adapter.report_status()["object_count"] == 1
    mp.adapter.delete([key])
    assert used(mp) == 0
    assert mp.adapter.report_status()["object_count"] == 0


def test_an_object_that_cannot_be_served_and_is_written_anew_counts_once(hub, bucket, l2_adapters):
    key = mp_key(1)
    by_others(hub, bucket, [key])
    mp = l2_adapters(verify="hash", usage_refresh_secs=60)
    complete(mp)
    hub.control.add_fault(Fault(route="xorb-data", flip_every=100))
    assert load(mp, [key]) == [None]
    hub.control.clear_faults()

    task = mp.adapter.submit_store_task([key], [mp_memory(noise(SIZE, 4711))])
    result = _await(mp.adapter.get_store_event_fd(), lambda: mp._stored(task))

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


def test_without_a_capacity_a_listing_reads_so_many_pages_and_says_that_there_is_more(hub_factory, l2_adapters):
    hub = hub_factory(page_size=2)
    HfApi(endpoint=hub.endpoint, token=False).create_bucket("tests/pages")
    where = {"handle": "hf://buckets/tests/pages/v1", "endpoint": hub.endpoint, "usage_max_pages": 2}
    put(l2_adapters(**where), [mp_key(n) for n in range(7)])

    bounded = l2_adapters(**where, usage_refresh_secs=60)
    eventually(lambda: used(bounded) == 4 * SIZE)
    assert not bounded.adapter.report_status()["usage_is_complete"]
    exact = l2_adapters(**where, usage_refresh_secs=60, max_capacity_gb=1)
    complete(exact)
    assert used(exact) == 7 * SIZE


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
    complete(mp)
    own = {salt: [mp_key(10 + n, salt) for n in range(5)] for salt in ("over", "under", "unknown")}
    for n in range(5):
        put(mp, [keys[n] for keys in own.values()])

    for _ in range(3):
        controller._check_and_evict(state)

    assert there(hub, bucket, others) == others
    assert there(hub, bucket, own["over"]) == own["over"][2:]
    assert there(hub, bucket, own["under"]) == own["under"]
    assert there(hub, bucket, own["unknown"]) == [], "LMCache's rule: who has no quota may hold nothing"


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
