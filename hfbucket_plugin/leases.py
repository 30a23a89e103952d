"""The right to write into somebody else's buffer, or to read from it, which can be taken back.

The engine owns the buffers that reads fill and that puts are stored from, and reuses them as soon as the call is reported
as failed. A thread that is still blocked in the network at that moment must never touch them again: it would write into
another chunk, or store another chunk's bytes. The check and the copy are one step here.
"""

from __future__ import annotations

import threading


class Lease:
    """Lets several threads write disjoint ranges of one buffer, until it is revoked.

    Args:
        buffer: Writable, one dimension, format ``B``.
    """

    def __init__(self, buffer: memoryview) -> None:
        self._buffer: memoryview | None = buffer
        self._lock = threading.Lock()
        self.size = len(buffer)

    def write(self, at: int, piece: bytes) -> bool:
        """Copy a piece to an offset.

        Pieces of a stream are less than 4 MiB (`settings.PIECE_BYTES`), so the lock is held for about a millisecond.

        Returns:
            False when the lease was revoked: stop reading.

        Raises:
            ValueError: The piece would pass the buffer's end. Nothing was written.
        """
        if at < 0 or at + len(piece) > self.size:
            raise ValueError(f"{len(piece)} bytes at {at} do not fit into a buffer of {self.size}")
        with self._lock:
            if self._buffer is None:
                return False
            self._buffer[at : at + len(piece)] = piece
            return True

    def read(self, at: int, length: int) -> bytes | None:
        """A copy of a range, or None when the lease was revoked: the memory may be gone."""
        with self._lock:
            return None if self._buffer is None else bytes(self._buffer[at : at + length])

    def revoke(self) -> None:
        """After this returns nothing writes or reads any more, and the buffer is no longer referred to."""
        with self._lock:
            self._buffer = None

    @property
    def live(self) -> bool:
        """Whether writes are still taken."""
        return self._buffer is not None


class SourceLease:
    """Lets a thread copy a buffer, until it is revoked.

    Args:
        buffer: One dimension, format ``B``. It stays as it is until `revoke` returns.
    """

    def __init__(self, buffer: memoryview) -> None:
        self._buffer: memoryview | None = buffer
        self._lock = threading.Lock()
        self.size = len(buffer)

    def read(self, start: int, end: int) -> bytes | None:
        """A copy of some bytes, or None when the lease was revoked.

        Copying holds the lock, and the GIL: ask for a few MiB at a time.
        """
        with self._lock:
            return None if self._buffer is None else bytes(self._buffer[start:end])

    def revoke(self) -> None:
        """After this returns nothing reads any more, and the buffer is no longer referred to."""
        with self._lock:
            self._buffer = None
