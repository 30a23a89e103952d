"""MP mode's object keys and layouts, as key strings and sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmcache.v1.distributed.api import ObjectKey

from hfbucket_plugin.errors import KeyFormatError
from hfbucket_plugin.keys import MPKey, parse_key

if TYPE_CHECKING:
    from lmcache.v1.distributed.api import MemoryLayoutDesc


def key_string(key: ObjectKey) -> str:
    """The key string of an object key, as LMCache's built-in adapter writes it."""
    return str(MPKey(key.model_name, key.kv_rank, key.object_group_id, key.chunk_hash.hex(), key.cache_salt))


def object_key(text: str) -> ObjectKey | None:
    """The object key of a key string, or None for one of the classic engine's."""
    try:
        parsed = parse_key(text)
    except KeyFormatError:
        return None
    if not isinstance(parsed, MPKey) or "@" in parsed.model:  # LMCache permits no such model in MP mode
        return None
    return ObjectKey(
        chunk_hash=bytes.fromhex(parsed.chunk_hash),
        model_name=parsed.model,
        kv_rank=parsed.kv_rank,
        object_group_id=parsed.group,
        cache_salt=parsed.salt,
    )


def layout_bytes(layout: MemoryLayoutDesc) -> int:
    """Bytes of one object of a layout."""
    return sum(shape.numel() * dtype.itemsize for shape, dtype in zip(layout.shapes, layout.dtypes, strict=True))
