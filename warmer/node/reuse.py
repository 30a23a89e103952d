"""Chunks that a tier of directories on this node holds already, for another tier that is filled after it. Plain Python."""

from __future__ import annotations

import errno
import os
import stat
import threading
from typing import TYPE_CHECKING, Final

from hfbucket_plugin.core.keys import parse_key
from hfbucket_plugin.errors import HFBucketError, IntegrityError
from hfbucket_plugin.hub.transfer import xet_hashes
from warmer.report.outcomes import TierError, TierFullError
from warmer.tiers.directory import DirectoryTier

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import BinaryIO

    from hfbucket_plugin.tools.selection import ChunkRef
    from warmer.tiers import ChunkDraft, Declaration

_PIECE_BYTES: Final = 4 * 1024 * 1024
"""Read and written at a time: an order to stop is noticed between two."""


class EarlierTier:
    """A tier of one node that a run filled before the one that it fills now. Nothing is written into it but by `repair`.

    What it holds is no promise: of a chunk that was there before the run nobody has looked at more than its size. A caller that takes one
    from here compares its hash.

    Args:
        declaration: Of a tier of directories, without placeholders.
    """

    def __init__(self, declaration: Declaration) -> None:
        self._declaration = declaration
        self._lock = threading.Lock()
        self._opened: DirectoryTier | None = None

    @property
    def name(self) -> str:
        """The tier's, for people."""
        return self._declaration.name

    def repair(self, chunk: ChunkRef, content: Path) -> None:
        """Replace what lies in the place of a chunk; where there is no room for the chunk, only remove it.

        Args:
            chunk: Which.
            content: A file with its bytes alone.

        Raises:
            TierError: Neither could be done.
            IntegrityError: The content is not that of the chunk; nothing was replaced.
        """
        with self._lock:
            if self._opened is None:
                self._opened = DirectoryTier(self._declaration)
            tier = self._opened
        try:
            draft = tier.draft(chunk.key, chunk.size)
        except TierFullError:
            tier.remove(chunk.key)
            return
        try:
            with content.open("rb") as source:
                whole = _copy(source, chunk.size, draft, lambda: False)
            if not whole or xet_hashes([draft.path])[0] != chunk.xet_hash:
                raise IntegrityError(f"{chunk.key}: what was to replace it is not whole")
            draft.publish()
        except (OSError, RuntimeError) as error:
            raise TierError(f"{chunk.key}: {error}") from None
        finally:
            draft.discard()

    def close(self) -> None:
        """Leave nothing of this process's own behind."""
        with self._lock:
            if self._opened is not None:
                self._opened.close()
                self._opened = None

    def has(self, chunk: ChunkRef) -> bool:
        """Whether there is a file for a chunk, as long as it must be."""
        try:
            found = self._declaration.file(chunk.key).lstat()
        except (OSError, HFBucketError):
            return False
        return stat.S_ISREG(found.st_mode) and found.st_size == self._declaration.layout.stored(chunk.size)

    def copy(self, chunk: ChunkRef, draft: ChunkDraft, stopped: Callable[[], bool] = lambda: False) -> bool:
        """Write a chunk's bytes into a draft, if the tier has a file for it that is as long as it must be.

        Args:
            chunk: Which.
            draft: Where to.
            stopped: Whether to stop, asked between two pieces.

        Returns:
            Whether all of them were written.

        Raises:
            TierError: The draft cannot be written.
        """
        if not self.has(chunk):
            return False
        try:
            header = self._declaration.layout.head(parse_key(chunk.key), chunk.size)
            source = open_chunk(self._declaration.file(chunk.key))
        except (OSError, HFBucketError):
            return False
        with source:
            return _read(source, len(header)) == header and _copy(source, chunk.size, draft, stopped)


def open_chunk(file: Path, *, follow: bool = False) -> BinaryIO:
    """Open a chunk's file for reading, but nothing that would hold the reader up, such as a FIFO.

    Args:
        file: Which.
        follow: Whether it may be a link, as engines read it.

    Raises:
        OSError: It cannot be opened, or is not a regular file.
    """
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW))
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    raise OSError(errno.EINVAL, "it is not a regular file")


def _copy(source: BinaryIO, size: int, draft: ChunkDraft, stopped: Callable[[], bool]) -> bool:
    at, lease = 0, draft.lease  # which makes the file, of an empty chunk too
    while at < size and not stopped():
        piece = _read(source, min(size - at, _PIECE_BYTES))
        if not piece or not lease.write(at, piece):
            return False
        at += len(piece)
    return at == size


def _read(source: BinaryIO, size: int) -> bytes:
    """Some bytes; none where the file cannot be read."""
    try:
        return source.read(size) if size else b""
    except OSError:
        return b""
