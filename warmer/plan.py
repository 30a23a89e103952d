"""What is to be in the tiers: planned chunks, in order, as a JSONL file. Pure but for that file.

A plan is read segment by segment, so that neither a driver's memory nor its start grows with the number of chunks.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

from hfbucket_plugin.errors import ConfigError
from hfbucket_plugin.keys import encode_name, is_probe

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from hfbucket_plugin.catalog import ChunkEntry
    from hfbucket_plugin.handle import BucketHandle
    from hfbucket_plugin.keys import Key

SEGMENT_CHUNKS: Final = 1000
"""Chunks of a segment: as many as the Hub looks up in one request."""


@dataclass(frozen=True, slots=True)
class PlannedChunk:
    """One chunk that every node is to hold.

    Attributes:
        key: Its key string.
        path: Of its object, from the root of the bucket.
        xet_hash: Of its content, 64 hexadecimal digits.
        size: Bytes.
        uploaded_at: When the Hub took it; None when it did not say.
        gone: Whether the bucket no longer held it when it was last looked up.
        worker: Rank of the one worker that reads it; None when all do, as where an engine has but one world, or stores
            what all its workers share (MLA) as if it had one.
    """

    key: str
    path: str
    xet_hash: str
    size: int
    uploaded_at: datetime | None = None
    gone: bool = False
    worker: int | None = None

    def to_line(self) -> str:
        """The chunk as one line of JSON, its newline included."""
        record: dict[str, Any] = {"key": self.key, "path": self.path, "xet_hash": self.xet_hash, "size": self.size}
        if self.uploaded_at is not None:
            record["uploaded_at"] = self.uploaded_at.isoformat()
        if self.gone:
            record["gone"] = True
        if self.worker is not None:
            record["worker"] = self.worker
        return json.dumps(record) + "\n"

    @classmethod
    def from_line(cls, line: str) -> PlannedChunk:
        """Read what `to_line` wrote.

        Raises:
            ValueError: The line is no planned chunk.
        """
        record = json.loads(line)
        if not isinstance(record, dict) or not all(isinstance(record.get(name), str) for name in _TEXTS):
            raise ValueError("a planned chunk needs key, path and xet_hash, as texts")
        size, uploaded_at, worker = record.get("size"), record.get("uploaded_at"), record.get("worker")
        if type(size) is not int or size < 0:
            raise ValueError("a planned chunk needs a size in bytes")
        if worker is not None and (type(worker) is not int or worker < 0):
            raise ValueError("the worker of a planned chunk is a rank")
        at = None if uploaded_at is None else datetime.fromisoformat(uploaded_at)
        return cls(record["key"], record["path"], record["xet_hash"], size, at, record.get("gone") is True, worker)


_TEXTS: Final = ("key", "path", "xet_hash")


class Planner:
    """Turns a listing into planned chunks for tiers that take one kind of key, and counts what it passes by.

    Args:
        handle: Of the instance that was listed.
        takes: The kind of key that the tier takes.

    Attributes:
        skipped: Chunks passed by, by reason: ``other_kind`` (keys that the tier cannot take) and ``probe`` (the
            object with which LMCache tests a backend).
    """

    def __init__(self, handle: BucketHandle, takes: type[Key]) -> None:
        self._handle = handle
        self._takes = takes
        self.skipped: Counter[str] = Counter()

    def plan(self, entries: Iterable[ChunkEntry]) -> Iterator[PlannedChunk]:
        """Yield what fits the tier, in the order of the listing: by key, hence by model and then by worker."""
        for entry in entries:
            if not isinstance(entry.key, self._takes):
                self.skipped["other_kind"] += 1
            elif is_probe(entry.text):
                self.skipped["probe"] += 1
            else:
                path = self._handle.join(encode_name(entry.text))
                content, key = entry.content, entry.key
                worker = key.worker_id if key.world_size > 1 else None
                yield PlannedChunk(entry.text, path, content.xet_hash, content.size, entry.uploaded_at, worker=worker)


def gone(chunk: PlannedChunk) -> PlannedChunk:
    """The chunk, no longer in the bucket."""
    return replace(chunk, gone=True)


class PlanFile:
    """A plan on disk.

    Attributes:
        path: Of the file.
        chunks: How many it holds.
        bytes: The sum of their sizes.
    """

    def __init__(self, path: Path, offsets: list[int], chunks: int, size: int) -> None:
        self.path = path
        self.chunks = chunks
        self.bytes = size
        self._offsets = offsets

    @classmethod
    def write(cls, path: Path, chunks: Iterable[PlannedChunk]) -> PlanFile:
        """Write a plan, as the chunks come.

        Raises:
            OSError: The file cannot be written.
        """
        offsets, count, size, at = [], 0, 0, 0
        with path.open("wb") as out:
            for chunk in chunks:
                if count % SEGMENT_CHUNKS == 0:
                    offsets.append(at)
                at += out.write(chunk.to_line().encode())
                count += 1
                size += chunk.size
        return cls(path, offsets, count, size)

    @classmethod
    def open(cls, path: Path) -> PlanFile:
        """Read a plan that was written before.

        Raises:
            ConfigError: The file cannot be read, or a line of it is no planned chunk; the message says which.
        """
        offsets, count, size, at = [], 0, 0, 0
        try:
            with path.open("rb") as lines:
                for line in lines:
                    if count % SEGMENT_CHUNKS == 0:
                        offsets.append(at)
                    size += PlannedChunk.from_line(line.decode()).size
                    at += len(line)
                    count += 1
        except OSError as error:
            raise ConfigError(f"plan {str(path)!r} cannot be read: {error}") from None
        except ValueError as error:
            raise ConfigError(f"plan {str(path)!r}, line {count + 1}: {error}") from None
        return cls(path, offsets, count, size)

    @property
    def segments(self) -> int:
        """How many segments it has."""
        return len(self._offsets)

    def segment(self, index: int) -> list[PlannedChunk]:
        """The chunks of one segment, at most `SEGMENT_CHUNKS`.

        Raises:
            OSError: The file cannot be read any more.
        """
        count = min(SEGMENT_CHUNKS, self.chunks - index * SEGMENT_CHUNKS)
        with self.path.open("rb") as lines:
            lines.seek(self._offsets[index])
            return [PlannedChunk.from_line(lines.readline().decode()) for _ in range(count)]

    def chunks_from(self, start: int) -> Iterator[PlannedChunk]:
        """The plan from its chunk number `start` on, counted from 0.

        Raises:
            OSError: The file cannot be read any more.
        """
        for index in range(start // SEGMENT_CHUNKS, self.segments):
            segment = self.segment(index)
            yield from segment[max(0, start - index * SEGMENT_CHUNKS) :]
