"""What the objects of an instance are to the jobs: chunks, or what is never deleted unless it is named."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from hfbucket_plugin.core.keys import RESERVED, decode_name, is_probe, may_be_key
from hfbucket_plugin.errors import KeyFormatError
from hfbucket_plugin.hub.listing import chunk_entry
from jobs.retention.order import RetentionEntry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from hfbucket_plugin.core.keys import BucketHandle
    from hfbucket_plugin.hub.bucket import Bucket, ObjectInfo
    from hfbucket_plugin.hub.listing import ChunkEntry


class Kind(StrEnum):
    """What an object is. The values stand in plans and reports."""

    CHUNK = "chunk"
    PROBE = "probe"  # with which LMCache's health monitor tests a backend
    FOREIGN = "foreign"  # no engine reads it: neither its name nor the last part of its path is like a key
    NEIGHBOUR = (
        "neighbour"  # of another instance: one that the configuration names, or one whose chunks are nested here
    )
    UNKNOWN = "unknown"  # named like a key, with fields that this version does not know: another version may read it
    OWN = "own"  # ours, below `.hfbucket/`: never deleted, whatever is asked for

    @property
    def foreign(self) -> bool:
        """Whether `--foreign delete` names it."""
        return self in (Kind.PROBE, Kind.FOREIGN)


@dataclass(frozen=True, slots=True)
class Listed:
    """An object of a listing.

    Attributes:
        info: As the Hub lists it.
        kind: What it is.
        name: Of the object, below the instance's prefix.
        chunk: Its key, where it has one.
    """

    info: ObjectInfo
    kind: Kind
    name: str
    chunk: ChunkEntry | None

    @property
    def entry(self) -> RetentionEntry:
        """The object as retention looks at it: one that has no key goes by its name."""
        content = self.info.content
        key = self.chunk.text if self.chunk is not None else self.name
        return RetentionEntry(key, content.xet_hash, content.size, self.info.uploaded_at)


def is_reserved(name: str) -> bool:
    """Whether a name below an instance's prefix is ours, or that of an instance nested in it."""
    return RESERVED in name.split("/")


def readable(name: str) -> bool:
    """Whether some engine could read an object of this name, below whatever prefix: it is a key's, or like one."""
    try:
        return may_be_key(decode_name(name))
    except KeyFormatError:
        return False


class Classifier:
    """Says what the objects of an instance are.

    Args:
        bucket: The instance's.
        neighbours: The handles of all instances that the configuration names: what lies below the prefix of another
            one is not this one's, nested though it may be.
    """

    def __init__(self, bucket: Bucket, neighbours: Sequence[BucketHandle] = ()) -> None:
        self._bucket = bucket
        own, head = bucket.handle, bucket.handle.join("")
        others = [f"{other.prefix}/" for other in neighbours if other.same_bucket(own) and other.prefix]
        self._nested = tuple(other for other in others if other.startswith(head) and other != head)

    def classify(self, info: ObjectInfo) -> Listed | None:
        """Say what an object is; None where it does not lie below the instance's prefix at all."""
        name = self._bucket.handle.relative(info.path)
        if name is None:
            return None
        chunk = chunk_entry(self._bucket, info)
        if is_reserved(name):
            return Listed(info, Kind.OWN, name, None)
        if chunk is not None:
            return Listed(info, Kind.PROBE if is_probe(chunk.text) else Kind.CHUNK, name, chunk)
        return Listed(info, self._without_key(info.path, name), name, None)

    def _without_key(self, path: str, name: str) -> Kind:
        """What an object is that is not a chunk of this instance. Nothing that an engine could read is foreign."""
        if self.is_neighbour(path):
            return Kind.NEIGHBOUR
        nested, _, leaf = name.rpartition("/")
        if not readable(leaf):
            return Kind.FOREIGN
        return Kind.NEIGHBOUR if nested else Kind.UNKNOWN

    def is_neighbour(self, path: str) -> bool:
        """Whether a path lies below another instance that is nested in this one."""
        return path.startswith(self._nested)

    def walk(self, page_secs: float, each_page: Callable[[], None] = lambda: None) -> Iterator[Listed]:
        """Stream all objects of the instance.

        Args:
            page_secs: Most seconds of a page.
            each_page: Called before each page: whether to go on.

        Raises:
            HFBucketError: A page did not come: what was yielded is no complete listing.
        """
        for info in self._bucket.list_objects(self._bucket.handle.join(""), page_secs, each_page):
            listed = self.classify(info)
            if listed is not None:
                yield listed
