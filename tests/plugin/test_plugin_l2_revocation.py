"""Buffers that LMCache frees while a load is still under way: nothing writes into them any more."""

import itertools
import time

import pytest
from plugin_support import eventually

from faults.mp import _LAYOUTS, MP, _await, _key, _memory
from faults.surface import CHUNK_BYTES, Limits, content
from localhub.faults import Fault

_numbers = itertools.count(1)
UNTOUCHED = b"\xa5" * CHUNK_BYTES


@pytest.fixture
def adapters(hub, bucket, tmp_path):
    made = []

    def make(put_secs=30.0):
        limits = Limits(lookup=20, get=20, put=put_secs)
        name = f"hfbucket.r{next(_numbers)}"
        made.append(MP(name, tmp_path, handle=f"hf://buckets/{bucket}/v1", endpoint=hub.endpoint, limits=limits))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def mp(adapters):
    surface = adapters()
    surface.put([0])
    return surface


def locked(mp):
    task = mp.adapter.submit_lookup_and_lock_task([_key(0)], _LAYOUTS)
    fd = mp.adapter.get_lookup_and_lock_event_fd()
    assert _await(fd, lambda: mp.adapter.query_lookup_and_lock_result(task)).test(0)


def loading(hub, mp):
    """A load that the store has begun to serve, and its buffer."""
    held = hub.control.add_fault(Fault(route="xorb-data", delay_s=1.0, times=1))
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

    assert not loaded(mp, task)
    assert bytes_of(memory) == UNTOUCHED


def test_an_unlock_of_another_request_revokes_nothing(hub, mp):
    locked(mp)
    locked(mp)
    task, memory = loading(hub, mp)

    mp.adapter.submit_unlock([_key(0)])

    assert loaded(mp, task)
    assert bytes_of(memory) == content(0)


def test_closing_revokes_all(hub, mp):
    locked(mp)
    _, memory = loading(hub, mp)

    mp.close()

    time.sleep(1.2)  # by now what the store held back has arrived, if anybody still listens
    assert bytes_of(memory) == UNTOUCHED


def test_a_source_that_changes_after_its_store_was_given_up_is_never_stored(hub, adapters):
    hasty, patient = adapters(put_secs=0.5), adapters()
    hub.control.add_fault(Fault(route="xet-write-token", delay_s=1.5, times=1))
    memory = _memory(content(7))
    task = hasty.adapter.submit_store_task([_key(7)], [memory])

    assert not _await(hasty.adapter.get_store_event_fd(), lambda: hasty._stored(task)).is_successful()
    memory.byte_array.cast("B")[:] = UNTOUCHED

    time.sleep(1.5)  # by now the thread that was given up has its token, and would go on
    patient.put([8])
    assert patient.list() == [patient.name(8)]


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
