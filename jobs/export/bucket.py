"""Bucket instance as an endpoint of an export."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any, Final

from hfbucket_plugin.core.buffers import RevocableBuffer
from hfbucket_plugin.core.deadline import Deadline
from hfbucket_plugin.core.keys import encode_name
from hfbucket_plugin.core.telemetry import MemorySink
from hfbucket_plugin.errors import BucketMissingError, HFBucketError, IntegrityError, RefusedError
from hfbucket_plugin.hub.connect import open_bucket
from hfbucket_plugin.hub.listing import list_chunks, list_chunks_ahead
from hfbucket_plugin.hub.transfer import DownloadToBuffer, Upload
from jobs.batch.model import FRESH_SECS
from jobs.export.endpoint import EndpointObject
from warmer.plan.key_files import keys_of, look_up_keys

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Iterator, Mapping, Sequence

    from hfbucket_plugin.config.settings import InstanceSettings
    from hfbucket_plugin.core.keys import ContentId
    from hfbucket_plugin.hub.bucket import Bucket
    from hfbucket_plugin.hub.listing import ChunkEntry
    from hfbucket_plugin.tools.selection import Selection
    from jobs.export.endpoint import Chunk

_REQUEST_SECS: Final = 60.0


class InstanceEnd:
    """Endpoint of an export that is a bucket instance.

    Args:
        name: Name of the instance.
        settings: Its settings.
        may_be_missing: Whether a missing bucket counts as empty, for a destination that will be created. Must be false
            for
            a source: its mirror would be emptied.
    """

    def __init__(self, name: str, settings: InstanceSettings, *, may_be_missing: bool = False) -> None:
        self._name = name
        self._may_be_missing = may_be_missing
        self.settings = settings
        # hf_xet's own timeouts follow the timeouts of the instance.
        patient = settings.model_copy(update={"put_timeout_secs": _REQUEST_SECS})
        self.bucket: Bucket = open_bucket(patient, name, MemorySink(), _REQUEST_SECS)

    @property
    def name(self) -> str:
        """Name of the instance."""
        return self._name

    def begin(self) -> None:
        """Create the bucket if it is missing and creation is allowed.

        Raises:
            RefusedError: If the role of the instance does not write.
            HFBucketError: If the bucket does not exist.
        """
        if not self.settings.writes:
            raise RefusedError(f"{self._name}: role is {self.settings.role}, so nothing is copied to this instance")
        deadline = Deadline.patient(_REQUEST_SECS)
        try:
            self.bucket.info(deadline)
        except BucketMissingError:
            if not self._may_be_missing:
                raise
            self.bucket.create(deadline)

    def entries(self, selection: Selection, skipped: Counter[str]) -> Iterator[ChunkEntry]:
        """See `SourceEndpoint`."""
        if not selection.keys_from:
            return list_chunks_ahead(self.bucket, selection.listing_prefixes())
        keys = (key for path in selection.keys_from for key in keys_of(path))
        return look_up_keys(self.bucket, keys, skipped)

    @property
    def fresh_secs(self) -> float:
        """See `DestinationEndpoint`. The limit is that of deletes, because the Hub has no conditional write."""
        return FRESH_SECS

    def expect_chunks(self) -> None:
        """See `jobs.batch.model.ReferenceEndpoint`."""
        if next(list_chunks(self.bucket, [""]), None) is None:
            raise RefusedError(f"{self.name}, the source of the mirror, has no chunk: nothing is deleted")

    def look_up(self, keys: Sequence[str], deadline: Deadline, *, patient: bool = True) -> dict[str, EndpointObject]:
        """See `DestinationEndpoint`."""
        by_path = {self._path(key): key for key in keys}
        try:
            found = self.bucket.stat(list(by_path), deadline, patient=patient)
        except BucketMissingError:
            if not self._may_be_missing:
                raise
            return {}
        return {
            by_path[path]: EndpointObject(info.content, info.uploaded_at)
            for path, info in found.items()
            if path in by_path
        }

    def fetch(self, wanted: Mapping[str, ContentId], deadline: Deadline) -> dict[str, bytearray | HFBucketError]:
        """See `SourceEndpoint`."""
        buffers = {key: bytearray(content.size) for key, content in wanted.items()}
        reads = {
            key: DownloadToBuffer(key, content, RevocableBuffer(memoryview(buffers[key])))
            for key, content in wanted.items()
        }
        self.bucket.transfer.read(list(reads.values()), deadline)
        return {key: buffers[key] if read.error is None else read.error for key, read in reads.items()}

    def gone(self, wanted: Mapping[str, ContentId], deadline: Deadline) -> frozenset[str]:
        """See `SourceEndpoint`."""
        held = self.look_up(list(wanted), deadline)
        return frozenset(key for key, content in wanted.items() if key not in held or held[key].content != content)

    def put(self, chunks: Mapping[str, Chunk], deadline: Deadline) -> dict[str, Any]:
        """See `DestinationEndpoint`. The hash that the client computes on upload is compared with the expected one."""
        upload = Upload()
        # hf_xet waits minutes for an answer, despite its timeouts.
        watch = threading.Timer(deadline.remaining(), self.bucket.transfer.abandon, [upload])
        watch.daemon = True
        watch.start()
        try:
            sources = [RevocableBuffer(memoryview(chunk.data)) for chunk in chunks.values()]
            sent = self.bucket.transfer.upload(sources, deadline, upload)
        finally:
            watch.cancel()
        return {
            key: content if content == chunk.content else _wrong(key, chunk, content)
            for (key, chunk), content in zip(chunks.items(), sent, strict=True)
        }

    def publish(
        self, staged: Mapping[str, ContentId], _replacing: frozenset[str], deadline: Deadline
    ) -> dict[str, str]:
        """See `DestinationEndpoint`."""
        by_path = {self._path(key): content for key, content in staged.items()}
        failed = self.bucket.add(by_path, deadline, once=True)
        return {key: failed[path].message for key in staged if (path := self._path(key)) in failed}

    def drop(self, staged: Mapping[str, ContentId]) -> None:
        """See `DestinationEndpoint`. Unnamed content is left to the store's garbage collection."""

    def copy(self, source: InstanceEnd, wanted: Mapping[str, ContentId], deadline: Deadline) -> dict[str, str]:
        """Have the Hub copy contents by hash from the bucket of another instance, in one request; no bytes move.

        Returns:
            The reasons for the contents that were not copied, by key.

        Raises:
            HFBucketError: If the request fails as a whole.
        """
        by_path = {self._path(key): content for key, content in wanted.items()}
        failed = self.bucket.copy(source.bucket.handle, by_path, deadline, once=True)
        return {key: failed[path].message for key in wanted if (path := self._path(key)) in failed}

    @contextlib.contextmanager
    def opened(self) -> Iterator[InstanceEnd]:
        """Provide the endpoint, and close it at the end."""
        try:
            yield self
        finally:
            self.close()

    def close(self) -> None:
        """End all transfers."""
        self.bucket.close()

    def _path(self, key: str) -> str:
        return self.bucket.handle.join(encode_name(key))


def _wrong(key: str, chunk: Chunk, content: ContentId) -> IntegrityError:
    return IntegrityError(
        f"{key}: its bytes have the hash {content.xet_hash} and size {content.size}, and should have "
        f"{chunk.content.xet_hash} and {chunk.content.size}; they were not stored. Its copy at the source is damaged"
    )
