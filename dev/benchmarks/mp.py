"""Measurements of MP mode: L2 adapters, driven as the controllers of `lmcache server` drive them; see `children`.

A task is submitted, its event descriptor polled, its result fetched. Loads go into objects over one buffer that was
allocated and touched before, as those of LMCache's L1 are.
"""

from __future__ import annotations

import argparse
import select
import statistics
import time
from typing import Any

import torch
from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.internal_api import L1MemoryDesc
from lmcache.v1.distributed.l2_adapters import create_l2_adapter
from lmcache.v1.distributed.l2_adapters.config import parse_args_to_l2_adapters_config
from lmcache.v1.memory_management import MemoryFormat, MemoryObjMetadata, TensorMemoryObj
from lmcache.v1.platform import consume_fd

from dev.benchmarks.cases import CASES, CHUNK_TOKENS, Case, mp_json
from dev.benchmarks.children import serve
from dev.benchmarks.classic import without_polls
from dev.benchmarks.gauges import Listing, Memory, Wire

_HOT_REPEATS = 5
_TASK_MS = 120_000


class L1:
    """Objects of one batch over one buffer."""

    def __init__(self, case: Case) -> None:
        self.shape = torch.Size([2, case.layers, CHUNK_TOKENS, case.hidden])
        self.layout = MemoryLayoutDesc(shapes=[self.shape], dtypes=[torch.bfloat16])
        self.buffer = torch.zeros((case.chunks, *self.shape), dtype=torch.bfloat16)
        self.objects = [
            TensorMemoryObj(
                chunk.view(-1),
                MemoryObjMetadata(
                    shape=self.shape,
                    dtype=torch.bfloat16,
                    address=chunk.data_ptr(),
                    phy_size=chunk.nbytes,
                    fmt=MemoryFormat.KV_2LTD,
                    ref_count=1,
                ),
                parent_allocator=None,
            )
            for chunk in self.buffer
        ]

    def fill(self, seed: int) -> None:
        """Fill the buffer with the KV of a seed: incompressible, as real KV nearly is."""
        generator = torch.Generator().manual_seed(seed)
        for chunk in self.buffer:
            chunk.copy_(torch.randn(chunk.shape, generator=generator))

    def describe(self) -> L1MemoryDesc:
        """What LMCache tells adapters of its memory."""
        return L1MemoryDesc(ptr=self.buffer.data_ptr(), size=self.buffer.nbytes, align_bytes=4096)


class Driver:
    """One adapter, made from the JSON that `lmcache server` takes, and its event descriptors."""

    def __init__(self, side: str, folder: str, l1: L1) -> None:
        options = argparse.Namespace(l2_adapter=[mp_json(side, folder)])
        config = parse_args_to_l2_adapters_config(options).adapters[0]
        self.adapter = create_l2_adapter(config, l1_memory_desc=l1.describe())
        self._layouts = {0: l1.layout}

    @staticmethod
    def _wait(descriptor: int) -> None:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        if not poll.poll(_TASK_MS):
            raise TimeoutError("the adapter did not end a task")
        consume_fd(descriptor)

    def lookup(self, keys: list[ObjectKey]) -> int:
        """Look keys up and lock them; returns how many were found."""
        task = self.adapter.submit_lookup_and_lock_task(keys, self._layouts)
        self._wait(self.adapter.get_lookup_and_lock_event_fd())
        return int(self.adapter.query_lookup_and_lock_result(task).popcount())

    def load(self, keys: list[ObjectKey], objects: list[TensorMemoryObj]) -> int:
        """Load keys into objects; returns how many were loaded."""
        task = self.adapter.submit_load_task(keys, objects)
        self._wait(self.adapter.get_load_event_fd())
        return int(self.adapter.query_load_result(task).popcount())

    def store(self, keys: list[ObjectKey], objects: list[TensorMemoryObj]) -> None:
        """Store objects.

        Raises:
            RuntimeError: The adapter says that it did not.
        """
        task = self.adapter.submit_store_task(keys, objects)
        self._wait(self.adapter.get_store_event_fd())
        if not self.adapter.pop_completed_store_tasks()[task].is_successful():
            raise RuntimeError("the adapter did not store")


def keys_of(case: Case, seed: int) -> list[ObjectKey]:
    """The keys of a seed's batch."""
    return [
        ObjectKey(chunk_hash=seed.to_bytes(4, "big") + number.to_bytes(4, "big"), model_name="bench/model", kv_rank=0)
        for number in range(case.chunks)
    ]


def prepare(case: str, folder: str, seeds: list[int]) -> dict[str, Any]:
    """Store a batch of each seed."""
    batch = CASES[case]
    l1 = L1(batch)
    driver = Driver("ours", folder, l1)
    for seed in seeds:
        l1.fill(seed)
        driver.store(keys_of(batch, seed), l1.objects)
    driver.adapter.close()
    return {}


def get(side: str, case: str, folder: str, seed: int) -> dict[str, Any]:
    """One cold lookup + load, then hot ones."""
    batch = CASES[case]
    l1, expected = L1(batch), L1(batch)
    expected.fill(seed)
    keys = keys_of(batch, seed)
    wire = Wire()
    driver = Driver(side, folder, l1)
    time.sleep(0.5)
    start = wire.phase()
    memory = Memory()
    cold = _lookup_and_load(driver, keys, l1, wire)
    extra = memory.extra_mib()
    _check(cold, l1, expected)
    hot = []
    for _ in range(_HOT_REPEATS):
        l1.buffer.zero_()
        hot.append(_lookup_and_load(driver, keys, l1, wire))
        _check(hot[-1], l1, expected)
    driver.adapter.close()
    return {
        "seconds": cold["seconds"],
        "hot_seconds": statistics.median(one["seconds"] for one in hot),
        "extra_mib": extra,
        "wire": {
            "start": start,
            "lookup": cold["lookup"],
            "get": cold["get"],
            "hot lookup": hot[-1]["lookup"],
            "hot get": hot[-1]["get"],
        },
    }


def _lookup_and_load(driver: Driver, keys: list[ObjectKey], l1: L1, wire: Wire) -> dict[str, Any]:
    started = time.perf_counter()
    found = driver.lookup(keys)
    seconds = time.perf_counter() - started
    lookup = wire.phase()
    started = time.perf_counter()
    loaded = driver.load(keys, l1.objects)
    seconds += time.perf_counter() - started
    driver.adapter.submit_unlock(keys)
    return {"seconds": seconds, "lookup": lookup, "get": wire.phase(), "missed": 2 * len(keys) - found - loaded}


def _check(result: dict[str, Any], l1: L1, expected: L1) -> None:
    if result["missed"] or not torch.equal(l1.buffer, expected.buffer):
        raise RuntimeError(f"{result['missed']} objects were not found or not loaded, or bytes differ")


def put(side: str, case: str, folder: str, seed: int, *, again: bool) -> dict[str, Any]:
    """Store a batch and wait until the bucket lists it; then another one."""
    batch = CASES[case]
    l1 = L1(batch)
    wire = Wire()
    driver = Driver(side, folder, l1)
    listing = Listing(folder)
    listing.sizes()
    time.sleep(0.5)
    results = []
    for number in range(1 + again):
        l1.fill(seed + number)
        wire.phase()
        listing.asked = 0
        memory = Memory()
        started = time.perf_counter()
        driver.store(keys_of(batch, seed + number), l1.objects)
        listing.wait_for([batch.chunk_bytes] * batch.chunks * (number + 1))
        seconds = time.perf_counter() - started
        results.append((seconds, memory.extra_mib(), without_polls(wire.phase(), listing.asked)))
    driver.adapter.close()
    return {
        "seconds": results[0][0],
        "hot_seconds": results[-1][0] if again else None,
        "extra_mib": results[0][1],
        "wire": {"put": results[0][2]} | ({"hot put": results[-1][2]} if again else {}),
    }


if __name__ == "__main__":
    serve({"prepare": prepare, "get": get, "put": put})
