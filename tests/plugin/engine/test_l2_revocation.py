"""Buffers that LMCache frees while a load is still in progress: nothing writes into them any more."""

import pytest

from localhub.faults import Fault
from tests.support.lmcache_mp import CHUNK_LAYOUTS, await_result, chunk_key, chunk_memory
from tests.support.surface import CHUNK_BYTES, content
from tests.support.waiting import eventually

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
