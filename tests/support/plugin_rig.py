"""LMCache's own parts around our connector, without a whole engine."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import TYPE_CHECKING, Any

import torch
import yaml
from lmcache.utils import CacheEngineKey
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.metadata import LMCacheMetadata
from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend
from lmcache.v1.storage_backend.remote_backend import RemoteBackend

from hfbucket_plugin.core.telemetry import CHUNKS, MemorySink

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from lmcache.v1.memory_management import MemoryObj

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

    def free(self) -> int:
        """How many chunks there is memory for."""
        held = []
        while (memory_obj := self.allocate()) is not None:
            held.append(memory_obj)
        for memory_obj in held:
            memory_obj.ref_count_down()
        return len(held)

    def count(self, operation: str, outcome: str) -> float:
        """How many chunks ended so."""
        assert self.tally is not None
        return self.tally.get(CHUNKS, operation=operation, outcome=outcome)

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
