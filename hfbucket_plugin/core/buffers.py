"""The right to write into somebody else's buffer, or to read from it, which can be taken back.

The engine owns the buffers that reads fill and that puts are stored from, and reuses them as soon as the call is reported
as failed. A thread that is still blocked in the network at that moment must never touch them again: it would write into
another chunk, or store another chunk's bytes. The check and the copy are one step here.

`lmcache server` also frees memory that is lent without telling the code that fills it: when it aborts a request, or clears its
cache by force. Its memory objects are marked as not valid before their memory is given to anybody else, so each copy
asks for that mark first.
"""

from __future__ import annotations

import threading
from typing import Final, Protocol


class Memory(Protocol):
    """An object of the engine's that stands for a piece of its memory.

    Attributes:
        valid: Whether the memory still belongs to it. A plain attribute: between reading it and the copy no other thread may run,
            and Python changes threads at calls and loops only.
    """

    valid: bool


class _Kept:
    """Memory that stays as it is until its lease is revoked."""

    valid = True


KEPT: Final = _Kept()


class RevocableBuffer:
    """Lets several threads write disjoint ranges of one buffer, or copy it, until it is revoked.

    Args:
        buffer: One dimension, format ``B``; writable where it is written. Where it is copied it stays as it is until `revoke`
            returns.
        memory: What the buffer belongs to, if the engine may free it before it is revoked.
    """

    def __init__(self, buffer: memoryview, memory: Memory = KEPT) -> None:
        self._buffer: memoryview | None = buffer
        self._memory = memory
        self._lock = threading.Lock()
        self.size = len(buffer)

    def write(self, at: int, piece: bytes) -> bool:
        """Copy a piece to an offset.

        Pieces of a stream are less than 4 MiB (`settings.PIECE_BYTES`), so the lock is held for about a millisecond.

        Returns:
            False when the lease was revoked or the memory was freed: stop reading.

        Raises:
            ValueError: The piece would pass the buffer's end. Nothing was written.
        """
        end = at + len(piece)
        place = slice(at, end)
        if at < 0 or end > self.size:
            raise ValueError(f"{len(piece)} bytes at {at} do not fit into a buffer of {self.size}")
        with self._lock:
            if self._buffer is not None and self._memory.valid:
                self._buffer[place] = piece  # no call between the check and the copy: see `Memory.valid`
                return True
            return False

    def read(self, start: int, end: int) -> bytes | None:
        """A copy of some bytes, or None when the buffer was revoked or the memory was freed.

        Copying holds the lock, and the GIL: ask for a few MiB at a time.
        """
        with self._lock:
            if self._buffer is None:
                return None
            piece = bytes(self._buffer[start:end])
            return (
                piece if self._memory.valid else None
            )  # asked afterwards: what was valid then has not been reused before

    def revoke(self) -> None:
        """After this returns nothing writes or reads any more, and the buffer is no longer referred to."""
        with self._lock:
            self._buffer = None

    @property
    def live(self) -> bool:
        """Whether writes are still taken."""
        return self._buffer is not None and self._memory.valid
