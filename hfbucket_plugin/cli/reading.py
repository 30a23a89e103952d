"""One object, read whole into memory and compared with its hash."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hfbucket_plugin.errors import IntegrityError
from hfbucket_plugin.leases import Lease
from hfbucket_plugin.own_objects import hash_of
from hfbucket_plugin.transfer import Read

if TYPE_CHECKING:
    from hfbucket_plugin.bucket import Bucket
    from hfbucket_plugin.content import Content
    from hfbucket_plugin.deadlines import Deadline


@dataclass(frozen=True, slots=True)
class Fetched:
    """What was read.

    Attributes:
        data: The bytes.
        seconds: How long they took, without what comes before the first of them.
    """

    data: bytearray
    seconds: float


def fetch(bucket: Bucket, name: str, content: Content, deadline: Deadline) -> Fetched:
    """Read an object as the engine does: by the streams of `Transfer`.

    Args:
        bucket: Where from.
        name: Names the object in errors.
        content: What to read.
        deadline: When to give up.

    Raises:
        IntegrityError: What arrived is not the object.
        HFBucketError: It did not arrive.
    """
    bucket.transfer.warm_up(deadline)  # else the session's making would be measured too
    data = bytearray(content.size)
    read = Read(name, content, Lease(memoryview(data)))
    started = time.monotonic()
    bucket.transfer.read([read], deadline)
    seconds = time.monotonic() - started
    if read.error is not None:
        raise read.error
    if (actual := hash_of(data)) != content.xet_hash:
        raise IntegrityError(f"{name}: what arrived has the hash {actual}, the listing says {content.xet_hash}")
    return Fetched(data, seconds)
