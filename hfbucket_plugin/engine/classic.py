"""Adapter for LMCache's classic, in-process engine: a `RemoteConnector` over `ChunkStore`.

The engine runs the coroutines on a shared event loop, so nothing here allocates, copies or waits on it: each call hands
its work to a thread and awaits a future.

LMCache has a built-in backend for the type `hfbucket`. Its `ConnectorManager` uses the first adapter that can parse a
URL, and built-in ones come first, so an external class of that type is constructed but never used. `_teach_manager`
adds one rule: an instance whose `module_path` and `class_name` name this adapter is served by it. The rule also covers
type names that LMCache does not know, and leaves the instances of the built-in backend and of other plugins alone.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import time
from copy import copy
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, Final, TypeVar

from lmcache.integration.vllm.utils import get_size_bytes
from lmcache.v1.storage_backend.connector import (
    ConnectorAdapter,
    ConnectorManager,
    SafeLocalCPUBackend,
    extract_plugin_type,
)
from lmcache.v1.storage_backend.connector.base_connector import RemoteConnector

from hfbucket_plugin.config.lmcache_yaml import rule_violations
from hfbucket_plugin.config.settings import KEY_ROOT
from hfbucket_plugin.config.settings import load as load_settings
from hfbucket_plugin.core.concurrency import WorkerPool
from hfbucket_plugin.core.deadline import Deadline
from hfbucket_plugin.core.keys import PROBE_MODEL, is_probe
from hfbucket_plugin.core.telemetry import default_sink
from hfbucket_plugin.engine.health_monitor import HealthShield, lift_threshold
from hfbucket_plugin.engine.memory import SourceMemory, TargetMemory
from hfbucket_plugin.errors import ConfigError, HFBucketError, PartialFailureError
from hfbucket_plugin.fingerprint import detect
from hfbucket_plugin.fingerprint.watch import FingerprintWatch
from hfbucket_plugin.store.chunk_store import ChunkStore

if TYPE_CHECKING:
    import builtins
    from collections.abc import Callable, Sequence
    from concurrent.futures import Future

    from lmcache.utils import CacheEngineKey
    from lmcache.v1.config import LMCacheEngineConfig
    from lmcache.v1.memory_management import MemoryObj
    from lmcache.v1.metadata import LMCacheMetadata
    from lmcache.v1.storage_backend.connector import ConnectorContext
    from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend

    from hfbucket_plugin.config.settings import InstanceSettings
    from hfbucket_plugin.core import telemetry
    from hfbucket_plugin.fingerprint.model import Fingerprint
    from hfbucket_plugin.store.read import Buffer

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

_GET_SHARE: Final = 0.9
"""Share of LMCache's `blocking_timeout_secs` that a get may use; after it LMCache discards what has arrived."""

_DEFAULT_BLOCKING_SECS: Final = 10.0
_CONCURRENT_CALLS: Final = 32
"""Maximum number of concurrent gets and lists. Each holds a thread, and an engine runs far fewer."""

_CONCURRENT_QUESTIONS: Final = 16
"""Maximum number of concurrent lookups, pings and deletes. They are short and have their own threads: behind gets that
hang, a lookup would exceed its deadline, and a ping would exceed LMCache's, which then disables the whole engine."""

PING_OK, PING_CLOSED = 0, 1

PLUGIN_TYPE: Final = "hfbucket"
_SCHEME: Final = "plugin://"
_MARK: Final = "_lmcache_hfbucket_rule"


class HFBucketConnector(RemoteConnector):
    """LMCache remote connector for one bucket instance.

    Args:
        local_cpu_backend: Allocator of memory for chunks that are read.
        config: Engine configuration. `save_unfull_chunk`, `save_chunk_meta` and layerwise mode must be off.
        metadata: Layout of a chunk, read at each call because KV groups may register after the connector is made.
        settings: Settings of the instance.
        instance: Name of the instance.
        sink: Metrics sink for outcomes; by default the Prometheus registry that LMCache serves.

    Raises:
        ConfigError: The engine configuration requires something that a bucket of full chunks cannot do. Problems with
            the token, the bucket or the network never raise here, because LMCache would then run without the connector
            for its lifetime.
    """

    def __init__(
        self,
        local_cpu_backend: LocalCPUBackend,
        config: LMCacheEngineConfig,
        metadata: LMCacheMetadata,
        *,
        settings: InstanceSettings,
        instance: str,
        sink: telemetry.Sink | None = None,
    ) -> None:
        _check_engine(config, instance)
        super().__init__(_without_chunk_meta(config), metadata)
        self._local_cpu = local_cpu_backend
        self._config = config
        self._metadata = metadata
        self._settings = settings
        self._instance = instance
        self._get_secs = _get_timeout(config, settings, instance)
        self._store = ChunkStore(settings, instance, sink or default_sink(), self._get_secs)
        self._calls = WorkerPool(f"hfbucket-call-{instance}", _CONCURRENT_CALLS)
        self._questions = WorkerPool(f"hfbucket-question-{instance}", _CONCURRENT_QUESTIONS)
        self._watch = FingerprintWatch(
            self._store.bucket, settings, instance, self._store.breakers, sink or default_sink()
        )
        self._fingerprint = self._watch.add(metadata.model_name, self._facts)
        self._closed = False
        self._shield = HealthShield(config.extra_config or {})
        self._closer = WorkerPool(f"hfbucket-close-{instance}", 1)
        for pool in (self._calls, self._questions, self._closer):
            pool.prepare()
        # LMCache gives schedulers a stub; they never read.
        self._store.begin(reads=not isinstance(local_cpu_backend, SafeLocalCPUBackend))

    # --- lookups: synchronous ones run in the caller's thread, without a timeout from LMCache -------------------------

    def exists_sync(self, key: CacheEngineKey) -> bool:
        """Return whether a full chunk exists, within `lookup_timeout_secs`; a failure counts as absent."""
        return self.batched_contains([key]) == 1

    async def exists(self, key: CacheEngineKey) -> bool:
        """Return whether a full chunk exists, within `lookup_timeout_secs`; a failure counts as absent."""
        return await self.batched_async_contains("", [key]) == 1

    def support_batched_contains(self) -> bool:
        """Return True: one request answers for all keys."""
        return True

    def batched_contains(self, keys: builtins.list[CacheEngineKey]) -> int:
        """Return the number of leading keys that exist as full chunks."""
        if self._shield.raised:
            self._store.not_looked_up(len(keys), "shield")
            return 0
        if why := self._refusal(keys):
            self._store.kept_out("lookup", len(keys), why)
            return 0
        return self._store.prefix_hits([key.to_string() for key in keys], self._chunk_size())

    async def batched_async_contains(
        self, lookup_id: str, keys: builtins.list[CacheEngineKey], pin: bool = False
    ) -> int:
        """Run `batched_contains` off the event loop. Nothing is pinned, because a bucket does not evict."""
        del lookup_id, pin
        return await self._call(self._questions, self.batched_contains, keys)

    # --- get ------------------------------------------------------------------------------------------------------

    def support_batched_get(self) -> bool:
        """Return True: the chunks of a batch are read concurrently."""
        return True

    async def get(self, key: CacheEngineKey) -> MemoryObj | None:
        """Read one chunk; return None for any kind of miss."""
        return (await self.batched_get([key]))[0]

    async def batched_get(self, keys: builtins.list[CacheEngineKey]) -> builtins.list[MemoryObj | None]:
        """Read chunks; return None for each miss of any kind. The caller owns one reference to each returned object."""
        return await self._get(keys, prefix_only=False)

    async def batched_get_non_blocking(
        self, lookup_id: str, keys: builtins.list[CacheEngineKey]
    ) -> builtins.list[MemoryObj]:
        """Read the chunks before the first miss. The caller owns one reference to each returned object."""
        del lookup_id
        return [found for found in await self._get(keys, prefix_only=True) if found is not None]

    async def _get(self, keys: builtins.list[CacheEngineKey], *, prefix_only: bool) -> builtins.list[MemoryObj | None]:
        if not keys:
            return []
        if why := self._refusal(keys):
            self._store.kept_out("get", len(keys), why)
            return [None] * len(keys)
        names, sizes = [key.to_string() for key in keys], [self._chunk_size()] * len(keys)
        deadline = Deadline.after(self._get_secs)
        read = partial(self._store.read_many, names, sizes, self._allocate, deadline, prefix_only=prefix_only)
        buffers = await self._call(self._calls, read, dropped=self._release)
        return self._got(buffers)

    def _got(self, buffers: Sequence[Buffer | None]) -> builtins.list[MemoryObj | None]:
        self._shield.got(everything=None not in buffers)
        return [buffer.memory_obj if isinstance(buffer, TargetMemory) else None for buffer in buffers]

    def _release(self, buffers: Sequence[Buffer | None]) -> None:
        for memory_obj in self._got(buffers):
            if memory_obj is not None:
                memory_obj.ref_count_down()

    def _allocate(self, _index: int) -> TargetMemory | None:
        # By default `allocate` waits for memory that only the blocked engine itself could free.
        memory_obj = self._local_cpu.allocate(
            self._metadata.get_shapes(), self._metadata.get_dtypes(), self.meta_fmt, busy_loop=False
        )
        return None if memory_obj is None else TargetMemory(memory_obj)

    # --- put ------------------------------------------------------------------------------------------------------

    def support_batched_put(self) -> bool:
        """Return True: the chunks of a batch are written in few commits."""
        return True

    async def put(self, key: CacheEngineKey, memory_obj: MemoryObj) -> None:
        """Store one full chunk.

        Raises:
            PartialFailureError: The chunk was not stored; the failure has been counted and logged.
        """
        await self.batched_put([key], [memory_obj])

    async def batched_put(self, keys: builtins.list[CacheEngineKey], memory_objs: builtins.list[MemoryObj]) -> None:
        """Store full chunks. The caller's references are kept; LMCache's wrapper drops them.

        Raises:
            PartialFailureError: Some chunks were not stored; each failure has been counted and logged.
            ValueError: The numbers of keys and of memory objects differ.
        """
        if len(keys) != len(memory_objs):  # before any reference is taken
            raise ValueError(f"{len(keys)} keys and {len(memory_objs)} memory objects: their numbers must be equal")
        deadline = Deadline.after(self._settings.put_timeout_secs)
        if why := self._refusal(keys, storing=True):
            self._store.kept_out("put", len(keys), why)
            return
        sources = [SourceMemory(key.to_string(), obj) for key, obj in zip(keys, memory_objs, strict=True)]
        future = self._store.puts.submit(sources, self._chunk_size(), deadline)
        report = await asyncio.wrap_future(future)
        failures = [failure for failure in report.failures if failure.kind != "role"]
        if failures:
            names = ", ".join(failure.item for failure in failures[:3]) + (", …" if failures[3:] else "")
            raise PartialFailureError(
                f"[{self._instance}] {len(failures)} of {len(sources)} chunks were not stored ({names}): "
                f"{failures[0].message}",
                tuple(failures),
            )

    # --- delete, list, ping, close -----------------------------------------------------------------------------------

    def remove_sync(self, key: CacheEngineKey) -> bool:
        """Delete a chunk in the caller's thread, within `lookup_timeout_secs`; return whether it is gone."""
        if why := self._refusal([key]):
            self._store.kept_out("delete", 1, why)
            return False
        deadline = Deadline.after(self._settings.lookup_timeout_secs)
        try:
            future = self._questions.submit(self._store.delete, [key.to_string()], deadline)
            return not future.result(timeout=deadline.remaining())
        except (HFBucketError, TimeoutError, RuntimeError):
            return False  # already counted and logged

    async def list(self) -> builtins.list[str]:
        """List the key strings of this instance.

        Raises:
            HFBucketError: The listing is incomplete.
        """
        return await self._call(self._calls, lambda: [*self._store.list_keys()])

    def support_ping(self) -> bool:
        """Return True; see `ping`."""
        return True

    async def ping(self) -> int:
        """Return 0 as long as this connector is open, without a request to the Hub.

        LMCache pings to protect the engine from a stalled backend: after one failed ping it disables the whole engine's
        cache, including local tiers. Deadlines and circuit breakers already give that protection here, because a lookup
        becomes a miss in time whatever the Hub does. Pinging the Hub every 30 s from each worker of a fleet would use
        up the account's quota. The state of the Hub is in the metrics and the log.
        """
        return PING_CLOSED if self._closed else PING_OK

    async def close(self) -> None:
        """Wait up to `close_timeout_secs` for puts in progress, then abort all other work. Further calls do nothing."""
        if self._closed:
            return
        self._closed = True
        try:
            await self._call(self._closer, self._close)
        finally:
            self._closer.close()

    def _close(self) -> None:
        end = time.monotonic() + self._settings.close_timeout_secs
        self._store.wait_for_puts(self._settings.close_timeout_secs)
        for pool in (self._calls, self._questions):
            pool.close()
        self._watch.finish(end - time.monotonic())
        self._store.finish(end - time.monotonic())
        self._watch.close()
        self._store.close()

    # --- helpers --------------------------------------------------------------------------------------------------

    def _facts(self) -> Fingerprint:
        return detect.classic(self._config, self._metadata, self._settings.model_revision)

    def _refusal(self, keys: Sequence[CacheEngineKey], *, storing: bool = False) -> str | None:
        """Return why the fingerprint excludes chunks. LMCache's probe never is, or the engine would not recover."""
        if keys and keys[0].model_name == PROBE_MODEL and is_probe(keys[0].to_string()):
            return None
        return self._fingerprint.refusal(storing=storing)

    def _chunk_size(self) -> int:
        return int(get_size_bytes(self._metadata.get_shapes(), self._metadata.get_dtypes()))

    async def _call(
        self,
        pool: WorkerPool,
        function: Callable[..., _T],
        *args: Any,
        dropped: Callable[[_T], None] | None = None,
    ) -> _T:
        """Run a blocking function in a pool and await it.

        Args:
            pool: Pool that runs the function.
            function: Function to run.
            *args: Arguments of the function.
            dropped: Called on the pool's thread with the result if the awaiting task was cancelled meanwhile.
        """
        future = pool.submit(function, *args)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            if dropped is not None:
                future.add_done_callback(lambda done: _drop(done, dropped))
            raise

    def __repr__(self) -> str:
        return f"<HFBucketConnector {self._instance} {self._settings.bucket_handle}>"


def _drop(future: Future[_T], dropped: Callable[[_T], None]) -> None:
    if not future.cancelled() and future.exception() is None:
        dropped(future.result())


def _check_engine(config: LMCacheEngineConfig, instance: str) -> None:
    """Reject engine settings that cannot work with full chunks without metadata."""
    wrong = rule_violations(
        save_unfull_chunk=bool(config.save_unfull_chunk),
        save_chunk_meta=bool((config.extra_config or {}).get("save_chunk_meta", False)),
        use_layerwise=bool(config.use_layerwise),
        serde=config.remote_serde,
    )
    if wrong:
        raise ConfigError(f"instance {instance!r}: {'; '.join(wrong)}")


def _without_chunk_meta(config: LMCacheEngineConfig) -> LMCacheEngineConfig:
    """Return the configuration with `save_chunk_meta` off; LMCache's base class treats a missing value as on."""
    adjusted = copy(config)
    adjusted.extra_config = {**(config.extra_config or {}), "save_chunk_meta": False}
    return adjusted


def _get_timeout(config: LMCacheEngineConfig, settings: InstanceSettings, instance: str) -> float:
    blocking = float(config.blocking_timeout_secs or _DEFAULT_BLOCKING_SECS)
    if settings.get_timeout_secs is None:
        return blocking * _GET_SHARE
    if settings.get_timeout_secs >= blocking:
        raise ConfigError(
            f"instance {instance!r}: get_timeout_secs ({settings.get_timeout_secs:g}) must end before LMCache's "
            f"blocking_timeout_secs ({blocking:g}), which throws away whatever has arrived by then"
        )
    return settings.get_timeout_secs


class HFBucketConnectorAdapter(ConnectorAdapter):
    """Creates connectors for bucket instances. LMCache constructs it without arguments."""

    def __init__(self) -> None:
        super().__init__(_SCHEME)
        _teach_manager()

    def can_parse(self, url: str) -> bool:
        """Return whether a URL has the `hfbucket` type. The manager's rule covers other types."""
        return url.startswith(_SCHEME) and extract_plugin_type(url.removeprefix(_SCHEME)) == PLUGIN_TYPE

    def create_connector(self, context: ConnectorContext) -> RemoteConnector:
        """Create the connector of the instance that the context names.

        Raises:
            ConfigError: A setting is missing, unknown or invalid. LMCache logs the message and runs without the
                connector, so it is also logged here as an error.
        """
        instance = _instance_name(context)
        try:
            if context.config is None or context.metadata is None:
                raise ConfigError(f"instance {instance!r}: LMCache gave no configuration or no metadata")
            own = load_settings(context.config.extra_config, instance, context.config.remote_storage_plugins or ())
            lift_threshold(context.config, lambda name: _is_ours(context.config, name))
            return HFBucketConnector(
                context.local_cpu_backend, context.config, context.metadata, settings=own, instance=instance
            )
        except HFBucketError as error:
            _log.error("%s", error)
            raise


def _instance_name(context: ConnectorContext) -> str:
    """Return the plugin name; in `remote_url: plugin://…` mode only the URL contains it."""
    name: str = context.plugin_name or context.url.removeprefix(_SCHEME)
    return name


def _adapter_for(context: ConnectorContext) -> HFBucketConnectorAdapter | None:
    """Return the adapter if the configuration names it, or a subclass of it, for this instance."""
    return _adapter_of(context.config, _instance_name(context))


def _is_ours(config: Any, instance: str) -> bool:
    return _adapter_of(config, instance) is not None


def _adapter_of(config: Any, instance: str) -> HFBucketConnectorAdapter | None:
    extra = (config.extra_config if config is not None else None) or {}
    head = f"{KEY_ROOT}{instance}."
    module_path, class_name = extra.get(f"{head}module_path"), extra.get(f"{head}class_name")
    if not module_path or not class_name:
        return None
    try:
        named = getattr(importlib.import_module(module_path), class_name, None)
    except ImportError:
        return None  # LMCache logged the error when it loaded the plugins
    if isinstance(named, type) and issubclass(named, HFBucketConnectorAdapter):
        return named()
    return None


def _teach_manager() -> None:
    """Add the rule for instances that name this adapter, once per process and in whatever order plugins load."""
    original = ConnectorManager.create_connector
    if hasattr(original, _MARK):
        return

    @wraps(original)
    def create_connector(self: Any) -> Any:
        if str(self.context.url).startswith(_SCHEME) and (ours := _adapter_for(self.context)) is not None:
            return ours.create_connector(self.context)
        return original(self)

    setattr(create_connector, _MARK, True)
    ConnectorManager.create_connector = create_connector
