"""Pages of a bucket's tree, by keyset: the cost of a page depends neither on its position nor on the bucket's size."""

import base64
from typing import Any

from localhub.errors import bad_request
from localhub.state.buckets import Bucket, BucketStore, iso

_LAST_CODE_POINT = 0x10FFFF
_SURROGATES = range(0xD800, 0xE000)


def tree_page(
    store: BucketStore, bucket: Bucket, *, prefix: str, recursive: bool, cursor: str | None, limit: int
) -> tuple[list[dict[str, Any]], str | None]:
    """Return one page of the entries that begin with `prefix`, by path, and the cursor of the next page, if any.

    The prefix is lexical, as on the Hub: `v1` also matches `v10/x`. Recursive pages hold files only. Other pages hold the
    files of one level, and each directory of that level with the time of its newest file. The prefixes `logs` and `logs/`
    both list the contents of `logs` (`HfFileSystem.ls` relies on it); `logs` also lists its lexical siblings.

    Raises:
        HubError: 400 for a cursor that this Hub did not issue, or issued for another prefix.
    """
    start = decode_cursor(cursor) if cursor else prefix
    stop = after_prefix(prefix)
    if start < prefix or (stop is not None and start >= stop):
        raise bad_request("the cursor is not one of this listing")
    with store.snapshot():
        if recursive:
            items = list(store.scan(bucket, start, stop, limit + 1))
        else:
            items = _one_level(store, bucket, start, stop, depth=len(prefix) + 1, limit=limit + 1)
    if len(items) <= limit:
        return items, None
    following = items[limit]["path"] + ("/" if items[limit]["type"] == "directory" else "")
    return items[:limit], encode_cursor(following)


def after_prefix(prefix: str) -> str | None:
    """Return the least string greater than all that begin with `prefix`, or None if there is none."""
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
        HubError: 400 for a cursor that this Hub did not issue.
    """
    try:
        return base64.b64decode(cursor, altchars=b"-_", validate=True).decode()
    except ValueError as error:  # not base64, not ASCII, or not UTF-8
        raise bad_request("the cursor is not one of this Hub") from error


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
                # Skip the rest of the directory: '0' is the character after '/'.
                directory, following = item["path"][:cut], item["path"][:cut] + "0"
                newest = iso(store.newest_ms(bucket, directory + "/", following))
                items.append({"type": "directory", "path": directory, "uploadedAt": newest})
                break
            items.append(item)
        position = following
    return items
