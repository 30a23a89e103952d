"""The MP surface: our L2 adapter, driven as LMCache's controllers do: submit, poll the event's descriptor, query."""

from __future__ import annotations

import select
import threading
import time
from typing import TYPE_CHECKING, Any, Final

import torch
from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.internal_api import L2AdapterListener
from lmcache.v1.memory_management import MemoryFormat, MemoryObjMetadata, TensorMemoryObj
from lmcache.v1.platform import consume_fd

from dev.faults.surface import CHUNK_BYTES, MODEL, Limits, content
from hfbucket_plugin.engine.mp import HFBucketL2Adapter, HFBucketL2AdapterConfig
from hfbucket_plugin.engine.mp_tasks import key_string

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

_DELETE_SECS: Final = 10.0
_LIST_SECS: Final = 30.0
_PATIENCE_SECS: Final = 120.0
_POLL_SECS: Final = 0.05
"""Longest wait for an event: with several threads another one may have consumed it."""

_SHAPE: Final = torch.Size([CHUNK_BYTES // 2])
_LAYOUTS: Final = {0: MemoryLayoutDesc([_SHAPE], [torch.bfloat16])}


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
        keys = [_key(number) for number in numbers]
        task = self.adapter.submit_lookup_and_lock_task(keys, _LAYOUTS)
        bitmap = _await(
            self.adapter.get_lookup_and_lock_event_fd(), lambda: self.adapter.query_lookup_and_lock_result(task)
        )
        return [bool(bitmap.test(index)) for index in range(len(keys))]

    def _unlock(self, numbers: Sequence[int], hits: Sequence[bool]) -> None:
        self.adapter.submit_unlock([_key(number) for number, hit in zip(numbers, hits, strict=True) if hit])

    def get(self, numbers: Sequence[int]) -> list[bytes | None]:
        """Load, alone, into buffers that held something else before."""
        keys = [_key(number) for number in numbers]
        objects = [_memory(b"\xa5" * CHUNK_BYTES) for _ in numbers]
        self.adapter._tasks.lock(keys)  # noqa: SLF001 - locked, as all that LMCache loads is, without a lookup of its own
        task = self.adapter.submit_load_task(keys, objects)
        bitmap = _await(self.adapter.get_load_event_fd(), lambda: self.adapter.query_load_result(task))
        self.adapter.submit_unlock(keys)
        return [bytes(obj.byte_array.cast("B")) if bitmap.test(index) else None for index, obj in enumerate(objects)]

    def put(self, numbers: Sequence[int]) -> bool | None:
        """Store; the result says whether all are."""
        objects = [_memory(content(number)) for number in numbers]
        task = self.adapter.submit_store_task([_key(number) for number in numbers], objects)
        result = _await(self.adapter.get_store_event_fd(), lambda: self._stored(task))
        return bool(result.is_successful())

    def _stored(self, task: int) -> Any:
        with self._lock:  # the adapter gives all results at once, for all waiters
            self._stores |= self.adapter.pop_completed_store_tasks()
            return self._stores.pop(task, None)

    def delete(self, numbers: Sequence[int]) -> bool | None:
        """Delete: LMCache is told of what is gone by its listener."""
        keys = [_key(number) for number in numbers]
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
        return key_string(_key(number))

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

    def close(self) -> None:
        """End it."""
        self.adapter.close()


def _await(descriptor: int, query: Callable[[], Any]) -> Any:
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


def _key(number: int) -> ObjectKey:
    return ObjectKey(chunk_hash=number.to_bytes(8, "big"), model_name=MODEL, kv_rank=0x01000100)


def _memory(data: bytes) -> TensorMemoryObj:
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
