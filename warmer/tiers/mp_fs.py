"""What the JSON of an `lmcache server --l2-adapter` says of a directory, MP mode: types `fs` and `fs_native`.

Follows `lmcache/v1/distributed/l2_adapters/` of LMCache 0.5.6: `fs_l2_adapter.py`, `fs_native_l2_adapter.py`,
`native_connector_l2_adapter.py` and `config.py`, and the native connector itself.

Both name files alike and keep raw bytes. `fs_native` with `use_odirect` reads as many bytes as the slot in L1 has, which
is the chunk rounded up, and takes a shorter file for a miss.
"""

from __future__ import annotations

import difflib
import json
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Final

from hfbucket_plugin.errors import ConfigError
from hfbucket_plugin.keys import MPKey
from warmer.tiers.declaration import DirectoryDeclaration, Layout, absolute_paths

if TYPE_CHECKING:
    from collections.abc import Callable

    from warmer.tiers.options import TierOptions

L1_ALIGNMENT: Final = 4096
"""`--l1-align-bytes` of `lmcache server`, at its default: the JSON does not say it."""

_BESIDE: Final = frozenset({"type", "eviction", "serde", "shared", "affinity_tag", "persist_enabled"})
"""What LMCache reads itself beside an adapter's own fields."""

_BUCKETS: Final = frozenset({"hfbucket", "plugin"})
_IMPOSSIBLE: Final = {
    "raw_block": "a raw block device has its index in the server's memory and cannot be filled from outside",
    "dax": "a DAX device has its index in the server's memory and cannot be filled from outside",
    "nixl_store": "NIXL keeps its index in the server's memory and cannot be filled from outside",
    "nixl_store_dynamic": "NIXL names its files by itself, and they cannot be filled from outside",
    "nixl_native": "NIXL keeps its index in the server's memory and cannot be filled from outside",
    "hf3fs": "3FS is written through its own client, and cannot be filled from outside",
    "mock": "the mock adapter lives in the server's memory and cannot be filled from outside",
    "fault_inject": "the fault-injecting adapter is for tests; name the adapter that it wraps",
    "p2p": "p2p reads the memory of other servers, and cannot be filled from outside",
}


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_positive(value: Any) -> bool:
    return isinstance(value, int) and value > 0


def _is_size(value: Any) -> bool:
    return isinstance(value, (int, float)) and value >= 0


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _or_none(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


_Fields = dict[str, tuple["Callable[[Any], bool]", str]]
_FS: Final[_Fields] = {
    "base_path": (_is_path, "a non-empty text"),
    "relative_tmp_dir": (_or_none(_is_text), "a text"),
    "read_ahead_size": (_or_none(_is_positive), "a positive integer"),
    "use_odirect": (_is_flag, "true or false"),
}
_FIELDS: Final[dict[str, _Fields]] = {
    "fs": _FS,
    "fs_native": _FS
    | {
        "relative_tmp_dir": (_is_text, "a text"),
        "num_workers": (_is_positive, "a positive integer"),
        "max_capacity_gb": (_is_size, "a number, 0 or more"),
    },
}


def declared_mp(text: str, options: TierOptions) -> DirectoryDeclaration:
    """Read the JSON of an L2 adapter.

    Raises:
        ConfigError: It is none, is of a type that cannot be filled from outside, or says what makes that impossible.
    """
    spec = _object(text)
    kind = spec.get("type")
    if not isinstance(kind, str) or kind not in _FIELDS:
        raise ConfigError(_no_directory(kind))
    _check(kind, spec)
    if spec.get("serde") is not None:
        raise ConfigError(
            f"tier of type {kind!r}: with serde the server keeps its chunks in another form, and whether the bucket's "
            "objects have that form nothing tells; leave serde out of the local tier"
        )
    name = f"{kind}:{spec['base_path']}"
    odirect = spec.get("use_odirect", False)
    layout = Layout(
        takes=MPKey,
        alignment=L1_ALIGNMENT if odirect and kind == "fs_native" else 1,
        mode=0o644 if odirect or kind == "fs_native" else 0o666,
    )
    return DirectoryDeclaration(name, absolute_paths(name, "base_path", [spec["base_path"]]), layout, options)


def _object(text: str) -> dict[str, Any]:
    try:
        spec = json.loads(text)
    except (ValueError, RecursionError):
        raise ConfigError(
            "tier: this is no JSON; give the very text that `lmcache server --l2-adapter` takes"
        ) from None
    if not isinstance(spec, dict):
        raise ConfigError('tier: must be a JSON object, such as {"type": "fs", "base_path": "/mnt/nvme/kv"}')
    return spec


def _no_directory(kind: Any) -> str:
    known = "those that can be are fs and fs_native"
    if not isinstance(kind, str):
        return f'tier: the JSON lacks "type", or it is no text; {known}'
    if kind in _IMPOSSIBLE:
        return f"tier of type {kind!r}: {_IMPOSSIBLE[kind]}; {known}"
    if kind in _BUCKETS:
        return f"tier of type {kind!r}: a bucket, or a class of somebody's, is no directory on a node; {known}"
    return f"tier of type {kind!r}: it is not known to be a directory that another process can fill; {known}"


def _check(kind: str, spec: dict[str, Any]) -> None:
    """See whether LMCache would take it, and whether all of it is known: a new option may change what files hold."""
    fields = _FIELDS[kind]
    complaints = []
    for name, value in spec.items():
        if name in fields:
            fits, words = fields[name]
            if not fits(value):
                complaints.append(f"{name} must be {words}")
        elif name not in _BESIDE:
            near = difflib.get_close_matches(name, [*fields, *_BESIDE], n=1, cutoff=0.6)
            hint = f" (did you mean {near[0]!r}?)" if near else f"; known are {', '.join(sorted(fields))}"
            complaints.append(f"unknown option {name!r}{hint}")
    if "base_path" not in spec:
        complaints.append("base_path is required")
    temporary = spec.get("relative_tmp_dir")
    if kind == "fs" and isinstance(temporary, str):
        path = PurePosixPath(temporary)
        if path.is_absolute() or ".." in path.parts:
            complaints.append("relative_tmp_dir must lie below base_path")
    if complaints:
        raise ConfigError(f"tier of type {kind!r}: {'; '.join(complaints)}")
