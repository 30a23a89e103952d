"""LMCache's classic, in-process engine: a `RemoteConnector` over `ChunkStore`, and which instances it serves.

The engine calls the coroutines on an event loop that it shares with everything else. Nothing of ours allocates, copies
or waits there: each call hands its work to a thread and awaits a future that the thread resolves.

LMCache ships a backend of its own for the type `hfbucket`, and its `ConnectorManager` lets the first adapter that can
parse a URL win: built-in ones come first, and none of them sees the configuration. LMCache imports and constructs an
external class of that type, and never uses it. So the manager is taught one rule, here and nowhere else: *an instance
whose `module_path` and `class_name` name this adapter is served by it*. The same rule serves type names that LMCache does
not know, and leaves other plugins and the built-in backend their instances.
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
"""Share of LMCache's `blocking_timeout_secs` that a get may take: past it LMCache throws away what did arrive."""

_DEFAULT_BLOCKING_SECS: Final = 10.0
_CONCURRENT_CALLS: Final = 32
"""Gets and lists that may be in progress: each holds a thread, and an engine has far fewer."""

_CONCURRENT_QUESTIONS: Final = 16
"""Lookups, pings and deletes that may be in progress. They are short, and have threads of their own: behind gets that
hang, a lookup would outlast its deadline, and a ping LMCache's patience, which then disables the whole engine."""

PING_OK, PING_CLOSED = 0, 1

PLUGIN_TYPE: Final = "hfbucket"
_SCHEME: Final = "plugin://"
_MARK: Final = "_lmcache_hfbucket_rule"


class HFBucketConnector(RemoteConnector):
    """One bucket instance as a remote store of LMCache's.

    Args:
        local_cpu_backend: Gives memory for chunks that are read.
        config: The engine's configuration. `save_unfull_chunk`, `save_chunk_meta` and layerwise mode must be off.
        metadata: The layout of a chunk; asked for each call, since KV groups may register after the connector is made.
        settings: The instance's.
        instance: Its name.
        sink: Where outcomes are counted; by default the Prometheus registry that LMCache serves.

    Raises:
        ConfigError: The engine's configuration asks for what a bucket of full chunks cannot do. Problems with the
            token, the bucket or the network never raise here: LMCache would run without the connector for ever.
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
        # LMCache gives a stub to schedulers, which never read.
        self._store.begin(reads=not isinstance(local_cpu_backend, SafeLocalCPUBackend))

    # --- lookups: sync ones run in the caller's thread, which LMCache gives no timeout ------------------------------

    def exists_sync(self, key: CacheEngineKey) -> bool:
        """Whether a full chunk is there; a failure counts as absent. Ends within `lookup_timeout_secs`."""
        return self.batched_contains([key]) == 1

    async def exists(self, key: CacheEngineKey) -> bool:
        """Whether a full chunk is there; a failure counts as absent. Ends within `lookup_timeout_secs`."""
        return await self.batched_async_contains("", [key]) == 1

    def support_batched_contains(self) -> bool:
        """Yes: one request answers for all keys."""
        return True

    def batched_contains(self, keys: builtins.list[CacheEngineKey]) -> int:
        """How many keys, from the first on without a gap, are there as full chunks."""
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
        """As `batched_contains`, off the event loop. Nothing is pinned: a bucket does not evict."""
        del lookup_id, pin
        return await self._call(self._questions, self.batched_contains, keys)

    # --- get ------------------------------------------------------------------------------------------------------

    def support_batched_get(self) -> bool:
        """Yes: chunks of a batch are read side by side."""
        return True

    async def get(self, key: CacheEngineKey) -> MemoryObj | None:
        """Read one chunk, or None for a miss of any kind."""
        return (await self.batched_get([key]))[0]

    async def batched_get(self, keys: builtins.list[CacheEngineKey]) -> builtins.list[MemoryObj | None]:
        """Read chunks; None for each that is a miss of any kind. The caller owns one reference to each object."""
        return await self._get(keys, prefix_only=False)

    async def batched_get_non_blocking(
        self, lookup_id: str, keys: builtins.list[CacheEngineKey]
    ) -> builtins.list[MemoryObj]:
        """Read chunks up to the first miss."""
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
        # By default `allocate` waits for memory that the very engine it blocks would have to free.
        memory_obj = self._local_cpu.allocate(
            self._metadata.get_shapes(), self._metadata.get_dtypes(), self.meta_fmt, busy_loop=False
        )
        return None if memory_obj is None else TargetMemory(memory_obj)

    # --- put ------------------------------------------------------------------------------------------------------

    def support_batched_put(self) -> bool:
        """Yes: chunks of a batch are written in few commits."""
        return True

    async def put(self, key: CacheEngineKey, memory_obj: MemoryObj) -> None:
        """Store one full chunk.

        Raises:
            PartialFailureError: It was not stored; counted and logged already.
        """
        await self.batched_put([key], [memory_obj])

    async def batched_put(self, keys: builtins.list[CacheEngineKey], memory_objs: builtins.list[MemoryObj]) -> None:
        """Store full chunks. References are left alone: LMCache's wrapper drops them.

        Raises:
            PartialFailureError: Some were not stored; each was counted and logged already.
            ValueError: There are more of one than of the other.
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
        """Delete a chunk; whether it is gone. Ends within `lookup_timeout_secs`, in the caller's thread."""
        if why := self._refusal([key]):
            self._store.kept_out("delete", 1, why)
            return False
        deadline = Deadline.after(self._settings.lookup_timeout_secs)
        try:
            future = self._questions.submit(self._store.delete, [key.to_string()], deadline)
            return not future.result(timeout=deadline.remaining())
        except (HFBucketError, TimeoutError, RuntimeError):
            return False  # counted and logged where it happened

    async def list(self) -> builtins.list[str]:
        """The key strings of this instance.

        Raises:
            HFBucketError: The listing is not complete.
        """
        return await self._call(self._calls, lambda: [*self._store.list_keys()])

    def support_ping(self) -> bool:
        """Yes; see `ping`."""
        return True

    async def ping(self) -> int:
        """0 as long as this connector is open.

        LMCache asks in order to protect the engine from a backend that stalls, and disables the whole engine's cache,
        local tiers included, on one failed answer. Here deadlines and breakers protect it: whatever the Hub does, a
        lookup is a miss in time. So this answers for the connector, and asks the Hub nothing: a fleet that pinged it
        every 30 s from each worker would use up its member's quota. The state of the Hub is in the metrics and the log.
        """
        return PING_CLOSED if self._closed else PING_OK

    async def close(self) -> None:
        """Wait up to `close_timeout_secs` for puts in progress, then end everything at once; once is enough."""
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
        """Why the fingerprint keeps chunks out; never LMCache's probe, without which the engine would not recover."""
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
        """Run a blocking function on a pool and await it.

        Args:
            pool: Whose thread runs it.
            function: What to run.
            *args: Its arguments.
            dropped: Given the result when the awaiting task was cancelled meanwhile; runs on the pool's thread.
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
    """Refuse what cannot work with full chunks that carry no metadata."""
    wrong = rule_violations(
        save_unfull_chunk=bool(config.save_unfull_chunk),
        save_chunk_meta=bool((config.extra_config or {}).get("save_chunk_meta", False)),
        use_layerwise=bool(config.use_layerwise),
        serde=config.remote_serde,
    )
    if wrong:
        raise ConfigError(f"instance {instance!r}: {'; '.join(wrong)}")


def _without_chunk_meta(config: LMCacheEngineConfig) -> LMCacheEngineConfig:
    """The configuration with `save_chunk_meta` off, which LMCache's base class takes to be on when it is left out."""
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
    """Makes connectors for bucket instances. LMCache constructs it without arguments."""

    def __init__(self) -> None:
        super().__init__(_SCHEME)
        _teach_manager()

    def can_parse(self, url: str) -> bool:
        """Whether a URL is of our own type. Other types that name us come in by the manager's rule."""
        return url.startswith(_SCHEME) and extract_plugin_type(url.removeprefix(_SCHEME)) == PLUGIN_TYPE

    def create_connector(self, context: ConnectorContext) -> RemoteConnector:
        """Make the connector of the instance that the context names.

        Raises:
            ConfigError: A setting is missing, unknown or impossible. LMCache logs the message and runs without the
                connector, so it is logged as an error here too, where it cannot be overlooked.
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
    """The plugin name; in `remote_url: plugin://…` mode only the URL holds it."""
    name: str = context.plugin_name or context.url.removeprefix(_SCHEME)
    return name


def _adapter_for(context: ConnectorContext) -> HFBucketConnectorAdapter | None:
    """Our adapter, if the configuration names it (or a subclass of it) for this instance."""
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
        return None  # LMCache has logged it when it loaded the plugins
    if isinstance(named, type) and issubclass(named, HFBucketConnectorAdapter):
        return named()
    return None


def _teach_manager() -> None:
    """Let instances that name us be served by us; once a process, whatever the order in which plugins load."""
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
