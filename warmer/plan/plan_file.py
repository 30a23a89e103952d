"""Plan of a warm-up, and the file in which it is stored."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import os
from collections import Counter
from typing import TYPE_CHECKING, Any, Final, Protocol

from hfbucket_plugin.core.keys import BucketHandle, encode_name, is_probe, parse_key
from hfbucket_plugin.errors import ConfigError, RefusedError
from hfbucket_plugin.tools.plan_file import Sealed, Segment
from hfbucket_plugin.tools.selection import ChunkRef
from warmer.report.outcomes import PlanLostError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from collections.abc import Set as AbstractSet
    from pathlib import Path

    from hfbucket_plugin.core.keys import Key
    from hfbucket_plugin.hub.listing import ChunkEntry


VERSION: Final = 1
"""Version of the format of plan files; a newer version is refused."""

_HEADER: Final = "warmer_plan"
_HEAD: Final = f'{{"{_HEADER}":'.encode()
_SEAL: Final = "seal"
_HEADER_ROOM: Final = 2048
"""Bytes reserved for counts in the header, which are known only after the chunks are written."""

_MOST_LINE_BYTES: Final = 64 * 1024
"""Maximum length of a chunk's line: names on the Hub have about a thousand characters, and a line contains the name twice."""

NEVER_PLANNED: Final = frozenset({"report", "report_html"})
"""Parts of a warm-up that no plan contains: the files that a run writes are chosen by the user who runs it."""

SEGMENT_CHUNKS: Final = 1000
"""Chunks of a segment, the number that the Hub looks up in one request."""


class Planner:
    """Converts a listing into planned chunks for tiers of one kind of key, and counts the skipped ones.

    Args:
        handle: Handle of the listed instance.
        takes: Kind of key that the tier accepts.

    Attributes:
        skipped: Chunks skipped, by reason: ``other_kind`` (keys that the tier does not accept) and ``probe`` (the
            object with which LMCache tests a backend).
    """

    def __init__(self, handle: BucketHandle, takes: type[Key]) -> None:
        self._handle = handle
        self._takes = takes
        self.skipped: Counter[str] = Counter()

    def plan(self, entries: Iterable[ChunkEntry]) -> Iterator[ChunkRef]:
        """Yield the chunks that fit the tier, in the order of the listing: by key, hence by model and then by worker."""
        for entry in entries:
            if not isinstance(entry.key, self._takes):
                self.skipped["other_kind"] += 1
            elif is_probe(entry.text):
                self.skipped["probe"] += 1
            else:
                path = self._handle.join(encode_name(entry.text))
                content, key = entry.content, entry.key
                worker = key.worker_id if key.world_size > 1 else None
                yield ChunkRef(entry.text, path, content.xet_hash, content.size, entry.uploaded_at, worker=worker)


class Segments(Protocol):
    """Chunks that are read segment by segment: a plan, or part of one."""

    @property
    def segments(self) -> int:
        """Number of segments."""

    def segment(self, index: int) -> list[ChunkRef]:
        """Return the chunks of one segment: `SEGMENT_CHUNKS`, or fewer in the last one.

        Raises:
            RefusedError: The file has changed since it was first read.
            PlanLostError: The file can no longer be read.
        """


def chunks_from(source: Segments, start: int) -> Iterator[ChunkRef]:
    """Yield the chunks of a plan, or of part of one, from index `start` on, counted from 0.

    Raises:
        RefusedError: The file has changed since it was first read.
        PlanLostError: The file can no longer be read.
    """
    for index in range(start // SEGMENT_CHUNKS, source.segments):
        segment = source.segment(index)
        yield from segment[max(0, start - index * SEGMENT_CHUNKS) :]


class WarmPlanFile:
    """A plan on disk: an optional header, and one chunk a line. The file is kept open.

    Each segment is compared with its content when the plan was first read or written: even if the file changes in the
    meantime, only chunks that it contained then are returned.

    Attributes:
        path: Path of the file.
        header: Description of the plan, as written; empty if the file has no header.
        chunks: Number of chunks.
        bytes: Sum of the chunks' sizes.
        home: Common prefix of the chunks' paths before the names of their keys; None if there are no chunks.
        shares: Number and bytes of the chunks for each worker; under None, those for all workers.
        workers: For each segment, the number of chunks for each worker.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header: dict[str, Any] = {}
        self.chunks = 0
        self.bytes = 0
        self.home: str | None = None
        self.shares: dict[int | None, tuple[int, int]] = {}
        self.workers: list[Counter[int | None]] = []
        self._segments: list[Segment] = []
        self._file: Sealed | None = None

    def _count(self, chunk: ChunkRef, line: bytes, at: int) -> None:
        if self.chunks % SEGMENT_CHUNKS == 0:
            self._segments.append(Segment(at))
            self.workers.append(Counter())
        self._segments[-1].add(line)
        self.workers[-1][chunk.worker] += 1
        self.chunks += 1
        self.bytes += chunk.size
        chunks, size = self.shares.get(chunk.worker, (0, 0))
        self.shares[chunk.worker] = (chunks + 1, size + chunk.size)

    @classmethod
    def write(
        cls,
        path: Path,
        chunks: Iterable[ChunkRef],
        header: Callable[[WarmPlanFile], dict[str, Any]] | None = None,
    ) -> WarmPlanFile:
        """Write a plan while its chunks are produced.

        Args:
            path: Path of the file.
            chunks: Chunks, in order.
            header: Makes the header, first of the empty plan and then of the complete one, which may be longer by counts.

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
                line = chunk.to_line().encode()
                plan._count(chunk, line, at)
                at += out.write(line)
            if header is not None:
                plan.header = header(plan)
                line = _header_line(plan.header)
                if len(line) > room - 1:
                    raise ValueError("the header of a plan grew beyond the room that was kept for it")
                out.seek(0)
                out.write(line)
            out.flush()
            os.fsync(out.fileno())
        plan._file = Sealed(path, "plan")
        return plan

    @classmethod
    def open(cls, path: Path, *, ours: bool = False) -> WarmPlanFile:
        """Read an existing plan, and validate every line.

        Args:
            path: Path of the file.
            ours: Whether to refuse a file that another user could have written.

        Raises:
            ConfigError: The file cannot be read, or a line is not a planned chunk; the message names the line.
            RefusedError: The file belongs to another user, or others may write to it; or its header contains what no plan
                contains, or a line names an object that does not belong to its key.
        """
        plan, at, number = cls(path), 0, 0
        plan._file = file = Sealed(path, "plan")
        if ours:
            file.expect_ours()
        try:
            for number, line in enumerate(file.raw_lines(), 1):
                if number == 1 and line.startswith(_HEAD):
                    plan._begin(_read_header(line))
                else:
                    plan._take(line, at)
                at += len(line)
        except OSError as error:
            raise ConfigError(f"plan {str(path)!r} cannot be read: {error.strerror}") from None
        except RefusedError as error:
            raise RefusedError(f"plan {str(path)!r}, line {number}: {error}") from None
        except UnicodeError:
            raise ConfigError(f"plan {str(path)!r}, line {number}: this is not valid Unicode text") from None
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"plan {str(path)!r}, line {number}: {error}") from None
        return plan

    def _begin(self, header: dict[str, Any]) -> None:
        self.header = header
        if "bucket" in header:
            self.home = BucketHandle.parse(header["bucket"]).join("")

    def _take(self, line: bytes, at: int) -> None:
        if len(line) > _MOST_LINE_BYTES:
            raise ValueError(f"the line is longer than {_MOST_LINE_BYTES} bytes")
        chunk = ChunkRef.from_line(line.decode())
        parse_key(chunk.key)
        name = encode_name(chunk.key)
        if self.home is None:
            self.home = chunk.path.removesuffix(name)
        if chunk.path != self.home + name:
            raise RefusedError(
                f"path {chunk.path!r} is not that of the key {chunk.key!r}, which is {self.home + name!r}: make a new plan"
            )
        self._count(chunk, line, at)

    @property
    def segments(self) -> int:
        """Number of segments."""
        return len(self._segments)

    def segment(self, index: int) -> list[ChunkRef]:
        """Return the chunks of one segment, at most `SEGMENT_CHUNKS`.

        Raises:
            RefusedError: The file has changed since it was first read.
            PlanLostError: The file can no longer be read.
        """
        if self._file is None:
            raise ValueError("the plan was not written yet")
        try:
            whole = self._file.again(self._segments[index])
        except OSError as error:
            raise PlanLostError(f"plan {str(self.path)!r} cannot be read any more: {error.strerror}") from None
        return [ChunkRef.from_line(line) for line in whole.decode().split("\n") if line]

    def chunks_from(self, start: int) -> Iterator[ChunkRef]:
        """Yield the chunks of the plan from index `start` on, counted from 0.

        Raises:
            RefusedError: The file has changed since it was first read.
            PlanLostError: The file can no longer be read.
        """
        return chunks_from(self, start)

    def share(self, ranks: frozenset[int] | None) -> tuple[int, int]:
        """Return the number and the bytes of the chunks for some workers.

        Args:
            ranks: Ranks of the workers; None for all.
        """
        shares = [share for worker, share in self.shares.items() if is_for(worker, ranks)]
        return sum(chunks for chunks, _ in shares), sum(size for _, size in shares)


def is_for(worker: int | None, ranks: frozenset[int] | None) -> bool:
    """Return whether a chunk of a worker belongs on a node with workers of some ranks; None stands for all."""
    return ranks is None or worker is None or worker in ranks


def _header_line(header: dict[str, Any]) -> bytes:
    return json.dumps({_HEADER: VERSION, **header, _SEAL: _seal_of(header)}).encode()


def _seal_of(header: dict[str, Any]) -> str:
    """Return a digest that shows whether a header was edited; it does not protect against forgery."""
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()


def _read_header(line: bytes) -> dict[str, Any]:
    header = json.loads(line)
    if not isinstance(header, dict) or type(header.get(_HEADER)) is not int:
        raise ValueError("this is no header of a plan")
    version = header.pop(_HEADER)
    if version > VERSION:
        raise ValueError(f"the plan has the format {version}, of a newer warmer; this one reads up to {VERSION}")
    json.dumps(
        header, ensure_ascii=False
    ).encode()  # raises for lone surrogates, which JSON can escape and UTF-8 cannot encode
    for name, kind in _HEADER_TYPES.items():
        if name in header and not isinstance(header[name], kind):
            raise ValueError(f"{name} of the header is not of the type that a plan has there")
    tiers, prompts = header.get("tiers", []), header.get("prompts_file", {})
    if not all(isinstance(one, str) for one in [*tiers, *prompts.values()]):
        raise ValueError("tiers and prompts_file of the header must hold texts")
    if not all(type(one) is int for one in header.get("skipped", {}).values()):
        raise ValueError("skipped of the header must hold counts")
    for name in NEVER_PLANNED & header.get("warm_up", {}).keys():
        raise RefusedError(f"warm_up of the header has {name}, which no plan names: give it on the command line")
    seal = header.pop(_SEAL, None)
    # Plans of older versions have no seal.
    if seal is not None and seal != _seal_of(header):
        raise RefusedError(
            "the header was changed after the plan was written: make a new plan, or give what is to be different on the command line"
        )
    return header


_HEADER_TYPES: Final[dict[str, type]] = {
    "made": str, "instance": str, "bucket": str, "takes": str, "tiers": list, "warm_up": dict, "selected": int,
    "selected_bytes": int, "skipped": dict, "fingerprints": list, "order": dict, "prompts": dict, "prompts_file": dict,
}  # fmt: skip


class PlanPart:
    """Chunks of a plan that are for certain workers, in the order of the plan.

    Args:
        plan: The plan.
        workers: Ranks of the workers; None among them stands for the chunks that are for all workers.
    """

    def __init__(self, plan: WarmPlanFile, workers: AbstractSet[int | None]) -> None:
        self._plan = plan
        self._workers = frozenset(workers)
        counts = (sum(counted[worker] for worker in self._workers) for counted in plan.workers)
        # Number of chunks before each segment of the plan, and in total.
        self._before = list(itertools.accumulate(counts, initial=0))

    @property
    def chunks(self) -> int:
        """Number of chunks."""
        return self._before[-1]

    @property
    def segments(self) -> int:
        """Number of segments of this part, which differ from those of the plan."""
        return -(-self.chunks // SEGMENT_CHUNKS)

    def segment(self, index: int) -> list[ChunkRef]:
        """Return the chunks of one segment, at most `SEGMENT_CHUNKS`.

        Raises:
            RefusedError: The file has changed since it was first read.
            PlanLostError: The file can no longer be read.
        """
        start = index * SEGMENT_CHUNKS
        return list(itertools.islice(self._read(start), min(SEGMENT_CHUNKS, self.chunks - start)))

    def _read(self, start: int) -> Iterator[ChunkRef]:
        first = bisect.bisect_right(self._before, start) - 1
        left = start - self._before[first]
        for index in range(first, self._plan.segments):
            if self._before[index + 1] == self._before[index]:
                continue  # no chunk of this segment is needed
            own = (chunk for chunk in self._plan.segment(index) if chunk.worker in self._workers)
            yield from itertools.islice(own, left, None)
            left = 0

    def chunks_from(self, start: int) -> Iterator[ChunkRef]:
        """Yield the chunks of the part from index `start` on, counted from 0.

        Raises:
            RefusedError: The file has changed since it was first read.
            PlanLostError: The file can no longer be read.
        """
        return chunks_from(self, start)
