"""What is to be in the tiers: planned chunks, in order, as a JSONL file. Pure but for that file.

A plan is read segment by segment, so that neither a driver's memory nor its start grows with the number of chunks.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final, Protocol

from hfbucket_plugin.errors import ConfigError
from hfbucket_plugin.keys import encode_name, is_probe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from hfbucket_plugin.catalog import ChunkEntry
    from hfbucket_plugin.handle import BucketHandle
    from hfbucket_plugin.keys import Key

VERSION: Final = 1
"""Of the format of plan files. A reader refuses a newer one."""

_HEADER: Final = "warmer_plan"
_HEAD: Final = f'{{"{_HEADER}":'.encode()
_HEADER_ROOM: Final = 2048
"""Bytes kept for what is known of a header only when the plan is written: counts."""

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
        heat: How hot it is (`hfbucket_plugin.heat.buckets`); None where that was not asked or is not known.
        last_hit: When it was last read; None where that is not known.
    """

    key: str
    path: str
    xet_hash: str
    size: int
    uploaded_at: datetime | None = None
    gone: bool = False
    worker: int | None = None
    heat: int | None = None
    last_hit: datetime | None = None

    def to_line(self) -> str:
        """The chunk as one line of JSON, its newline included."""
        record: dict[str, Any] = {"key": self.key, "path": self.path, "xet_hash": self.xet_hash, "size": self.size}
        if self.uploaded_at is not None:
            record["uploaded_at"] = self.uploaded_at.isoformat()
        if self.gone:
            record["gone"] = True
        if self.worker is not None:
            record["worker"] = self.worker
        if self.heat is not None:
            record["heat"] = self.heat
        if self.last_hit is not None:
            record["last_hit"] = self.last_hit.isoformat()
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
        at, hit = (
            None if one is None else datetime.fromisoformat(one) for one in (uploaded_at, record.get("last_hit"))
        )
        heat = record["heat"] if type(record.get("heat")) is int else None
        return cls(
            record["key"], record["path"], record["xet_hash"], size, at, record.get("gone") is True, worker, heat, hit
        )


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


class Segments(Protocol):
    """Chunks that are read segment by segment: a plan, or the part of one."""

    @property
    def segments(self) -> int:
        """How many segments there are."""

    def segment(self, index: int) -> list[PlannedChunk]:
        """The chunks of one: `SEGMENT_CHUNKS`, and in the last what is left.

        Raises:
            OSError: The file cannot be read any more.
        """


def chunks_from(source: Segments, start: int) -> Iterator[PlannedChunk]:
    """The chunks of a plan, or of a part of one, from its number `start` on, counted from 0.

    Raises:
        OSError: The file cannot be read any more.
    """
    for index in range(start // SEGMENT_CHUNKS, source.segments):
        segment = source.segment(index)
        yield from segment[max(0, start - index * SEGMENT_CHUNKS) :]


class PlanFile:
    """A plan on disk: a header, if it has one, and chunks, a line each.

    Attributes:
        path: Of the file.
        header: What the plan is of, as it was written; empty when the file has no header.
        chunks: How many it holds.
        bytes: The sum of their sizes.
        shares: The same for each worker that chunks are for; under None, for those that are for all.
        workers: Of each segment, how many chunks are for which worker.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header: dict[str, Any] = {}
        self.chunks = 0
        self.bytes = 0
        self.shares: dict[int | None, tuple[int, int]] = {}
        self.workers: list[Counter[int | None]] = []
        self._offsets: list[int] = []

    def _count(self, chunk: PlannedChunk, at: int) -> None:
        if self.chunks % SEGMENT_CHUNKS == 0:
            self._offsets.append(at)
            self.workers.append(Counter())
        self.workers[-1][chunk.worker] += 1
        self.chunks += 1
        self.bytes += chunk.size
        chunks, size = self.shares.get(chunk.worker, (0, 0))
        self.shares[chunk.worker] = (chunks + 1, size + chunk.size)

    @classmethod
    def write(
        cls,
        path: Path,
        chunks: Iterable[PlannedChunk],
        header: Callable[[PlanFile], dict[str, Any]] | None = None,
    ) -> PlanFile:
        """Write a plan, as the chunks come.

        Args:
            path: Of the file.
            chunks: In their order.
            header: Makes the header, first of an empty plan and then of the whole, which may be longer by some counts.

        Raises:
            OSError: The file cannot be written.
        """
        plan, at = cls(path), 0
        with path.open("wb") as out:
            room = 0
            if header is not None:
                room = len(_header_line(header(plan))) + _HEADER_ROOM
                at += out.write(b" " * (room - 1) + b"\n")
            for chunk in chunks:
                plan._count(chunk, at)
                at += out.write(chunk.to_line().encode())
            if header is not None:
                plan.header = header(plan)
                line = _header_line(plan.header)
                if len(line) > room - 1:
                    raise ValueError("the header of a plan grew beyond the room that was kept for it")
                out.seek(0)
                out.write(line)
            out.flush()
            os.fsync(out.fileno())
        return plan

    @classmethod
    def open(cls, path: Path) -> PlanFile:
        """Read a plan that was written before.

        Raises:
            ConfigError: The file cannot be read, or a line of it is no planned chunk; the message says which.
        """
        plan, at, number = cls(path), 0, 0
        try:
            with path.open("rb") as lines:
                for number, line in enumerate(lines, 1):
                    if number == 1 and line.startswith(_HEAD):
                        plan.header = _read_header(line)
                    else:
                        plan._count(PlannedChunk.from_line(line.decode()), at)
                    at += len(line)
        except OSError as error:
            raise ConfigError(f"plan {str(path)!r} cannot be read: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"plan {str(path)!r}, line {number}: {error}") from None
        return plan

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
        return chunks_from(self, start)

    def share(self, ranks: frozenset[int] | None) -> tuple[int, int]:
        """How many chunks are for some workers, and their bytes.

        Args:
            ranks: Of the workers; None for all.
        """
        shares = [share for worker, share in self.shares.items() if is_for(worker, ranks)]
        return sum(chunks for chunks, _ in shares), sum(size for _, size in shares)


def is_for(worker: int | None, ranks: frozenset[int] | None) -> bool:
    """Whether a chunk of a worker is to be where some workers are; None stands for all."""
    return ranks is None or worker is None or worker in ranks


def _header_line(header: dict[str, Any]) -> bytes:
    return json.dumps({_HEADER: VERSION, **header}).encode()


def _read_header(line: bytes) -> dict[str, Any]:
    header = json.loads(line)
    if not isinstance(header, dict) or type(header.get(_HEADER)) is not int:
        raise ValueError("this is no header of a plan")
    version = header.pop(_HEADER)
    if version > VERSION:
        raise ValueError(f"the plan has the format {version}, of a newer warmer; this one reads up to {VERSION}")
    return header
