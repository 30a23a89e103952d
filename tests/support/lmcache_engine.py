"""Real LMCache engines on CPU: the classic, in-process ones, with a KV cache that is a plain tensor.

Everything is LMCache's own but the GPU connector, which here copies between LMCache's chunks and a tensor.
"""

from __future__ import annotations

import itertools
import os
from typing import TYPE_CHECKING, Any

os.environ.setdefault("LMCACHE_TRACK_USAGE", "false")

import torch
import yaml
from lmcache.v1.cache_engine import LMCacheEngineBuilder
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.gpu_connector.mock_gpu_connector import MockGPUConnector
from lmcache.v1.metadata import LMCacheMetadata

from hfbucket_plugin.core.keys import encode_name
from hfbucket_plugin.core.telemetry import CHUNKS, FINGERPRINT_CONFLICTS, FINGERPRINT_STATE, MemorySink
from hfbucket_plugin.fingerprint.model import FingerprintClaim, Record
from tests.support.buckets import MODEL, all_paths, download
from tests.support.lmcache_classic import OURS
from tests.support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import pytest

    from hfbucket_plugin.fingerprint.model import Fingerprint

PREFIX = "kv"
HEAD = f"{PREFIX}/.hfbucket/fingerprints"
RECORD = f"{HEAD}/{encode_name(MODEL)}.json"
CHUNK = 64

_numbers = itertools.count(1)


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
        for remote in self.remotes:
            what = f"all chunks of {self.name} in {remote.remote_url}"
            eventually(lambda at=remote: all(at.connection.exists_sync(key) for key in keys), timeout_secs, what)

    def close(self) -> None:
        """End the engine."""
        LMCacheEngineBuilder.destroy(self.name)


def prompt(seed: int, tokens: int) -> list[int]:
    """Token ids of a prompt that shares no prefix with another seed's."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 32_000, (tokens,), generator=generator).tolist()


class Fleet:
    """Engines on one bucket, each with an instance of its own name.

    Args:
        hub: The Hub of the tests.
        bucket: Its id.
        directory: Of the test.
        monkeypatch: To count what each engine does.
    """

    def __init__(self, hub: Any, bucket: str, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.hub = hub
        self.bucket = bucket
        self.tally = MemorySink()
        self._directory = directory
        self._engines: list[CpuEngine] = []
        monkeypatch.setattr("hfbucket_plugin.engine.classic.default_sink", lambda: self.tally)

    def config(self, name: str, chunk_size: int = CHUNK, **values: Any) -> Path:
        """The YAML of an engine."""
        own = {"bucket_handle": f"hf://buckets/{self.bucket}/{PREFIX}", "endpoint": self.hub.endpoint, **OURS}
        own |= {"metadata_cache_ttl_secs": 0} | values
        document = {
            "chunk_size": chunk_size,
            "local_cpu": False,
            "save_unfull_chunk": False,
            "remote_serde": "naive",
            "max_local_cpu_size": 0.1,
            "remote_storage_plugins": [name],
            "extra_config": {f"remote_storage_plugin.{name}.{key}": value for key, value in own.items()},
        }
        path = self._directory / f"{name}.yaml"
        path.write_text(yaml.safe_dump(document))
        return path

    def engine(self, chunk_size: int = CHUNK, options: dict[str, Any] | None = None, **values: Any) -> Engine:
        """A real engine."""
        name = f"hfbucket.e{next(_numbers)}"
        shape = {"layers": 2, "hidden": 16, "model": MODEL} | (options or {})
        engine = CpuEngine(name, self.config(name, chunk_size, **values), **shape)
        self._engines.append(engine)
        return Engine(engine, name, self.tally)

    def close(self) -> None:
        """End the engines."""
        for engine in self._engines:
            engine.close()

    def paths(self) -> list[str]:
        """All objects of the bucket."""
        return all_paths(self.hub.endpoint, self.bucket)

    def chunks(self) -> list[str]:
        """Those of chunks."""
        return [path for path in self.paths() if "/.hfbucket/" not in path]

    def record(self) -> Record | None:
        """What is recorded."""
        if RECORD not in self.paths():
            return None
        return Record.from_json(download(self.hub.endpoint, self.bucket, RECORD), MODEL, RECORD)

    def recorded(self) -> Record:
        """What is recorded, when it is there."""
        record: Record = eventually(self.record)
        return record

    def claims(self) -> list[Fingerprint]:
        """The claims beside it."""
        own = [path for path in self.paths() if path.startswith(RECORD.removesuffix(".json") + "/")]
        return [FingerprintClaim.from_json(download(self.hub.endpoint, self.bucket, path), path) for path in own]


class Engine:
    """A real engine, and what is counted of its instance."""

    def __init__(self, engine: CpuEngine, name: str, tally: MemorySink) -> None:
        self.engine = engine
        self.name = name
        self._tally = tally

    def state(self) -> str:
        """Of its fingerprint."""
        found = [
            state
            for state in ("unknown", "unrecorded", "agrees", "conflict", "unreadable")
            if self._tally.get(FINGERPRINT_STATE, instance=self.name, state=state)
        ]
        return found[0] if found else "none"

    def becomes(self, state: str) -> None:
        """Wait until its fingerprint is in a state."""
        eventually(lambda: self.state() == state)

    def outcome(self, operation: str, outcome: str) -> float:
        """Chunks of an operation that ended in some way."""
        return self._tally.get(CHUNKS, instance=self.name, operation=operation, outcome=outcome)

    def conflicts(self, field: str) -> float:
        """Times that a field was found to differ."""
        return self._tally.get(FINGERPRINT_CONFLICTS, instance=self.name, field=field)

    def store(self, seed: int, chunks: int = 2, *, wait: bool = True) -> Any:
        """Store a prompt of some chunks, and return its KV."""
        tokens = self.tokens(seed, chunks)
        kv = self.engine.random_kv(len(tokens), seed)
        self.engine.store(tokens, kv)
        if wait:
            self.engine.wait_written(tokens)
        self.engine.forget_local()
        return kv

    def lookup(self, seed: int, chunks: int = 2) -> int:
        """Chunks of a prompt that are found."""
        return self.engine.lookup(self.tokens(seed, chunks)) // self.engine.config.chunk_size

    def retrieve(self, seed: int, chunks: int = 2) -> tuple[int, Any]:
        """Chunks of a prompt that are retrieved, and the KV."""
        self.engine.forget_local()
        hit, kv = self.engine.retrieve(self.tokens(seed, chunks))
        return hit // self.engine.config.chunk_size, kv

    def tokens(self, seed: int, chunks: int) -> list[int]:
        """A prompt."""
        return prompt(seed, chunks * self.engine.config.chunk_size)
