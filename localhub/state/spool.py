"""Request bodies on their way to the disk."""

import asyncio
import os
import stat
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import IO

from localhub.errors import HubError

_PIECE_BYTES = 1024 * 1024
_STALE_SECONDS = 24 * 3600.0
_PREFIX = "localhub-upload-"


class Spool(AbstractContextManager["Spool"]):
    """One body in a temporary file, which the end of the context removes. At most 1 MiB of it is in memory.

    Args:
        directory: where the temporary file is created, on the file system of the file that `publish` makes.
    """

    def __init__(self, directory: Path) -> None:
        self._file = tempfile.NamedTemporaryFile(dir=directory, prefix=_PREFIX, delete=False)  # noqa: SIM115 - `__exit__` closes it
        self._path = Path(self._file.name)
        self._pieces: list[bytes] = []

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)

    async def fill(self, stream: AsyncIterator[bytes], limit: int) -> None:
        """Write a whole body.

        Raises:
            HubError: 413 when the body is longer than `limit` bytes.
        """
        size = held = 0
        async for piece in stream:
            size += len(piece)
            if size > limit:
                raise HubError(413, f"the body exceeds the limit of {limit} bytes")
            self._pieces.append(piece)
            held += len(piece)
            if held >= _PIECE_BYTES:
                await asyncio.to_thread(self._flush)
                held = 0

    def reader(self) -> IO[bytes]:
        """Return a reader of the whole body, which the caller closes."""
        self._flush()
        return self._path.open("rb", buffering=_PIECE_BYTES)

    def publish(self, target: Path, size: int) -> None:
        """Make the first `size` bytes the file `target`, which appears whole or not at all."""
        self._file.truncate(size)
        self._path.replace(target)

    def _flush(self) -> None:
        self._file.writelines(self._pieces)
        self._file.flush()
        self._pieces.clear()


def remove_stale(directory: Path) -> None:
    """Remove what killed processes left behind: regular files older than a day with the name of a spool.

    Raises:
        OSError: the directory cannot be read, or is a symbolic link.
    """
    oldest = time.time() - _STALE_SECONDS
    opened = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        for name in os.listdir(opened):  # noqa: PTH208 - by descriptor, which pathlib does not support
            with suppress(FileNotFoundError):  # another process of this root removes it too
                found = os.stat(name, dir_fd=opened, follow_symlinks=False)
                if name.startswith(_PREFIX) and stat.S_ISREG(found.st_mode) and found.st_mtime < oldest:
                    os.unlink(name, dir_fd=opened)
    finally:
        os.close(opened)
