"""Responses whose body is bytes of files, stored as they are or unpacked from xorbs, and never held in memory as a whole."""

import asyncio
import itertools
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from localhub.formats.reconstruction import Piece
from localhub.formats.xorbs import ChunkTable, iter_chunks
from localhub.state.xorb_store import XorbStore

_PIECE_BYTES = 512 * 1024

_CHUNKS_PER_PIECE = 16
"""At most 2 MiB."""


def _ranged(wanted: tuple[int, int] | None, size: int) -> dict[str, Any]:
    """Return status, headers and media type of a response with the bytes of `wanted`, or with all `size` bytes."""
    start, stop = wanted or (0, size)
    headers = {"accept-ranges": "bytes", "content-length": str(stop - start)}
    if wanted:
        headers["content-range"] = f"bytes {start}-{stop - 1}/{size}"
    return {"status_code": 206 if wanted else 200, "headers": headers, "media_type": "application/octet-stream"}


class FileSlice(Response):
    """A stored file, or a range of its bytes as a 206.

    Args:
        path: the file.
        size: its size in bytes.
        wanted: the start and the end (exclusive) of the range; None for the whole file as a 200.
    """

    def __init__(self, path: Path, size: int, wanted: tuple[int, int] | None) -> None:
        super().__init__(**_ranged(wanted, size))
        self._path = path
        self._start, self._stop = wanted or (0, size)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        del receive
        file = os.open(self._path, os.O_RDONLY)
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            position = self._start
            while position < self._stop and scope["method"] != "HEAD":
                piece = await self._read(file, min(_PIECE_BYTES, self._stop - position), position)
                position += len(piece)
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            os.close(file)

    async def _read(self, file: int, size: int, offset: int) -> bytes | bytearray:
        buffer = bytearray(size)
        try:
            # What the page cache holds is read here: a switch of threads costs more than the copy.
            count = os.preadv(file, [buffer], offset, os.RWF_NOWAIT)
        except OSError:
            count = 0
        if count == size:
            return buffer
        piece = await asyncio.to_thread(os.pread, file, size, offset)
        if not piece:
            raise EOFError(f"{self._path} is shorter than its recorded size")
        return piece


def file_bytes(found: list[Piece], size: int, wanted: tuple[int, int] | None, xorbs: XorbStore) -> Response:
    """Return a response with a file that is unpacked from its chunks, or a range of its bytes as a 206.

    Args:
        found: the chunks that hold the wanted bytes, in order.
        size: size of the whole file in bytes.
        wanted: the start and the end (exclusive) of the range; None for the whole file as a 200.
        xorbs: where the chunks are stored.
    """
    start, stop = wanted or (0, size)
    return StreamingResponse(_unpacked(found, stop - start, xorbs), **_ranged(wanted, size))


async def _unpacked(found: list[Piece], length: int, xorbs: XorbStore) -> AsyncIterator[bytes]:
    """Yield `length` bytes of the chunks, without those that the first piece skips."""
    skip = found[0].skip if found else 0
    for piece in found:
        path = xorbs.path(piece.xorb)
        for first in range(piece.first, piece.end, _CHUNKS_PER_PIECE):
            end = min(first + _CHUNKS_PER_PIECE, piece.end)
            part = (await asyncio.to_thread(_unpack, path, piece.table, first, end))[skip : skip + length]
            skip = 0
            length -= len(part)
            yield part


def _unpack(path: Path, table: ChunkTable, first: int, end: int) -> bytes:
    """Return the unpacked bytes of the chunks `first` to `end` (exclusive) of a stored xorb."""
    with path.open("rb", buffering=1024 * 1024) as file:
        file.seek(table.start(first))
        return b"".join(chunk for chunk, _ in itertools.islice(iter_chunks(file), end - first))
