"""Settings of an instance in MP mode: the JSON of `lmcache server --l2-adapter`, read by the server and by tools.

::

    {"type": "plugin", "module_path": "hfbucket_plugin.l2_adapter", "class_name": "HFBucketL2Adapter",
     "adapter_params": {"bucket_handle": "hf://buckets/my-org/lmcache-kv/prod", "token_env": "HF_TOKEN"}}

The JSON of LMCache's built-in adapter, `{"type": "hfbucket", "bucket_handle": ...}`, names the same settings and
objects, so tools accept it too.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import AfterValidator, Field

from hfbucket_plugin.config.settings import Count, InstanceSettings, SecsOrNone, check_fact, hide_tokens, validated
from hfbucket_plugin.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

MODULE: Final = "hfbucket_plugin.l2_adapter"
DEFAULT_GET_SECS: Final = 9.0
"""Default time limit of a load in seconds. LMCache waits for a load as long as it lasts, so this equals the classic
engine's default, 90 % of 10 s."""

_MAX_CAPACITY_GB: Final = 2**30
"""One exbibyte, whose bytes fit into all of LMCache's counters."""

_LMCACHE_KEYS: Final = frozenset({"type", "eviction", "serde", "shared", "affinity_tag", "persist_enabled"})
"""Fields that LMCache itself reads beside an adapter's own (`lmcache/v1/distributed/l2_adapters/config.py`)."""


class L2Settings(InstanceSettings):
    """Settings of an L2 adapter in LMCache's MP mode: those of an instance, and some of its own."""

    name: str = Field(
        "hfbucket",
        pattern=r"^[A-Za-z0-9_.:/-]{1,64}$",
        description="Names the instance in logs and metrics. Give each `--l2-adapter` a name of its own, such as "
        "`hfbucket.us`.",
    )
    max_capacity_gb: float = Field(
        0.0,
        ge=0,
        le=_MAX_CAPACITY_GB,
        description="Maximum GiB of the objects below the prefix, for LMCache's `eviction`. 0: no limit, and only "
        "eviction by quota (`IsolatedLRU`) works. A bucket has no limit of its own.",
    )
    usage_refresh_secs: SecsOrNone = Field(
        3600.0,
        description="Maximum seconds between two listings that correct the account of what the prefix holds, if "
        "`max_capacity_gb` is set. An eviction that finds the account wrong causes a listing at once. A "
        "listing costs a call for every 1,000 objects. 0: never list.",
    )
    usage_max_pages: Count = Field(
        100,
        description="Maximum pages of a listing if `max_capacity_gb` is not set: one is made only when an eviction by"
        " quota finds that others deleted objects. With a capacity, all pages are read.",
    )
    object_sizes: Literal["layout", "any"] = Field(
        "layout",
        description="What a lookup accepts: objects of exactly the size of the model's layout, or any. `any` is for "
        "adapters with a `serde`, which changes sizes; the size is checked again when an object is "
        "loaded.",
    )
    server_chunk_size: Count | None = Field(
        None,
        description="The server's `--chunk-size`, for the fingerprint, since LMCache does not pass it to an adapter. "
        "Only recorded and compared; without it, the layout of lookups still shows a different chunk "
        "size.",
    )
    server_hash_algorithm: Annotated[str, AfterValidator(check_fact)] | None = Field(
        None,
        min_length=1,
        max_length=64,
        description="The server's `--hash-algorithm`, for the fingerprint, since LMCache does not pass it to an "
        "adapter. Only recorded and compared, together with its hash of a fixed sequence of tokens.",
    )
    num_workers: Count | None = Field(
        None,
        description="Accepted because LMCache's built-in adapter takes it; without effect here, where "
        "`max_parallel_reads` and `max_parallel_writes` limit the work.",
    )

    @property
    def load_timeout_secs(self) -> float:
        """Time limit of a load in seconds."""
        return self.get_timeout_secs if self.get_timeout_secs is not None else DEFAULT_GET_SECS


def _refused(message: str) -> ConfigError:
    """Return an error without tokens, in case one was pasted in place of a value that the message repeats."""
    return ConfigError(hide_tokens(message))


def from_params(params: Mapping[str, Any]) -> L2Settings:
    """Parse `adapter_params`.

    Raises:
        ConfigError: Settings are invalid; the message names each of them and the nearest known name.
    """
    name = params.get("name")
    instance = name if isinstance(name, str) else "hfbucket"
    misplaced = sorted(_LMCACHE_KEYS & params.keys())
    if misplaced:
        raise _refused(
            f"instance {instance!r}: {', '.join(misplaced)} must stand beside adapter_params, not in it: LMCache reads it there"
        )
    return validated(L2Settings, params, instance, "adapter_params.")


def from_json(text: str) -> L2Settings:
    """Parse the JSON of an `--l2-adapter`, of this package or of the built-in adapter.

    Raises:
        ConfigError: It is not a JSON object, names no bucket adapter, or has invalid settings.
    """
    try:
        spec = json.loads(text)
    except (ValueError, RecursionError):
        raise ConfigError("--l2-adapter: not valid JSON; pass the text that `lmcache server` takes") from None
    if not isinstance(spec, dict):
        raise ConfigError('--l2-adapter: must be a JSON object, such as {"type": "plugin", ...}')
    kind = spec.get("type")
    if kind == "hfbucket":
        return from_params({key: value for key, value in spec.items() if key not in _LMCACHE_KEYS})
    if kind != "plugin" or spec.get("module_path") != MODULE:
        named = f"type {kind!r}" + (f", module_path {spec.get('module_path')!r}" if kind == "plugin" else "")
        raise _refused(
            f'--l2-adapter: {named} is not a bucket adapter; expected {{"type": "plugin", "module_path": "{MODULE}", ...}} '
            'and the built-in {"type": "hfbucket", ...}'
        )
    params = spec.get("adapter_params", {})
    if not isinstance(params, dict):
        raise ConfigError("--l2-adapter: adapter_params must be a JSON object of settings")
    return from_params(params)
