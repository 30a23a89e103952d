"""Engines whose fingerprints meet in one bucket."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import yaml

from dev.demo.engine import CpuEngine, prompt
from hfbucket_plugin.core.keys import encode_name
from hfbucket_plugin.core.telemetry import CHUNKS, FINGERPRINT_CONFLICTS, FINGERPRINT_STATE, MemorySink
from hfbucket_plugin.fingerprint.model import FingerprintClaim, Record
from tests.support.plugin_rig import OURS
from tests.support.plugin_support import all_paths, download, eventually

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

    from hfbucket_plugin.fingerprint.model import Fingerprint

MODEL = "org/model"
PREFIX = "kv"
HEAD = f"{PREFIX}/.hfbucket/fingerprints"
RECORD = f"{HEAD}/{encode_name(MODEL)}.json"
CHUNK = 64

_numbers = itertools.count(1)


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
