"""Tasks of MP mode as LMCache's controllers submit them, on keys and objects of any kind."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any

import torch
from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.internal_api import L2AdapterListener
from lmcache.v1.memory_management import MemoryFormat, MemoryObjMetadata, TensorMemoryObj

from dev.faults.mp import _await
from hfbucket_plugin.core.keys import encode_name
from hfbucket_plugin.engine.mp_tasks import key_string
from tests.support.plugin_support import noise, paths

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from dev.faults.mp import MP

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
    return _await(mp.adapter.get_store_event_fd(), lambda: mp._stored(task))


def lookup(mp: MP, keys: Sequence[ObjectKey], layouts: dict[int, MemoryLayoutDesc] | None = None) -> list[bool]:
    """Look up and lock, and wait for the result."""
    task = mp.adapter.submit_lookup_and_lock_task(list(keys), {0: layout(SIZE)} if layouts is None else layouts)
    fd = mp.adapter.get_lookup_and_lock_event_fd()
    bitmap = _await(fd, lambda: mp.adapter.query_lookup_and_lock_result(task))
    return [bitmap.test(index) for index in range(len(keys))]


def load(mp: MP, keys: Sequence[ObjectKey], size: int = SIZE) -> list[bytes | None]:
    """Load into buffers that held something else, and wait for the result."""
    objects = [mp_memory(b"\xee" * size) for _ in keys]
    task = mp.adapter.submit_load_task(list(keys), objects)
    bitmap = _await(mp.adapter.get_load_event_fd(), lambda: mp.adapter.query_load_result(task))
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
