"""Measurements of lookups and gets in a running engine, with the key index and without; see `children`.

An engine that has served a while meets prompts that it has not seen before: some of them are in the bucket, others are not.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dev.benchmarks.cases import BUCKET, CASES, INDEXED
from dev.benchmarks.children import serve
from dev.benchmarks.gauges import Wire

if TYPE_CHECKING:
    from collections.abc import Callable

    from hfbucket_plugin.store.chunk_store import ChunkStore

_UNKNOWN_SEED = 100_000
_PATIENCE_SECS = 60.0
_REST_SECS = 0.3
"""After a comparison of tensors: torch's threads spin for 200 ms before they go to sleep, and take the cores from what follows."""


def build(folder: str) -> dict[str, Any]:
    """Publish an index of a folder."""
    return build_at(f"hf://buckets/{BUCKET}/{folder}")


def build_at(handle: str) -> dict[str, Any]:
    """Publish an index of an instance."""
    from hfbucket_plugin.config.settings import load
    from hfbucket_plugin.core.deadline import Deadline
    from hfbucket_plugin.core.telemetry import MemorySink
    from hfbucket_plugin.hub.connect import open_bucket
    from hfbucket_plugin.index.build import from_listing, publish
    from hfbucket_plugin.index.store import IndexStore

    settings = load({"remote_storage_plugin.hfbucket.bucket_handle": handle}, "hfbucket")
    bucket = open_bucket(settings, "hfbucket", MemorySink(), 60.0)
    with tempfile.TemporaryDirectory() as directory:
        built = from_listing(bucket, Path(directory), 60.0)
        publish(IndexStore(bucket, "bench"), built, Deadline.after(60.0))
    bucket.close()
    return {"keys": built.keys}


def _wait_for_index(store: ChunkStore) -> None:
    end = time.monotonic() + _PATIENCE_SECS
    while store.index is not None and store.index.status()["state"] != "usable":
        if time.monotonic() > end:
            raise TimeoutError(f"the index is not in use: {store.index.status()}")
        time.sleep(0.02)


def classic(side: str, case: str, folder: str, seeds: list[int], misses: int) -> dict[str, Any]:
    """A real engine: lookups of prompts that are not there, then a lookup and retrieve of each that is."""
    import torch

    from dev.benchmarks.classic import make_engine, touch_pool
    from tests.support.lmcache_engine import prompt

    batch = CASES[case]
    engine = make_engine(side, batch, folder)
    if side == INDEXED:
        _wait_for_index(engine.remotes[0].connection._connector._store)  # noqa: SLF001 - nobody else says so
    touch_pool(engine, 2 * batch.chunks)
    into = torch.zeros_like(engine.random_kv(batch.tokens, 0))

    def hit(seed: int) -> None:
        tokens = prompt(seed, batch.tokens)
        found, got = engine.lookup(tokens), engine.retrieve_into(tokens, into)
        if (found, got) != (batch.tokens, batch.tokens):
            raise RuntimeError(f"{found} of {batch.tokens} tokens found, {got} hit")

    def check(seed: int) -> None:
        engine.forget_local()
        if not torch.equal(into, engine.random_kv(batch.tokens, seed)):
            raise RuntimeError("other bytes came back than were stored")

    def miss(number: int) -> None:
        if engine.lookup(prompt(_UNKNOWN_SEED + number, batch.tokens)):
            raise RuntimeError("a prompt was found that nobody stored")

    figures = _measure(hit, check, miss, seeds, misses)
    engine.close()
    return figures


def mp(side: str, case: str, folder: str, seeds: list[int], misses: int) -> dict[str, Any]:
    """The L2 adapter: the same by lookup and load tasks."""
    import torch

    from dev.benchmarks.mp import L1, Driver, keys_of

    batch = CASES[case]
    l1, expected = L1(batch), L1(batch)
    driver = Driver(side, folder, l1)
    if side == INDEXED:
        _wait_for_index(driver.adapter._store)  # noqa: SLF001 - nobody else says so

    def hit(seed: int) -> None:
        keys = keys_of(batch, seed)
        found, loaded = driver.lookup(keys), driver.load(keys, l1.objects)
        driver.adapter.submit_unlock(keys)
        if (found, loaded) != (batch.chunks, batch.chunks):
            raise RuntimeError(f"{found} of {batch.chunks} objects found, {loaded} loaded")

    def check(seed: int) -> None:
        expected.fill(seed)
        if not torch.equal(l1.buffer, expected.buffer):
            raise RuntimeError("other bytes came back than were stored")

    def miss(number: int) -> None:
        if driver.lookup(keys_of(batch, _UNKNOWN_SEED + number)):
            raise RuntimeError("an object was found that nobody stored")

    figures = _measure(hit, check, miss, seeds, misses)
    driver.adapter.close()
    return figures


def _measure(
    hit: Callable[[int], None],
    check: Callable[[int], None],
    miss: Callable[[int], None],
    seeds: list[int],
    misses: int,
) -> dict[str, Any]:
    """Seconds of each, and requests of all of them; the first of each kind finds no session, and does not count."""
    wire = Wire()
    hit(seeds[0])
    check(seeds[0])
    miss(0)
    wire.phase()
    hit_secs = []
    for seed in seeds[1:]:
        time.sleep(_REST_SECS)
        started = time.perf_counter()
        hit(seed)
        hit_secs.append(time.perf_counter() - started)
        check(seed)
    hit_calls = wire.phase()
    miss_secs = []
    for number in range(1, 1 + misses):
        started = time.perf_counter()
        miss(number)
        miss_secs.append(time.perf_counter() - started)
    return {
        "hit_seconds": hit_secs,
        "miss_seconds": miss_secs,
        "hits": len(hit_secs),
        "misses": len(miss_secs),
        "hit_requests": hit_calls,
        "miss_requests": wire.phase(),
    }


if __name__ == "__main__":
    serve({"build": build, "classic": classic, "mp": mp})
