"""Small objects of ours below `<prefix>/.hfbucket/`: written, read and listed whole."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

from hfbucket_plugin.errors import DeadlineError, IntegrityError, TransportError
from hfbucket_plugin.hub.records import fetch
from hfbucket_plugin.hub.transfer import Upload

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hfbucket_plugin.core.deadline import Deadline
    from hfbucket_plugin.core.keys import ContentId
    from hfbucket_plugin.errors import ItemFailure
    from hfbucket_plugin.hub.bucket import Bucket, ObjectInfo

MAX_BYTES: Final = 8 * 1024 * 1024
"""Largest that is read: what is longer was not written by us."""


def upload(bucket: Bucket, data: bytes, deadline: Deadline) -> ContentId:
    """Send bytes to the store; they are in no bucket yet.

    Raises:
        HFBucketError: The store did not take them.
    """
    handle = Upload()
    try:
        (content,) = bucket.transfer.upload([data], deadline, handle)
    except DeadlineError:
        bucket.transfer.abandon(handle)
        raise
    return content


def put(bucket: Bucket, name: str, content: ContentId, deadline: Deadline) -> None:
    """Give a content a name below the instance's prefix.

    Raises:
        HFBucketError: It has none, or nobody knows.
    """
    raise_failed(bucket.add({bucket.handle.join(name): content}, deadline))


def remove(bucket: Bucket, paths: Sequence[str], deadline: Deadline) -> None:
    """Delete objects.

    Raises:
        HFBucketError: Some are still there, or nobody knows.
    """
    if paths:
        raise_failed(bucket.delete(paths, deadline))


def raise_failed(failed: Mapping[str, ItemFailure]) -> None:
    """Raise the first failure of a batch.

    Raises:
        TransportError: There is one.
    """
    for failure in failed.values():
        raise TransportError(f"{failure.item}: {failure.message}")


def read_json(bucket: Bucket, info: ObjectInfo, deadline: Deadline) -> dict[str, Any]:
    """Read an object that holds a JSON record.

    Raises:
        IntegrityError: It holds none.
        HFBucketError: It did not arrive.
    """
    if info.content.size > MAX_BYTES:
        raise IntegrityError(f"{info.path}: {info.content.size} bytes are no record of ours")
    data = bytes(fetch(bucket, info.path, info.content, deadline).data)
    try:
        record = json.loads(data)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise IntegrityError(f"{info.path}: holds no JSON record")
    return record
