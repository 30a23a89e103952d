"""Chunks that a tier of directories on this node holds already, for another tier that is filled after it. Plain Python."""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING, Final

from hfbucket_plugin.errors import HFBucketError
from hfbucket_plugin.keys import ClassicKey, parse_key

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import BinaryIO

    from warmer.plan import PlannedChunk
    from warmer.tiers import Declaration, Draft

_PIECE_BYTES: Final = 4 * 1024 * 1024
"""Read and written at a time: an order to stop is noticed between two."""


class EarlierTiers:
    """The tiers of one node that a run filled before the one that it fills now. Nothing is written into them.

    What they hold is no promise: whoever takes a chunk from here verifies it as if it came from the Hub.

    Args:
        declarations: Of tiers of directories, without placeholders.
        stopped: Whether the run was told to stop.
    """

    def __init__(self, declarations: Sequence[Declaration] = (), stopped: Callable[[], bool] = lambda: False) -> None:
        self._declarations = tuple(declarations)
        self._stopped = stopped

    def __bool__(self) -> bool:
        return bool(self._declarations)

    def copy(self, chunk: PlannedChunk, draft: Draft) -> bool:
        """Write a chunk's bytes into a draft, if one of the tiers has a file for it that is as long as it must be.

        Returns:
            Whether all of them were written.

        Raises:
            TierError: The draft cannot be written.
        """
        return any(self._copy_from(one, chunk, draft) for one in self._declarations)

    def _copy_from(self, declaration: Declaration, chunk: PlannedChunk, draft: Draft) -> bool:
        layout = declaration.layout
        try:
            file, key = declaration.file(chunk.key), parse_key(chunk.key)
            header = layout.header.bytes_for(key, chunk.size) if layout.header and isinstance(key, ClassicKey) else b""
            found = file.stat()
            if not stat.S_ISREG(found.st_mode) or found.st_size != layout.stored(chunk.size):
                return False
            source = file.open("rb")
        except (OSError, HFBucketError):
            return False
        with source:
            return _read(source, len(header)) == header and self._copy_content(source, chunk.size, draft)

    def _copy_content(self, source: BinaryIO, size: int, draft: Draft) -> bool:
        at = 0
        while at < size and not self._stopped():
            piece = _read(source, min(size - at, _PIECE_BYTES))
            if not piece or not draft.lease.write(at, piece):
                return False
            at += len(piece)
        return at == size


def _read(source: BinaryIO, size: int) -> bytes:
    """Some bytes; none where the file cannot be read."""
    try:
        return source.read(size) if size else b""
    except OSError:
        return b""
