"""The classic surface: LMCache's own `RemoteBackend`, made from a configuration, over our connector."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import TYPE_CHECKING, Any, Final

import torch
import yaml
from lmcache.utils import CacheEngineKey
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.health_monitor.checks.remote_backend_check import RemoteBackendHealthCheck
from lmcache.v1.metadata import LMCacheMetadata
from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend
from lmcache.v1.storage_backend.remote_backend import RemoteBackend

from dev.faults.surface import CHUNK_BYTES, HIDDEN, LAYERS, MODEL, TOKENS, Limits, content

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from lmcache.v1.memory_management import MemoryObj

_LIST_SECS: Final = 60.0
_PATIENCE_SECS: Final = 120.0


@contextlib.contextmanager
def running_loop() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop on a thread of its own, as an engine has it."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="engine-loop", daemon=True)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(30)
        loop.close()


class Classic:
    """One engine's remote backend.

    Args:
        instance: Its name, `hfbucket` or `hfbucket.<something>`.
        loop: Runs the connector's coroutines.
        directory: For its configuration and temporary files.
        handle: `hf://buckets/…`.
        endpoint: The Hub's address.
        limits: Its deadlines.
        cpu_gb: The engine's memory.
        **values: More settings of the instance.
    """

    deletes_at_once = 1

    def __init__(
        self,
        instance: str,
        loop: asyncio.AbstractEventLoop,
        directory: Path,
        *,
        handle: str,
        endpoint: str,
        limits: Limits,
        cpu_gb: float = 0.02,
        **values: Any,
    ) -> None:
        self.instance = instance
        self._loop = loop
        self._limits = limits
        settings = {
            "module_path": "hfbucket_plugin.adapter",
            "class_name": "HFBucketConnectorAdapter",
            "bucket_handle": handle,
            "endpoint": endpoint,
            "download_tmp_dir": str(directory / "tmp"),
            "lookup_timeout_secs": limits.lookup,
            "get_timeout_secs": limits.get,
            "put_timeout_secs": limits.put,
            "fingerprint": "off",  # faults are to meet the work, and counts to tell of it alone
        }
        document = {
            "chunk_size": TOKENS,
            "local_cpu": False,
            "max_local_cpu_size": cpu_gb,
            "save_unfull_chunk": False,
            "blocking_timeout_secs": limits.get + 10,
            "remote_storage_plugins": [instance],
            "extra_config": {
                f"remote_storage_plugin.{instance}.{name}": value for name, value in (settings | values).items()
            },
        }
        path = directory / f"{instance}.yaml"
        path.write_text(yaml.safe_dump(document))
        config = LMCacheEngineConfig.from_file(str(path))
        metadata = LMCacheMetadata(
            model_name=MODEL,
            world_size=1,
            local_world_size=1,
            worker_id=0,
            local_worker_id=0,
            kv_dtype=torch.bfloat16,
            kv_shape=(LAYERS, 2, TOKENS, 1, HIDDEN),
            role="worker",
            chunk_size=TOKENS,
        )
        self._metadata = metadata
        self.memory = LocalCPUBackend(config=config, metadata=metadata, dst_device="cpu")
        self.remote = RemoteBackend(config, metadata, loop, self.memory, "cpu", plugin_name=instance)
        if self.remote.connection is None:
            raise RuntimeError(f"LMCache made no connector of {document}")
        self._check = RemoteBackendHealthCheck(self.remote)

    def lookup(self, numbers: Sequence[int]) -> list[bool]:
        """What the scheduler asks: LMCache is told how many hits there are before the first miss."""
        hits = self.remote.batched_contains([_key(number) for number in numbers])
        return [index < hits for index in range(len(numbers))]

    def get(self, numbers: Sequence[int]) -> list[bytes | None]:
        """What a retrieve gets, in its own way."""
        return [_taken(obj) for obj in self.remote.batched_get_blocking([_key(number) for number in numbers])]

    def retrieve(self, numbers: Sequence[int]) -> tuple[list[bool], list[bytes | None]]:
        """What a retrieve does: look up, and get what was found before the first miss."""
        hits = self.lookup(numbers)
        found = [number for number, hit in zip(numbers, hits, strict=True) if hit]
        return hits, self.get(found) if found else []

    def put(self, numbers: Sequence[int]) -> bool | None:
        """Store as an engine does: it is told that the task ended, and not how."""
        objects = [self._chunk(number) for number in numbers]
        left = threading.Semaphore(0)
        self.remote.batched_submit_put_task(
            [_key(number) for number in numbers], objects, on_complete_callback=lambda _: left.release()
        )
        for (
            memory_obj
        ) in objects:  # LMCache's storage manager does so too: the storing side holds a reference of its own
            memory_obj.ref_count_down()
        for _ in numbers:
            if not left.acquire(timeout=_PATIENCE_SECS):
                raise TimeoutError("the put never ended")
        return None

    def delete(self, numbers: Sequence[int]) -> bool | None:
        """LMCache's `remove`, chunk by chunk."""
        gone = [self.remote.remove(_key(number)) for number in numbers]
        return all(gone)

    def list(self) -> list[str]:
        """The connector's own listing."""
        future = asyncio.run_coroutine_threadsafe(self.remote.connection.list(), self._loop)
        names: list[str] = future.result(_PATIENCE_SECS)
        return names

    @staticmethod
    def name(number: int) -> str:
        """The key string of a chunk."""
        text: str = _key(number).to_string()
        return text

    def deadline(self, operation: str) -> float:
        """A delete is given a lookup's time."""
        limits = self._limits
        return {"lookup": limits.lookup, "get": limits.get, "put": limits.put, "delete": limits.lookup}.get(
            operation, _LIST_SECS
        )

    def healthy(self) -> bool:
        """What LMCache's health monitor finds."""
        return bool(self._check.check())

    def free_chunks(self) -> int:
        """How many chunks there is memory for."""
        held = []
        shapes, dtypes = self._metadata.get_shapes(), self._metadata.get_dtypes()
        while (memory_obj := self.memory.allocate(shapes, dtypes, busy_loop=False)) is not None:
            held.append(memory_obj)
        for memory_obj in held:
            memory_obj.ref_count_down()
        return len(held)

    def _chunk(self, number: int) -> MemoryObj:
        memory_obj = self.memory.allocate(self._metadata.get_shapes(), self._metadata.get_dtypes(), busy_loop=False)
        if memory_obj is None:
            raise MemoryError("the engine's memory is used up")
        memory_obj.byte_array.cast("B")[:] = content(number)
        return memory_obj

    def close(self) -> None:
        """End the backend and its memory."""
        self.remote.close()
        self.memory.close()


def _key(number: int) -> CacheEngineKey:
    return CacheEngineKey(MODEL, 1, 0, number, torch.bfloat16, {})


def _taken(memory_obj: MemoryObj | None) -> bytes | None:
    if memory_obj is None:
        return None
    data = bytes(memory_obj.byte_array.cast("B"))
    memory_obj.ref_count_down()
    assert len(data) == CHUNK_BYTES  # noqa: S101 - LMCache's allocator gave another layout
    return data
