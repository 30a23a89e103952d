"""The two engine surfaces, driven as LMCache drives them, behind one protocol: what holds for one holds for the other.

Chunks are numbered, and their contents are plain bytes; what a key, a buffer or a reference is remains a surface's own.
"""

from __future__ import annotations

import contextlib
import select
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Protocol

import torch
from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
from lmcache.v1.memory_management import MemoryFormat, MemoryObjMetadata, TensorMemoryObj
from lmcache.v1.platform import consume_fd, create_event_notifier
from plugin_rig import key
from plugin_support import eventually

from hfbucket_plugin.errors import PartialFailureError
from hfbucket_plugin.keys import encode_name
from hfbucket_plugin.l2_keys import key_string
from hfbucket_plugin.metrics import CHUNKS, Tally

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lmcache.lmcache_native import Bitmap
    from lmcache.v1.distributed.api import KeyEntry
    from lmcache.v1.distributed.l2_adapters.base import L2AdapterInterface
    from lmcache.v1.memory_management import MemoryObj
    from plugin_rig import Rig

WAIT_SECS = 60.0
"""Longest that a test waits for what has a deadline of its own."""


class Surface(Protocol):
    """An engine's way to one instance.

    Attributes:
        size: Bytes of a full chunk.
        prefix: Of the instance in its bucket.
    """

    size: int
    prefix: str

    def name(self, number: int) -> str:
        """The key string of a chunk."""

    def put(self, chunks: Sequence[tuple[int, bytes]]) -> bool:
        """Store chunks in one call; whether the surface says that all of them are there now."""

    def found(self, numbers: Sequence[int]) -> list[bool]:
        """Which chunks a lookup finds, whatever stands before them."""

    def hits(self, numbers: Sequence[int]) -> int:
        """How many chunks one lookup finds, from the first on without a gap."""

    def get(self, numbers: Sequence[int]) -> list[bytes | None]:
        """Load chunks in one call, into memory that held other bytes before."""

    def delete(self, numbers: Sequence[int]) -> None:
        """Delete chunks."""

    def listed(self) -> list[str]:
        """The key strings of what the instance holds, sorted."""

    def take_back(self) -> list[memoryview]:
        """All memory that the calls so far worked on and that is the engine's again, for it to use as it likes."""

    def settle(self) -> None:
        """Wait until nothing is under way, and check that every buffer was given back exactly once."""

    def count(self, operation: str, outcome: str) -> float:
        """How many chunks ended so."""

    def close(self) -> None:
        """End it. Calls after that are allowed, and once more is fine."""


def object_path(surface: Surface, number: int) -> str:
    """Where a chunk lies in the bucket."""
    return f"{surface.prefix}/{encode_name(surface.name(number))}"


# --- the classic engine ---------------------------------------------------------------------------------------------------


class ClassicSurface:
    """LMCache's `RemoteBackend` around a connector.

    Args:
        rig: With its memory and event loop.
        prefix: Of the instance.
    """

    def __init__(self, rig: Rig, prefix: str) -> None:
        self.rig = rig
        self.prefix = prefix
        shapes, dtypes = rig.metadata.get_shapes(), rig.metadata.get_dtypes()
        self.size = sum(shape.numel() * dtype.itemsize for shape, dtype in zip(shapes, dtypes, strict=True))
        self._whole = rig.free()
        self._kept: list[MemoryObj] = []
        self._connector = rig.remote.connection

    def name(self, number: int) -> str:
        return str(key(number).to_string())

    def put(self, chunks: Sequence[tuple[int, bytes]]) -> bool:
        memory_objs = [self._filled(content) for _, content in chunks]
        keys = [key(number) for number, _ in chunks]
        try:
            # The connector itself, since LMCache's wrapper swallows what it raises; else as the wrapper does.
            self.rig.run(self._connector.getWrappedConnector().batched_put(keys, memory_objs))
        except PartialFailureError:
            return False
        finally:
            for memory_obj in memory_objs:
                memory_obj.ref_count_down()
        return True

    def _filled(self, content: bytes) -> MemoryObj:
        memory_obj = self.rig.allocate()
        assert memory_obj is not None
        memory_obj.byte_array.cast("B")[:] = content
        return memory_obj

    def found(self, numbers: Sequence[int]) -> list[bool]:
        return [self.rig.remote.contains(key(number)) for number in numbers]

    def hits(self, numbers: Sequence[int]) -> int:
        hits: int = self.rig.remote.batched_contains([key(number) for number in numbers])
        return hits

    def get(self, numbers: Sequence[int]) -> list[bytes | None]:
        contents: list[bytes | None] = []
        for memory_obj in self.rig.remote.batched_get_blocking([key(number) for number in numbers]):
            contents.append(None if memory_obj is None else bytes(memory_obj.byte_array))
            if memory_obj is not None:
                assert memory_obj.get_ref_count() == 1, "nobody else holds what was got"
                memory_obj.ref_count_down()
        return contents

    def delete(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            self.rig.remote.remove(key(number))

    def listed(self) -> list[str]:
        return sorted(self.rig.run(self._connector.list()))

    def take_back(self) -> list[memoryview]:
        eventually(lambda: self.rig.free() == self._whole)
        while (memory_obj := self.rig.allocate()) is not None:
            self._kept.append(memory_obj)
        return [memory_obj.byte_array.cast("B") for memory_obj in self._kept]

    def settle(self) -> None:
        while self._kept:
            self._kept.pop().ref_count_down()
        # More free than at first would be one that was given back twice.
        eventually(lambda: self.rig.free() == self._whole)

    def count(self, operation: str, outcome: str) -> float:
        return self.rig.count(operation, outcome)

    def close(self) -> None:
        self.rig.run(self._connector.close())

    def end(self) -> None:
        """Close what is around the connector too."""
        self.settle()
        self.rig.close()


# --- MP mode --------------------------------------------------------------------------------------------------------------


def mp_key(number: int, salt: str = "", model: str = "org/model", group: int = 0) -> ObjectKey:
    """A key of MP mode."""
    return ObjectKey(number.to_bytes(8, "big"), model, 0x01000000, group, salt)


def mp_memory(content: bytes) -> TensorMemoryObj:
    """A memory object of the server's own, of exactly these bytes."""
    data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    metadata = MemoryObjMetadata(
        shape=torch.Size([len(content)]),
        dtype=torch.uint8,
        address=data.data_ptr(),
        phy_size=len(content),
        fmt=MemoryFormat.KV_2LTD,
        ref_count=1,
    )
    return TensorMemoryObj(data, metadata, parent_allocator=None)


def layout(size: int) -> MemoryLayoutDesc:
    """The layout of an object of so many bytes."""
    return MemoryLayoutDesc([torch.Size([size])], [torch.uint8])


class Controller:
    """What LMCache's store and prefetch controllers do with an adapter: submit, poll its descriptors, fetch results.

    Args:
        adapter: Ours, or any other.
    """

    def __init__(self, adapter: L2AdapterInterface) -> None:
        self.adapter = adapter
        self._lock = threading.Lock()
        self._waiting: dict[tuple[str, int], Future[Any]] = {}
        self._early: dict[int, Any] = {}
        self._stop = create_event_notifier()
        self._fds = {
            adapter.get_store_event_fd(): "store",
            adapter.get_lookup_and_lock_event_fd(): "lookup",
            adapter.get_load_event_fd(): "load",
        }
        self._thread = threading.Thread(target=self._poll, name="controller", daemon=True)
        self._thread.start()

    def _poll(self) -> None:
        poller = select.poll()
        for fd in [*self._fds, self._stop.fileno()]:
            poller.register(fd, select.POLLIN)
        while True:
            for fd, _ in poller.poll():
                if fd == self._stop.fileno():
                    return
                consume_fd(fd)
                self._fetch(self._fds[fd])

    def _fetch(self, kind: str) -> None:
        with self._lock:
            if kind == "store":
                for task, result in self.adapter.pop_completed_store_tasks().items():
                    future = self._waiting.pop((kind, task), None)
                    if future is None:  # it ended before its number was known here
                        self._early[task] = result
                    else:
                        future.set_result(result)
                return
            query = {
                "lookup": self.adapter.query_lookup_and_lock_result,
                "load": self.adapter.query_load_result,
            }[kind]
            for what, task in [one for one in self._waiting if one[0] == kind]:
                if (result := query(task)) is not None:
                    self._waiting.pop((what, task)).set_result(result)

    def submit(self, kind: str, function: Callable[..., int], *args: Any) -> Future[Any]:
        """Submit a task; its result comes once."""
        future: Future[Any] = Future()
        with self._lock:  # so that the poller cannot look for its result before it is known
            task = function(*args)
            if task in self._early and kind == "store":
                future.set_result(self._early.pop(task))
            else:
                self._waiting[kind, task] = future
        return future

    def store(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> Any:
        """Store, and wait for the result."""
        return self.submit("store", self.adapter.submit_store_task, keys, objects).result(WAIT_SECS)

    def lookup(self, keys: list[ObjectKey], layouts: dict[int, MemoryLayoutDesc]) -> list[bool]:
        """Look up and lock, and wait for the result."""
        task = self.submit("lookup", self.adapter.submit_lookup_and_lock_task, keys, layouts)
        return bits(task.result(WAIT_SECS), len(keys))

    def load(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> list[bool]:
        """Load, and wait for the result."""
        return bits(self.submit("load", self.adapter.submit_load_task, keys, objects).result(WAIT_SECS), len(keys))

    def stop(self) -> None:
        """Poll no more; LMCache does it before it closes an adapter. Whoever still waits is told that nothing was done."""
        self._stop.notify()
        self._thread.join()
        self._stop.close()
        with self._lock:
            waiting, self._waiting = self._waiting, {}
        for future in waiting.values():
            future.set_exception(GoneError)


class GoneError(RuntimeError):
    """The controller was stopped before the task had ended."""


def bits(bitmap: Bitmap, count: int) -> list[bool]:
    """A bitmap as booleans."""
    return [bitmap.test(index) for index in range(count)]


def all_pages(adapter: L2AdapterInterface, page_size: int, model: str | None = None) -> list[KeyEntry]:
    """Everything that an adapter lists, page by page."""
    entries: list[KeyEntry] = []
    cursor = None
    while True:
        page = adapter.list_l2_keys(model, page_size, cursor)
        assert len(page.entries) <= page_size
        entries += page.entries
        cursor = page.next_page_token
        if cursor is None:
            return entries


class MPSurface:
    """An L2 adapter under a controller of the tests.

    Args:
        adapter: Ours, or LMCache's built-in one.
        size: Bytes of a full chunk.
        prefix: Of the instance.
        tally: What the adapter counts with, if it is ours.
    """

    def __init__(self, adapter: L2AdapterInterface, size: int, prefix: str, tally: Tally | None = None) -> None:
        self.adapter = adapter
        self.size = size
        self.prefix = prefix
        self.tally = tally
        self.controller = Controller(adapter)
        self._memory: list[TensorMemoryObj] = []
        self._closed = False

    def name(self, number: int) -> str:
        return key_string(mp_key(number))

    def _filled(self, content: bytes) -> TensorMemoryObj:
        self._memory.append(mp_memory(content))
        return self._memory[-1]

    def put(self, chunks: Sequence[tuple[int, bytes]]) -> bool:
        keys = [mp_key(number) for number, _ in chunks]
        objects = [self._filled(content) for _, content in chunks]
        if self._closed:
            task = self.adapter.submit_store_task(keys, objects)
            return bool(self.adapter.pop_completed_store_tasks().get(task, -1) >= 0)
        try:
            return bool(self.controller.store(keys, objects).is_successful())
        except GoneError:
            return False

    def _lookup(self, numbers: Sequence[int]) -> list[bool]:
        keys = [mp_key(number) for number in numbers]
        layouts = {0: layout(self.size)}
        if self._closed:
            result = self.adapter.query_lookup_and_lock_result(self.adapter.submit_lookup_and_lock_task(keys, layouts))
            return [False] * len(keys) if result is None else bits(result, len(keys))
        hits = self.controller.lookup(keys, layouts)
        self.adapter.submit_unlock([one for one, hit in zip(keys, hits, strict=True) if hit])
        return hits

    def found(self, numbers: Sequence[int]) -> list[bool]:
        return self._lookup(numbers)

    def hits(self, numbers: Sequence[int]) -> int:
        found = self._lookup(numbers)
        return found.index(False) if False in found else len(found)

    def get(self, numbers: Sequence[int]) -> list[bytes | None]:
        keys = [mp_key(number) for number in numbers]
        objects = [self._filled(b"\xee" * self.size) for _ in numbers]
        if self._closed:
            result = self.adapter.query_load_result(self.adapter.submit_load_task(keys, objects))
            loaded = [False] * len(keys) if result is None else bits(result, len(keys))
        else:
            try:
                loaded = self.controller.load(keys, objects)
            except GoneError:
                loaded = [False] * len(keys)
        return [bytes(obj.byte_array) if there else None for obj, there in zip(objects, loaded, strict=True)]

    def delete(self, numbers: Sequence[int]) -> None:
        self.adapter.delete([mp_key(number) for number in numbers])

    def listed(self) -> list[str]:
        return sorted(key_string(entry.key.to_object_key()) for entry in all_pages(self.adapter, 2))

    def take_back(self) -> list[memoryview]:
        return [obj.byte_array.cast("B") for obj in self._memory]

    def settle(self) -> None:
        def quiet() -> bool:
            status = self.adapter.report_status()
            return not any(status["tasks"].values()) and not status["waiting_put_bytes"]

        eventually(quiet)
        assert {obj.get_ref_count() for obj in self._memory} <= {1}, "references are the server's own"
        self._memory.clear()

    def count(self, operation: str, outcome: str) -> float:
        assert self.tally is not None
        return self.tally.get(CHUNKS, operation=operation, outcome=outcome)

    def close(self) -> None:
        if not self._closed:
            self.controller.stop()
        self._closed = True
        self.adapter.close()

    def end(self) -> None:
        """As `close`; there is nothing around it."""
        with contextlib.suppress(KeyError):  # the built-in's status tells no tasks
            self.settle()
        self.close()
