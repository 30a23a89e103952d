"""MP mode: our L2 adapter, driven as LMCache's controllers do: submit, poll the event's descriptor, query; and its surface.

`MP` is the surface, on chunks of one size. Functions on an `MP` take keys and objects of any kind.
"""

from __future__ import annotations

import select
import threading
import time
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import pytest
import torch
from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.internal_api import L2AdapterListener
from lmcache.v1.memory_management import MemoryFormat, MemoryObjMetadata, TensorMemoryObj
from lmcache.v1.platform import consume_fd

from hfbucket_plugin.core.keys import encode_name
from hfbucket_plugin.engine.mp import HFBucketL2Adapter, HFBucketL2AdapterConfig
from hfbucket_plugin.engine.mp_tasks import key_string
from tests.support.buckets import noise, paths
from tests.support.surface import CHUNK_BYTES, MODEL, Limits, content

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from lmcache.v1.memory_management import MemoryObj

    from hfbucket_plugin.store.chunk_store import ChunkStore

_DELETE_SECS: Final = 10.0
_LIST_SECS: Final = 30.0
_PATIENCE_SECS: Final = 120.0
_POLL_SECS: Final = 0.05
"""Longest wait for an event: with several threads another one may have consumed it."""

_SHAPE: Final = torch.Size([CHUNK_BYTES // 2])
CHUNK_LAYOUTS: Final = {0: MemoryLayoutDesc([_SHAPE], [torch.bfloat16])}


class _Deletions(L2AdapterListener):  # type: ignore[misc]
    """Remembers for each thread what its deletes were told to be gone."""

    def __init__(self) -> None:
        self._own = threading.local()

    @property
    def keys(self) -> list[ObjectKey]:
        if not hasattr(self._own, "keys"):
            self._own.keys = []
        found: list[ObjectKey] = self._own.keys
        return found

    def on_l2_keys_stored(self, keys: list[ObjectKey], sizes: list[int]) -> None:
        pass

    def on_l2_keys_accessed(self, keys: list[ObjectKey]) -> None:
        pass

    def on_l2_keys_deleted(self, keys: list[ObjectKey]) -> None:
        self.keys.extend(keys)


class MP:
    """One L2 adapter; thread-safe.

    Args:
        instance: Its name.
        directory: For temporary files.
        handle: `hf://buckets/…`.
        endpoint: The Hub's address.
        limits: Its deadlines.
        **values: More settings of the instance.
    """

    deletes_at_once = 2
    lends_memory = False

    def __init__(
        self, instance: str, directory: Path, *, handle: str, endpoint: str, limits: Limits, **values: Any
    ) -> None:
        self.instance = instance
        self._limits = limits
        params = {
            "name": instance,
            "bucket_handle": handle,
            "endpoint": endpoint,
            "download_tmp_dir": str(directory / "tmp"),
            "lookup_timeout_secs": limits.lookup,
            "get_timeout_secs": limits.get,
            "put_timeout_secs": limits.put,
            "usage_refresh_secs": 0,
            "fingerprint": "off",  # faults are to meet the work, and counts to tell of it alone
        }
        self.adapter = HFBucketL2Adapter(HFBucketL2AdapterConfig.from_dict(params | values))
        self._deletions = _Deletions()
        self.adapter.register_listener(self._deletions)
        self._stores: dict[int, Any] = {}
        self._lock = threading.Lock()

    def lookup(self, numbers: Sequence[int]) -> list[bool]:
        """Look up and lock; what is locked is unlocked at once."""
        hits = self._lock_what_is_there(numbers)
        self._unlock(numbers, hits)
        return hits

    def retrieve(self, numbers: Sequence[int]) -> tuple[list[bool], list[bytes | None]]:
        """What a retrieve does: look up and lock, load what was found, unlock."""
        hits = self._lock_what_is_there(numbers)
        found = [number for number, hit in zip(numbers, hits, strict=True) if hit]
        try:
            return hits, self.get(found) if found else []
        finally:
            self._unlock(numbers, hits)

    def _lock_what_is_there(self, numbers: Sequence[int]) -> list[bool]:
        keys = [chunk_key(number) for number in numbers]
        task = self.adapter.submit_lookup_and_lock_task(keys, CHUNK_LAYOUTS)
        bitmap = await_result(
            self.adapter.get_lookup_and_lock_event_fd(), lambda: self.adapter.query_lookup_and_lock_result(task)
        )
        return [bool(bitmap.test(index)) for index in range(len(keys))]

    def _unlock(self, numbers: Sequence[int], hits: Sequence[bool]) -> None:
        self.adapter.submit_unlock([chunk_key(number) for number, hit in zip(numbers, hits, strict=True) if hit])

    def get(self, numbers: Sequence[int]) -> list[bytes | None]:
        """Load, alone, into buffers that held something else before."""
        keys = [chunk_key(number) for number in numbers]
        objects = [chunk_memory(b"\xa5" * CHUNK_BYTES) for _ in numbers]
        self.adapter._tasks.lock(keys)
        task = self.adapter.submit_load_task(keys, objects)
        bitmap = await_result(self.adapter.get_load_event_fd(), lambda: self.adapter.query_load_result(task))
        self.adapter.submit_unlock(keys)
        return [bytes(obj.byte_array.cast("B")) if bitmap.test(index) else None for index, obj in enumerate(objects)]

    def put(self, numbers: Sequence[int]) -> bool | None:
        """Store; the result says whether all are."""
        objects = [chunk_memory(content(number)) for number in numbers]
        task = self.adapter.submit_store_task([chunk_key(number) for number in numbers], objects)
        result = await_result(self.adapter.get_store_event_fd(), lambda: self._stored(task))
        return bool(result.is_successful())

    def _stored(self, task: int) -> Any:
        with self._lock:  # the adapter gives all results at once, for all waiters
            self._stores |= self.adapter.pop_completed_store_tasks()
            return self._stores.pop(task, None)

    def delete(self, numbers: Sequence[int]) -> bool | None:
        """Delete: LMCache is told of what is gone by its listener."""
        keys = [chunk_key(number) for number in numbers]
        self._deletions.keys.clear()
        self.adapter.delete(keys)
        return set(keys) <= set(self._deletions.keys)

    def list(self) -> list[str]:
        """All pages."""
        names: list[str] = []
        cursor = None
        while True:
            page = self.adapter.list_l2_keys(MODEL, 500, cursor)
            names += [key_string(entry.key.to_object_key()) for entry in page.entries]
            cursor = page.next_page_token
            if cursor is None:
                return names

    @staticmethod
    def name(number: int) -> str:
        """The key string of a chunk."""
        return key_string(chunk_key(number))

    def deadline(self, operation: str) -> float:
        """A delete is given 10 s: no engine waits for it."""
        limits = self._limits
        return {"lookup": limits.lookup, "get": limits.get, "put": limits.put, "delete": _DELETE_SECS}.get(
            operation, _LIST_SECS
        )

    def healthy(self) -> bool:
        """LMCache has no check of an L2 adapter that would disable anything."""
        return True

    def free_chunks(self) -> int:
        """Buffers are the controllers'."""
        return 0

    def take_all(self) -> list[MemoryObj]:
        """Nothing, for the same reason."""
        return []

    @property
    def store(self) -> ChunkStore:
        """What is below the adapter."""
        store: ChunkStore = self.adapter._store
        return store

    def close(self) -> None:
        """End it."""
        self.adapter.close()

    close_client = close


def await_result(descriptor: int, query: Callable[[], Any]) -> Any:
    """Wait for an event until there is a result, as a controller's loop does."""
    end = time.monotonic() + _PATIENCE_SECS
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    while (result := query()) is None:
        left = end - time.monotonic()
        if left <= 0:
            raise TimeoutError("the task never ended")
        if poller.poll(min(left, _POLL_SECS) * 1000):
            consume_fd(descriptor)
    return result


def chunk_key(number: int) -> ObjectKey:
    """The key of a numbered chunk of the surface."""
    return ObjectKey(chunk_hash=number.to_bytes(8, "big"), model_name=MODEL, kv_rank=0x01000100)


def chunk_memory(data: bytes) -> TensorMemoryObj:
    """A buffer for a chunk of the surface, of these bytes."""
    raw = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    metadata = MemoryObjMetadata(
        shape=_SHAPE,
        dtype=torch.bfloat16,
        address=0,
        phy_size=len(data),
        ref_count=1,
        fmt=MemoryFormat.KV_2LTD,
        shapes=[_SHAPE],
        dtypes=[torch.bfloat16],
    )
    return TensorMemoryObj(raw, metadata, None)


SIZE = 4096
GIB = 1024**3


def mp_key(number: int, salt: str = "", model: str = "org/model", group: int = 0) -> ObjectKey:
    """A key of MP mode."""
    return ObjectKey(number.to_bytes(8, "big"), model, 0x01000000, group, salt)


def mp_memory(content: bytes) -> TensorMemoryObj:
    """A memory object of the server's own, of exactly these bytes."""
    data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    shape = torch.Size([len(content)])
    metadata = MemoryObjMetadata(
        shape=shape,
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


def content_of(key: ObjectKey, size: int = SIZE) -> bytes:
    """What `put` stores."""
    return noise(size, zlib.crc32(key_string(key).encode()))


def path_of(key: ObjectKey, prefix: str = "v1") -> str:
    """Where an object lies in the bucket."""
    return f"{prefix}/{encode_name(key_string(key))}"


def there(hub: Any, bucket: str, keys: Iterable[ObjectKey]) -> list[ObjectKey]:
    """Those of some keys that the bucket holds."""
    held = set(paths(hub.endpoint, bucket))
    return [key for key in keys if path_of(key) in held]


def put(mp: MP, keys: Sequence[ObjectKey], size: int = SIZE) -> Any:
    """Store, and wait for the result."""
    task = mp.adapter.submit_store_task(list(keys), [mp_memory(content_of(key, size)) for key in keys])
    return await_result(mp.adapter.get_store_event_fd(), lambda: mp._stored(task))


def lookup(mp: MP, keys: Sequence[ObjectKey], layouts: dict[int, MemoryLayoutDesc] | None = None) -> list[bool]:
    """Look up and lock, and wait for the result."""
    task = mp.adapter.submit_lookup_and_lock_task(list(keys), {0: layout(SIZE)} if layouts is None else layouts)
    fd = mp.adapter.get_lookup_and_lock_event_fd()
    bitmap = await_result(fd, lambda: mp.adapter.query_lookup_and_lock_result(task))
    return [bitmap.test(index) for index in range(len(keys))]


def load(mp: MP, keys: Sequence[ObjectKey], size: int = SIZE) -> list[bytes | None]:
    """Load into buffers that held something else, and wait for the result."""
    objects = [mp_memory(b"\xee" * size) for _ in keys]
    task = mp.adapter.submit_load_task(list(keys), objects)
    bitmap = await_result(mp.adapter.get_load_event_fd(), lambda: mp.adapter.query_load_result(task))
    return [bytes(obj.byte_array) if bitmap.test(index) else None for index, obj in enumerate(objects)]


def used(mp: MP) -> int:
    """Bytes that the instance is said to hold."""
    amount: int = mp.adapter.get_usage().total_bytes_used
    return amount


class Listener(L2AdapterListener):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.stored: list[tuple[ObjectKey, int]] = []
        self.accessed: list[ObjectKey] = []
        self.deleted: list[ObjectKey] = []

    def on_l2_keys_stored(self, keys: list[ObjectKey], sizes: list[int]) -> None:
        self.stored += zip(keys, sizes, strict=True)

    def on_l2_keys_accessed(self, keys: list[ObjectKey]) -> None:
        self.accessed += keys

    def on_l2_keys_deleted(self, keys: list[ObjectKey]) -> None:
        self.deleted += keys


_MODULE = "hfbucket_plugin.l2_adapter"


@dataclass(frozen=True)
class Place:
    """Where an adapter keeps its objects."""

    endpoint: str
    bucket_id: str
    prefix: str = "kv/mp"

    @property
    def handle(self) -> str:
        return f"hf://buckets/{self.bucket_id}/{self.prefix}"


def built_in(place: Place) -> dict[str, Any]:
    """LMCache's own; its endpoint is `HF_ENDPOINT`."""
    return {"type": "hfbucket", "bucket_handle": place.handle}


def ours(place: Place) -> dict[str, Any]:
    """This package's; it believes nothing for longer than a question, so that deletes are seen at once."""
    return {
        "type": "plugin",
        "module_path": _MODULE,
        "class_name": "HFBucketL2Adapter",
        "adapter_params": {"bucket_handle": place.handle, "endpoint": place.endpoint, "metadata_cache_ttl_secs": 0},
    }


def indexed(place: Place) -> dict[str, Any]:
    """The same, with a key index."""
    adapter = ours(place)
    return adapter | {"adapter_params": adapter["adapter_params"] | {"index": "snapshot", "fingerprint": "off"}}


EVERY_ADAPTER = [
    pytest.param(built_in, id="built-in"),
    pytest.param(ours, id="ours"),
]
