"""What a configuration says of the engines that use it, for tools that compare it with fingerprints without an engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from hfbucket_plugin.l2_settings import L2Settings

if TYPE_CHECKING:
    from hfbucket_plugin.fingerprint import Fingerprint
    from hfbucket_plugin.named import NamedInstance

_CHUNK_SIZE: Final = 256
_ALGORITHM: Final = "builtin"
"""LMCache's defaults (`lmcache/v1/config.py`)."""


def as_configured(recorded: Fingerprint, named: NamedInstance, hash_check: str | None = None) -> Fingerprint | None:
    """What an engine in the place of a recorded one would be by a configuration, as far as that says.

    Args:
        recorded: What the bucket says.
        named: The instance, and the configuration that names it.
        hash_check: What this process makes of the fixed tokens, where that is known.

    Returns:
        Of the same space; what only an engine knows is None. None where the configuration is one of the other mode.
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
        return None  # LMCache has its own opinion of it
