"""Small metadata records below `<prefix>/.hfbucket/`."""

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
"""Types of the buffer that an object was read into."""


class RecordStore:
    """Reads and writes small metadata objects.

    Args:
        bucket: Bucket of the instance.
        name: Prefix of the thread names.
        uploads: Maximum number of concurrent uploads.
    """

    def __init__(self, bucket: Bucket, name: str, uploads: int = 1) -> None:
        self._bucket = bucket
        self._uploads = WorkerPool(f"hfbucket-own-{name}", uploads, 1)

    def read(self, objects: Sequence[tuple[str, ContentId]], deadline: Deadline) -> list[Bytes | HFBucketError]:
        """Read objects concurrently and verify their hashes. All of them are in memory at the same time.

        Args:
            objects: Name for errors, and content, of each object.
            deadline: When to give up.

        Returns:
            For each object its bytes, or the error.
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
                self._bucket.transfer.renew()  # makes the next attempt independent of this one
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
            HFBucketError: The object was not read.
        """
        (data,) = self.read([(name, content)], deadline)
        if isinstance(data, HFBucketError):
            raise data
        return data

    def put(self, path: str, data: bytes, deadline: Deadline) -> None:
        """Write an object, replacing an existing one.

        Args:
            path: Path from the root of the bucket.
            data: Bytes of the object.
            deadline: When to give up.

        Raises:
            HFBucketError: The object was not written, or its state is unknown.
        """
        raise_failed(self._bucket.add({path: self.upload(data, deadline)}, deadline))

    def upload(self, data: bytes | RevocableBuffer, deadline: Deadline) -> ContentId:
        """Upload a content without naming it in a bucket. hf_xet may hang for longer than its timeouts.

        Raises:
            HFBucketError: The content was not uploaded.
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
        """Stop writing."""
        self._uploads.close()


_HASHED_TOGETHER = 64
"""Number of files hashed in one call, and open meanwhile; one call for many small files is faster than one each."""

_MAPPED_BYTES = 1024 * 1024
"""Size in bytes from which objects are read directly into the file that is hashed. Smaller ones are copied, so that
thousands of them need no descriptor each."""


class _Memory:
    """Memory for an object to read and hash; unless the object is small, a mapped file without a path.

    hf_xet hashes files only. Nothing is zero-filled while the GIL is held. Use it as a context manager: the descriptor
    is closed at the end, and the bytes stay valid as long as they are referenced.

    Args:
        size: Size in bytes.

    Raises:
        OSError: The system has no memory or no descriptor for it.
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
    """Return the Xet hashes of objects in memory.

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
    """Return the Xet hash of bytes.

    Raises:
        OSError: The system has no memory for a copy.
    """
    with open(os.memfd_create("hfbucket-hash"), "wb") as file:  # noqa: PTH123 - it has no path
        file.write(data)
        file.flush()
        return xet_hashes([Path(f"/proc/self/fd/{file.fileno()}")])[0]


@dataclass(frozen=True, slots=True)
class Fetched:
    """Content that was read.

    Attributes:
        data: Bytes of the content.
        seconds: Read time in seconds, without the setup before the first byte.
    """

    data: bytearray
    seconds: float


def fetch(bucket: Bucket, name: str, content: ContentId, deadline: Deadline) -> Fetched:
    """Read an object as the engine does, through the streams of `Transfer`.

    Args:
        bucket: Bucket to read from.
        name: Name of the object, for errors.
        content: Content to read.
        deadline: When to give up.

    Raises:
        IntegrityError: The bytes do not match the content.
        HFBucketError: The object was not read.
    """
    bucket.transfer.warm_up(deadline)  # keeps the session setup out of the measurement
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
"""Maximum size in bytes of a record to read; this package writes no longer ones."""


def upload(bucket: Bucket, data: bytes, deadline: Deadline) -> ContentId:
    """Upload bytes to the store without naming them in a bucket.

    Raises:
        HFBucketError: The store did not accept them.
    """
    handle = Upload()
    try:
        (content,) = bucket.transfer.upload([data], deadline, handle)
    except DeadlineError:
        bucket.transfer.abandon(handle)
        raise
    return content


def put(bucket: Bucket, name: str, content: ContentId, deadline: Deadline) -> None:
    """Name a content below the prefix of the instance.

    Raises:
        HFBucketError: The content was not named, or its state is unknown.
    """
    raise_failed(bucket.add({bucket.handle.join(name): content}, deadline))


def remove(bucket: Bucket, paths: Sequence[str], deadline: Deadline) -> None:
    """Delete objects.

    Raises:
        HFBucketError: Some objects still exist, or their state is unknown.
    """
    if paths:
        raise_failed(bucket.delete(paths, deadline))


def raise_failed(failed: Mapping[str, ItemFailure]) -> None:
    """Raise the first failure of a batch.

    Raises:
        TransportError: The batch has a failure.
    """
    for failure in failed.values():
        raise TransportError(f"{failure.item}: {failure.message}")


def read_json(bucket: Bucket, info: ObjectInfo, deadline: Deadline) -> dict[str, Any]:
    """Read an object that holds a JSON record.

    Raises:
        IntegrityError: The object is not a JSON record.
        HFBucketError: The object was not read.
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
