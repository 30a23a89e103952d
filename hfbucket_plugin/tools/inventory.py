"""Inventory of a bucket, by kind of object and by model."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

from hfbucket_plugin.core import units
from hfbucket_plugin.core.keys import (
    RESERVED,
    BucketHandle,
    ClassicKey,
    decode_name,
    encode_name,
    is_probe,
    may_be_key,
    model_of,
)
from hfbucket_plugin.errors import KeyFormatError
from hfbucket_plugin.hub.listing import chunk_entry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from datetime import datetime

    from hfbucket_plugin.hub.bucket import Bucket, ObjectInfo
    from hfbucket_plugin.hub.listing import ChunkEntry


@dataclass(frozen=True, slots=True)
class RetentionEntry:
    """Chunk of an instance, with the fields that retention needs.

    Attributes:
        key: Its key string.
        xet_hash: Xet hash of its content.
        size: Size in bytes.
        uploaded_at: Upload time by the Hub's clock; None if the Hub did not say.
        last_hit: Time of the last read; None if no read is known.
        counted_since: Time since which reads are known; None if they are not known at all.
    """

    key: str
    xet_hash: str
    size: int
    uploaded_at: datetime | None
    last_hit: datetime | None = None
    counted_since: datetime | None = None

    @property
    def last_used(self) -> datetime | None:
        """Last known put or read."""
        return _latest(self.uploaded_at, self.last_hit)

    @property
    def idle_since(self) -> datetime | None:
        """Last known put or read, but not before reads are recorded: unrecorded time does not count as idle."""
        return _latest(self.last_used, self.counted_since)

    @property
    def model(self) -> str:
        """Model whose KV the chunk holds."""
        return model_of(self.key)


def _latest(one: datetime | None, other: datetime | None) -> datetime | None:
    return max(one, other) if one is not None and other is not None else one or other


class ObjectKind(StrEnum):
    """Kind of an object of an instance. The values appear in output, JSON, plans and reports."""

    CLASSIC = "classic"  # a chunk with a classic key
    MP = "mp"  # a chunk with an MP key
    PROBE = "probe"  # written by LMCache's health monitor to test a backend
    FOREIGN = "foreign"  # not read by any engine: neither its name nor the last part of its path resembles a key
    NEIGHBOUR = "neighbour"  # of another instance, in the configuration or with chunks nested here
    UNKNOWN = "unknown"  # resembles a key with fields unknown to this version: another version may read it
    OWN = "own"  # a metadata record below `.hfbucket/`: never deleted, whatever is requested

    @property
    def is_chunk(self) -> bool:
        """Whether the kind is a chunk of this instance."""
        return self in (ObjectKind.CLASSIC, ObjectKind.MP)

    @property
    def foreign(self) -> bool:
        """Whether `--foreign delete` covers the kind."""
        return self in (ObjectKind.PROBE, ObjectKind.FOREIGN)

    def counted(self, number: int) -> str:
        """Return a number of objects of this kind in words."""
        return f"{number:,} {_WORDS[self]}"


_WORDS: Final = {
    ObjectKind.CLASSIC: "with classic keys",
    ObjectKind.MP: "with MP keys",
    ObjectKind.PROBE: "of LMCache's probe",
    ObjectKind.OWN: f"below {RESERVED}/",
    ObjectKind.FOREIGN: "foreign",
}


@dataclass(frozen=True, slots=True)
class ListedObject:
    """Object of a listing.

    Attributes:
        info: The object as listed by the Hub.
        kind: Its kind.
        name: Its name, below the instance's prefix.
        chunk: Its chunk entry, if it has a key.
    """

    info: ObjectInfo
    kind: ObjectKind
    name: str
    chunk: ChunkEntry | None

    @property
    def shown_kind(self) -> ObjectKind:
        """Kind shown by read-only commands: a chunk, the probe, a record of this instance, or foreign."""
        kind = self.kind
        if kind is ObjectKind.OWN and not self.name.startswith(f"{RESERVED}/"):
            return ObjectKind.FOREIGN
        return ObjectKind.FOREIGN if kind in (ObjectKind.NEIGHBOUR, ObjectKind.UNKNOWN) else kind

    @property
    def entry(self) -> RetentionEntry:
        """Retention entry of the object; an object without a key uses its name."""
        content = self.info.content
        key = self.chunk.text if self.chunk is not None else self.name
        return RetentionEntry(key, content.xet_hash, content.size, self.info.uploaded_at)


def is_reserved(name: str) -> bool:
    """Return whether a name below an instance's prefix is a metadata record, of this instance or one nested in it."""
    return RESERVED in name.split("/")


def readable(name: str) -> bool:
    """Return whether an engine could read an object of this name, below any prefix: it is or resembles a key."""
    try:
        return may_be_key(decode_name(name))
    except KeyFormatError:
        return False


class Classifier:
    """Classifier of the objects of an instance.

    Args:
        bucket: Client of the instance's bucket.
        neighbours: Handles of all instances in the configuration: objects below the prefix of another instance belong
            to
            that one, even if it is nested in this one.
    """

    def __init__(self, bucket: Bucket, neighbours: Sequence[BucketHandle] = ()) -> None:
        self._bucket = bucket
        own, head = bucket.handle, bucket.handle.join("")
        others = [f"{other.prefix}/" for other in neighbours if other.same_bucket(own) and other.prefix]
        self._nested = tuple(other for other in others if other.startswith(head) and other != head)

    def classify(self, info: ObjectInfo) -> ListedObject | None:
        """Classify an object; return None if it does not lie below the instance's prefix."""
        name = self._bucket.handle.relative(info.path)
        if name is None:
            return None
        if is_reserved(name):
            return ListedObject(info, ObjectKind.OWN, name, None)
        chunk = chunk_entry(self._bucket, info)
        if chunk is None:
            return ListedObject(info, self._without_key(info.path, name), name, None)
        if is_probe(chunk.text):
            return ListedObject(info, ObjectKind.PROBE, name, chunk)
        kind = ObjectKind.CLASSIC if isinstance(chunk.key, ClassicKey) else ObjectKind.MP
        return ListedObject(info, kind, name, chunk)

    def _without_key(self, path: str, name: str) -> ObjectKind:
        """Classify an object that is not a chunk of this instance; nothing that an engine could read is foreign."""
        if self.is_neighbour(path):
            return ObjectKind.NEIGHBOUR
        nested, _, leaf = name.rpartition("/")
        if not readable(leaf):
            return ObjectKind.FOREIGN
        return ObjectKind.NEIGHBOUR if nested else ObjectKind.UNKNOWN

    def is_neighbour(self, path: str) -> bool:
        """Return whether a path lies below another instance nested in this one."""
        return path.startswith(self._nested)

    def walk(
        self,
        page_secs: float,
        each_page: Callable[[], None] = lambda: None,
        *,
        key_prefix: str = "",
        model: str | None = None,
    ) -> Iterator[ListedObject]:
        """Stream the objects of the instance.

        Args:
            page_secs: Timeout of a listing page, in seconds.
            each_page: Called before each page; what it raises ends the listing.
            key_prefix: Prefix of the keys. The Hub applies it, so no other objects are listed.
            model: Skip chunks of other models, whose names may continue after an `@`; None for all models.

        Raises:
            HFBucketError: If a page cannot be listed: the yielded objects are incomplete.
        """
        for info in self._bucket.list_objects(self._bucket.handle.join(encode_name(key_prefix)), page_secs, each_page):
            listed = self.classify(info)
            if listed is not None and (model is None or listed.chunk is None or listed.chunk.key.model == model):
                yield listed


@dataclass(slots=True)
class ObjectTotals:
    """Totals of objects.

    Attributes:
        objects: Number of objects.
        bytes: Sum of their sizes.
        oldest: Earliest upload time; None if the Hub does not say.
        newest: Latest upload time.
    """

    objects: int = 0
    bytes: int = 0
    oldest: datetime | None = None
    newest: datetime | None = None

    def add(self, listed: ListedObject) -> None:
        """Count an object."""
        self.objects += 1
        self.bytes += listed.info.content.size
        if (when := listed.info.uploaded_at) is not None:
            self.oldest = min(self.oldest or when, when)
            self.newest = max(self.newest or when, when)

    def record(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return {
            "objects": self.objects,
            "bytes": self.bytes,
            "oldest": units.instant(self.oldest),
            "newest": units.instant(self.newest),
        }


@dataclass(frozen=True, order=True, slots=True)
class WorkerGroup:
    """Group of the chunks that one worker of an engine wrote.

    Attributes:
        model: The model.
        world_size: Number of workers.
        worker: Rank of the worker.
        kind: Kind of its keys.
    """

    model: str
    world_size: int
    worker: int
    kind: ObjectKind


@dataclass(slots=True)
class InstanceSummary:
    """Totals of an instance.

    Attributes:
        groups: Chunks by their writer.
        chunks: All chunks.
        others: Other objects, by kind.
    """

    groups: dict[WorkerGroup, ObjectTotals] = field(default_factory=dict)
    chunks: ObjectTotals = field(default_factory=ObjectTotals)
    others: dict[ObjectKind, ObjectTotals] = field(
        default_factory=lambda: {
            kind: ObjectTotals() for kind in (ObjectKind.PROBE, ObjectKind.OWN, ObjectKind.FOREIGN)
        }
    )

    @property
    def empty(self) -> bool:
        """Whether the instance has no objects."""
        return not self.chunks.objects and not any(amount.objects for amount in self.others.values())

    def record(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        groups = [
            {"kind": str(group.kind), "model": group.model, "world_size": group.world_size, "worker": group.worker}
            | amount.record()
            for group, amount in sorted(self.groups.items())
        ]
        others = {str(kind): amount.record() for kind, amount in self.others.items()}
        return {"groups": groups, "chunks": self.chunks.record(), **others}


def summarised(listed: Iterable[ListedObject]) -> InstanceSummary:
    """Summarize a listing.

    Raises:
        HFBucketError: If the listing is incomplete.
    """
    summary = InstanceSummary()
    for one in listed:
        kind = one.shown_kind
        if kind in summary.others:
            summary.others[kind].add(one)
        elif one.chunk is not None:
            key = one.chunk.key
            group = WorkerGroup(key.model, key.world_size, key.worker_id, kind)
            summary.groups.setdefault(group, ObjectTotals()).add(one)
            summary.chunks.add(one)
    return summary


HEADER: Final = ("model", "kind", "world", "worker", "objects", "bytes", "oldest", "newest")

_NAMES: Final = {ObjectKind.PROBE: "LMCache's probe", ObjectKind.OWN: f"{RESERVED}/", ObjectKind.FOREIGN: "foreign"}


def rows(summary: InstanceSummary, now: datetime) -> list[tuple[str, ...]]:
    """Return the table rows of a summary, with the columns of `HEADER`."""
    lines = [
        (units.printable(group.model), str(group.kind), str(group.world_size), str(group.worker), *_cells(amount, now))
        for group, amount in sorted(summary.groups.items())
    ]
    lines.append(("all chunks", "", "", "", *_cells(summary.chunks, now)))
    lines += [
        (_NAMES[kind], "", "", "", *_cells(amount, now)) for kind, amount in summary.others.items() if amount.objects
    ]
    return lines


def _cells(amount: ObjectTotals, now: datetime) -> tuple[str, ...]:
    when = (units.age(amount.oldest, now), units.age(amount.newest, now))
    return f"{amount.objects:,}", units.size(amount.bytes), *when
