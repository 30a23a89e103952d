"""A real LMCache engine on CPU: the classic, in-process one, with a KV cache that is a plain tensor.

Everything is LMCache's own but the GPU connector, which here copies between LMCache's chunks and a tensor.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

os.environ.setdefault("LMCACHE_TRACK_USAGE", "false")

import torch
from lmcache.v1.cache_engine import LMCacheEngineBuilder
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.gpu_connector.mock_gpu_connector import MockGPUConnector
from lmcache.v1.metadata import LMCacheMetadata

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


class TensorConnector(MockGPUConnector):
    """Moves chunks between LMCache and a KV cache that is one tensor, `[2, layers, tokens, hidden]`."""

    def __init__(self, kv_shape: tuple[int, ...]) -> None:
        super().__init__(kv_shape)
        self.kv: torch.Tensor | None = None

    def batched_from_gpu(self, memory_objs: Any, starts: Sequence[int], ends: Sequence[int], **_: Any) -> None:
        """Copy the KV of token ranges into chunks."""
        for memory_obj, start, end in zip(memory_objs, starts, ends, strict=True):
            memory_obj.tensor.copy_(self.kv[:, :, start:end])

    def batched_to_gpu(self, memory_objs: Any, starts: Sequence[int], ends: Sequence[int], **_: Any) -> None:
        """Copy chunks into the KV of token ranges."""
        for memory_obj, start, end in zip(memory_objs, starts, ends, strict=True):
            self.kv[:, :, start:end].copy_(memory_obj.tensor)


class CpuEngine:
    """One engine.

    Args:
        name: Unique in the process.
        config: An LMCache YAML file.
        layers: Of the model.
        hidden: Bytes of a token's KV are `2 * layers * hidden * 2` (bfloat16).
        model: The model's name, as it stands in keys.
        world_size: Workers of the engine; this is one of them.
        worker_id: Which.
    """

    def __init__(
        self,
        name: str,
        config: Path,
        *,
        layers: int = 4,
        hidden: int = 128,
        model: str = "demo/tiny-llama",
        world_size: int = 1,
        worker_id: int = 0,
    ) -> None:
        self.name = name
        self.config = LMCacheEngineConfig.from_file(str(config))
        kv_shape = (layers, 2, self.config.chunk_size, 1, hidden)
        self.metadata = LMCacheMetadata(
            model_name=model,
            world_size=world_size,
            local_world_size=world_size,
            worker_id=worker_id,
            local_worker_id=worker_id,
            kv_dtype=torch.bfloat16,
            kv_shape=kv_shape,
            role="worker",
            chunk_size=self.config.chunk_size,
        )
        self.connector = TensorConnector(kv_shape)
        self._shape = (2, layers, hidden)
        self.engine = LMCacheEngineBuilder.get_or_create(
            name, self.config, self.metadata, self.connector, lambda _tensor, _rank: None, lambda value, _rank: value
        )
        self.engine.post_init()

    def random_kv(self, tokens: int, seed: int) -> torch.Tensor:
        """KV of that many tokens, `[2, layers, tokens, hidden]`: incompressible, as real KV nearly is."""
        kv, layers, hidden = self._shape
        generator = torch.Generator().manual_seed(seed)
        return torch.randn((kv, layers, tokens, hidden), generator=generator).to(torch.bfloat16)

    def store(self, tokens: list[int], kv: torch.Tensor) -> None:
        """Store the KV of a prompt; it is written to the remote stores in the background."""
        self.connector.kv = kv
        self.engine.store(torch.tensor(tokens))

    def lookup(self, tokens: list[int]) -> int:
        """How many tokens of the prompt are cached, from its start."""
        return int(self.engine.lookup(torch.tensor(tokens)))

    def retrieve(self, tokens: list[int]) -> tuple[int, torch.Tensor]:
        """Retrieve a prompt.

        Returns:
            How many tokens were hit, and the KV: zeros where they were not.
        """
        kv, layers, hidden = self._shape
        into = torch.zeros((kv, layers, len(tokens), hidden), dtype=torch.bfloat16)
        return self.retrieve_into(tokens, into), into

    def retrieve_into(self, tokens: list[int], into: torch.Tensor) -> int:
        """Retrieve a prompt into a tensor of its shape; returns how many tokens were hit."""
        self.connector.kv = into
        return int(self.engine.retrieve(torch.tensor(tokens)).sum())

    @property
    def remotes(self) -> list[Any]:
        """LMCache's `RemoteBackend`s, in the order in which they are asked."""
        backends = self.engine.storage_manager.storage_backends
        return [backend for name, backend in backends.items() if "Remote" in name]

    def forget_local(self) -> None:
        """Empty the engine's own memory, so that the next retrieve asks the remote stores."""
        self.engine.storage_manager.local_cpu_backend.clear()

    def keys(self, tokens: list[int]) -> list[Any]:
        """The keys of a prompt's full chunks, as LMCache's own hasher makes them."""
        return [key for _, _, key in self.engine.token_database.process_tokens(torch.tensor(tokens))]

    def wait_written(self, tokens: list[int], timeout_secs: float = 60.0) -> None:
        """Wait until every remote store holds the prompt: puts run in the background.

        Raises:
            TimeoutError: One does not.
        """
        keys = self.keys(tokens)
        end = time.monotonic() + timeout_secs
        for remote in self.remotes:
            while not all(remote.connection.exists_sync(key) for key in keys):
                if time.monotonic() > end:
                    raise TimeoutError(f"engine {self.name}: {remote.remote_url} lacks chunks after {timeout_secs} s")
                time.sleep(0.02)

    def close(self) -> None:
        """End the engine."""
        LMCacheEngineBuilder.destroy(self.name)


def prompt(seed: int, tokens: int) -> list[int]:
    """Token ids of a prompt that shares no prefix with another seed's."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 32_000, (tokens,), generator=generator).tolist()
