"""What both engine surfaces share: full-chunk rules, prefix hits, reads into the engine's buffers, writes, deletes.

Everything here takes key strings and blocks its thread up to a deadline at most. Nothing raises into an engine for a
single chunk: a chunk that is not served is a miss with a reason, counted and logged apart from a plain one.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final, Protocol

from hfbucket_plugin.deadlines import Deadline
from hfbucket_plugin.errors import (
    BucketMissingError,
    HFBucketError,
    IntegrityError,
    KeyFormatError,
    MissingError,
    TransportError,
)
from hfbucket_plugin.existence import Existence
from hfbucket_plugin.instance import open_bucket
from hfbucket_plugin.keys import decode_name, encode_name, parse_key
from hfbucket_plugin.leases import Lease
from hfbucket_plugin.outcomes import Outcomes
from hfbucket_plugin.puts import Putter
from hfbucket_plugin.scratch import Scratch
from hfbucket_plugin.transfer import Content, Read, xet_hashes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from hfbucket_plugin import metrics
    from hfbucket_plugin.errors import ItemFailure
    from hfbucket_plugin.puts import Source
    from hfbucket_plugin.settings import InstanceSettings

_PING_SECS: Final = 3.0
"""Below the 5 s that LMCache's health monitor grants a ping (`lmcache/v1/health_monitor`)."""

_WARM_UP_SECS: Final = 5.0
_WARM_UP_EVERY_SECS: Final = 10.0
"""Apart at least, so that an outage does not double the requests of lookups."""

_LIST_PAGE_SECS: Final = 30.0
_COPY_BYTES: Final = 4 * 1024 * 1024


class Buffer(Protocol):
    """Memory of the engine's that one chunk is read into."""

    @property
    def view(self) -> memoryview:
        """Writable bytes, exactly as many as a full chunk has."""

    def release(self) -> None:
        """Give the memory back: the chunk was not read. Called at most once, and nothing writes afterwards."""


class ChunkStore:
    """The chunks of one instance.

    Args:
        settings: The instance's.
        instance: Its name.
        sink: Where outcomes are counted.
        get_timeout_secs: The deadline that gets usually have.
    """

    def __init__(self, settings: InstanceSettings, instance: str, sink: metrics.Sink, get_timeout_secs: float) -> None:
        self.settings = settings
        self._instance = instance
        self._handle = settings.bucket_handle
        self._bucket = open_bucket(settings, instance, sink, get_timeout_secs)
        self._outcomes = Outcomes(instance, sink)
        self._existence = Existence(self._bucket, settings, instance)
        self._putter = Putter(self._bucket, self._existence, self._outcomes, settings)
        self._scratch = Scratch(settings.download_tmp_dir)
        self._next_warm_up = 0.0

    def prefix_hits(self, keys: Sequence[str], size: int) -> int:
        """How many keys, from the first on without a gap, are there as full chunks of `size` bytes.

        Returns within `lookup_timeout_secs`; a failure is 0 hits, counted and logged as what it is.
        """
        started = time.monotonic()
        self.warm_up()
        try:
            contents = self._existence.contents(keys, Deadline.after(self.settings.lookup_timeout_secs))
        except HFBucketError as error:
            self._failed("lookup", error, len(keys), started)
            return 0
        hits = 0
        for key in keys:
            content = contents.get(key)
            if content is None or content.size != size:
                break
            hits += 1
        self._tell_lookup(keys, contents, hits, size)
        self._outcomes.ended("lookup", "ok", started)
        return hits

    def _tell_lookup(self, keys: Sequence[str], contents: Mapping[str, Content | None], hits: int, size: int) -> None:
        rest = [contents.get(key) for key in keys[hits:]]
        refused = [content for content in rest if content is not None and content.size != size]
        missing = rest.count(None)
        self._outcomes.chunks("lookup", "hit", hits)
        self._outcomes.chunks("lookup", "missing", missing)
        self._outcomes.chunks("lookup", "size", len(refused))
        self._outcomes.chunks("lookup", "behind_a_gap", len(rest) - missing - len(refused))
        if refused:
            self._warn_of_size("lookup", f"{len(refused)} chunks", refused[0].size, size)

    def _warn_of_size(self, operation: str, what: str, actual: int, size: int) -> None:
        self._outcomes.warn(
            operation,
            "size",
            f"{what}: refused, since the object has {actual} bytes and a full chunk {size}; was it written with another "
            "chunk_size, dtype or layout?",
        )

    def warm_up(self) -> None:
        """Have a session for reading made in the background, if there is none.

        At the start it spares the first read an access token, TLS and client set-up, and tells the log at once of a
        token or bucket that will not do; beside a lookup it runs while the Hub looks the keys up.
        """
        if not self._bucket.transfer.ready and time.monotonic() >= self._next_warm_up:
            self._next_warm_up = time.monotonic() + _WARM_UP_EVERY_SECS
            self._existence.in_background(self._make_session)

    def _make_session(self) -> None:
        try:
            self._bucket.transfer.warm_up(Deadline.after(_WARM_UP_SECS))
        except HFBucketError as error:
            if not self._is_yet_to_be_created(error):
                self._outcomes.warn("session", error.kind, str(error))

    def read_many(
        self,
        keys: Sequence[str],
        size: int,
        open_buffer: Callable[[int], Buffer | None],
        deadline: Deadline,
        *,
        prefix_only: bool = False,
    ) -> list[Buffer | None]:
        """Read chunks into the engine's buffers.

        Args:
            keys: Their keys.
            size: Bytes of a full chunk; an object of another size is refused.
            open_buffer: Gives the buffer for the key at an index, or None when there is no memory at this moment:
                then this chunk and those after it are misses, since nothing here waits for memory.
            deadline: What has arrived by then is returned; the rest are misses.
            prefix_only: Whether chunks behind the first miss are of no use, and are released.

        Returns:
            For each key its filled buffer, or None; every buffer that is not returned was released.
        """
        started = time.monotonic()
        results: list[Buffer | None] = [None] * len(keys)
        try:
            contents = self._existence.contents(keys, deadline)
        except HFBucketError as error:
            self._failed("get", error, len(keys), started)
            return results
        reads = self._open(self._full_chunks(keys, contents, size), open_buffer)
        self._bucket.transfer.read([read for read, _ in reads.values()], deadline)
        if self.settings.verify == "hash":
            for read, buffer in reads.values():
                self._verify(read, buffer, deadline)
        outcome = "ok"
        for index, (read, buffer) in reads.items():
            read.lease.revoke()
            if read.error is None:
                results[index] = buffer
            else:
                buffer.release()
                outcome = read.error.kind
                self._missed(keys[index], read.error)
        served = sum(result is not None for result in results)
        self._outcomes.chunks("get", "hit", served)
        self._outcomes.bytes("read", served * size)
        self._outcomes.ended("get", outcome, started)
        if prefix_only:
            _release_behind_first_miss(results)
        return results

    def _full_chunks(
        self, keys: Sequence[str], contents: Mapping[str, Content | None], size: int
    ) -> dict[int, tuple[str, Content]]:
        wanted = {}
        for index, key in enumerate(keys):
            content = contents.get(key)
            if content is None:
                self._outcomes.chunks("get", "missing", 1)
            elif content.size != size:
                self._outcomes.chunks("get", "size", 1)
                self._warn_of_size("get", key, content.size, size)
            else:
                wanted[index] = (key, content)
        return wanted

    def _open(
        self, wanted: Mapping[int, tuple[str, Content]], open_buffer: Callable[[int], Buffer | None]
    ) -> dict[int, tuple[Read, Buffer]]:
        reads: dict[int, tuple[Read, Buffer]] = {}
        for index, (key, content) in wanted.items():
            problem = "there is none free"
            try:
                buffer = open_buffer(index)
            except Exception as error:  # noqa: BLE001 - the engine's allocator; the buffers opened before must not leak
                buffer, problem = None, f"{type(error).__name__}: {error}"
            if buffer is None:
                left = len(wanted) - len(reads)
                self._outcomes.chunks("get", "allocation", left)
                self._outcomes.warn("get", "allocation", f"{key}: no memory for {left} chunks: {problem}")
                break
            reads[index] = (Read(key, content, Lease(buffer.view)), buffer)
        return reads

    def _verify(self, read: Read, buffer: Buffer, deadline: Deadline) -> None:
        """Compare the Xet hash of what was read with the listing's; one chunk after the other bounds the space."""
        if not read.done:
            return
        try:
            deadline.check(f"{read.name}: hash")
            with self._scratch.file() as path:
                with path.open("wb") as out:
                    for at in range(0, read.content.size, _COPY_BYTES):
                        out.write(buffer.view[at : at + _COPY_BYTES])
                actual = xet_hashes([path])[0]
        except HFBucketError as error:
            read.fail(error)
            return
        except OSError as error:
            read.fail(TransportError(f"{read.name}: its hash could not be computed: {error}"))
            return
        if actual != read.content.xet_hash:
            expected = read.content.xet_hash
            read.fail(IntegrityError(f"{read.name}: what arrived has the hash {actual}, the listing says {expected}"))

    def _missed(self, key: str, error: HFBucketError) -> None:
        self._outcomes.chunks("get", error.kind, 1)
        self._outcomes.warn("get", error.kind, str(error))
        if isinstance(error, (MissingError, IntegrityError)):
            self._existence.cache.drop(key)

    def write_many(self, sources: Sequence[Source], size: int, deadline: Deadline) -> list[ItemFailure]:
        """Store full chunks; see `Putter.write_many`."""
        return self._putter.write_many(sources, size, deadline)

    def puts_refused(self, keys: Sequence[str]) -> None:
        """Tell of chunks that were not stored because no more puts are taken, or were given up while they waited."""
        self._outcomes.chunks("put", "not_taken", len(keys))
        self._outcomes.warn("put", "not_taken", f"{len(keys)} chunks were not stored: too many puts wait, or it closes")

    def delete(self, keys: Sequence[str], deadline: Deadline) -> dict[str, ItemFailure]:
        """Delete chunks, at once and for ever.

        Returns:
            What failed, by key.

        Raises:
            HFBucketError: The request failed as a whole.
        """
        started = time.monotonic()
        paths = {self._handle.join(encode_name(key)): key for key in keys}
        try:
            failures = {paths.get(p, p): f for p, f in self._bucket.delete(list(paths), deadline).items()}
        except HFBucketError as error:
            for key in keys:  # it may have been done, and only the answer be missing
                self._existence.cache.drop(key)
            self._failed("delete", error, len(keys), started)
            raise
        for key in keys:
            if key in failures:
                self._existence.cache.drop(key)
                self._outcomes.warn("delete", failures[key].kind, f"{key}: {failures[key].message}")
            else:
                self._existence.cache.put(key, None)
        self._outcomes.chunks("delete", "deleted", len(keys) - len(failures))
        self._outcomes.chunks("delete", "hub", len(failures))
        self._outcomes.ended("delete", "hub" if failures else "ok", started)
        return failures

    def list_keys(self) -> Iterator[str]:
        """Stream the key strings of this instance: not those of a longer prefix, nor objects that are no chunks.

        Raises:
            HFBucketError: A page did not come.
        """
        for info in self._bucket.list_objects(self._handle.join(""), _LIST_PAGE_SECS):
            name = self._handle.relative(info.path)
            if name is None or "/" in name:
                continue
            try:
                key = decode_name(name)
                parse_key(key)
            except KeyFormatError:
                continue
            yield key

    def ping(self) -> None:
        """Ask for the bucket's record.

        Raises:
            HFBucketError: It did not come. A bucket that will be created on the first write is no error.
        """
        started = time.monotonic()
        try:
            self._bucket.info(Deadline.after(_PING_SECS))
        except HFBucketError as error:
            self._failed("ping", error, 0, started)
            if not self._is_yet_to_be_created(error):
                raise
        else:
            self._outcomes.ended("ping", "ok", started)

    def _is_yet_to_be_created(self, error: HFBucketError) -> bool:
        return self.settings.create_bucket_if_missing and isinstance(error, BucketMissingError)

    def _failed(self, operation: str, error: HFBucketError, chunks: int, started: float) -> None:
        if self._is_yet_to_be_created(error):
            self._outcomes.chunks(operation, "missing", chunks)
            self._outcomes.ended(operation, "ok", started)
        else:
            self._outcomes.failed(operation, error, chunks, started)

    def sweep(self) -> None:
        """Remove temporary files of dead processes, beside whatever else is going on."""
        self._existence.in_background(self._scratch.sweep_quietly)

    def close(self) -> None:
        """Take no more work and end all transfers at once; waits for nothing."""
        self._putter.close()
        self._existence.close()
        self._bucket.close()
        self._scratch.close()


def _release_behind_first_miss(results: list[Buffer | None]) -> None:
    missed = False
    for index, buffer in enumerate(results):
        if buffer is None:
            missed = True
        elif missed:
            buffer.release()
            results[index] = None
