"""What tests of both engine surfaces share, beside the surfaces themselves (`dev.faults.classic`, `dev.faults.mp`)."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from dev.faults import mp
from dev.faults.classic import Classic
from hfbucket_plugin.core.keys import encode_name
from tests.support.plugin_support import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pytest
    from lmcache.v1.memory_management import MemoryObj

    from dev.faults.mp import MP
    from hfbucket_plugin.store.chunk_store import ChunkStore

PREFIX = "fleet/v1"
PATTERN = b"\x5a"

_fresh = itertools.count(1_000_000)


def path_of(surface: Classic | MP, number: int) -> str:
    """Where a chunk lies in the bucket."""
    return f"{PREFIX}/{encode_name(surface.name(number))}"


def fresh(count: int) -> list[int]:
    """Chunks that no other test has uploaded: what the store has already is not uploaded again."""
    return list(itertools.islice(_fresh, count))


def store_of(surface: Classic | MP) -> ChunkStore:
    """What is below a surface."""
    bucket_client = surface.remote.connection._connector if isinstance(surface, Classic) else surface.adapter
    store: ChunkStore = bucket_client._store
    return store


def close_door(surface: Classic | MP) -> None:
    """Close what is ours of a surface; the memory around it lives on."""
    if isinstance(surface, Classic):
        surface.remote.close()
    else:
        surface.adapter.close()


class EngineMemory:
    """The memory of surfaces, of which an engine uses at once whatever it was given back.

    Args:
        monkeypatch: To see the buffers of MP mode, which are the controllers'.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._buffers: list[MemoryObj] = []
        self._whole: dict[Classic, int] = {}
        self._taken: list[MemoryObj] = []
        self._make = mp._memory
        monkeypatch.setattr("dev.faults.mp._memory", self.buffer)

    def buffer(self, data: bytes) -> MemoryObj:
        """One of MP mode's, of these bytes."""
        self._buffers.append(self._make(data))
        return self._buffers[-1]

    def watch(self, surface: Classic | MP) -> None:
        """Note how much of it there is, while nothing is lent."""
        if isinstance(surface, Classic):
            self._whole[surface] = surface.free_chunks()

    def scribble(self, surface: Classic | MP) -> None:
        """Take back all memory that calls worked on and that is the engine's again, and write something else into it."""
        if isinstance(surface, Classic):
            eventually(lambda: surface.free_chunks() == self._whole[surface])
            self._taken += _all_of(surface)
        views = self._views(surface)
        assert views
        for view in views:
            view[:] = PATTERN * len(view)

    def untouched(self, surface: Classic | MP) -> bool:
        """Whether nobody has written into it since."""
        return all(view == PATTERN * len(view) for view in self._views(surface))

    def _views(self, surface: Classic | MP) -> list[memoryview]:
        objects = self._taken if isinstance(surface, Classic) else self._buffers
        return [memory_obj.byte_array.cast("B") for memory_obj in objects]

    def settle(self, surface: Classic | MP) -> None:
        """Wait until nothing is lent any more, and check that all was given back once."""
        while self._taken:
            self._taken.pop().ref_count_down()
        if isinstance(surface, Classic):  # more than at first would be a chunk that was given back twice
            eventually(lambda: surface.free_chunks() == self._whole[surface])
        else:
            assert {memory_obj.get_ref_count() for memory_obj in self._buffers} <= {1}, (
                "references are the server's own"
            )


def _all_of(surface: Classic) -> Iterator[MemoryObj]:
    shapes, dtypes = surface._metadata.get_shapes(), surface._metadata.get_dtypes()
    while (memory_obj := surface.memory.allocate(shapes, dtypes, busy_loop=False)) is not None:
        yield memory_obj
