"""LMCache memory objects as buffers and sources of `hfbucket_plugin.store.chunk_store`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hfbucket_plugin.core.buffers import KEPT, RevocableBuffer

if TYPE_CHECKING:
    from lmcache.v1.memory_management import MemoryObj

    from hfbucket_plugin.core.buffers import Memory


def bytes_of(memory_obj: MemoryObj) -> memoryview:
    """Return the logical bytes of a memory object, without allocation padding, in format ``B``."""
    view: memoryview = memory_obj.byte_array
    return view.cast("B")  # ctypes gives "<B", which does not support assignment


class TargetMemory:
    """Memory object that a chunk is read into; holds one reference until it is released or handed to the engine."""

    def __init__(self, memory_obj: MemoryObj) -> None:
        self.memory_obj = memory_obj
        self.view = bytes_of(memory_obj)
        self.lease = RevocableBuffer(self.view)

    def release(self) -> None:
        """Drop the reference, which returns the memory to the allocator."""
        self.memory_obj.ref_count_down()


class SourceMemory:
    """Memory object that a chunk is stored from; holds its own reference until it is released.

    The engine's wrapper drops its reference when the put returns, while a thread that was abandoned at the deadline
    may still be reading.
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
    """Memory object of `lmcache server`, which has no reference counts here and reclaims the object when the task ends.

    The object is held until then, because its view is made of an address and keeps nothing alive. The server may free
    the memory earlier, when it aborts a request or force-clears its cache; `memory` says whether it has.
    """

    def __init__(self, key: str, memory_obj: MemoryObj) -> None:
        self.key = key
        self.memory: Memory = memory_obj if hasattr(memory_obj, "valid") else KEPT
        self.view = bytes_of(memory_obj)
        self.lease = RevocableBuffer(self.view, self.memory)

    def release(self) -> None:
        """Do nothing: leases ensure that nothing accesses the memory any more."""
