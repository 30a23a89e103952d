"""What a bucket holds, by kind of object and by model."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

from hfbucket_plugin.core import units
from hfbucket_plugin.core.keys import RESERVED, ClassicKey, encode_name, is_probe
from hfbucket_plugin.hub.listing import chunk_entry

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from datetime import datetime

    from hfbucket_plugin.hub.bucket import Bucket, ObjectInfo
    from hfbucket_plugin.hub.listing import ChunkEntry


class Kind(StrEnum):
    """What an object is. The values are shown, and stand in JSON."""

    CLASSIC = "classic"
    MP = "mp"
    PROBE = "probe"  # with which LMCache's health monitor tests a backend
    OWN = "own"  # below `<prefix>/.hfbucket/`
    FOREIGN = "foreign"

    def counted(self, number: int) -> str:
        """A number of them, in words."""
        return f"{number:,} {_WORDS[self]}"


_WORDS: Final = {
    Kind.CLASSIC: "with classic keys",
    Kind.MP: "with MP keys",
    Kind.PROBE: "of LMCache's probe",
    Kind.OWN: f"below {RESERVED}/",
    Kind.FOREIGN: "foreign",
}


@dataclass(frozen=True, slots=True)
class Listed:
    """An object of a listing.

    Attributes:
        info: As the Hub lists it.
        kind: What it is.
        chunk: Its key, where it has one.
    """

    info: ObjectInfo
    kind: Kind
    chunk: ChunkEntry | None


def walk(bucket: Bucket, key_prefix: str, page_secs: float, *, model: str | None = None) -> Iterator[Listed]:
    """Stream the objects of an instance whose key starts with a text; an empty one is everything.

    Args:
        bucket: The instance's.
        key_prefix: Matched by the Hub, so that nothing else is listed.
        page_secs: Most seconds a page may take.
        model: Leave out the chunks of other models, whose names may go on after an `@`; None for those of all models.

    Raises:
        HFBucketError: A page did not come: what was yielded is no complete listing.
    """
    for info in bucket.list_objects(bucket.handle.join(encode_name(key_prefix)), page_secs):
        listed = classify(bucket, info)
        if model is None or listed.chunk is None or listed.chunk.key.model == model:
            yield listed


def classify(bucket: Bucket, info: ObjectInfo) -> Listed:
    """Say what an object of an instance is."""
    chunk = chunk_entry(bucket, info)
    if chunk is None:
        name = bucket.handle.relative(info.path) or ""
        return Listed(info, Kind.OWN if name.startswith(f"{RESERVED}/") else Kind.FOREIGN, None)
    if is_probe(chunk.text):
        return Listed(info, Kind.PROBE, chunk)
    return Listed(info, Kind.CLASSIC if isinstance(chunk.key, ClassicKey) else Kind.MP, chunk)


@dataclass(slots=True)
class ObjectTotals:
    """Some objects in numbers.

    Attributes:
        objects: How many.
        bytes: Their sizes added up.
        oldest: When the first of them was uploaded; None where the Hub does not say.
        newest: When the last of them was.
    """

    objects: int = 0
    bytes: int = 0
    oldest: datetime | None = None
    newest: datetime | None = None

    def add(self, listed: Listed) -> None:
        """Count an object."""
        self.objects += 1
        self.bytes += listed.info.content.size
        if (when := listed.info.uploaded_at) is not None:
            self.oldest = min(self.oldest or when, when)
            self.newest = max(self.newest or when, when)

    def record(self) -> dict[str, Any]:
        """For programs."""
        return {
            "objects": self.objects,
            "bytes": self.bytes,
            "oldest": units.instant(self.oldest),
            "newest": units.instant(self.newest),
        }


@dataclass(frozen=True, order=True, slots=True)
class WorkerGroup:
    """What one worker of an engine wrote.

    Attributes:
        model: The model.
        world_size: Number of workers.
        worker: Which of them.
        kind: The kind of its keys.
    """

    model: str
    world_size: int
    worker: int
    kind: Kind


@dataclass(slots=True)
class InstanceSummary:
    """An instance in numbers.

    Attributes:
        groups: Its chunks, by who wrote them.
        chunks: All of them.
        others: What is no chunk, by kind.
    """

    groups: dict[WorkerGroup, ObjectTotals] = field(default_factory=dict)
    chunks: ObjectTotals = field(default_factory=ObjectTotals)
    others: dict[Kind, ObjectTotals] = field(
        default_factory=lambda: {kind: ObjectTotals() for kind in (Kind.PROBE, Kind.OWN, Kind.FOREIGN)}
    )

    @property
    def empty(self) -> bool:
        """Whether nothing was found at all."""
        return not self.chunks.objects and not any(amount.objects for amount in self.others.values())

    def record(self) -> dict[str, Any]:
        """For programs."""
        groups = [
            {"kind": str(group.kind), "model": group.model, "world_size": group.world_size, "worker": group.worker}
            | amount.record()
            for group, amount in sorted(self.groups.items())
        ]
        others = {str(kind): amount.record() for kind, amount in self.others.items()}
        return {"groups": groups, "chunks": self.chunks.record(), **others}


def summarised(listed: Iterable[Listed]) -> InstanceSummary:
    """Count a listing, object by object.

    Raises:
        HFBucketError: The listing is not complete, so there is no summary.
    """
    summary = InstanceSummary()
    for one in listed:
        if one.kind in summary.others:
            summary.others[one.kind].add(one)
        elif one.chunk is not None:
            key = one.chunk.key
            group = WorkerGroup(key.model, key.world_size, key.worker_id, one.kind)
            summary.groups.setdefault(group, ObjectTotals()).add(one)
            summary.chunks.add(one)
    return summary


HEADER: Final = ("model", "kind", "world", "worker", "objects", "bytes", "oldest", "newest")

_NAMES: Final = {Kind.PROBE: "LMCache's probe", Kind.OWN: f"{RESERVED}/", Kind.FOREIGN: "foreign"}


def rows(summary: InstanceSummary, now: datetime) -> list[tuple[str, ...]]:
    """A summary for people: the columns of `HEADER`."""
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
