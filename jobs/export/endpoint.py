"""Interfaces of the two endpoints of an export, source and destination. Instances and directories implement both.

Nothing appears at a destination under its name before all of its bytes are there and have the expected hash: `put`
uploads bytes, and `publish` makes them visible.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Iterator, Mapping, Sequence
    from datetime import datetime

    from hfbucket_plugin.core.deadline import Deadline
    from hfbucket_plugin.core.keys import ContentId
    from hfbucket_plugin.errors import HFBucketError
    from hfbucket_plugin.hub.listing import ChunkEntry
    from hfbucket_plugin.tools.selection import Selection


@dataclass(frozen=True, slots=True)
class EndpointObject:
    """Object that an endpoint holds under a key.

    Attributes:
        content: Its hash and size.
        uploaded_at: Upload time by the Hub's clock, or modification time of a file.
    """

    content: ContentId
    uploaded_at: datetime | None


@dataclass(frozen=True, slots=True)
class Chunk:
    """Bytes of a chunk, and their expected content.

    Attributes:
        data: The bytes, not verified yet.
        content: The expected hash and size.
        uploaded_at: Upload time by the Hub's clock.
    """

    data: bytearray
    content: ContentId
    uploaded_at: datetime | None


class Endpoint(Protocol):
    """Common interface of both endpoints."""

    @property
    def name(self) -> str:
        """Name of the endpoint in messages and plans."""

    def close(self) -> None:
        """Release all resources."""


class SourceEndpoint(Endpoint, Protocol):
    """Endpoint that chunks are copied from."""

    def entries(self, selection: Selection, skipped: Counter[str]) -> Iterator[ChunkEntry]:
        """Stream all chunks of a selection, and possibly others; count skipped objects by reason.

        Raises:
            HFBucketError: If the listing ends early: the yielded chunks are incomplete.
        """

    def fetch(self, wanted: Mapping[str, ContentId], deadline: Deadline) -> dict[str, bytearray | HFBucketError]:
        """Read chunks; return the bytes, or the error of a failed read, by key."""

    def gone(self, wanted: Mapping[str, ContentId], deadline: Deadline) -> frozenset[str]:
        """Return the keys whose content was deleted or rewritten; damaged content does not count.

        Raises:
            HFBucketError: If the endpoint cannot be read.
        """


class DestinationEndpoint(Endpoint, Protocol):
    """Endpoint that chunks are copied to."""

    @property
    def fresh_secs(self) -> float:
        """Maximum age in seconds of a look-up, from its request, when an object is named on its basis."""

    def look_up(self, keys: Sequence[str], deadline: Deadline, *, patient: bool = True) -> dict[str, EndpointObject]:
        """Return the objects that the endpoint holds under the given keys.

        Args:
            keys: The keys.
            deadline: Deadline of the operation.
            patient: Whether to wait out a pause that the Hub requests.

        Raises:
            HFBucketError: If the endpoint cannot be read.
        """

    def begin(self) -> None:
        """Prepare the endpoint for writing.

        Raises:
            HFBucketError: If the endpoint cannot be written to.
        """

    def put(self, chunks: Mapping[str, Chunk], deadline: Deadline) -> dict[str, Any]:
        """Upload bytes without naming them; return the input of `publish`, or the error of invalid bytes, by key.

        Raises:
            HFBucketError: If no bytes were uploaded.
        """

    def publish(self, staged: Mapping[str, Any], replacing: frozenset[str], deadline: Deadline) -> dict[str, str]:
        """Name uploaded bytes, so that they become visible; no request is retried.

        Args:
            staged: Results of `put`, by key.
            replacing: Keys whose current content may be replaced.
            deadline: Deadline of the operation.

        Returns:
            The reasons for failed keys, by key.

        Raises:
            HFBucketError: If the outcome of all keys is unknown.
        """

    def drop(self, staged: Mapping[str, Any]) -> None:
        """Discard uploaded bytes."""
