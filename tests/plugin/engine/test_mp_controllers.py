"""LMCache's real storage manager, with its prefetch and store controllers, over our adapter and beside over the built-in one.

Schedules from seeds: many requests at once with prefixes in common, lookups of which nothing is loaded since L1 has it, an L1 that is
too small, requests that LMCache aborts at any point, clearing by force. The store is healthy throughout, and slow at times.
"""

import argparse
import json
import random

import pytest
import torch
from huggingface_hub import HfApi
from lmcache.v1.distributed.api import GroupedObjectKeys, MemoryLayoutDesc, ObjectKey, PrefetchTaskSpec
from lmcache.v1.distributed.config import (
    EvictionConfig,
    L1ManagerConfig,
    L1MemoryManagerConfig,
    StorageManagerConfig,
)
from lmcache.v1.distributed.l2_adapters.config import parse_args_to_l2_adapters_config
from lmcache.v1.distributed.storage_controllers.prefetch_controller import PrefetchPhase
from lmcache.v1.distributed.storage_manager import StorageManager
from lmcache.v1.storage_backend.connector.hfbucket_connector import HFBucketClient

from localhub.faults import Fault
from tests.support.buckets import noise, paths
from tests.support.waiting import eventually

SIZE = 64 * 1024
LAYOUT = MemoryLayoutDesc([torch.Size([SIZE // 2])], [torch.bfloat16])
MIB = 1024 * 1024
CHUNKS = 12
PROMPTS = [range(4), range(2), range(6), [0, 1, 2, 6, 7], range(8, 12)]
"""Chunks of prompts, most of which begin alike."""

ROOMY, TIGHT = 64, 1
"""MiB of L1: for all staging buffers of all requests at once, or for 16 chunks."""


def key(number):
    return ObjectKey(chunk_hash=number.to_bytes(8, "big"), model_name="org/model", kv_rank=0x01000100)


def content(number):
    return noise(SIZE, 7000 + number)


class Server:
    """What `lmcache server` is made of, over one adapter."""

    def __init__(self, kind, handle, endpoint, l1_mib, directory):
        self.kind = kind
        params = {"bucket_handle": handle, "download_tmp_dir": str(directory / kind)}
        if kind == "ours":
            params |= {"endpoint": endpoint, "usage_refresh_secs": 0, "fingerprint": "off"}
            spec = {
                "type": "plugin",
                "module_path": "hfbucket_plugin.l2_adapter",
                "class_name": "HFBucketL2Adapter",
                "adapter_params": params,
            }
        else:
            spec = {"type": "hfbucket"} | params
        self.manager = StorageManager(
            StorageManagerConfig(
                l1_manager_config=L1ManagerConfig(L1MemoryManagerConfig(l1_mib * MIB, False, shm_name="")),
                eviction_config=EvictionConfig("noop"),
                l2_adapter_config=parse_args_to_l2_adapters_config(argparse.Namespace(l2_adapter=[json.dumps(spec)])),
            )
        )
        [self.adapter] = self.manager._l2_adapters.values()
        self.controller = self.manager._prefetch_controller
        self.lost = 0
        for query in ("query_lookup_and_lock_result", "query_load_result"):
            self._count_lost(query)
        self.doomed = {}
        advance = self.controller._advance_request

        def advance_or_fail(request, signaled):
            if self.doomed.get(request.request_id) is request.phase:
                del self.doomed[request.request_id]
                raise RuntimeError("an error of LMCache's own, as in its tests")
            advance(request, signaled)

        self.controller._advance_request = advance_or_fail

    def _count_lost(self, name):
        """Count what LMCache is told to be missing: all is there, so that nothing should be."""
        real = getattr(self.adapter, name)

        def query(task):
            result = real(task)
            self.lost += 0 if result is None else len(result) - result.popcount()
            return result

        setattr(self.adapter, name, query)

    def store(self, numbers):
        """Write chunks to L1, from where the store controller brings them into the bucket."""
        keys = [key(number) for number in numbers]
        for one, memory in self.manager.reserve_write(keys, LAYOUT).items():
            memory.byte_array.cast("B")[:] = content(int.from_bytes(one.chunk_hash, "big"))
        self.manager.finish_write(keys)

    def empty(self):
        """Empty L1."""

        def emptied():
            self.manager.clear()
            return self.manager.get_l1_usage()[0] == 0

        eventually(emptied)

    def begin(self, numbers, doomed_in=None):
        """A request's prefetch."""
        keys = [key(number) for number in numbers]
        spec = PrefetchTaskSpec([GroupedObjectKeys(keys=keys, object_group_id=0, layout_desc=LAYOUT)])
        with self.controller._submission_lock:
            number = self.controller._next_request_id
        if doomed_in is not None:
            self.doomed[number] = doomed_in
        handle = self.manager.submit_prefetch_task(spec)
        assert handle.prefetch_request_id == number
        return keys, handle

    @property
    def all_wait(self):
        """Whether every request that LMCache takes on at a time waits for its load, or is over."""
        status = self.controller.report_status()
        waiting = status["submission_queue_size"] + status["pending_queue_size"]
        full = status["in_flight_request_count"] == status["max_in_flight"]
        return not status["lookup_phase_count"] and (full or not waiting)

    def end(self, keys, handle):
        """How many chunks a request is served, of which each is what was stored; its locks are returned."""
        result = eventually(lambda: self.manager.query_prefetch_status(handle), 60)
        hits = [one for index, one in enumerate(keys) if result.hit_cells[0].test(index)]
        if hits:
            with self.manager.read_prefetched_results(hits) as objects:
                served = None if objects is None else [bytes(one.byte_array.cast("B")[:SIZE]) for one in objects]
            self.manager.finish_read_prefetched(hits)
            assert served == [content(int.from_bytes(one.chunk_hash, "big")) for one in hits]
        return len(hits)


@pytest.fixture
def servers(hub, bucket, tmp_path, monkeypatch):
    """Both sides over the same chunks, which their own store controllers have stored."""
    # The built-in knows no other Hub than the one of HF_ENDPOINT, which is read when a process starts.
    monkeypatch.setattr(
        HFBucketClient, "__init__", lambda self, token: setattr(self, "_api", HfApi(endpoint=hub.endpoint, token=False))
    )
    made = []

    def make(l1_mib):
        for kind in ("ours", "built-in"):
            server = Server(kind, f"hf://buckets/{bucket}/{kind}", hub.endpoint, l1_mib, tmp_path)
            made.append(server)
            server.store(range(CHUNKS))
            eventually(
                lambda kind=kind: sum(path.startswith(f"{kind}/") for path in paths(hub.endpoint, bucket)) == CHUNKS
            )
            server.empty()
        return made

    yield make
    hub.control.clear_faults()
    for server in made:
        server.manager.close()


def schedule(seed, l1_mib):
    """Rounds of requests: prompts, where LMCache fails some, whether the store keeps them waiting, what becomes of L1 before."""
    random_ = random.Random(seed)
    for _ in range(5):
        count = random_.choice([1, 3, 9, 12])
        prompts = (
            [random_.choice(PROMPTS)] * count
            if l1_mib == TIGHT or random_.random() < 0.5
            else random_.choices(PROMPTS, k=count)
        )
        fails = (
            [random_.choice([None, None, None, *PrefetchPhase]) for _ in prompts]
            if random_.random() < 0.4
            else [None] * count
        )
        yield list(zip(prompts, fails, strict=True)), random_.random() < 0.6, random_.random() < 0.7


def run(hub, server, requests, held):
    """One round on one side: how many chunks each request was served."""
    if held:
        hub.control.add_fault(Fault(route="xorb-data", hang=True))
    begun = [server.begin(prompt, fail) for prompt, fail in requests]
    if held:
        if server.kind == "ours" and not any(
            fail for _, fail in requests
        ):  # lookups of the built-in wait behind its loads
            eventually(lambda: server.all_wait)
        hub.control.clear_faults()
    served = [server.end(keys, handle) for keys, handle in begun]
    server.doomed.clear()
    return served


@pytest.mark.parametrize("l1_mib", [ROOMY, TIGHT], ids=["roomy", "tight"])
@pytest.mark.parametrize("seed", range(2))
def test_ours_serves_what_the_built_in_serves_and_blames_no_healthy_store(hub, servers, seed, l1_mib):
    ours, builtin = servers(l1_mib)
    for requests, held, emptied in schedule(seed, l1_mib):
        reported = f"seed {seed}: {requests}, held {held}, emptied {emptied}"
        for server in (ours, builtin):
            if emptied:
                server.empty()
            hits = run(hub, server, requests, held)
            if held and emptied and l1_mib == ROOMY and len(requests) <= 8 and not any(fail for _, fail in requests):
                assert hits == [len(prompt) for prompt, _ in requests], reported
        # By what the adapters serve: LMCache itself drops what another request brings into L1 between two of its looks.
        assert ours.lost == 0 <= builtin.lost, reported
        assert ours.adapter.report_status()["breakers_open"] == [], reported
    eventually(lambda: not ours.adapter.report_status()["tasks"]["load"])
    tasks = ours.adapter._tasks
    aborted_in_lookup = sum(len(task.keys) for task in tasks._tasks["lookup"].values())
    assert sum(tasks._locks.values()) == aborted_in_lookup, "all other locks were returned"
    assert not tasks._unclaimed


def test_nine_requests_with_one_prefix_are_all_served(hub, servers):
    ours, _ = servers(ROOMY)

    assert run(hub, ours, [(PROMPTS[0], None)] * 9, held=True) == [4] * 9
    ours.empty()
    run(hub, ours, [(PROMPTS[0], None)] * 16, held=False)

    assert ours.lost == 0
    assert ours.adapter.report_status()["breakers_open"] == []
    assert ours.adapter.report_status()["locked_key_count"] == 0


def test_a_load_that_is_aborted_writes_into_no_memory_that_another_request_was_given(hub, servers):
    ours, _ = servers(TIGHT)
    held = hub.control.add_fault(Fault(route="xorb-data", hang=True))
    given_up = ours.begin(range(8))
    eventually(lambda: ours.all_wait and hub.control.hits(held))
    [request] = ours.controller._in_flight_requests.values()
    ours.controller._abort_request(request)
    ours.store(range(100, 112))  # takes the memory that was freed
    assert ours.end(*given_up) == 0
    hub.control.clear_faults()

    eventually(lambda: not ours.adapter.report_status()["tasks"]["load"])
    assert ours.end(*ours.begin(range(100, 112))) == 12
    assert ours.adapter.report_status()["breakers_open"] == []
    assert ours.adapter.report_status()["locked_key_count"] == 0


def test_memory_that_is_cleared_by_force_under_a_load_is_not_written(hub, servers):
    ours, _ = servers(TIGHT)
    held = hub.control.add_fault(Fault(route="xorb-data", hang=True))
    overrun = ours.begin(range(8))
    eventually(lambda: ours.all_wait and hub.control.hits(held))
    ours.manager.clear(force=True)
    ours.store(range(100, 112))
    hub.control.clear_faults()

    eventually(lambda: ours.manager.query_prefetch_status(overrun[1]))
    assert ours.end(*ours.begin(range(100, 112))) == 12
    assert ours.adapter.report_status()["breakers_open"] == []
