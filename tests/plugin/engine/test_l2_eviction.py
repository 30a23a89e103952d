"""LMCache's eviction over a bucket that others write too: what goes, in which order, and what must never go."""

import functools
import itertools

import pytest
from lmcache.v1.distributed.eviction import L2EvictionPolicy
from lmcache.v1.distributed.eviction_policy.isolated_lru import IsolatedLRUEvictionPolicy
from lmcache.v1.distributed.eviction_policy.lru import LRUEvictionPolicy

from hfbucket_plugin.core.keys import encode_name
from tests.support.buckets import paths, upload
from tests.support.lmcache_mp import MP, chunk_key
from tests.support.surface import CHUNK_BYTES, content
from tests.support.waiting import eventually

GIB = 1024**3


@pytest.fixture
def adapters(l2_adapters):
    return functools.partial(l2_adapters, usage_refresh_secs=3600)


def by_others(hub, bucket, numbers):
    for number in numbers:  # one after the other, so that each has a time of its own
        upload(hub.endpoint, bucket, {f"v1/{encode_name(MP.name(number))}": content(number)})


def complete(mp):
    eventually(lambda: mp.adapter.report_status()["usage_is_complete"])


def victims(policy, ratio, **options):
    return [key for action in policy.get_eviction_actions(ratio, **options) for key in action.keys]


def test_the_oldest_objects_of_all_writers_go_first(hub, bucket, adapters):
    by_others(hub, bucket, range(4))
    mp = adapters(max_capacity_gb=4 * CHUNK_BYTES / GIB)
    policy = LRUEvictionPolicy()
    mp.adapter.register_listener(L2EvictionPolicy(policy))
    complete(mp)
    eventually(lambda: victims(policy, 1.0))

    assert mp.adapter.get_usage().usage_fraction == pytest.approx(1.0)
    assert victims(policy, 0.25) == [chunk_key(0)]
    assert victims(policy, 0.5) == [chunk_key(0), chunk_key(1)]


def test_a_policy_of_quotas_is_never_told_of_what_others_wrote(hub, bucket, adapters):
    by_others(hub, bucket, range(3))
    mp = adapters(max_capacity_gb=1)
    policy = IsolatedLRUEvictionPolicy()
    mp.adapter.register_listener(L2EvictionPolicy(policy))
    complete(mp)

    assert mp.adapter.get_usage().total_bytes_used == 3 * CHUNK_BYTES
    assert dict(mp.adapter.get_usage().bytes_by_cache_salt) == {}, "a salt without a quota would be wiped"
    mp.put([9])
    assert dict(mp.adapter.get_usage().bytes_by_cache_salt) == {"": CHUNK_BYTES}
    assert victims(policy, 1.0, cache_salt="") == [chunk_key(9)]


def test_chunks_of_the_classic_engine_do_not_drive_others_out(hub, bucket, adapters):
    classic = encode_name("org/model@1@0@ab@bfloat16")
    upload(hub.endpoint, bucket, {f"v1/{classic}": bytes(5 * CHUNK_BYTES)})
    by_others(hub, bucket, [0])
    mp = adapters(max_capacity_gb=1)
    complete(mp)

    assert mp.adapter.get_usage().total_bytes_used == CHUNK_BYTES


@pytest.mark.parametrize("part", ["_tasks.free", "_store.look", "_usage.deleted"])
def test_an_error_of_any_kind_does_not_end_the_thread_that_evicts(adapters, monkeypatch, caplog, part):
    def broken(*_args):
        raise ValueError("not foreseen")

    mp = adapters(max_capacity_gb=1)
    mp.put([0, 1])
    complete(mp)
    with monkeypatch.context() as patched:
        owner, name = part.split(".")
        patched.setattr(getattr(mp.adapter, owner), name, broken)
        mp.adapter.delete([chunk_key(0)])
    assert "not foreseen" in caplog.text

    mp.adapter.delete([chunk_key(1)])

    assert mp.lookup([1]) == [False]


def test_what_was_deleted_before_time_ran_out_is_counted(hub, bucket, adapters, monkeypatch):
    monkeypatch.setattr("hfbucket_plugin.engine.mp.MAX_BATCH", 2)
    by_others(hub, bucket, range(4))
    mp = adapters(max_capacity_gb=1)
    complete(mp)
    real, calls = mp.adapter._store.look, itertools.count()

    def late(keys, deadline):
        if next(calls):
            deadline = deadline.within(0)
        return real(keys, deadline)

    monkeypatch.setattr(mp.adapter._store, "look", late)
    mp.adapter.delete([chunk_key(number) for number in range(4)])

    assert len(paths(hub.endpoint, bucket)) == 2
    assert mp.adapter.get_usage().total_bytes_used == 2 * CHUNK_BYTES
    assert mp._deletions.keys == [chunk_key(0), chunk_key(1)]
