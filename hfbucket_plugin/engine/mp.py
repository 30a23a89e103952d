"""L2 adapter over `ChunkStore` for LMCache's MP mode (`lmcache server`).

    lmcache server … --l2-adapter '{"type": "plugin", "module_path": "hfbucket_plugin.l2_adapter",
        "class_name": "HFBucketL2Adapter", "adapter_params": {"bucket_handle": "hf://buckets/my-org/lmcache-kv/prod"}}'

LMCache's controllers submit tasks and poll event descriptors. Every task ends by its deadline with what was done so
far. LMCache owns the buffers: after a task is reported as ended, or the adapter is closed, nothing accesses them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from lmcache.lmcache_native import Bitmap
from lmcache.v1.distributed.eviction_policy.isolated_lru import IsolatedLRUEvictionPolicy
from lmcache.v1.distributed.eviction_policy.lru import LRUEvictionPolicy
from lmcache.v1.distributed.internal_api import L2StoreResult
from lmcache.v1.distributed.l2_adapters.base import AdapterUsage, L2AdapterInterface
from lmcache.v1.distributed.l2_adapters.config import L2AdapterConfigBase

from hfbucket_plugin.config import l2
from hfbucket_plugin.core.concurrency import WorkerPool
from hfbucket_plugin.core.deadline import Deadline
from hfbucket_plugin.core.keys import encode_name
from hfbucket_plugin.core.telemetry import default_sink
from hfbucket_plugin.engine.memory import BorrowedMemory
from hfbucket_plugin.engine.mp_tasks import KINDS, TaskTable, key_string, layout_bytes, object_key
from hfbucket_plugin.engine.mp_usage import Usage, UsageListing, list_page
from hfbucket_plugin.errors import HFBucketError
from hfbucket_plugin.fingerprint.watch import FingerprintWatch
from hfbucket_plugin.fingerprint.watch_mp import L2Fingerprints
from hfbucket_plugin.hub.bucket import MAX_BATCH
from hfbucket_plugin.store.chunk_store import ChunkStore

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from concurrent.futures import Future

    from lmcache.v1.distributed.api import KeyListPage, MemoryLayoutDesc, ObjectKey
    from lmcache.v1.distributed.internal_api import L2AdapterListener
    from lmcache.v1.memory_management import MemoryObj

    from hfbucket_plugin.config.l2 import L2Settings
    from hfbucket_plugin.core import telemetry
    from hfbucket_plugin.core.keys import ContentId
    from hfbucket_plugin.engine.mp_tasks import Task
    from hfbucket_plugin.store.write import PutReport

_log = logging.getLogger(__name__)

_LOOKUPS: Final = 16
_LOADS: Final = 32
"""Maximum number of concurrent lookups, and of concurrent loads; each holds a thread. They have separate threads, so
that lookups do not wait for loads that hang."""

_BACKLOG: Final = 1024
"""Maximum number of tasks that wait for a thread, each up to its own deadline; a further task is a miss at once."""

_DELETE_SECS: Final = 10.0
_GIB: Final = 1024**3


class HFBucketL2AdapterConfig(L2AdapterConfigBase):
    """Parsed `adapter_params`; LMCache finds this class by its name.

    Args:
        settings: Settings of the instance.
    """

    def __init__(self, settings: L2Settings) -> None:
        self.settings = settings

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> HFBucketL2AdapterConfig:
        """Parse `adapter_params`.

        Raises:
            ConfigError: A setting is missing, unknown or invalid. It is a ValueError, which stops the server.
        """
        return cls(l2.from_params(d))

    @classmethod
    def help(cls) -> str:
        """Return the settings, one per line."""
        fields = l2.L2Settings.model_fields.items()
        return "adapter_params:\n" + "\n".join(f"- {name}: {field.description}" for name, field in fields)


class HFBucketL2Adapter(L2AdapterInterface):
    """L2 store of `lmcache server` for one bucket instance.

    Args:
        config: Settings of the instance.
        l1_memory_desc: LMCache's own memory; unused.
        sink: Metrics sink for outcomes; by default the Prometheus registry that the server's `/metrics` shows.

    A wrong token, a missing bucket or an unreachable Hub never raise here, because the server would not start. They are
    logged, counted and reported by `report_status`.
    """

    def __init__(
        self, config: HFBucketL2AdapterConfig, l1_memory_desc: Any = None, *, sink: telemetry.Sink | None = None
    ) -> None:
        del l1_memory_desc
        settings = config.settings
        super().__init__(max_capacity_bytes=int(settings.max_capacity_gb * _GIB))
        self._settings = settings
        self._store = ChunkStore(settings, settings.name, sink or default_sink(), settings.load_timeout_secs)
        watch = FingerprintWatch(
            self._store.bucket, settings, settings.name, self._store.breakers, sink or default_sink()
        )
        self._fingerprints = L2Fingerprints(watch, settings)
        self._tasks = TaskTable()
        self._lookup_threads = WorkerPool(f"hfbucket-l2-lookup-{settings.name}", _LOOKUPS, _BACKLOG)
        self._load_threads = WorkerPool(f"hfbucket-l2-load-{settings.name}", _LOADS, _BACKLOG)
        for pool in (self._lookup_threads, self._load_threads):
            pool.prepare()
        self._lock = threading.Lock()
        self._closed = False
        self._usage = Usage(everybody=settings.max_capacity_gb > 0)
        self._usage_listing = UsageListing(
            self._store.bucket,
            self._usage,
            settings.usage_refresh_secs,
            None if settings.max_capacity_gb else settings.usage_max_pages,
            self._notify_listeners,
            by_itself=settings.max_capacity_gb > 0,
            corrected=self._forget_deleted,
        )
        self._store.on_answers(self._learn)
        self._store.begin()

    # --- events -----------------------------------------------------------------------------------------------------

    def get_store_event_fd(self) -> int:
        """Return the descriptor that is signalled when a store task ends."""
        return self._tasks.fd("store")

    def get_lookup_and_lock_event_fd(self) -> int:
        """Return the descriptor that is signalled when a lookup task ends."""
        return self._tasks.fd("lookup")

    def get_load_event_fd(self) -> int:
        """Return the descriptor that is signalled when a load task ends."""
        return self._tasks.fd("load")

    # --- store ------------------------------------------------------------------------------------------------------

    def submit_store_task(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> int:
        """Store objects within `put_timeout_secs`. An object that exists with the same size is not written again.

        Returns:
            The task's number.

        Raises:
            ValueError: The numbers of keys and of objects differ.
        """
        sources = [BorrowedMemory(key_string(key), obj) for key, obj in zip(keys, objects, strict=True)]
        names = {source.key: key for source, key in zip(sources, keys, strict=True)}
        sizes = {source.key: len(source.view) for source in sources}
        task = self._tasks.begin("store")
        if why := self._fingerprints.of_store(keys, objects):
            self._store.kept_out("put", len(keys), why)
            self._tasks.finish(task, L2StoreResult(False, 0))
            return task.id
        future = self._store.puts.submit(sources, None, Deadline.after(self._settings.put_timeout_secs))
        future.add_done_callback(lambda done: self._end_store(task, names, sizes, done))
        return task.id

    def _end_store(
        self, task: Task, names: Mapping[str, ObjectKey], sizes: Mapping[str, int], future: Future[PutReport]
    ) -> None:
        result = L2StoreResult(False, 0)
        try:
            if not future.cancelled() and future.exception() is None:
                report = future.result()
                stored = [names[key] for key in report.stored]
                amounts = [sizes[key] for key in report.stored]
                result = L2StoreResult(not report.failures, sum(amounts))
                if stored and not self._closed:
                    replaced = {self._path(key): size for key, size in report.replaced.items()}
                    entries = [(self._path(key), names[key].cache_salt, sizes[key]) for key in report.stored]
                    self._usage.wrote(entries, replaced)
                    self._notify(self._notify_keys_stored, stored, amounts)
        finally:
            self._tasks.finish(task, result)

    def _notify(self, notify: Callable[..., None], *args: Any) -> None:
        """Notify LMCache's listeners; an exception of a listener is ignored."""
        try:
            notify(*args)
        except Exception:  # noqa: BLE001 - LMCache's listener; the task must end all the same
            _log.exception("[%s] a listener failed", self._settings.name)

    def pop_completed_store_tasks(self) -> dict[int, L2StoreResult]:
        """Return the results of store tasks that ended since the last call."""
        return self._tasks.take_all("store")

    # --- lookup and lock --------------------------------------------------------------------------------------------

    def submit_lookup_and_lock_task(
        self, keys: list[ObjectKey], group_layout_descs: dict[int, MemoryLayoutDesc]
    ) -> int:
        """Look up objects with exactly the size of their group's layout, within `lookup_timeout_secs`."""
        task = self._tasks.begin("lookup")
        if why := self._fingerprints.of_lookup(keys, group_layout_descs):
            self._store.kept_out("lookup", len(keys), why)
            self._tasks.finish(task, Bitmap(len(keys)))
            return task.id
        sizes: dict[int, int | None] = {}
        if self._settings.object_sizes == "layout":
            sizes = {group: layout_bytes(layout) for group, layout in group_layout_descs.items()}
        deadline = Deadline.after(self._settings.lookup_timeout_secs)
        self._submit(self._lookup_threads, task, len(keys), self._lookup, task, list(keys), sizes, deadline)
        return task.id

    def _lookup(
        self, task: Task, keys: Sequence[ObjectKey], sizes: Mapping[int, int | None], deadline: Deadline
    ) -> Sequence[bool]:
        names = [key_string(key) for key in keys]
        hits = self._store.found(names, [sizes.get(key.object_group_id) for key in keys], deadline=deadline)
        found = [key for key, hit in zip(keys, hits, strict=True) if hit]
        if found:
            self._tasks.lock(found, task)
            self._notify(self._notify_keys_accessed, found)
        return hits

    def query_lookup_and_lock_result(self, task_id: int) -> Bitmap | None:
        """Return which objects were found and locked; None if the task is running or its result was already returned."""
        result: Bitmap | None = self._tasks.take("lookup", task_id)
        return result

    def submit_unlock(self, keys: list[ObjectKey]) -> None:
        """Release one lock of each object, loaded or not. A load that is given up stops writing; see `TaskTable.unlock`."""
        self._tasks.unlock(keys)

    # --- load -------------------------------------------------------------------------------------------------------

    def submit_load_task(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> int:
        """Load objects into buffers within `get_timeout_secs` (9 s by default).

        Returns:
            The task's number.

        Raises:
            ValueError: The numbers of keys and of objects differ.
        """
        buffers = [BorrowedMemory(key_string(key), obj) for key, obj in zip(keys, objects, strict=True)]
        if why := self._fingerprints.of_load(keys):
            task = self._tasks.begin("load")
            self._store.kept_out("get", len(keys), why)
            self._tasks.finish(task, Bitmap(len(keys)))
            return task.id
        deadline = Deadline.after(self._settings.load_timeout_secs)
        task = self._tasks.begin("load", keys, buffers)
        self._submit(self._load_threads, task, len(keys), self._load, buffers, deadline)
        return task.id

    def _load(self, buffers: Sequence[BorrowedMemory], deadline: Deadline) -> Sequence[bool]:
        names = [buffer.key for buffer in buffers]
        sizes = [buffer.lease.size for buffer in buffers]
        filled = self._store.read_many(names, sizes, buffers.__getitem__, deadline)
        return [buffer is not None for buffer in filled]

    def query_load_result(self, task_id: int) -> Bitmap | None:
        """Return which objects were loaded; None if the task is running or its result was already returned."""
        result: Bitmap | None = self._tasks.take("load", task_id)
        return result

    def _submit(
        self,
        pool: WorkerPool,
        task: Task,
        bits: int,
        function: Callable[..., Sequence[bool]],
        *args: Any,
    ) -> None:
        """Run a function in a pool and finish the task with its result for each key; an error makes all keys misses."""

        def run() -> None:
            bitmap = Bitmap(bits)
            try:
                for index, found in enumerate(function(*args)):
                    if found:
                        bitmap.set(index)
            except Exception:  # noqa: BLE001 - the polling side must get a result
                _log.exception("[%s] a task failed", self._settings.name)
                bitmap = Bitmap(bits)
            finally:
                self._tasks.finish(task, bitmap)

        try:
            pool.submit(run)
        except RuntimeError as error:
            _log.warning("[%s] not tried: %s", self._settings.name, error)
            self._tasks.finish(task, Bitmap(bits))

    # --- delete, list, usage ----------------------------------------------------------------------------------------

    def delete(self, keys: list[ObjectKey]) -> None:
        """Delete unlocked objects immediately and permanently; failures are logged and counted.

        Blocks the calling thread for at most 10 s. Never raises, because that would end LMCache's eviction thread.
        """
        try:
            self._delete(keys)
        except Exception:  # noqa: BLE001 - an exception would end LMCache's eviction thread
            _log.exception("[%s] %d objects were not all deleted", self._settings.name, len(keys))

    def _delete(self, keys: Sequence[ObjectKey]) -> None:
        free = self._tasks.free(keys)
        kept_out = {key: why for key in free if (why := self._fingerprints.of_load([key]))}
        for why, chunks in Counter(kept_out.values()).items():
            self._store.kept_out("delete", chunks, why)
        names = {key_string(key): key for key in free if key not in kept_out}
        if not names or self._closed or not self._settings.writes:
            return
        deadline = Deadline.after(_DELETE_SECS)
        texts = list(names)
        done = 0
        try:
            if not self._may_evict():
                return
            for start in range(
                0, len(texts), MAX_BATCH
            ):  # report each batch when done, because time may run out in between
                batch = {text: names[text] for text in texts[start : start + MAX_BATCH]}
                if not self._delete_batch(batch, deadline):
                    return
                done += len(batch)
        except HFBucketError as error:
            left = len(texts) - done
            _log.warning("[%s] %d of %d objects were not deleted: %s", self._settings.name, left, len(texts), error)

    def _may_evict(self) -> bool:
        """Return whether the account is believed correct; otherwise request a listing, and evict nothing before it.

        Raises:
            HFBucketError: The Hub did not report the number of files in the bucket.
        """
        if not self._usage_listing.settled:
            return False
        if not self._evicts_by_capacity() or not self._usage_listing.others_deleted():
            return True
        _log.info("[%s] others deleted objects: usage is listed again before more is evicted", self._settings.name)
        return not self._usage_listing.found_stale()

    def _evicts_by_capacity(self) -> bool:
        return bool(self._max_capacity_bytes) and any(map(_evicts_by_capacity, list(self._listeners)))

    def _delete_batch(self, names: Mapping[str, ObjectKey], deadline: Deadline) -> bool:
        """Delete the objects that exist, unless counted objects are missing, which means that the account is wrong.

        Returns:
            Whether more may be evicted.
        """
        held = self._store.look(list(names), deadline)
        gone = [name for name in names if name not in held]
        ghosts = self._usage.gone(map(self._path, gone))
        if gone:
            self._deleted([(names[name], ghosts.get(self._path(name), 0)) for name in gone])
        if ghosts:
            _log.info("[%s] %d objects that were counted had been deleted by others", self._settings.name, len(ghosts))
            if self._usage_listing.found_stale():
                return False
        too_new = [name for name, info in held.items() if self._usage_listing.too_new(info.uploaded_at)]
        if too_new and self._evicts_by_capacity():
            self._keep([names[name] for name in too_new])
            held = {name: info for name, info in held.items() if name not in set(too_new)}
        failures = self._store.delete(list(held), deadline) if held else {}
        done = {name: info.content.size for name, info in held.items() if name not in failures}
        self._usage.deleted({self._path(name): size for name, size in done.items()})
        if done:
            self._deleted([(names[name], size) for name, size in done.items()])
        return True

    def _deleted(self, objects: Sequence[tuple[ObjectKey, int]]) -> None:
        """Notify LMCache of deleted objects, with the bytes that were counted for each."""
        self._usage_listing.evicted(len(objects))
        self._credit(sum(size for _, size in objects))
        self._notify(self._notify_keys_deleted, [key for key, _ in objects], [size for _, size in objects])

    def _keep(self, keys: list[ObjectKey]) -> None:
        """Make LMCache offer other keys, because these are newer than objects that have not been reported to it."""
        for listener in list(self._listeners):
            if _evicts_by_capacity(listener):
                self._notify(listener.on_l2_keys_accessed, keys)

    def _credit(self, amount: int) -> None:
        """Raise the base class's account, which counts only this process's writes, to cover deletes of other objects."""
        with self._usage_lock:
            self._total_bytes_used: int = max(self._total_bytes_used, amount)

    def _path(self, name: str) -> str:
        return self._store.bucket.handle.join(encode_name(name))

    def _learn(self, contents: Mapping[str, ContentId | None], asked: float) -> None:
        """Correct the usage account by an answer of the Hub, and notify LMCache of keys that are gone."""
        keys = {self._path(name): name for name in contents}
        sizes = {path: content.size if (content := contents[name]) else None for path, name in keys.items()}
        lost = [key for path in self._usage.learned(sizes, asked) if (key := object_key(keys[path])) is not None]
        if lost:
            self._deleted([(key, 0) for key in lost])

    def _forget_deleted(self) -> None:
        """Notify LMCache's policies of objects that a listing did not find, or they would evict others instead."""
        if not self._usage.exact:
            return
        for listener in list(self._listeners):
            policy = getattr(listener, "policy", None)
            if isinstance(policy, IsolatedLRUEvictionPolicy):
                salts: list[str | None] = list(policy.get_tracked_salts())
            elif isinstance(policy, LRUEvictionPolicy):
                salts = [None]
            else:  # asking ARC changes its state
                continue
            for salt in salts:
                for action in policy.get_eviction_actions(1.0, cache_salt=salt):
                    counted = self._usage.counts([self._path(key_string(key)) for key in action.keys])
                    gone = [key for key, is_counted in zip(action.keys, counted, strict=True) if not is_counted]
                    self._notify(listener.on_l2_keys_deleted, gone)

    def list_l2_keys(
        self, model_name: str | None = None, page_size: int = 500, cursor: str | None = None
    ) -> KeyListPage:
        """Return one page of the keys in the bucket, from all writers; see `list_page`."""
        with self._store.listing():
            return list_page(self._store.bucket, model_name, page_size, cursor)

    def get_usage(self) -> AdapterUsage:
        """Return the usage below the prefix from all writers, or without a capacity that of this process's own objects.

        Usage by cache salt covers only this process's own objects: LMCache deletes everything that it knows of a salt
        without a quota, and a server that has just started has no quotas.
        """
        return AdapterUsage(
            total_bytes_used=self._usage.total,
            total_capacity_bytes=self._max_capacity_bytes,
            bytes_by_cache_salt=MappingProxyType(self._usage.by_salt()),
        )

    def register_listener(self, listener: L2AdapterListener) -> None:
        """Register a listener for changes; the listing that follows reports the objects that already exist."""
        super().register_listener(listener)
        self._usage_listing.again()

    def _notify_listeners(self, keys: list[ObjectKey], sizes: list[int]) -> None:
        """Report objects that a listing found, newest first, to listeners that evict by total capacity.

        Policies with quotas by salt are excluded: they delete everything of a salt without a quota, including objects
        of other processes.
        """
        for listener in list(self._listeners):
            if self._max_capacity_bytes and _evicts_by_capacity(listener):
                self._notify(listener.on_l2_keys_stored, keys, sizes)

    # --- status and shutdown ------------------------------------------------------------------------------------------

    def report_status(self) -> dict[str, Any]:
        """Return the state of this adapter; `reasons` lists why it is unhealthy."""
        open_parts = self._store.breakers.status()
        reasons = [f"{part} is disabled for now: {why}" for part, why in open_parts.items()]
        if self._closed:
            reasons.append("the adapter is closed")
        conflicts = self._fingerprints.status()
        reasons += conflicts
        if pause := self._store.bucket.paused_secs:
            reasons.append(f"the Hub asked this token to wait {pause:.0f} s more: its quota is used up")
        return {
            "is_healthy": not open_parts
            and not self._closed
            and not (conflicts and self._settings.fingerprint == "enforce"),
            "type": type(self).__name__,
            "reasons": reasons,
            "instance": self._settings.name,
            "bucket": str(self._settings.bucket_handle),
            "role": self._settings.role,
            "breakers_open": sorted(open_parts),
            "tasks": {kind: self._tasks.running(kind) for kind in KINDS},
            "waiting_put_bytes": self._store.puts.waiting_bytes,
            "locked_key_count": self._tasks.locked,
            "object_count": self._usage.objects,
            "current_size_bytes": self._usage.total,
            "usage_is_complete": self._usage.complete,
            "max_capacity_bytes": self._max_capacity_bytes,
            "index": None if self._store.index is None else self._store.index.status(),
        }

    def close(self) -> None:
        """Wait up to `close_timeout_secs` for stores in progress, then abort all other work. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._usage_listing.close()
        end = time.monotonic() + self._settings.close_timeout_secs
        self._store.wait_for_puts(self._settings.close_timeout_secs)
        self._lookup_threads.close()
        self._load_threads.close()
        self._fingerprints.finish(end - time.monotonic())
        self._fingerprints.close()
        self._store.finish(end - time.monotonic())
        self._store.close()
        self._tasks.close()


def _evicts_by_capacity(listener: L2AdapterListener) -> bool:
    """Return whether a listener is a policy that evicts by total capacity rather than by quotas of salts."""
    return not getattr(getattr(listener, "policy", None), "support_isolation", True)
