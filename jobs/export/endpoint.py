"""The two endpoints of an export: where chunks come from, and where they go. An instance is either, a directory is either.

Nothing appears at a destination under its name before all of its bytes are there and have the hash that they should:
`put` brings bytes to it, `publish` makes them visible.
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
    """What an end holds under a key.

    Attributes:
        content: Its hash and size.
        uploaded_at: When the Hub took it; of a file, its time.
    """

    content: ContentId
    uploaded_at: datetime | None


@dataclass(frozen=True, slots=True)
class Chunk:
    """The bytes of a chunk, and what they should be.

    Attributes:
        data: The bytes; nobody checked them yet.
        content: What they should be.
        uploaded_at: When the Hub took them.
    """

    data: bytearray
    content: ContentId
    uploaded_at: datetime | None


class Endpoint(Protocol):
    """What both endpoints have."""

    @property
    def name(self) -> str:
        """For people, and for plans."""

    def close(self) -> None:
        """Let go of what was opened."""


class SourceEndpoint(Endpoint, Protocol):
    """Where chunks come from."""

    def entries(self, selection: Selection, skipped: Counter[str]) -> Iterator[ChunkEntry]:
        """Stream chunks: all of a choice, and maybe others. What is skipped is counted, by reason.

        Raises:
            HFBucketError: What was yielded is no complete listing.
        """

    def fetch(self, wanted: Mapping[str, ContentId], deadline: Deadline) -> dict[str, bytearray | HFBucketError]:
        """Read chunks, by key; of one that cannot be read, why."""

    def gone(self, wanted: Mapping[str, ContentId], deadline: Deadline) -> frozenset[str]:
        """Keys under which there is now, rightly, no such content: it was deleted or rewritten.

        Raises:
            HFBucketError: Nobody knows.
        """


class DestinationEndpoint(Endpoint, Protocol):
    """Where chunks go."""

    @property
    def fresh_secs(self) -> float:
        """How old a look at it may be, from when it was asked for, when a name is given by it."""

    def look_up(self, keys: Sequence[str], deadline: Deadline, *, patient: bool = True) -> dict[str, EndpointObject]:
        """What it holds of some keys.

        Args:
            keys: Which.
            deadline: When to give up.
            patient: Whether a pause that a Hub asks for is waited out.

        Raises:
            HFBucketError: Nobody knows.
        """

    def begin(self) -> None:
        """Be ready to be written to.

        Raises:
            HFBucketError: It never will be.
        """

    def put(self, chunks: Mapping[str, Chunk], deadline: Deadline) -> dict[str, Any]:
        """Bring bytes there, invisibly; of each key, what `publish` takes, or the error of bytes that are not as they should.

        Raises:
            HFBucketError: It took none of them.
        """

    def publish(self, staged: Mapping[str, Any], replacing: frozenset[str], deadline: Deadline) -> dict[str, str]:
        """Make what `put` brought visible, now or not at all: no request is sent twice.

        Args:
            staged: By key.
            replacing: Keys whose present content may go.
            deadline: When to give up.

        Returns:
            Why, by key, for those that failed.

        Raises:
            HFBucketError: Nobody knows what became of any.
        """

    def drop(self, staged: Mapping[str, Any]) -> None:
        """Forget what `put` brought."""
