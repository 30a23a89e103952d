"""Streamed listings of an instance, parsed: what the warmer and the jobs select from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from hfbucket_plugin.errors import KeyFormatError
from hfbucket_plugin.handle import RESERVED
from hfbucket_plugin.keys import decode_name, encode_name, parse_key

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from datetime import datetime

    from hfbucket_plugin.bucket import Bucket, ObjectInfo
    from hfbucket_plugin.content import Content
    from hfbucket_plugin.keys import Key

_PAGE_SECS: Final = 60.0


@dataclass(frozen=True, slots=True)
class ChunkEntry:
    """One chunk of an instance.

    Attributes:
        text: Its key string.
        key: The same, parsed.
        content: Its hash and size.
        uploaded_at: When the Hub took it.
    """

    text: str
    key: Key
    content: Content
    uploaded_at: datetime | None


def list_chunks(bucket: Bucket, key_prefixes: Iterable[str]) -> Iterator[ChunkEntry]:
    """Stream the chunks whose key starts with one of the prefixes, each chunk once.

    Memory does not grow with the bucket: pages come one by one. Objects that are no chunks (names that do not parse,
    nested paths, our own records) are passed by.

    Args:
        bucket: The instance's.
        key_prefixes: Starts of key strings; an empty one is everything.

    Raises:
        HFBucketError: A page did not come: what was yielded is no complete listing.
    """
    for prefix in without_covered(key_prefixes):
        for info in bucket.list_objects(bucket.handle.join(encode_name(prefix)), _PAGE_SECS):
            entry = chunk_entry(bucket, info)
            if entry is not None and entry.text.startswith(prefix):
                yield entry


def without_covered(prefixes: Iterable[str]) -> list[str]:
    """Drop prefixes that a shorter one covers, so that no chunk is listed twice."""
    kept: list[str] = []
    for prefix in sorted(set(prefixes)):
        if not kept or not prefix.startswith(kept[-1]):
            kept.append(prefix)
    return kept


def chunk_entry(bucket: Bucket, info: ObjectInfo) -> ChunkEntry | None:
    """The chunk that an object is, or None for an object of another instance or of no chunk."""
    name = bucket.handle.relative(info.path)
    if name is None or "/" in name or name == RESERVED:
        return None
    try:
        text = decode_name(name)
        return ChunkEntry(text, parse_key(text), info.content, info.uploaded_at)
    except KeyFormatError:
        return None
