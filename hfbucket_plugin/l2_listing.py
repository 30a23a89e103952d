"""Pages of an instance's keys, for LMCache's listing of what an adapter holds: stateless, so that any client may go on."""

from __future__ import annotations

import base64
import binascii
import json
from typing import TYPE_CHECKING, Final

from lmcache.v1.distributed.api import KeyEntry, KeyListPage

from hfbucket_plugin.catalog import chunk_entry
from hfbucket_plugin.deadlines import Deadline
from hfbucket_plugin.keys import encode_name
from hfbucket_plugin.l2_keys import object_key

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from hfbucket_plugin.bucket import Bucket, ObjectInfo

_PAGE_SECS: Final = 30.0
_LARGEST_PAGE: Final = 10_000
_LONGEST_CURSOR: Final = 16_384


def list_page(bucket: Bucket, model: str | None, page_size: int, cursor: str | None) -> KeyListPage:
    """One page of the MP keys of an instance, in the order of the Hub's listing.

    Args:
        bucket: The instance's.
        model: Only keys of this model; None for all.
        page_size: Most entries, 1 to 10,000.
        cursor: Of the page before; None for the first.

    Raises:
        ValueError: `page_size` or `cursor` is none of ours.
        HFBucketError: The Hub's listing did not come.
    """
    if isinstance(page_size, bool) or not 0 < page_size <= _LARGEST_PAGE:
        raise ValueError(f"page_size must be 1 to {_LARGEST_PAGE}, not {page_size!r}")
    place, after = _decode(cursor) if cursor is not None else (None, None)
    prefix = bucket.handle.join(encode_name(f"{model}@") if model is not None else "")
    entries: list[KeyEntry] = []
    last: tuple[str | None, str] = (place, "")
    while True:
        infos, following = bucket.list_page(prefix, place, Deadline.after(_PAGE_SECS))
        passed = after is None or any(info.path >= after for info in infos)
        for info in _behind(infos, after):
            entry = _entry(bucket, info, model)
            if entry is None:
                continue
            if len(entries) == page_size:  # there is one more: only now is another page promised
                return KeyListPage(tuple(entries), _encode(*last))
            entries.append(entry)
            last = (place, info.path)
        if following is None:
            return KeyListPage(tuple(entries), None)
        # Objects that came meanwhile push others into the next page: told ones too.
        place, after = following, None if passed else after


def _behind(infos: Sequence[ObjectInfo], after: str | None) -> Iterator[ObjectInfo]:
    """The objects of a page behind a path; where that was deleted meanwhile, those that sort behind it."""
    if after is None:
        yield from infos
        return
    index = next((at for at, info in enumerate(infos) if info.path == after), None)
    yield from infos[index + 1 :] if index is not None else [info for info in infos if info.path > after]


def _entry(bucket: Bucket, info: ObjectInfo, model: str | None) -> KeyEntry | None:
    chunk = chunk_entry(bucket, info)
    key = object_key(chunk.text) if chunk is not None else None
    if key is None or (model is not None and key.model_name != model):
        return None
    return KeyEntry(key.to_encoded_object_key(), info.content.size)


def _encode(place: str | None, after: str) -> str:
    """A cursor: the Hub's own cursor of a page, never an address, and the last path that was told of it."""
    return base64.urlsafe_b64encode(json.dumps([place, after]).encode()).decode()


def _decode(cursor: str) -> tuple[str | None, str]:
    try:
        if len(cursor) > _LONGEST_CURSOR:
            raise ValueError  # noqa: TRY301 - worded below
        given = json.loads(base64.b64decode(cursor, altchars=b"-_", validate=True))
        if not isinstance(given, list):
            raise TypeError  # noqa: TRY301 - worded below
        place, after = given
        if not (place is None or isinstance(place, str)) or not isinstance(after, str):
            raise TypeError  # noqa: TRY301 - worded below
    except (binascii.Error, ValueError, TypeError, RecursionError):
        raise ValueError("the cursor is not one that this adapter gave; start without one") from None
    return place, after
