"""Reuse of chunks that an earlier directory tier on this node already holds. Plain Python."""

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
"""Bytes read and written at a time; a stop is noticed between two pieces."""


class EarlierTier:
    """Tier of a node that a run filled before the present one. Only `repair` writes into it.

    Its content is not trusted: for a chunk that was there before the run, at most the size was checked. A caller that takes
    a chunk from here compares its hash.

    Args:
        declaration: Declaration of a directory tier, without placeholders.
    """

    def __init__(self, declaration: Declaration) -> None:
        self._declaration = declaration
        self._lock = threading.Lock()
        self._opened: DirectoryTier | None = None

    @property
    def name(self) -> str:
        """Name of the tier, for messages."""
        return self._declaration.name

    def repair(self, chunk: ChunkRef, content: Path) -> None:
        """Replace wrong content in the place of a chunk; if there is no room for the chunk, only remove the content.

        Args:
            chunk: Right chunk.
            content: File that holds exactly the chunk's bytes.

        Raises:
            TierError: The content could be neither replaced nor removed.
            IntegrityError: The file does not hold the chunk; nothing was replaced.
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
        """Remove the temporary and lock files of this process."""
        with self._lock:
            if self._opened is not None:
                self._opened.close()
                self._opened = None

    def has(self, chunk: ChunkRef) -> bool:
        """Return whether there is a file of the right length for a chunk."""
        try:
            found = self._declaration.file(chunk.key).lstat()
        except (OSError, HFBucketError):
            return False
        return stat.S_ISREG(found.st_mode) and found.st_size == self._declaration.layout.stored(chunk.size)

    def copy(self, chunk: ChunkRef, draft: ChunkDraft, stopped: Callable[[], bool] = lambda: False) -> bool:
        """Write a chunk's bytes into a draft, if the tier has a file of the right length for the chunk.

        Args:
            chunk: Chunk to copy.
            draft: Destination.
            stopped: Returns whether to stop; called between two pieces.

        Returns:
            Whether all bytes were written.

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
    """Open a chunk's file for reading, without blocking on a special file such as a FIFO.

    Args:
        file: Path of the file.
        follow: Whether to follow a symbolic link, as engines do.

    Raises:
        OSError: The file cannot be opened, or is not a regular file.
    """
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW))
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    raise OSError(errno.EINVAL, "it is not a regular file")


def _copy(source: BinaryIO, size: int, draft: ChunkDraft, stopped: Callable[[], bool]) -> bool:
    at, lease = 0, draft.lease  # creates the file, for an empty chunk too
    while at < size and not stopped():
        piece = _read(source, min(size - at, _PIECE_BYTES))
        if not piece or not lease.write(at, piece):
            return False
        at += len(piece)
    return at == size


def _read(source: BinaryIO, size: int) -> bytes:
    """Read up to `size` bytes; return none if the file cannot be read."""
    try:
        return source.read(size) if size else b""
    except OSError:
        return b""
