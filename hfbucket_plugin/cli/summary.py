"""`stat`: what an instance holds, in numbers. Memory follows the number of models and workers, not of objects."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from hfbucket_plugin.cli import words
from hfbucket_plugin.cli.objects import Kind, Listed
from hfbucket_plugin.handle import RESERVED

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime


@dataclass(slots=True)
class Amount:
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
            "oldest": words.instant(self.oldest),
            "newest": words.instant(self.newest),
        }


@dataclass(frozen=True, order=True, slots=True)
class Group:
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
class Summary:
    """An instance in numbers.

    Attributes:
        groups: Its chunks, by who wrote them.
        chunks: All of them.
        others: What is no chunk, by kind.
    """

    groups: dict[Group, Amount] = field(default_factory=dict)
    chunks: Amount = field(default_factory=Amount)
    others: dict[Kind, Amount] = field(
        default_factory=lambda: {kind: Amount() for kind in (Kind.PROBE, Kind.OWN, Kind.FOREIGN)}
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


def summarised(listed: Iterable[Listed]) -> Summary:
    """Count a listing, object by object.

    Raises:
        HFBucketError: The listing is not complete, so there is no summary.
    """
    summary = Summary()
    for one in listed:
        if one.kind in summary.others:
            summary.others[one.kind].add(one)
        elif one.chunk is not None:
            key = one.chunk.key
            group = Group(key.model, key.world_size, key.worker_id, one.kind)
            summary.groups.setdefault(group, Amount()).add(one)
            summary.chunks.add(one)
    return summary


HEADER: Final = ("model", "kind", "world", "worker", "objects", "bytes", "oldest", "newest")

_NAMES: Final = {Kind.PROBE: "LMCache's probe", Kind.OWN: f"{RESERVED}/", Kind.FOREIGN: "foreign"}


def rows(summary: Summary, now: datetime) -> list[tuple[str, ...]]:
    """A summary for people: the columns of `HEADER`."""
    lines = [
        (words.printable(group.model), str(group.kind), str(group.world_size), str(group.worker), *_cells(amount, now))
        for group, amount in sorted(summary.groups.items())
    ]
    lines.append(("all chunks", "", "", "", *_cells(summary.chunks, now)))
    lines += [
        (_NAMES[kind], "", "", "", *_cells(amount, now)) for kind, amount in summary.others.items() if amount.objects
    ]
    return lines


def _cells(amount: Amount, now: datetime) -> tuple[str, ...]:
    when = (words.age(amount.oldest, now), words.age(amount.newest, now))
    return f"{amount.objects:,}", words.size(amount.bytes), *when
