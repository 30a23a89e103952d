"""A file of lines that is read twice: the second time gives what the first one gave, or nothing.

Plans are checked and approved as a whole, and carried out later. Whatever becomes of the file between the two readings,
no line is given that was not there at the first one: the file stays open, and every stretch of it is compared with its
SHA-256 before any line of it is given again.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
import weakref
from itertools import islice
from typing import TYPE_CHECKING, Final

from hfbucket_plugin.errors import ConfigError, RefusedError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_LINES: Final = 1000
"""Lines of a stretch: as much is in memory at one time."""


class Sealed:
    """A file of lines, held open.

    Args:
        path: Of the file.
        what: What it is, for errors, such as `plan`.

    Attributes:
        status: Its owner, mode and more.

    Raises:
        ConfigError: It cannot be read, or is no file.
    """

    def __init__(self, path: Path, what: str) -> None:
        self._name = f"{what} {str(path)!r}"
        self._stretches: list[tuple[int, bytes]] = []
        try:
            self._number = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a FIFO must not hold us up
            weakref.finalize(self, os.close, self._number)
            self.status = os.fstat(self._number)
        except OSError as error:
            raise ConfigError(f"{self._name} cannot be read: {error.strerror}") from None
        if not stat.S_ISREG(self.status.st_mode):
            raise ConfigError(f"{self._name} cannot be read: it is no file")

    def expect_ours(self) -> None:
        """Refuse a file that somebody else could have written.

        Raises:
            RefusedError: It belongs to another user, or others may write to it.
        """
        if self.status.st_uid != os.geteuid() or self.status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise RefusedError(
                f"{self._name} belongs to another user, or others may write to it: nobody knows who wrote what is in it, and "
                "nothing of it is carried out. Plan anew; or read it, and copy it with `install -m 600 PLAN COPY`"
            )

    def lines(self) -> Iterator[bytes]:
        """All lines, for the first time.

        Raises:
            OSError: The file cannot be read.
        """
        self._stretches.clear()
        os.lseek(self._number, 0, os.SEEK_SET)
        with os.fdopen(os.dup(self._number), "rb") as file:
            while stretch := list(islice(file, _LINES)):
                whole = b"".join(stretch)
                self._stretches.append((len(whole), hashlib.sha256(whole).digest()))
                yield from stretch

    def lines_again(self) -> Iterator[bytes]:
        """The same lines once more.

        Raises:
            RefusedError: The file was changed since it was read.
            OSError: It cannot be read any more.
        """
        at = 0
        for length, digest in self._stretches:
            whole = self._read(at, length)
            if hashlib.sha256(whole).digest() != digest:
                raise RefusedError(f"{self._name} was changed after it was checked: nothing more of it is carried out")
            at += length
            yield from io.BytesIO(whole)

    def _read(self, at: int, length: int) -> bytes:
        pieces: list[bytes] = []
        while length and (piece := os.pread(self._number, length, at)):
            pieces.append(piece)
            at, length = at + len(piece), length - len(piece)
        return b"".join(pieces)
