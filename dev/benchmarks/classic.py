"""Measurements of the classic, in-process engine; each action runs in a process of its own, see `children`."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dev.benchmarks.cases import CASES, classic_yaml
from dev.benchmarks.children import serve
from dev.benchmarks.gauges import Heartbeat, Listing, Memory, SlowCallbacks, Wire
from tests.support.lmcache_engine import CpuEngine, prompt

if TYPE_CHECKING:
    import torch

    from dev.benchmarks.cases import Case

_HOT_REPEATS = 5


def make_engine(side: str, case: Case, folder: str, *, blocking_secs: float = 30, pool: float = 2.5) -> CpuEngine:
    """A real engine with one side's backend."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "lmcache.yaml"
        text = classic_yaml(side, case, folder, blocking_secs=blocking_secs, pool=pool)
        path.write_text(text, encoding="utf-8")
        return CpuEngine("bench", path, layers=case.layers, hidden=case.hidden, model="bench/model")


def touch_pool(engine: CpuEngine, chunks: int) -> None:
    """Write to the engine's memory, so that pages it faults in later are not taken for the backend's."""
    backend = engine.engine.storage_manager.local_cpu_backend
    shapes, dtypes = engine.metadata.get_shapes(), engine.metadata.get_dtypes()
    held = [backend.allocate(shapes, dtypes, busy_loop=False) for _ in range(chunks)]
    for memory_obj in held:
        if memory_obj is not None:
            memory_obj.tensor.zero_()
    for memory_obj in held:
        if memory_obj is not None:
            memory_obj.ref_count_down()


def prepare(case: str, folder: str, seeds: list[int]) -> dict[str, Any]:
    """Store a batch of each seed."""
    batch = CASES[case]
    engine = make_engine("ours", batch, folder)
    for seed in seeds:
        tokens = prompt(seed, batch.tokens)
        engine.store(tokens, engine.random_kv(len(tokens), seed))
        engine.wait_written(tokens)
    engine.close()
    return {}


def get(side: str, case: str, folder: str, seed: int) -> dict[str, Any]:
    """One cold lookup + retrieve; then hot ones, of which every byte is fetched again; then one for slow callbacks."""
    import torch

    batch = CASES[case]
    wire = Wire()
    engine = make_engine(side, batch, folder)
    tokens = prompt(seed, batch.tokens)
    expected = engine.random_kv(len(tokens), seed)
    touch_pool(engine, 2 * batch.chunks)
    into = torch.zeros_like(expected)
    heartbeat = Heartbeat(engine.remotes[0].loop)
    time.sleep(0.2)
    start = wire.phase()
    memory = Memory()
    cold = _lookup_and_retrieve(engine, tokens, into, wire)
    extra = memory.extra_mib()
    p99, worst = heartbeat.stop()
    _check(cold, into, expected)
    hot = []
    for _ in range(_HOT_REPEATS):
        engine.forget_local()
        into.zero_()
        hot.append(_lookup_and_retrieve(engine, tokens, into, wire))
        _check(hot[-1], into, expected)
    slow = SlowCallbacks(engine.remotes[0].loop)
    engine.forget_local()
    engine.retrieve_into(tokens, into)
    slow_callbacks = list(slow.seen)
    engine.close()
    return {
        "seconds": cold["seconds"],
        "hot_seconds": statistics.median(one["seconds"] for one in hot),
        "extra_mib": extra,
        "p99_ms": p99,
        "max_ms": worst,
        "slow_callbacks": slow_callbacks,
        "wire": {
            "start": start,
            "lookup": cold["lookup"],
            "get": cold["get"],
            "hot lookup": hot[-1]["lookup"],
            "hot get": hot[-1]["get"],
        },
    }


def _lookup_and_retrieve(engine: CpuEngine, tokens: list[int], into: torch.Tensor, wire: Wire) -> dict[str, Any]:
    """What it took, requests included. Reading the counters in between is not timed."""
    started = time.perf_counter()
    found = engine.lookup(tokens)
    seconds = time.perf_counter() - started
    lookup = wire.phase()
    started = time.perf_counter()
    hit = engine.retrieve_into(tokens, into)
    seconds += time.perf_counter() - started
    return {"seconds": seconds, "lookup": lookup, "get": wire.phase(), "missed": 2 * len(tokens) - found - hit}


def _check(result: dict[str, Any], into: torch.Tensor, expected: torch.Tensor) -> None:
    import torch

    if result["missed"] or not torch.equal(into, expected):
        raise RuntimeError(f"{result['missed']} tokens were not found or not hit, or bytes differ")


def put(side: str, case: str, folder: str, seed: int, *, again: bool) -> dict[str, Any]:
    """Store a batch and wait until the bucket lists it; then another one, with what the first left open."""
    batch = CASES[case]
    wire = Wire()
    engine = make_engine(side, batch, folder, pool=1.25)
    rounds = []
    for number in range(1 + again):
        tokens = prompt(seed + number, batch.tokens)
        rounds.append((tokens, engine.random_kv(len(tokens), seed + number)))
    touch_pool(engine, batch.chunks)
    listing = Listing(folder)
    listing.sizes()
    wire.phase()
    results = []
    for number, (tokens, kv) in enumerate(rounds, start=1):
        listing.asked = 0
        memory = Memory()
        heartbeat = Heartbeat(engine.remotes[0].loop)
        started = time.perf_counter()
        engine.store(tokens, kv)
        listing.wait_for([batch.chunk_bytes] * batch.chunks * number)
        seconds = time.perf_counter() - started
        p99, worst = heartbeat.stop()
        results.append((seconds, memory.extra_mib(), p99, worst, without_polls(wire.phase(), listing.asked)))
        time.sleep(0.2)
        wire.phase()
    engine.close()
    seconds, extra, p99, worst, requests = results[0]
    return {
        "seconds": seconds,
        "hot_seconds": results[-1][0] if again else None,
        "extra_mib": extra,
        "p99_ms": p99,
        "max_ms": worst,
        "slow_callbacks": [],
        "wire": {"put": requests} | ({"hot put": results[-1][-1]} if again else {}),
    }


def without_polls(requests: dict[str, int], polls: int) -> dict[str, int]:
    """Requests without the listings that the benchmark itself asked for."""
    left = requests | {"tree": requests.get("tree", 0) - polls}
    return {name: count for name, count in left.items() if count > 0}


if __name__ == "__main__":
    os.environ.setdefault("LMCACHE_TRACK_USAGE", "false")
    serve({"prepare": prepare, "get": get, "put": put})
