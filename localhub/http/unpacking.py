"""Answers whose body is a file's own bytes, unpacked from its xorbs: what a redirect from `resolve` leads to."""

import itertools
from collections.abc import AsyncIterator
from concurrent.futures import Executor
from functools import partial
from pathlib import Path

from starlette.responses import StreamingResponse

from localhub.formats.reconstruction import Piece
from localhub.formats.xorbs import ChunkTable, iter_chunks
from localhub.http.streaming import range_headers
from localhub.http.wire import run_in
from localhub.state.xorb_store import XorbStore

_CHUNKS_AT_ONCE = 16
"""At most 2 MiB."""


class FileBytes(StreamingResponse):
    """A file made of chunks, or a range of its bytes as a 206.

    Args:
        found: the chunks that hold the wanted bytes, in order.
        size: bytes of the whole file.
        wanted: first byte and end (not included) of the range; None for the whole file as a 200.
        xorbs: where the chunks are.
        executor: where chunks are read and unpacked.
    """

    def __init__(
        self, found: list[Piece], size: int, wanted: tuple[int, int] | None, *, xorbs: XorbStore, executor: Executor
    ) -> None:
        start, stop = wanted or (0, size)
        super().__init__(
            _wanted(found, stop - start, xorbs, executor),
            status_code=206 if wanted else 200,
            headers=range_headers(wanted, size),
            media_type="application/octet-stream",
        )


async def _wanted(found: list[Piece], length: int, xorbs: XorbStore, executor: Executor) -> AsyncIterator[bytes]:
    """Yield `length` bytes from the chunks, less what the first chunk has before them."""
    skip = found[0].skip if found else 0
    async for data in _unpacked(found, xorbs, executor):
        part = data[skip : skip + length]
        skip = 0
        length -= len(part)
        yield part


async def _unpacked(found: list[Piece], xorbs: XorbStore, executor: Executor) -> AsyncIterator[bytes]:
    for piece in found:
        path = xorbs.path(piece.xorb)
        for first in range(piece.first, piece.end, _CHUNKS_AT_ONCE):
            end = min(first + _CHUNKS_AT_ONCE, piece.end)
            yield await run_in(executor, partial(unpack, path, piece.table, first, end))


def unpack(path: Path, table: ChunkTable, first: int, end: int) -> bytes:
    """Return the unpacked bytes of the chunks `first` to `end` (not included) of a stored xorb. Blocks.

    Raises:
        XorbError: the file is damaged.
    """
    with path.open("rb", buffering=1024 * 1024) as file:
        file.seek(table.start(first))
        return b"".join(chunk for chunk, _ in itertools.islice(iter_chunks(file), end - first))
