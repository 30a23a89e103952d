"""Fingerprints of engines, from their configuration and from LMCache's objects."""

from __future__ import annotations

import functools
import logging
import os
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Final

from hfbucket_plugin import __version__
from hfbucket_plugin.config.l2 import L2Settings
from hfbucket_plugin.core.telemetry import RateLimitedLogger
from hfbucket_plugin.fingerprint.model import ChunkLayout, Fingerprint, LayerGroup

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lmcache.v1.config import LMCacheEngineConfig
    from lmcache.v1.distributed.api import MemoryLayoutDesc
    from lmcache.v1.metadata import LMCacheMetadata

    from hfbucket_plugin.config.instances import InstanceConfig


_CHUNK_SIZE: Final = 256
_ALGORITHM: Final = "builtin"
"""LMCache's defaults (`lmcache/v1/config.py`)."""


def as_configured(recorded: Fingerprint, named: InstanceConfig, hash_check: str | None = None) -> Fingerprint | None:
    """Return the fingerprint that an engine with a configuration would have in place of a recorded one.

    Args:
        recorded: Fingerprint in the bucket.
        named: Instance, with the configuration that names it.
        hash_check: This process's hash of the fixed tokens, if known.

    Returns:
        A fingerprint of the same space, with None for what only an engine knows; None if the configuration has the
        other
        mode.
    """
    if recorded.mode != named.mode:
        return None
    known: dict[str, Any] = {
        "model_revision": named.settings.model_revision,
        "layout": None,
        "layouts": (),
        "hash_bytes": None,
        "hash_check": hash_check,
    }
    if isinstance(named.settings, L2Settings):
        known["chunk_size"] = named.settings.server_chunk_size
        known["hash_algorithm"] = named.settings.server_hash_algorithm
    elif named.engine is not None:
        own = named.engine.engine
        known["chunk_size"] = _number(own.get("chunk_size", _CHUNK_SIZE))
        known["hash_algorithm"] = str(own.get("pre_caching_hash_algorithm") or _ALGORITHM)
    return recorded.model_copy(update=known)


def _number(value: Any) -> int | None:
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):
        return None  # LMCache decides it by itself


_limited = RateLimitedLogger(logging.getLogger(__name__), 3600.0)

CHECK_TOKENS: Final = tuple(range(1, 17))
"""Tokens hashed for `hash_check`: a chunk of 16 tokens, whatever the engine's chunk size."""

_SEEDED_BY: Final = "PYTHONHASHSEED"
_BLAKE3: Final = "blake3"


def classic(config: LMCacheEngineConfig, metadata: LMCacheMetadata, revision: str | None) -> Fingerprint:
    """Return the fingerprint of a classic engine.

    Cheap except for the first call, which looks up a hash function. Call again when the engine is working, because its
    KV groups register after the connector is made.

    Args:
        config: Configuration of the engine.
        metadata: Metadata of the engine. A scheduler has no KV cache, so its layout is unknown.
        revision: Revision of the weights; None if not configured.

    Raises:
        ValueError: LMCache reports a value that no fingerprint can hold, such as an empty model name.
    """
    from lmcache.utils import TORCH_DTYPE_TO_STR_DTYPE  # noqa: PLC0415 - not needed by tools that read fingerprints

    shared = bool(metadata.use_mla and (config.extra_config or {}).get("save_only_first_rank", True))
    return Fingerprint(
        mode="classic",
        model=metadata.model_name,
        world_size=1 if shared else metadata.world_size,
        dtype=TORCH_DTYPE_TO_STR_DTYPE.get(metadata.kv_dtype),
        model_revision=revision,
        chunk_size=config.chunk_size,
        layout=None if metadata.role == "scheduler" else _classic_layout(metadata),
        hash_algorithm=config.pre_caching_hash_algorithm,
        hash_check=classic_check(config.pre_caching_hash_algorithm),
        **_common(),
    )


def _classic_layout(metadata: LMCacheMetadata) -> ChunkLayout:
    shapes, dtypes = metadata.get_shapes(), metadata.get_dtypes()
    groups = [LayerGroup(shape=tuple(shape), dtype=_name(dtype)) for shape, dtype in zip(shapes, dtypes, strict=True)]
    return ChunkLayout(groups=tuple(groups), worker=metadata.worker_id)


def mp(settings: L2Settings, model: str, kv_rank: int, hash_bytes: int, layout: ChunkLayout | None) -> Fingerprint:
    """Return the fingerprint of an engine behind `lmcache server`, as far as an L2 adapter can know it.

    Args:
        settings: Settings of the adapter, which may contain what LMCache does not report.
        model: Model name in keys.
        kv_rank: `kv_rank` of a key.
        hash_bytes: Number of bytes of a key's hash.
        layout: Layout from lookups; None before the first.

    Raises:
        ValueError: A key has a value that no fingerprint can hold.
    """
    return Fingerprint(
        mode="mp",
        model=model,
        world_size=kv_rank >> 24,
        local_world_size=kv_rank >> 8 & 0xFF,
        model_revision=settings.model_revision,
        chunk_size=settings.server_chunk_size,
        layout=layout,
        hash_algorithm=settings.server_hash_algorithm,
        hash_check=mp_check(settings.server_hash_algorithm) if settings.server_hash_algorithm else None,
        hash_bytes=hash_bytes,
        **_common(),
    )


def mp_layout(descs: Mapping[int, MemoryLayoutDesc]) -> ChunkLayout | None:
    """Return the layout of all object groups; None if there is none."""
    groups = [
        mp_group(index, shape, dtype)
        for index, desc in sorted(descs.items())
        for shape, dtype in zip(desc.shapes, desc.dtypes, strict=True)
    ]
    return ChunkLayout(groups=tuple(groups)) if groups else None


def mp_group(index: int, shape: Sequence[int], dtype: Any) -> LayerGroup:
    """Return one group of an object group."""
    return LayerGroup(shape=tuple(shape), dtype=_name(dtype), object_group=index)


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _common() -> dict[str, Any]:
    return {
        "hash_seed_pinned": seed_is_pinned(os.environ),
        "lmcache_version": _lmcache_version(),
        "written_by": f"lmcache-hfbucket {__version__} on {platform.node() or 'a host without a name'}",
        "recorded_at": datetime.now(UTC),
    }


def seed_is_pinned(environ: Mapping[str, str]) -> bool:
    """Return whether PYTHONHASHSEED is a number; otherwise each process has a random seed."""
    return environ.get(_SEEDED_BY, "").isdecimal()


@functools.cache
def _lmcache_version() -> str | None:
    try:
        return version("lmcache")
    except PackageNotFoundError:
        return None


# --- hashes ----------------------------------------------------------------------------------------------------------


def classic_check(algorithm: str) -> str | None:
    """Return the classic engine's hash of `CHECK_TOKENS` in this process; None if LMCache does not provide it."""
    try:
        from lmcache.v1.token_database import ChunkedTokenDatabase  # noqa: PLC0415 - takes seconds, which tools avoid

        database: Any = object.__new__(ChunkedTokenDatabase)  # without its constructor: see above
        database.hash_func = _looked_up(algorithm, database._get_vllm_hash_func)  # noqa: SLF001 - no public name exists
        return f"{database._hash_tokens(list(CHECK_TOKENS)):x}"  # noqa: SLF001 - no public name exists
    except Exception as error:  # noqa: BLE001 - another LMCache version: the field is then not compared
        _not_known(algorithm, error)
        return None


def mp_check(algorithm: str) -> str | None:
    """Return the hash of `CHECK_TOKENS` by `lmcache server` in this process; None if LMCache does not provide it."""
    try:
        from lmcache.v1.multiprocess.token_hasher import TokenHasher  # noqa: PLC0415 - as above

        hasher: Any = object.__new__(TokenHasher)
        hasher.hash_func = _looked_up(algorithm, hasher._get_hash_func)  # noqa: SLF001 - no public name exists
        vllm = sys.modules.get("vllm.v1.core.kv_cache_utils") if algorithm != _BLAKE3 else None
        first = getattr(vllm, "NONE_HASH", None)
        hasher.none_hash = hasher.hash_func((0, (0,), None)) if first is None else first
        return bytes(TokenHasher.hash_to_bytes(hasher.hash_tokens(list(CHECK_TOKENS)))).hex()
    except Exception as error:  # noqa: BLE001 - as above
        _not_known(algorithm, error)
        return None


def _not_known(algorithm: str, error: Exception) -> None:
    """Log the problem at a limited rate: each look asks for facts, for up to a thousand models in MP mode."""
    words = f"LMCache's hash of {algorithm!r} is not known: {type(error).__name__}: {error}"
    _limited.warning(algorithm, f"fingerprint: {words}")


_functions: dict[str, Any] = {}


def _looked_up(algorithm: str, look_up: Any) -> Any:
    """Return a hash function of LMCache, looked up once per process, because LMCache logs each fallback."""
    name = f"{look_up.__qualname__} {algorithm}"
    if name not in _functions:
        _functions[name] = look_up(algorithm)
    return _functions[name]
