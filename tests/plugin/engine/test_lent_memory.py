"""The engine's memory, on both surfaces: what arrives late is written nowhere, what changes late is not stored, and each
piece is given back exactly once.
"""

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from hfbucket_plugin.core.buffers import RevocableBuffer
from hfbucket_plugin.engine import classic
from hfbucket_plugin.engine import memory as engine_memory
from hfbucket_plugin.engine import mp as l2_adapter
from hfbucket_plugin.hub.xet_session import xet_config
from localhub.faults import Fault
from tests.support import lmcache_mp
from tests.support.buckets import download, paths, upload
from tests.support.lmcache_classic import Classic
from tests.support.lmcache_mp import MP
from tests.support.surface import (
    CHUNK_BYTES,
    EngineMemory,
    Limits,
    chunks_counted,
    content,
    fresh,
    path_of,
    store_of,
)
from tests.support.waiting import eventually

HASTY = Limits(lookup=10, get=0.3, put=0.3)
NO_SUCH = 99


@pytest.fixture
def memory(monkeypatch):
    return EngineMemory(monkeypatch)


@pytest.fixture
def deaf_sessions(monkeypatch):
    """Sessions that are patient, and go on when they are aborted: who was given up is not freed, and works on."""
    monkeypatch.setattr("hfbucket_plugin.hub.xet_session._abort", lambda _session: None)
    monkeypatch.setattr("hfbucket_plugin.hub.transfer.xet_config", lambda _secs, *rest: xet_config(60, *rest))


@pytest.fixture
def sessions(request):
    """How sessions are given up: as ours are, or without any effect."""
    if request.param == "deaf":
        request.getfixturevalue("deaf_sessions")
    return request.param


@pytest.fixture
def too_late(monkeypatch):
    """Notes each time that a thread came to write into memory that was not ours any more."""
    noted = []
    real = RevocableBuffer.write

    def write(self, at, piece):
        taken = real(self, at, piece)
        if not taken:
            noted.append(at)
        return taken

    monkeypatch.setattr(RevocableBuffer, "write", write)
    return noted


def is_idle(pool):
    with pool._lock:
        return pool._idle == pool._threads and not pool._waiting


def nobody_reads(surface):
    """Whether all threads that read have ended what they did, those that were given up included."""
    return is_idle(store_of(surface).bucket.transfer._workers)


def nobody_writes(surface):
    """The same of those that upload and name."""
    store = store_of(surface)
    return all(map(is_idle, (store._writer._threads, store.puts._pool, store._writer._committer._threads)))


LATE_ANSWERS = {
    "trickling": {"route": "xorb-data", "trickle_bytes": 8_000, "trickle_interval_s": 0.1},
    "delayed": {"route": "xorb-data", "delay_s": 1.0},
    "held up": {"route": "xorb-data", "hang": True},
    "held up before": {"route": "reconstruction", "hang": True},
}


@pytest.mark.parametrize(
    ("sessions", "fault"),
    [("aborted", "held up"), *(("deaf", fault) for fault in LATE_ANSWERS)],
    indirect=["sessions"],
)
def test_what_arrives_after_a_load_failed_is_written_nowhere(hub, surfaces, memory, sessions, *, too_late, fault):
    surfaces().put([0, 1])
    surface = surfaces(HASTY, breaker_failures=100)
    memory.watch(surface)
    # With a session at hand the time is the data's alone.
    eventually(lambda: surface.get([NO_SUCH]) == [None] and store_of(surface).bucket.transfer.ready)
    late = hub.control.add_fault(Fault(**LATE_ANSWERS[fault]))

    eventually(lambda: surface.get([0, 1]) == [None, None] and hub.control.hits(late))
    memory.scribble(surface)

    hub.control.clear_faults()
    eventually(lambda: nobody_reads(surface))
    assert memory.untouched(surface)
    if sessions == "deaf":
        assert too_late, "it did arrive"
    memory.settle(surface)


LATE_PUTS = {
    "before anything": "paths-info",
    "before the session": "xet-write-token",
    "in the upload": "xorb-upload",
    "after the upload": "shard-upload",
    "in the naming": "batch",
}


@pytest.mark.parametrize(
    ("sessions", "when"),
    [("aborted", "in the upload"), *(("deaf", when) for when in LATE_PUTS)],
    indirect=["sessions"],
)
def test_bytes_that_change_after_a_put_failed_never_get_into_the_bucket(
    hub, bucket, surfaces, memory, sessions, *, when
):
    surface = surfaces(HASTY, breaker_failures=100, close_timeout_secs=1)
    memory.watch(surface)
    late = hub.control.add_fault(Fault(route=LATE_PUTS[when], hang=True))
    ours = fresh(2)

    def fails_there():
        assert surface.put(ours) is not True
        return hub.control.hits(late)

    eventually(fails_there)
    assert chunks_counted(surface.instance, "put").keys() <= {"deadline", "under_way"}
    memory.scribble(surface)

    hub.control.clear_faults()
    eventually(lambda: nobody_writes(surface))
    memory.settle(surface)
    there = {path: download(hub.endpoint, bucket, path) for path in paths(hub.endpoint, bucket)}
    assert there.items() <= {path_of(surface, number): content(number) for number in ours}.items()
    later = fresh(1)
    eventually(lambda: surface.put(later) is not False and path_of(surface, *later) in paths(hub.endpoint, bucket))
    memory.settle(surface)


def begin(surface, threads, gets, puts, memory):
    """A load and a store that nobody waits for here: LMCache polls no more when it closes an adapter."""
    if isinstance(surface, Classic):
        threads.submit(surface.get, gets)
        threads.submit(surface.put, puts)
    else:
        surface.adapter.submit_load_task(
            [lmcache_mp.chunk_key(one) for one in gets], [memory.buffer(bytes(CHUNK_BYTES))] * len(gets)
        )
        surface.adapter.submit_store_task(
            [lmcache_mp.chunk_key(one) for one in puts], [memory.buffer(content(one)) for one in puts]
        )


@pytest.mark.parametrize(
    ("surfaces", "sessions"),
    # A classic get gives its memory back when it ends: with deaf sessions, at its deadline.
    [("classic", "aborted"), ("mp", "aborted"), ("mp", "deaf")],
    indirect=True,
)
def test_close_ends_what_is_in_progress_and_nothing_touches_memory_afterwards(
    hub, bucket, surfaces, memory, sessions, *, monkeypatch
):
    monkeypatch.setattr("hfbucket_plugin.store.write._YIELD_SECS", 0.05)  # the put would wait for the get
    surfaces().put([0, 1])
    surface = surfaces(close_timeout_secs=0.2)
    memory.watch(surface)
    late = [hub.control.add_fault(Fault(route=route, hang=True)) for route in ("xorb-data", "xorb-upload")]

    with ThreadPoolExecutor(2) as threads:
        begin(surface, threads, [0, 1], fresh(1), memory)
        eventually(lambda: all(hub.control.hits(one) for one in late))
        surface.close_client()
        memory.scribble(surface)
        hub.control.clear_faults()

    eventually(lambda: nobody_reads(surface) and nobody_writes(surface))
    assert memory.untouched(surface)
    there = {path: download(hub.endpoint, bucket, path) for path in paths(hub.endpoint, bucket)}
    assert there == {path_of(surface, number): content(number) for number in (0, 1)}
    memory.settle(surface)


def test_after_close_no_call_touches_memory(hub, bucket, surfaces, memory):
    surface = surfaces()
    memory.watch(surface)
    surface.put([0])
    surface.close_client()
    hub.control.reset_counters()

    with ThreadPoolExecutor(2) as threads:
        begin(surface, threads, [0, 1], [2], memory)

    memory.scribble(surface)
    assert memory.untouched(surface)
    memory.settle(surface)
    assert paths(hub.endpoint, bucket) == [path_of(surface, 0)]
    assert hub.control.counters().total.requests <= 1, "the listing of this test"


# --- given back exactly once ------------------------------------------------------------------------------------------


@pytest.fixture
def lent(monkeypatch):
    """How often each piece of the engine's memory was given back."""
    released = Counter()
    lock = threading.Lock()

    def counting(cls):
        class Counting(cls):
            def __init__(self, *args):
                super().__init__(*args)
                with lock:
                    released[self] += 0

            def release(self):
                with lock:
                    released[self] += 1
                super().release()

        return Counting

    monkeypatch.setattr(classic, "SourceMemory", counting(engine_memory.SourceMemory))
    monkeypatch.setattr(classic, "TargetMemory", counting(engine_memory.TargetMemory))
    monkeypatch.setattr(l2_adapter, "BorrowedMemory", counting(engine_memory.BorrowedMemory))
    return released


PUTS = {
    "stored": {},
    "denied": {"route": "xet-write-token", "status": 403},
    "not looked up": {"route": "paths-info", "status": 500},
    "not uploaded": {"route": "shard-upload", "status": 500},
    "not named": {"route": "batch", "status": 500},
    "refused by name": {"route": "batch", "items": ""},
    "late for the lookup": {"route": "paths-info", "hang": True},
    "late for the session": {"route": "xet-write-token", "hang": True},
    "late for the upload": {"route": "xorb-upload", "hang": True},
    "late for the naming": {"route": "batch", "hang": True},
}


@pytest.mark.parametrize("case", [*PUTS, "present", "read-only", "too many", "closed"])
def test_what_a_put_lends_is_given_back_exactly_once(hub, surfaces, lent, memory, *, case):
    settings = {"read-only": {"role": "read-only"}, "too many": {"max_waiting_put_bytes": 2 * CHUNK_BYTES}}
    numbers = fresh(3)
    if case == "present":
        surfaces().put(numbers)
        eventually(lambda: set(lent.values()) == {1})
        lent.clear()
    hangs = PUTS.get(case, {}).get("hang")
    surface = surfaces(HASTY if hangs else Limits(lookup=20, get=20, put=30), **settings.get(case, {}))
    memory.watch(surface)
    if PUTS.get(case):
        hub.control.add_fault(Fault(**PUTS[case]))

    # A key that stands there twice is stored once, and given back twice.
    numbers.append(numbers[-1])
    if case == "closed" and isinstance(surface, MP):
        surface.close_client()
        surface.adapter.submit_store_task(
            [lmcache_mp.chunk_key(one) for one in numbers], [memory.buffer(b"x") for _ in numbers]
        )
    else:
        if case == "closed":
            surface.close_client()
        surface.put(numbers)

    stored = chunks_counted(surface.instance, "put").get("stored", 0)
    assert stored == {"stored": 3, "too many": 2}.get(case, 0)
    hub.control.clear_faults()
    eventually(lambda: len(lent) == 4 and set(lent.values()) == {1})
    eventually(lambda: nobody_writes(surface) or case == "closed")
    assert set(lent.values()) == {1}
    memory.settle(surface)


GETS = {
    "served": {},
    "denied": {"route": "reconstruction", "status": 403},
    "broken off": {"route": "xorb-data", "truncate_at": 10},
    "late": {"route": "xorb-data", "hang": True},
}


@pytest.mark.parametrize("case", GETS)
def test_what_a_load_fills_is_given_back_or_handed_on_and_never_both(hub, bucket, surfaces, lent, memory, *, case):
    surfaces().put([0, 1])
    surface = surfaces(HASTY if case == "late" else Limits(lookup=20, get=20, put=30))
    memory.watch(surface)
    eventually(lambda: set(lent.values()) == {1})
    lent.clear()
    upload(hub.endpoint, bucket, {path_of(surface, 3): b"of another layout"})
    if GETS[case]:
        hub.control.add_fault(Fault(**GETS[case]))

    found = surface.get([0, NO_SUCH, 3, 1])

    assert found == ([content(0), None, None, content(1)] if case == "served" else [None] * 4)
    hub.control.clear_faults()
    eventually(lambda: nobody_reads(surface))
    # Memory is asked for only for what there is to be read, where the surface is not given it beforehand.
    assert sum(lent.values()) == (0 if case == "served" else 2)
    assert max(lent.values()) <= 1
    memory.settle(surface)
