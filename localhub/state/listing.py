"""Pages of a bucket's tree, by keyset: a page costs the same wherever it starts and however much is stored."""

import base64
from dataclasses import dataclass
from typing import Any

from localhub.errors import bad_request
from localhub.state.buckets import Bucket, BucketStore, iso

_LAST_CODE_POINT = 0x10FFFF
_SURROGATES = range(0xD800, 0xE000)


@dataclass(frozen=True)
class Page:
    """One page of a listing.

    Attributes:
        items: files and directories as the clients read them.
        cursor: what to ask the next page with, or None on the last one.
    """

    items: list[dict[str, Any]]
    cursor: str | None


def tree_page(
    store: BucketStore, bucket: Bucket, *, prefix: str, recursive: bool, cursor: str | None, limit: int
) -> Page:
    """Return one page of what begins with `prefix`, by path.

    The prefix is lexical, as the Hub's: `v1` also matches `v10/x`. Recursive pages hold files only. Others hold the
    files of one level, and one directory for all those below it, with the time of the newest among them: for the
    prefixes `logs` and `logs/` alike, what is in `logs` (`HfFileSystem.ls` relies on it), and for `logs` its lexical
    siblings too.

    Raises:
        HubError: 400 for a cursor that this Hub did not make, or made for another prefix.
    """
    start = decode_cursor(cursor) if cursor else prefix
    stop = after_prefix(prefix)
    if start < prefix or (stop is not None and start >= stop):
        raise bad_request("not a cursor of this listing")
    with store.snapshot():
        if recursive:
            items = list(store.scan(bucket, start, stop, limit + 1))
        else:
            items = _one_level(store, bucket, start, stop, depth=len(prefix) + 1, limit=limit + 1)
    if len(items) <= limit:
        return Page(items, None)
    return Page(items[:limit], encode_cursor(_start_of(items[limit])))


def after_prefix(prefix: str) -> str | None:
    """Return the least string above everything that begins with `prefix`; None when nothing is above."""
    for index in range(len(prefix) - 1, -1, -1):
        code = ord(prefix[index]) + 1
        if code in _SURROGATES:
            code = _SURROGATES.stop
        if code <= _LAST_CODE_POINT:
            return prefix[:index] + chr(code)
    return None


def encode_cursor(position: str) -> str:
    """Return an opaque cursor for a position in a listing."""
    return base64.urlsafe_b64encode(position.encode()).decode()


def decode_cursor(cursor: str) -> str:
    """Return the position that a cursor stands for.

    Raises:
        HubError: 400 for a cursor that this Hub did not make.
    """
    try:
        return base64.b64decode(cursor, altchars=b"-_", validate=True).decode()
    except ValueError as error:  # not base64, not ASCII, or not UTF-8
        raise bad_request("not a cursor of this Hub") from error


def _one_level(
    store: BucketStore, bucket: Bucket, start: str, stop: str | None, *, depth: int, limit: int
) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = []
    position: str | None = start
    while position is not None and len(items) < limit:
        following: str | None = None
        for item in store.scan(bucket, position, stop, limit - len(items)):
            cut = item["path"].find("/", depth)
            if cut >= 0:
                # What is in it is stepped over: '0' is the character after '/'.
                directory, following = item["path"][:cut], item["path"][:cut] + "0"
                newest = iso(store.newest_ms(bucket, directory + "/", following))
                items.append({"type": "directory", "path": directory, "uploadedAt": newest})
                break
            items.append(item)
        position = following
    return items


def _start_of(item: dict[str, Any]) -> str:
    path: str = item["path"]
    return path + "/" if item["type"] == "directory" else path
