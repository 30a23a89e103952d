"""Chunks put in another order than they come in, in bounded memory: sorted runs on disk, merged. And cut at a budget."""

from __future__ import annotations

import heapq
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final

from warmer.plan.plan_file import PlannedChunk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path
    from typing import IO

_RUN_CHUNKS: Final = 50_000
"""Chunks sorted in memory at a time: about 30 MB."""

_OLDEST: Final = 1 << 62
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)


def newest_first(chunk: PlannedChunk) -> int:
    """Where a chunk stands when the newest are first; one whose time the Hub did not tell is the oldest."""
    return _OLDEST if chunk.uploaded_at is None else (_EPOCH - chunk.uploaded_at) // _MICROSECOND


def hottest_first(chunk: PlannedChunk) -> int:
    """Where a chunk stands when the hottest are first: by how hot it is, then by its last use, then the newest."""
    uses = [at for at in (chunk.last_hit, chunk.uploaded_at) if at is not None]
    unused = (_EPOCH - max(uses)) // _MICROSECOND if uses else _OLDEST
    return (-(chunk.heat or 0) << 128) + (unused << 64) + newest_first(chunk)


def within(chunks: Iterable[PlannedChunk], most: int | None, max_bytes: int | None) -> Iterator[PlannedChunk]:
    """The first chunks that fit a budget.

    It ends with the first that does not fit: smaller ones behind it would be older, or of no use without it.

    Args:
        chunks: In the order in which they are wanted.
        most: Chunks; None for no bound.
        max_bytes: The sum of their sizes; None for no bound.
    """
    size = 0
    for count, chunk in enumerate(chunks, 1):
        size += chunk.size
        if (most is not None and count > most) or (max_bytes is not None and size > max_bytes):
            return
        yield chunk


def in_order(
    chunks: Iterable[PlannedChunk],
    place: Callable[[PlannedChunk], int],
    path: Path,
    cut: Callable[[Iterable[PlannedChunk]], Iterator[PlannedChunk]] = iter,
    run_chunks: int = _RUN_CHUNKS,
) -> Iterator[PlannedChunk]:
    """The chunks by their place, and by key where that is the same.

    Args:
        chunks: In any order.
        place: Where a chunk stands.
        path: A file to sort in, overwritten; it grows by about 300 bytes a chunk.
        cut: Takes the first chunks of any that are in order, such as `within`.
        run_chunks: Chunks sorted in memory at a time.

    Raises:
        OSError: The file cannot be written.
    """
    with path.open("wb") as out:
        runs = [_spill(run, place, out, cut) for run in _runs(chunks, run_chunks)]
    merged = heapq.merge(*(_read(path, start, end) for start, end in runs), key=lambda chunk: (place(chunk), chunk.key))
    return cut(merged)


def _runs(chunks: Iterable[PlannedChunk], size: int) -> Iterator[list[PlannedChunk]]:
    run: list[PlannedChunk] = []
    for chunk in chunks:
        run.append(chunk)
        if len(run) == size:
            yield run
            run = []
    if run:
        yield run


def _spill(
    run: list[PlannedChunk],
    place: Callable[[PlannedChunk], int],
    out: IO[bytes],
    cut: Callable[[Iterable[PlannedChunk]], Iterator[PlannedChunk]],
) -> tuple[int, int]:
    """Write a run: what a budget takes of it alone, and the first that it does not take, which ends the whole too."""
    start = out.tell()
    run.sort(key=lambda chunk: (place(chunk), chunk.key))
    taken = sum(1 for _ in cut(run))
    for chunk in run[: taken + 1]:
        out.write(chunk.to_line().encode())
    return start, out.tell()


def _read(path: Path, start: int, end: int) -> Iterator[PlannedChunk]:
    with path.open("rb") as lines:
        lines.seek(start)
        while lines.tell() < end:
            yield PlannedChunk.from_line(lines.readline().decode())
