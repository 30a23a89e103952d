"""Answers whose body is part of a file, sent in pieces without the file ever being in memory."""

import asyncio
import os
from concurrent.futures import Executor
from pathlib import Path

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

_PIECE_BYTES = 512 * 1024


def range_headers(wanted: tuple[int, int] | None, size: int) -> dict[str, str]:
    """Return the headers of an answer that is the bytes from the first to the second of `wanted`, or all `size`."""
    if wanted is None:
        return {"accept-ranges": "bytes", "content-length": str(size)}
    start, stop = wanted
    return {
        "accept-ranges": "bytes",
        "content-length": str(stop - start),
        "content-range": f"bytes {start}-{stop - 1}/{size}",
    }


class FileSlice(Response):
    """A file, or a range of its bytes as a 206.

    Args:
        path: the file.
        size: its bytes.
        wanted: first byte and end (not included) of the range; None for the whole file as a 200.
        executor: where reads go that would wait for the disk.
    """

    def __init__(self, path: Path, size: int, wanted: tuple[int, int] | None, executor: Executor) -> None:
        super().__init__(
            status_code=206 if wanted else 200,
            headers=range_headers(wanted, size),
            media_type="application/octet-stream",
        )
        self._path = path
        self._start, self._stop = wanted or (0, size)
        self._executor = executor

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer."""
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
            # What the page cache holds is read at once: a change of threads costs more than the copy.
            count = os.preadv(file, [buffer], offset, os.RWF_NOWAIT)
        except OSError:
            count = 0
        if count == size:
            return buffer
        loop = asyncio.get_running_loop()
        piece = await loop.run_in_executor(self._executor, os.pread, file, size, offset)
        if not piece:
            raise EOFError(f"{self._path} is shorter than what is recorded of it")
        return piece
