"""The keys of instances, streamed, as records and as rows."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from hfbucket_plugin.cli import words
from hfbucket_plugin.cli.objects import Kind, Listed, walk
from hfbucket_plugin.keys import ClassicKey, MPKey

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hfbucket_plugin.bucket import Bucket
    from hfbucket_plugin.catalog import ChunkEntry

_WIDTHS: Final = (12, 7, 24, 5, 6, 8, 10, 7, 25)
HEADER: Final = ("INSTANCE", "KIND", "MODEL", "WORLD", "WORKER", "PART", "SIZE", "AGE", "UPLOADED", "KEY")


class Keys:
    """The keys of one instance.

    Args:
        bucket: Its bucket.
        key_prefix: The start of the keys; empty for all.
        page_secs: Most seconds a page of the listing may take.
        model: The only model whose keys are wanted; None for all models.

    Attributes:
        passed_by: Objects that are no keys, by kind, as far as the listing was read.
    """

    def __init__(self, bucket: Bucket, key_prefix: str, page_secs: float, model: str | None = None) -> None:
        self._listed = walk(bucket, key_prefix, page_secs, model=model)
        self.passed_by: Counter[Kind] = Counter()

    def __iter__(self) -> Iterator[tuple[Listed, ChunkEntry]]:
        """Stream them.

        Raises:
            HFBucketError: A page did not come: there are more.
        """
        for listed in self._listed:
            if listed.chunk is None:
                self.passed_by[listed.kind] += 1
            else:
                yield listed, listed.chunk


def record(instance: str, kind: Kind, chunk: ChunkEntry, now: datetime) -> dict[str, Any]:
    """A key for programs."""
    key, uploaded = chunk.key, chunk.uploaded_at
    return {
        "instance": instance,
        "key": chunk.text,
        "kind": str(kind),
        "model": key.model,
        "world_size": key.world_size,
        "worker": key.worker_id,
        "layer": key.layer_id if isinstance(key, ClassicKey) else None,
        "group": key.group if isinstance(key, MPKey) else None,
        "size": chunk.content.size,
        "xet_hash": chunk.content.xet_hash,
        "uploaded_at": words.instant(uploaded),
        "age_seconds": max(0, round((now - uploaded).total_seconds())) if uploaded is not None else None,
    }


def row(instance: str, kind: Kind, chunk: ChunkEntry, now: datetime) -> tuple[str, ...]:
    """A key for people: the columns of `HEADER`."""
    key = chunk.key
    uploaded = chunk.uploaded_at.astimezone(UTC) if chunk.uploaded_at is not None else None
    cells = (
        instance,
        str(kind),
        key.model,
        str(key.world_size),
        str(key.worker_id),
        _part(chunk),
        words.size(chunk.content.size),
        words.age(uploaded, now),
        words.instant(uploaded) or "-",
        chunk.text,
    )
    return tuple(words.printable(cell) for cell in cells)


def _part(chunk: ChunkEntry) -> str:
    if isinstance(chunk.key, MPKey):
        return f"group {chunk.key.group}"
    return "-" if chunk.key.layer_id is None else f"layer {chunk.key.layer_id}"


def aligned(cells: tuple[str, ...]) -> str:
    """Cells in columns. The widths are fixed, since the rows to come are not known: a long cell moves its own row."""
    *most, last = cells
    return " ".join([cell.ljust(width) for cell, width in zip(most, _WIDTHS, strict=True)] + [last])
