"""Answers whose body is part of a file, sent in pieces without the file ever being in memory."""

import asyncio
import os
from concurrent.futures import Executor
from pathlib import Path

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

_PIECE_BYTES = 512 * 1024


class FileSlice(Response):
    """The bytes `start` to `stop` (not included) of a file, as a 206, or as a 200 when that is all of it.

    Args:
        path: the file.
        start: first byte.
        stop: end of the bytes.
        size: bytes of the whole file.
        executor: where reads go that would wait for the disk.
    """

    def __init__(self, path: Path, start: int, stop: int, size: int, executor: Executor) -> None:
        whole = (start, stop) == (0, size)
        headers = {"accept-ranges": "bytes", "content-length": str(stop - start)}
        if not whole:
            headers["content-range"] = f"bytes {start}-{stop - 1}/{size}"
        super().__init__(status_code=200 if whole else 206, headers=headers, media_type="application/octet-stream")
        self._path = path
        self._start = start
        self._stop = stop
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
