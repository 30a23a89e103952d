"""What both engine surfaces look like to tests: five operations on numbered chunks, each told apart and timed alike.

`tests.support.lmcache_classic` and `tests.support.lmcache_mp` implement it.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Final, Protocol

import prometheus_client

from hfbucket_plugin.core import telemetry
from hfbucket_plugin.core.keys import encode_name
from tests.support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pytest
    from lmcache.v1.memory_management import MemoryObj

    from hfbucket_plugin.store.chunk_store import ChunkStore

LAYERS: Final = 2
HIDDEN: Final = 32
TOKENS: Final = 256
CHUNK_BYTES: Final = LAYERS * 2 * TOKENS * HIDDEN * 2
MODEL: Final = "faults/model"

PREFIX = "fleet/v1"
PATTERN = b"\x5a"

_fresh = itertools.count(1_000_000)


@dataclass(frozen=True)
class Limits:
    """The deadlines of the instance that is tried, in seconds: short, so that a run is."""

    lookup: float = 0.5
    get: float = 1.5
    put: float = 2.0


class Surface(Protocol):
    """One engine's client of one bucket instance."""

    instance: str
    deletes_at_once: int
    """Chunks that one delete may name."""
    lends_memory: bool
    """Whether buffers are from the surface's own memory, and not its caller's."""
    store: ChunkStore
    """What is below the surface."""

    def lookup(self, numbers: Sequence[int]) -> list[bool]:
        """Which chunks are there, as the engine is told."""

    def get(self, numbers: Sequence[int]) -> list[bytes | None]:
        """The bytes of chunks, None for a miss."""

    def retrieve(self, numbers: Sequence[int]) -> tuple[list[bool], list[bytes | None]]:
        """Look chunks up, as `lookup`, and get those that were found."""

    def put(self, numbers: Sequence[int]) -> bool | None:
        """Store chunks; whether all are stored, or None where the surface does not say."""

    def delete(self, numbers: Sequence[int]) -> bool | None:
        """Delete chunks; whether they are gone, or None where the surface does not say."""

    def list(self) -> list[str]:
        """The object names of all chunks."""

    def name(self, number: int) -> str:
        """The key string of a chunk."""

    def deadline(self, operation: str) -> float:
        """Most seconds that an operation may take."""

    def healthy(self) -> bool:
        """What LMCache's own check of this surface says."""

    def free_chunks(self) -> int:
        """For how many chunks the engine has memory now; 0 where it has none of its own."""

    def take_all(self) -> list[MemoryObj]:
        """All memory that is free now, for chunks."""

    def close_client(self) -> None:
        """Close what is ours; the memory around it lives on."""

    def close(self) -> None:
        """End it."""


@lru_cache(maxsize=4096)
def content(number: int) -> bytes:
    """What is in a chunk: bytes that nothing compresses, as real KV is."""
    return random.Random(number).randbytes(CHUNK_BYTES)


def counted(instance: str, name: str, operation: str) -> Counter[str]:
    """What the process's metrics say of an operation: outcome to number."""
    found: Counter[str] = Counter()
    for family in prometheus_client.REGISTRY.collect():
        if family.name + "_total" != name:
            continue
        for sample in family.samples:
            labels = sample.labels
            if sample.name == name and labels.get("instance") == instance and labels.get("operation") == operation:
                found[labels["outcome"]] += round(sample.value)
    return +found


def chunks_counted(instance: str, operation: str) -> Counter[str]:
    """Chunks of an operation, by what became of them."""
    return counted(instance, telemetry.CHUNKS, operation)


def operations_counted(instance: str, operation: str) -> Counter[str]:
    """Operations, by how they ended."""
    return counted(instance, telemetry.OPERATIONS, operation)


def path_of(surface: Surface, number: int) -> str:
    """Where a chunk lies in the bucket."""
    return f"{PREFIX}/{encode_name(surface.name(number))}"


def fresh(count: int) -> list[int]:
    """Chunks that no other test has uploaded: what the store has already is not uploaded again."""
    return list(itertools.islice(_fresh, count))


def store_of(surface: Surface) -> ChunkStore:
    """What is below a surface."""
    return surface.store


class EngineMemory:
    """The memory of surfaces, of which an engine uses at once whatever it was given back.

    Args:
        monkeypatch: To see the buffers of MP mode, which are the controllers'.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from tests.support import lmcache_mp  # which imports this module

        self._buffers: list[MemoryObj] = []
        self._whole: dict[Surface, int] = {}
        self._taken: list[MemoryObj] = []
        self._make = lmcache_mp.chunk_memory
        monkeypatch.setattr(lmcache_mp, "chunk_memory", self.buffer)

    def buffer(self, data: bytes) -> MemoryObj:
        """One of MP mode's, of these bytes."""
        self._buffers.append(self._make(data))
        return self._buffers[-1]

    def watch(self, surface: Surface) -> None:
        """Note how much of it there is, while nothing is lent."""
        if surface.lends_memory:
            self._whole[surface] = surface.free_chunks()

    def scribble(self, surface: Surface) -> None:
        """Take back all memory that calls worked on and that is the engine's again, and write something else into it."""
        if surface.lends_memory:
            eventually(lambda: surface.free_chunks() == self._whole[surface])
            self._taken += surface.take_all()
        views = self._views(surface)
        assert views
        for view in views:
            view[:] = PATTERN * len(view)

    def untouched(self, surface: Surface) -> bool:
        """Whether nobody has written into it since."""
        return all(view == PATTERN * len(view) for view in self._views(surface))

    def _views(self, surface: Surface) -> list[memoryview]:
        objects = self._taken if surface.lends_memory else self._buffers
        return [memory_obj.byte_array.cast("B") for memory_obj in objects]

    def settle(self, surface: Surface) -> None:
        """Wait until nothing is lent any more, and check that all was given back once."""
        while self._taken:
            self._taken.pop().ref_count_down()
        if surface.lends_memory:  # more than at first would be a chunk that was given back twice
            eventually(lambda: surface.free_chunks() == self._whole[surface])
        else:
            assert {memory_obj.get_ref_count() for memory_obj in self._buffers} <= {1}, (
                "references are the server's own"
            )
