"""Revocable access to a buffer that somebody else owns.

The engine owns the buffers that reads fill and that puts are stored from, and reuses them as soon as a call is reported
as failed. A thread still blocked in the network must not touch them afterwards: it would write into another chunk, or
store another chunk's bytes. Check and copy are therefore one step here. `lmcache server` also frees lent memory without
notice, when it aborts a request or force-clears its cache; it first marks the memory object as invalid, so each copy
checks that.
"""

from __future__ import annotations

import threading
from typing import Final, Protocol


class Memory(Protocol):
    """Object of the engine that stands for a piece of its memory.

    Attributes:
        valid: Whether the memory still belongs to it. Must be a plain attribute: no other thread may run between
            reading it and the copy, and Python switches threads only at calls and loops.
    """

    valid: bool


class _Kept:
    """Memory that stays valid until its lease is revoked."""

    valid = True


KEPT: Final = _Kept()


class RevocableBuffer:
    """Buffer of which several threads write disjoint ranges, or which they copy, until it is revoked.

    Args:
        buffer: One dimension, format ``B``; writable if it is written. If it is copied, it must not change until
            `revoke` returns.
        memory: Owner of the buffer, if the engine may free it before it is revoked.
    """

    def __init__(self, buffer: memoryview, memory: Memory = KEPT) -> None:
        self._buffer: memoryview | None = buffer
        self._memory = memory
        self._lock = threading.Lock()
        self.size = len(buffer)

    def write(self, at: int, piece: bytes) -> bool:
        """Copy a piece to an offset.

        Pieces of a stream are smaller than 4 MiB (`settings.PIECE_BYTES`), so the lock is held for about a millisecond.

        Args:
            at: Offset in bytes.
            piece: Bytes to copy.

        Returns:
            False if the lease was revoked or the memory was freed; the caller should stop reading.

        Raises:
            ValueError: The piece would exceed the buffer; nothing was written.
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
        """Return a copy of a range of bytes; None if the buffer was revoked or the memory was freed.

        Copying holds the lock and the GIL, so request only a few MiB at a time.
        """
        with self._lock:
            if self._buffer is None:
                return None
            piece = bytes(self._buffer[start:end])
            return (
                piece if self._memory.valid else None
            )  # checked after the copy: memory that is still valid has not been reused before

    def revoke(self) -> None:
        """Drop the buffer; nothing writes to it or reads from it after the return."""
        with self._lock:
            self._buffer = None

    @property
    def live(self) -> bool:
        """Whether the buffer still accepts writes."""
        return self._buffer is not None and self._memory.valid
