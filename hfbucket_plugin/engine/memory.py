"""LMCache's memory objects, as the buffers and sources of `hfbucket_plugin.store.chunk_store`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hfbucket_plugin.core.buffers import KEPT, RevocableBuffer

if TYPE_CHECKING:
    from lmcache.v1.memory_management import MemoryObj

    from hfbucket_plugin.core.buffers import Memory


def bytes_of(memory_obj: MemoryObj) -> memoryview:
    """The logical bytes of a memory object, without the padding of its allocation, as format ``B``."""
    view: memoryview = memory_obj.byte_array
    return view.cast("B")  # ctypes gives "<B", which cannot be assigned to


class TargetMemory:
    """A memory object that a chunk is read into; owns one reference until it is released or handed on."""

    def __init__(self, memory_obj: MemoryObj) -> None:
        self.memory_obj = memory_obj
        self.view = bytes_of(memory_obj)
        self.lease = RevocableBuffer(self.view)

    def release(self) -> None:
        """Drop the reference: the allocator takes the memory back."""
        self.memory_obj.ref_count_down()


class SourceMemory:
    """A memory object that a chunk is stored from; holds a reference of its own until it is released.

    The engine's wrapper drops its reference when the put returns, which may be while a thread that was abandoned at
    the deadline still reads.
    """

    def __init__(self, key: str, memory_obj: MemoryObj) -> None:
        self.key = key
        self._memory_obj = memory_obj
        memory_obj.ref_count_up()
        self.view = bytes_of(memory_obj)

    def release(self) -> None:
        """Drop the reference."""
        self._memory_obj.ref_count_down()


class BorrowedMemory:
    """A memory object of `lmcache server`'s, which counts no references for us: it is theirs again when the task ends.

    The object itself is held until then, since its view holds nothing: it is made of an address. The server may free its memory
    before the task ends, when it aborts a request or clears its cache by force: `memory` says whether it has.
    """

    def __init__(self, key: str, memory_obj: MemoryObj) -> None:
        self.key = key
        self.memory: Memory = memory_obj if hasattr(memory_obj, "valid") else KEPT
        self.view = bytes_of(memory_obj)
        self.lease = RevocableBuffer(self.view, self.memory)

    def release(self) -> None:
        """Nothing to do: leases see to it that nothing touches the memory any more."""
