"""Request bodies on their way to the disk: in memory while they are small, in a file beyond."""

import io
import os
import stat
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import IO, Self

from localhub.errors import HubError

_PIECE_BYTES = 1024 * 1024
_STALE_SECONDS = 24 * 3600.0
_PREFIX = "localhub-upload-"

Run = Callable[[Callable[[], None]], Awaitable[None]]
"""Runs a blocking function in a thread."""


class Spool:
    """One body. At most 1 MiB of it is in memory; the rest is in a temporary file that `close` removes.

    Args:
        directory: where the temporary file goes; on the file system of the file that `publish` makes.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._pieces: list[bytes] = []
        self._held = 0
        self._file: IO[bytes] | None = None
        self.size = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def fill(self, stream: AsyncIterator[bytes], limit: int, run: Run) -> None:
        """Take in a whole body.

        Raises:
            HubError: 413 when it is longer than `limit` bytes.
        """
        async for piece in stream:
            self.size += len(piece)
            if self.size > limit:
                raise HubError(413, f"the body is over the limit of {limit} bytes")
            self._pieces.append(piece)
            self._held += len(piece)
            if self._held >= _PIECE_BYTES:
                await run(self._flush)

    def reader(self) -> IO[bytes]:
        """Return a reader of the whole body, to be closed by the caller."""
        if self._file is None:
            return io.BytesIO(b"".join(self._pieces))
        self._flush()
        return Path(self._file.name).open("rb", buffering=_PIECE_BYTES)

    def publish(self, target: Path, size: int) -> None:
        """Make the first `size` bytes the file `target`, which appears whole or not at all."""
        self._flush()
        if self._file is None:
            self._file = self._open()
        self._file.truncate(size)
        Path(self._file.name).replace(target)
        self._file.close()
        self._file = None

    def close(self) -> None:
        """Drop the body."""
        self._pieces.clear()
        if self._file is not None:
            self._file.close()
            Path(self._file.name).unlink(missing_ok=True)
            self._file = None

    def _flush(self) -> None:
        if self._file is None:
            self._file = self._open()
        self._file.writelines(self._pieces)
        self._file.flush()
        self._pieces.clear()
        self._held = 0

    def _open(self) -> IO[bytes]:
        return tempfile.NamedTemporaryFile(dir=self._directory, prefix=_PREFIX, delete=False)


def remove_stale(directory: Path) -> None:
    """Remove what processes that were killed left behind: bodies older than a day, which no upload takes.

    Only regular files that bear the name of a body are removed, and no link is followed.

    Raises:
        OSError: The directory cannot be read, or is a link.
    """
    oldest = time.time() - _STALE_SECONDS
    opened = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        for name in os.listdir(opened):  # noqa: PTH208 - by descriptor, which pathlib has not
            if not name.startswith(_PREFIX):
                continue
            try:
                found = os.stat(name, dir_fd=opened, follow_symlinks=False)
                if stat.S_ISREG(found.st_mode) and found.st_mtime < oldest:
                    os.unlink(name, dir_fd=opened)
            except FileNotFoundError:
                continue
    finally:
        os.close(opened)
