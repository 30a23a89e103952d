"""What both surfaces look like to a trial: five operations on numbered chunks, each told apart and timed alike."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Final, Protocol

import prometheus_client

from hfbucket_plugin.core import telemetry

if TYPE_CHECKING:
    from collections.abc import Sequence

LAYERS: Final = 2
HIDDEN: Final = 32
TOKENS: Final = 256
CHUNK_BYTES: Final = LAYERS * 2 * TOKENS * HIDDEN * 2
MODEL: Final = "faults/model"


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
