"""Small metadata records of ours below `<prefix>/.hfbucket/`."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from hfbucket_plugin.core.buffers import RevocableBuffer
from hfbucket_plugin.core.concurrency import WorkerPool, result_of
from hfbucket_plugin.errors import DeadlineError, HFBucketError, IntegrityError, TransportError
from hfbucket_plugin.hub.transfer import DownloadToBuffer, Upload, xet_hashes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hfbucket_plugin.core.deadline import Deadline
    from hfbucket_plugin.core.keys import ContentId
    from hfbucket_plugin.errors import ItemFailure
    from hfbucket_plugin.hub.bucket import Bucket, ObjectInfo


Bytes = bytearray | mmap.mmap
"""What an object was read into."""


class RecordStore:
    """Reads and writes small objects of ours.

    Args:
        bucket: The instance's.
        name: Names the threads.
        uploads: Most uploads at one time.
    """

    def __init__(self, bucket: Bucket, name: str, uploads: int = 1) -> None:
        self._bucket = bucket
        self._uploads = WorkerPool(f"hfbucket-own-{name}", uploads, 1)

    def read(self, objects: Sequence[tuple[str, ContentId]], deadline: Deadline) -> list[Bytes | HFBucketError]:
        """Read objects side by side, and compare each with its hash. They are all in memory at one time.

        Args:
            objects: A name for errors, and the content, of each.
            deadline: When to give up.

        Returns:
            The bytes of each, or why they did not arrive.
        """
        with contextlib.ExitStack() as stack:
            memory = [stack.enter_context(_Memory(content.size)) for _, content in objects]
            whole = [one.data for one in memory]
            reads = [
                DownloadToBuffer(name, content, RevocableBuffer(memoryview(data)), background=True)
                for (name, content), data in zip(objects, whole, strict=True)
            ]
            try:
                self._bucket.transfer.read(reads, deadline)
            finally:
                for read in reads:
                    read.lease.revoke()
            arrived = [index for index, read in enumerate(reads) if read.error is None]
            hashes = dict(zip(arrived, _hashes_of([memory[index] for index in arrived]), strict=True))
        results: list[Bytes | HFBucketError] = []
        for index, (read, data) in enumerate(zip(reads, whole, strict=True)):
            if read.error is not None:
                results.append(read.error)
            elif hashes[index] != read.content.xet_hash:
                self._bucket.transfer.renew()  # so that the next try is independent of this one
                expected = read.content.xet_hash
                results.append(
                    IntegrityError(f"{read.name}: what arrived has the hash {hashes[index]}, not {expected}")
                )
            else:
                results.append(data)
        return results

    def read_one(self, name: str, content: ContentId, deadline: Deadline) -> Bytes:
        """Read one object; see `read`.

        Raises:
            HFBucketError: It did not arrive.
        """
        (data,) = self.read([(name, content)], deadline)
        if isinstance(data, HFBucketError):
            raise data
        return data

    def put(self, path: str, data: bytes, deadline: Deadline) -> None:
        """Write an object, in the place of what is there.

        Args:
            path: From the root of the bucket.
            data: Its bytes.
            deadline: When to give up.

        Raises:
            HFBucketError: It is not there, or its state is unknown.
        """
        raise_failed(self._bucket.add({path: self.upload(data, deadline)}, deadline))

    def upload(self, data: bytes | RevocableBuffer, deadline: Deadline) -> ContentId:
        """Upload a content; it is in no bucket yet. hf_xet may hang for longer than its timeouts say.

        Raises:
            HFBucketError: It was not uploaded.
        """
        upload = Upload()
        try:
            stored = self._uploads.submit(self._bucket.transfer.upload, [data], deadline, upload)
        except RuntimeError as error:
            raise TransportError(f"not uploaded: {error}") from None
        try:
            return result_of(stored, deadline, "upload")[0]
        except DeadlineError:
            self._bucket.transfer.abandon(upload)
            raise

    def close(self) -> None:
        """Write nothing any more."""
        self._uploads.close()


_HASHED_TOGETHER = 64
"""Files open at one time: one call for many small ones is much faster than one call each."""

_MAPPED_BYTES = 1024 * 1024
"""From here on bytes lie where they are hashed. Smaller ones are copied for it, so that thousands need no descriptor each."""


class _Memory:
    """Memory for an object that is to be read and hashed: a file without a path, mapped, where it is not small.

    hf_xet hashes files only. Nothing is filled with zeros while Python's lock is held. Use it as a context manager: its
    descriptor goes at the end, and the bytes stay for as long as they are referenced.

    Args:
        size: Bytes.

    Raises:
        OSError: The system has no memory, or no descriptor, for it.
    """

    def __init__(self, size: int) -> None:
        self.descriptor: int | None = None
        self.data: Bytes
        if size < _MAPPED_BYTES:
            self.data = bytearray(size)
            return
        descriptor = os.memfd_create("hfbucket-object")
        try:
            os.ftruncate(descriptor, size)
            self.data = mmap.mmap(descriptor, size)
        except BaseException:
            os.close(descriptor)
            raise
        self.descriptor = descriptor

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None


def _hashes_of(memory: Sequence[_Memory]) -> list[str]:
    """The Xet hashes of what lies in memory.

    Raises:
        OSError: The system has no memory for copies of the small ones.
    """
    found: list[str] = []
    for start in range(0, len(memory), _HASHED_TOGETHER):
        with contextlib.ExitStack() as stack:
            paths = []
            for one in memory[start : start + _HASHED_TOGETHER]:
                descriptor = one.descriptor
                if descriptor is None:
                    file = stack.enter_context(open(os.memfd_create("hfbucket-hash"), "wb"))  # noqa: PTH123 - it has no path
                    file.write(one.data)
                    file.flush()
                    descriptor = file.fileno()
                paths.append(Path(f"/proc/self/fd/{descriptor}"))
            found += xet_hashes(paths)
    return found


def hash_of(data: bytearray) -> str:
    """The Xet hash of bytes.

    Raises:
        OSError: The system has no memory for it.
    """
    with open(os.memfd_create("hfbucket-hash"), "wb") as file:  # noqa: PTH123 - it has no path
        file.write(data)
        file.flush()
        return xet_hashes([Path(f"/proc/self/fd/{file.fileno()}")])[0]


@dataclass(frozen=True, slots=True)
class Fetched:
    """What was read.

    Attributes:
        data: The bytes.
        seconds: How long they took, without what comes before the first of them.
    """

    data: bytearray
    seconds: float


def fetch(bucket: Bucket, name: str, content: ContentId, deadline: Deadline) -> Fetched:
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
    read = DownloadToBuffer(name, content, RevocableBuffer(memoryview(data)))
    started = time.monotonic()
    bucket.transfer.read([read], deadline)
    seconds = time.monotonic() - started
    if read.error is not None:
        raise read.error
    if (actual := hash_of(data)) != content.xet_hash:
        raise IntegrityError(f"{name}: what arrived has the hash {actual}, the listing says {content.xet_hash}")
    return Fetched(data, seconds)


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
        HFBucketError: It has none, or its state is unknown.
    """
    raise_failed(bucket.add({bucket.handle.join(name): content}, deadline))


def remove(bucket: Bucket, paths: Sequence[str], deadline: Deadline) -> None:
    """Delete objects.

    Raises:
        HFBucketError: Some are still there, or their state is unknown.
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
