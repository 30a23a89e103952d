"""Buffers that LMCache frees while a load is still under way: nothing writes into them any more."""

import pytest
from plugin_support import eventually

from faults.mp import _LAYOUTS, _await, _key, _memory
from faults.surface import CHUNK_BYTES, content
from localhub.faults import Fault

UNTOUCHED = b"\xa5" * CHUNK_BYTES


@pytest.fixture
def mp(l2_adapters):
    surface = l2_adapters()
    surface.put([0])
    return surface


def locked(mp):
    task = mp.adapter.submit_lookup_and_lock_task([_key(0)], _LAYOUTS)
    fd = mp.adapter.get_lookup_and_lock_event_fd()
    assert _await(fd, lambda: mp.adapter.query_lookup_and_lock_result(task)).test(0)


def loading(hub, mp):
    """A load that the store is asked for and does not answer yet, and its buffer."""
    held = hub.control.add_fault(Fault(route="xorb-data", hang=True))
    memory = _memory(UNTOUCHED)
    task = mp.adapter.submit_load_task([_key(0)], [memory])
    eventually(lambda: hub.control.hits(held))
    return task, memory


def loaded(mp, task):
    return _await(mp.adapter.get_load_event_fd(), lambda: mp.adapter.query_load_result(task)).test(0)


def bytes_of(memory):
    return bytes(memory.byte_array.cast("B"))


def test_an_unlock_that_leaves_fewer_locks_than_loads_revokes_them(hub, mp):
    locked(mp)
    task, memory = loading(hub, mp)

    mp.adapter.submit_unlock([_key(0)])
    hub.control.clear_faults()

    assert not loaded(mp, task)
    assert bytes_of(memory) == UNTOUCHED


def test_an_unlock_of_another_request_revokes_nothing(hub, mp):
    locked(mp)
    locked(mp)
    task, memory = loading(hub, mp)

    mp.adapter.submit_unlock([_key(0), _key(99)])
    hub.control.clear_faults()

    assert loaded(mp, task)
    assert bytes_of(memory) == content(0)


def test_a_load_that_is_given_up_while_others_hold_locks_writes_no_more(hub, mp):
    locked(mp)
    locked(mp)
    task, memory = loading(hub, mp)

    mp.adapter.submit_unlock([_key(0)])
    hub.control.clear_faults()

    assert not loaded(mp, task)
    assert bytes_of(memory) == UNTOUCHED


def test_the_unlock_after_a_load_revokes_no_other_of_the_same_keys(hub, mp):
    locked(mp)
    locked(mp)
    done = mp.adapter.submit_load_task([_key(0)], [_memory(UNTOUCHED)])
    assert loaded(mp, done)
    task, memory = loading(hub, mp)

    mp.adapter.submit_unlock([_key(0)])
    hub.control.clear_faults()
    assert loaded(mp, task)
    mp.adapter.submit_unlock([_key(0)])

    assert bytes_of(memory) == content(0)
    assert mp.adapter.report_status()["locked_key_count"] == 0


def test_locks_are_counted_and_what_is_locked_is_not_deleted(mp):
    locked(mp)
    locked(mp)
    mp.adapter.submit_unlock([_key(0), _key(99)])

    assert not mp.delete([0])
    assert mp.adapter.report_status()["locked_key_count"] == 1
    mp.adapter.submit_unlock([_key(0)])
    mp.adapter.submit_unlock([_key(0)])
    assert mp.adapter.report_status()["locked_key_count"] == 0
    assert mp.delete([0])
    assert mp.list() == []
