"""Reads of chunks into the engine's buffers, with the reason for each miss."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Final, Protocol

import cachetools

from hfbucket_plugin.core import forks
from hfbucket_plugin.errors import (
    AccessDeniedError,
    BucketMissingError,
    HashMismatchError,
    HFBucketError,
    IntegrityError,
    MissingError,
    RevokedError,
    TempDirError,
    ThrottledError,
    TransportError,
    UnsentError,
)
from hfbucket_plugin.hub.transfer import DownloadToBuffer, xet_hashes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from hfbucket_plugin.core.buffers import RevocableBuffer
    from hfbucket_plugin.core.deadline import Deadline
    from hfbucket_plugin.core.keys import ContentId
    from hfbucket_plugin.core.telemetry import Telemetry
    from hfbucket_plugin.store.guarded import GuardedBucket
    from hfbucket_plugin.store.lookup import Existence
    from hfbucket_plugin.store.quarantine import Quarantine

_COPY_BYTES: Final = 4 * 1024 * 1024
_SAMPLE_BYTES: Final = 64 * 1024
"""Bytes that a probe reads of a content: less than the largest piece of content-defined chunking, 128 KiB."""

_SAMPLES: Final = 3
"""Number of contents that one probe samples, because an unreadable content says nothing about the others."""

_REMEMBERED: Final = 16
"""Number of recently served and of recently failed contents that probes sample in turn."""


_STORES_FAULT: Final = (TransportError, ThrottledError, AccessDeniedError, IntegrityError)


class Buffer(Protocol):
    """Engine memory that one chunk is read into."""

    @property
    def view(self) -> memoryview:
        """Writable bytes, exactly as many as a full chunk has."""

    @property
    def lease(self) -> RevocableBuffer:
        """Revocable right to write to the buffer; the owner may revoke it at any time."""

    def release(self) -> None:
        """Return the memory because the chunk was not read. Called at most once; nothing writes to it afterwards."""


class Reader:
    """Reads the chunks of one instance.

    Args:
        guarded: Bucket to read from.
        existence: Source of the contents under each key; learns which could not be served.
        outcomes: Telemetry for results.
        quarantine: Contents that recently could not be served.
    """

    def __init__(
        self,
        guarded: GuardedBucket,
        existence: Existence,
        outcomes: Telemetry,
        quarantine: Quarantine,
    ) -> None:
        self._bucket = guarded.bucket
        self._settings = guarded.settings
        self._breakers = guarded.breakers
        self._read_priority = guarded.read_priority
        self._temp_dir = guarded.temp_dir
        self._existence = existence
        self._outcomes = outcomes
        self._quarantine = quarantine
        self._closed = False
        self._probes = 0
        self._start_over()
        forks.reset_in_child(self._start_over)

    def _start_over(self) -> None:
        """Reset to no reads, initially and in a forked child, where the parent's reads do not continue."""
        self._lock = threading.Lock()
        self._active: set[DownloadToBuffer] = set()
        self._served: cachetools.LRUCache[str, ContentId] = cachetools.LRUCache(_REMEMBERED)
        self._failed: cachetools.LRUCache[str, ContentId] = cachetools.LRUCache(_REMEMBERED)

    def read_many(
        self,
        keys: Sequence[str],
        sizes: Sequence[int],
        open_buffer: Callable[[int], Buffer | None],
        deadline: Deadline,
        *,
        prefix_only: bool = False,
    ) -> list[Buffer | None]:
        """Read chunks into the engine's buffers.

        Args:
            keys: Key strings.
            sizes: Full chunk size of each key in bytes; an object of another size is refused.
            open_buffer: Returns the buffer for the key at an index, or None if no memory is available now. That chunk
                and all later ones are then misses, because reads never wait for memory.
            deadline: When to stop; chunks that have not arrived by then are misses.
            prefix_only: Whether chunks after the first miss are useless to the caller; they are released.

        Returns:
            The filled buffer of each key, or None. All other buffers have been released, and nothing writes to them any
            more.
        """
        started = time.monotonic()
        results: list[Buffer | None] = [None] * len(keys)
        if not self._settings.reads:
            self._outcomes.chunks("get", "role", len(keys))
            return results
        try:
            self._breakers.admit("read", keys, found=True)
            # Usually known from the lookup. If not, the request gets the time of a lookup, not of a get.
            asking = deadline.within(self._settings.lookup_timeout_secs)
            contents, unknown = self._existence.answers(keys, asking)
            if unknown is not None and not any(contents.values()):
                raise unknown
        except HFBucketError as error:
            self._outcomes.failed("get", error, len(keys), started)
            return results
        with self._read_priority.reading():
            self._outcomes.in_flight("get", self._read_priority.reads)
            wanted = self._full_chunks(keys, contents, sizes, unknown)
            outcome = self._serve(keys, wanted, open_buffer, results, deadline)
        if unknown is not None and outcome == "ok":
            outcome = unknown.kind
        self._outcomes.in_flight("get", self._read_priority.reads)
        served = [index for index, buffer in enumerate(results) if buffer is not None]
        self._outcomes.chunks("get", "hit", len(served))
        self._outcomes.bytes("read", sum(sizes[index] for index in served))
        self._outcomes.ended("get", outcome, started)
        if prefix_only:
            _release_behind_first_miss(results)
        self._existence.served([key for key, buffer in zip(keys, results, strict=True) if buffer is not None])
        return results

    def _full_chunks(
        self,
        keys: Sequence[str],
        contents: Mapping[str, ContentId | None],
        sizes: Sequence[int],
        unknown: HFBucketError | None,
    ) -> dict[int, tuple[str, ContentId]]:
        wanted = {}
        if unknown is not None:
            self._outcomes.warn("get", unknown.kind, str(unknown))
        for index, (key, size) in enumerate(zip(keys, sizes, strict=True)):
            content = contents.get(key)
            if unknown is not None and key not in contents:
                self._outcomes.chunks("get", unknown.kind, 1)
            elif content is None:
                self._outcomes.chunks("get", "missing", 1)
            elif content.size != size:
                self._outcomes.chunks("get", "size", 1)
                self._outcomes.warn_of_size("get", key, content.size, size)
            elif self._quarantine.holds(content.xet_hash):
                self._outcomes.chunks("get", "quarantined", 1)
            else:
                wanted[index] = (key, content)
        return wanted

    def _serve(
        self,
        keys: Sequence[str],
        wanted: Mapping[int, tuple[str, ContentId]],
        open_buffer: Callable[[int], Buffer | None],
        results: list[Buffer | None],
        deadline: Deadline,
    ) -> str:
        """Fill buffers into `results`; return the outcome of the operation as a label value."""
        reads = self._open(wanted, open_buffer)
        try:
            self._bucket.transfer.read([read for read, _ in reads.values()], deadline)
            if self._settings.verify == "hash":
                for read, _ in reads.values():
                    self._verify(read, deadline)
        except BaseException:  # on any error the memory must go back to the engine
            for read, buffer in reads.values():
                read.lease.revoke()
                buffer.release()
            raise
        finally:
            with self._lock:
                self._active.difference_update(read for read, _ in reads.values())
        outcome = "ok"
        store_works = self._report_health([read for read, _ in reads.values()])
        for index, (read, buffer) in reads.items():
            read.lease.revoke()
            if read.error is None:
                self._quarantine.served(read.content)
                results[index] = buffer
            else:
                buffer.release()
                outcome = read.error.kind
                self._missed(keys[index], read, store_works=store_works)
        return outcome

    def _open(
        self, wanted: Mapping[int, tuple[str, ContentId]], open_buffer: Callable[[int], Buffer | None]
    ) -> dict[int, tuple[DownloadToBuffer, Buffer]]:
        reads: dict[int, tuple[DownloadToBuffer, Buffer]] = {}
        for index, (key, content) in wanted.items():
            problem = "none is free"
            try:
                buffer = open_buffer(index)
            except Exception as error:  # noqa: BLE001 - the engine's allocator; earlier buffers must not leak
                buffer, problem = None, f"{type(error).__name__}: {error}"
            if buffer is None:
                left = len(wanted) - len(reads)
                self._outcomes.chunks("get", "allocation", left)
                self._outcomes.warn("get", "allocation", f"{key}: no memory for {left} chunks: {problem}")
                break
            if (
                buffer.lease.size != content.size
            ):  # the end of a larger buffer would be served without having been filled
                self._outcomes.chunks("get", "size", 1)
                self._outcomes.warn_of_size("get", key, content.size, buffer.lease.size)
                buffer.release()
                continue
            read = DownloadToBuffer(key, content, buffer.lease)
            with self._lock:
                self._active.add(read)
                closed = self._closed
            if closed:
                read.fail(TransportError(f"{key}: the instance is closed"))
            reads[index] = (read, buffer)
        return reads

    def _verify(self, read: DownloadToBuffer, deadline: Deadline) -> None:
        """Compare the Xet hash of each chunk with the listing, one chunk after the other to bound temporary space."""
        if not read.done:
            return
        try:
            deadline.check(f"{read.name}: hash")
            with self._temp_dir.file() as path:
                with path.open("wb") as out:
                    for at in range(0, read.content.size, _COPY_BYTES):
                        if (piece := read.lease.read(at, at + _COPY_BYTES)) is None:
                            raise RevokedError(f"{read.name}: its buffer was taken back while it was being hashed")
                        out.write(piece)
                actual = xet_hashes([path])[0]
        except HFBucketError as error:
            read.fail(error)
            return
        except OSError as error:
            # A local problem, which says nothing about the store or the object.
            read.fail(TempDirError(f"{read.name}: its hash could not be computed in download_tmp_dir: {error}"))
            return
        if actual != read.content.xet_hash:
            expected = read.content.xet_hash
            read.fail(
                HashMismatchError(f"{read.name}: what arrived has the hash {actual}, the listing says {expected}")
            )

    def _report_health(self, reads: Sequence[DownloadToBuffer]) -> bool:
        """Report to the breaker whether the store served anything; only if it did are the failures the objects' own."""
        for read in reads:
            self._remember(read.content, read.error)
        if any(read.error is None or isinstance(read.error, HashMismatchError) for read in reads):
            self._breakers.succeeded("read")
            return True
        for read in reads:
            if isinstance(read.error, _STORES_FAULT) and not isinstance(read.error, UnsentError) and not self._closed:
                self._breakers.failed("read", read.error)
                break
        return False

    def _remember(self, content: ContentId, error: HFBucketError | None) -> None:
        """Record for probes whether the latest read of a content succeeded."""
        with self._lock:
            if error is None:
                self._served[content.xet_hash] = content
                self._failed.pop(content.xet_hash, None)
            elif isinstance(error, MissingError):
                self._served.pop(content.xet_hash, None)
                self._failed.pop(content.xet_hash, None)
            elif isinstance(error, _STORES_FAULT):
                self._failed[content.xet_hash] = content

    def _missed(self, key: str, read: DownloadToBuffer, *, store_works: bool) -> None:
        error = read.error
        if error is None or self._closed:
            return
        self._outcomes.chunks("get", error.kind, 1)
        self._outcomes.warn("get", error.kind, str(error))
        if isinstance(error, MissingError):
            # The store lacks an object that the Hub lists, or listed some time ago.
            self._existence.gone(key)
            if isinstance(error, BucketMissingError):  # a missing bucket says nothing about the object
                return
        elif isinstance(error, HashMismatchError):
            self._existence.drop(key)
            self._bucket.transfer.renew()  # makes the next fetch independent of this one
        elif not (store_works and isinstance(error, (IntegrityError, TransportError))):
            return
        self._quarantine.failed(read.content, error, key)

    def probe(self, deadline: Deadline) -> None:
        """Read parts of several contents, different ones each time, to check that the store serves any.

        If one is served, those that fail are quarantined, because the fault is then their own.

        Raises:
            HFBucketError: No content was served before the deadline.
        """
        if contents := self._to_sample():
            sampled = _Sampled(self._quarantine.failed)

            def ended(content: ContentId, error: HFBucketError | None) -> None:
                self._remember(content, error)
                sampled.add(content, error)

            self._bucket.transfer.sample(contents, _SAMPLE_BYTES, deadline, ended)
        else:
            self._bucket.transfer.warm_up(deadline)

    def _to_sample(self) -> list[ContentId]:
        """Return the contents to sample next: those that have not failed recently, then those that have."""
        known = {content.xet_hash: content for content in self._existence.some(_REMEMBERED) if content.size}
        with self._lock:
            failed = dict(self._failed.items())
            known |= dict(self._served.items())
            self._probes += 1
            turn = self._probes * _SAMPLES
        fresh = [content for xet_hash, content in known.items() if xet_hash not in failed]
        stale = list(failed.values())
        return [*_in_turn(fresh, turn), *_in_turn(stale, turn)][:_SAMPLES]

    def close(self) -> None:
        """Stop writing to any buffer."""
        with self._lock:
            self._closed = True
            active = list(self._active)
        for read in active:
            read.fail(TransportError(f"{read.name}: the instance was closed"))


def _in_turn(contents: list[ContentId], turn: int) -> list[ContentId]:
    """Return the contents rotated so that each call starts with another one."""
    start = turn % len(contents) if contents else 0
    return contents[start:] + contents[:start]


class _Sampled:
    """Outcomes of the contents of one probe; thread-safe.

    Args:
        at_fault: Called for each content that failed although another one was served.
    """

    def __init__(self, at_fault: Callable[[ContentId], None]) -> None:
        self._at_fault = at_fault
        self._lock = threading.Lock()
        self._served = False
        self._failed: list[ContentId] = []

    def add(self, content: ContentId, error: HFBucketError | None) -> None:
        """Record the outcome of a content; None if it was served."""
        with self._lock:
            if error is None:
                self._served = True
            elif isinstance(error, (IntegrityError, TransportError)) and not isinstance(error, UnsentError):
                self._failed.append(content)
            failed, self._failed = (self._failed, []) if self._served else ([], self._failed)
        for one in failed:
            self._at_fault(one)


def _release_behind_first_miss(results: list[Buffer | None]) -> None:
    missed = False
    for index, buffer in enumerate(results):
        if buffer is None:
            missed = True
        elif missed:
            buffer.release()
            results[index] = None
