"""The classic engine: LMCache's own `RemoteBackend`, made from a configuration, over our connector; and its surface."""

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

from hfbucket_plugin.core.telemetry import CHUNKS, MemorySink
from tests.support.surface import CHUNK_BYTES, HIDDEN, LAYERS, MODEL, TOKENS, Limits, content

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from lmcache.v1.memory_management import MemoryObj

    from hfbucket_plugin.store.chunk_store import ChunkStore

_LIST_SECS: Final = 60.0
_PATIENCE_SECS: Final = 120.0

OURS = {"module_path": "hfbucket_plugin.adapter", "class_name": "HFBucketConnectorAdapter"}

SEED_MINIMAL = """
chunk_size: 256
local_cpu: false
save_unfull_chunk: false
remote_serde: "naive"
blocking_timeout_secs: 10
remote_storage_plugins: ["hfbucket"]
extra_config:
  remote_storage_plugin.hfbucket.bucket_handle: "hf://buckets/my-org/lmcache-kv/prod"
  remote_storage_plugin.hfbucket.token_env: "HF_TOKEN"
  remote_storage_plugin.hfbucket.create_bucket_if_missing: false
  remote_storage_plugin.hfbucket.download_tmp_dir: "/tmp/lmcache-hfbucket"
  remote_storage_plugin.hfbucket.metadata_cache_ttl_secs: 30
"""

SEED_SEVERAL = """
remote_storage_plugins: ["hfbucket.us", "hfbucket.eu"]
extra_config:
  remote_storage_plugin.hfbucket.us.bucket_handle: "hf://buckets/my-org/lmcache-kv/us"
  remote_storage_plugin.hfbucket.us.token_env: "HF_US_TOKEN"
  remote_storage_plugin.hfbucket.eu.bucket_handle: "hf://buckets/my-org/lmcache-kv/eu"
  remote_storage_plugin.hfbucket.eu.token_env: "HF_EU_TOKEN"
"""


def served_by_us(text: str, *instances: str) -> str:
    """The YAML of a configuration, with the two keys of each instance added that name our adapter."""
    document = yaml.safe_load(text)
    for instance in instances:
        document["extra_config"] |= {f"remote_storage_plugin.{instance}.{name}": OURS[name] for name in OURS}
    return yaml.safe_dump(document)


def engine_config(path: Path, text: str) -> LMCacheEngineConfig:
    """LMCache's configuration of a YAML text."""
    path.write_text(text)
    return LMCacheEngineConfig.from_file(str(path))


def engine_metadata(layers: int = 2, hidden: int = 8, chunk_size: int = 256, **values: Any) -> LMCacheMetadata:
    """The layout of a chunk: `4 * layers * hidden * chunk_size` bytes."""
    values = {"model_name": "org/model", "world_size": 1, "worker_id": 0} | values
    return LMCacheMetadata(
        local_world_size=1,
        local_worker_id=0,
        kv_dtype=torch.bfloat16,
        kv_shape=(layers, 1 if values.get("use_mla") else 2, chunk_size, 1, hidden),
        role="worker",
        chunk_size=chunk_size,
        **values,
    )


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


def key(number: int, model: str = "org/model", **tags: str) -> CacheEngineKey:
    """A key of the classic engine."""
    configs = {f"lmcache.tag.{name}": value for name, value in tags.items()}
    return CacheEngineKey(model, 1, 0, number, torch.bfloat16, configs)


class Rig:
    """A `RemoteBackend` of LMCache's, with its memory and its event loop.

    Args:
        config: Its configuration.
        plugin: The instance that it serves; None for `remote_url`.
        loop: Runs the connector's coroutines.
        metadata: The layout of a chunk.
        tally: What the connector counts with, if a test put it in place.
    """

    def __init__(
        self,
        config: LMCacheEngineConfig,
        plugin: str | None,
        loop: asyncio.AbstractEventLoop,
        *,
        metadata: LMCacheMetadata | None = None,
        tally: MemorySink | None = None,
    ) -> None:
        self.metadata = metadata or engine_metadata()
        self.loop = loop
        self.memory = LocalCPUBackend(config=config, metadata=self.metadata, dst_device="cpu")
        self.remote = RemoteBackend(config, self.metadata, loop, self.memory, "cpu", plugin_name=plugin)
        self.tally = tally

    @property
    def connection(self) -> Any:
        """LMCache's instrumented wrapper."""
        return self.remote.connection

    @property
    def connector(self) -> Any:
        """The connector itself."""
        return self.remote.connection._connector

    def run(self, coroutine: Any, seconds: float = 60.0) -> Any:
        """Run a coroutine on the engine's loop, and wait for it."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(seconds)

    def allocate(self) -> MemoryObj | None:
        """Memory for a chunk, if there is any."""
        return self.memory.allocate(
            self.metadata.get_shapes(), self.metadata.get_dtypes(), self.connector.meta_fmt, busy_loop=False
        )

    def chunk(self, number: int) -> MemoryObj:
        """A chunk with content of its own, owned by the caller."""
        memory_obj = self.allocate()
        assert memory_obj is not None
        view = memory_obj.byte_array.cast("B")
        view[:] = self.content(number)
        return memory_obj

    def content(self, number: int) -> bytes:
        """What is in `chunk(number)`."""
        return torch.randint(
            0, 256, (self.connector._chunk_size(),), dtype=torch.uint8, generator=torch.Generator().manual_seed(number)
        ).numpy().tobytes()  # fmt: skip

    def put(self, numbers: Sequence[int]) -> None:
        """Store chunks under the keys of the same numbers, as an engine does."""
        memory_objs = [self.chunk(number) for number in numbers]
        self.run(self.connection.batched_put([key(number) for number in numbers], memory_objs))

    def free_chunks(self) -> int:
        """How many chunks there is memory for."""
        held = self.take_all()
        for memory_obj in held:
            memory_obj.ref_count_down()
        return len(held)

    def take_all(self) -> list[MemoryObj]:
        """Memory for as many chunks as there is memory for."""
        held = []
        while (memory_obj := self.allocate()) is not None:
            held.append(memory_obj)
        return held

    def count(self, operation: str, outcome: str) -> float:
        """How many chunks ended so."""
        assert self.tally is not None
        return self.tally.get(CHUNKS, operation=operation, outcome=outcome)

    @property
    def store(self) -> ChunkStore:
        """What is below the connector."""
        store: ChunkStore = self.connector._store
        return store

    def close_client(self) -> None:
        """Close what is ours; the memory around it lives on."""
        self.remote.close()

    def close(self) -> None:
        """End it."""
        if self.remote.connection is not None:
            self.remote.close()
        self.memory.close()


def taken(memory_objs: Sequence[MemoryObj | None]) -> list[bytes | None]:
    """The bytes of what was got; each object is given back, and nobody else held it."""
    contents: list[bytes | None] = []
    for memory_obj in memory_objs:
        if memory_obj is None:
            contents.append(None)
            continue
        assert memory_obj.get_ref_count() == 1
        contents.append(bytes(memory_obj.byte_array.cast("B")))
        memory_obj.ref_count_down()
    return contents


class Classic(Rig):
    """The surface of one engine's remote backend.

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
    lends_memory = True

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
        self._limits = limits
        settings = {
            **OURS,
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
        config = engine_config(directory / f"{instance}.yaml", yaml.safe_dump(document))
        layout = engine_metadata(LAYERS, HIDDEN, TOKENS, model_name=MODEL)
        super().__init__(config, instance, loop, metadata=layout)
        if self.remote.connection is None:
            raise RuntimeError(f"LMCache made no connector of {document}")
        self._check = RemoteBackendHealthCheck(self.remote)

    def lookup(self, numbers: Sequence[int]) -> list[bool]:
        """What the scheduler asks: LMCache is told how many hits there are before the first miss."""
        hits = self.remote.batched_contains([key(number, MODEL) for number in numbers])
        return [index < hits for index in range(len(numbers))]

    def get(self, numbers: Sequence[int]) -> list[bytes | None]:
        """What a retrieve gets, in its own way."""
        return [_taken(obj) for obj in self.remote.batched_get_blocking([key(number, MODEL) for number in numbers])]

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
            [key(number, MODEL) for number in numbers], objects, on_complete_callback=lambda _: left.release()
        )
        for memory_obj in objects:  # as LMCache's storage manager does: the storing side holds a reference of its own
            memory_obj.ref_count_down()
        for _ in numbers:
            if not left.acquire(timeout=_PATIENCE_SECS):
                raise TimeoutError("the put never ended")
        return None

    def delete(self, numbers: Sequence[int]) -> bool | None:
        """LMCache's `remove`, chunk by chunk."""
        gone = [self.remote.remove(key(number, MODEL)) for number in numbers]
        return all(gone)

    def list(self) -> list[str]:
        """The connector's own listing."""
        names: list[str] = self.run(self.connection.list(), _PATIENCE_SECS)
        return names

    @staticmethod
    def name(number: int) -> str:
        """The key string of a chunk."""
        text: str = key(number, MODEL).to_string()
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

    def _chunk(self, number: int) -> MemoryObj:
        memory_obj = self.allocate()
        if memory_obj is None:
            raise MemoryError("the engine's memory is used up")
        memory_obj.byte_array.cast("B")[:] = content(number)
        return memory_obj


def _taken(memory_obj: MemoryObj | None) -> bytes | None:
    if memory_obj is None:
        return None
    data = bytes(memory_obj.byte_array.cast("B"))
    memory_obj.ref_count_down()
    assert len(data) == CHUNK_BYTES
    return data
