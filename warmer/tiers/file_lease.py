"""The right to write into a file, which can be taken back: as `Lease`, for bytes that go to disk and not to memory.

Pieces are written where they belong as they come, so several ranges of a chunk arrive in parallel and none of it is
kept in memory. Not through a mapping of the file: a failing disk would end the process with SIGBUS, and copying into a
mapping holds the GIL while `pwrite` does not.
"""

from __future__ import annotations

import errno
import os
import threading
from typing import Final

from hfbucket_plugin.leases import Lease
from warmer.errors import TierError, TierFullError

FULL: Final = (errno.ENOSPC, errno.EDQUOT)
"""What a full disk, or a full quota of it, says."""


class FileLease(Lease):
    """Lets several threads write disjoint ranges of one file, until it is revoked.

    Args:
        descriptor: Open for writing; the lease closes it.
        size: Bytes that the file is to have.
    """

    def __init__(self, descriptor: int, size: int) -> None:
        super().__init__(memoryview(b""))
        self.size = size
        self._descriptor = descriptor
        self._writing = threading.Lock()
        self._open = True
        self._live = True

    def write(self, at: int, piece: bytes) -> bool:
        """Write a piece at an offset.

        Returns:
            False when the lease was revoked: stop reading.

        Raises:
            ValueError: The piece would pass the file's end. Nothing was written.
            TierError: The disk did not take it: no matter of the store's, whose errors are told apart from it.
        """
        if at < 0 or at + len(piece) > self.size:
            raise ValueError(f"{len(piece)} bytes at {at} do not fit into a file of {self.size}")
        # One step with the check: after a revoke the descriptor may be closed, and its number another file's.
        with self._writing:
            if not self._live:
                return False
            view = memoryview(piece)
            while view:
                try:
                    written = os.pwrite(self._descriptor, view, at)
                except OSError as error:
                    kind = TierFullError if error.errno in FULL else TierError
                    raise kind(f"the tier's disk did not take {len(view)} bytes: {error}") from None
                view, at = view[written:], at + written
            return True

    @property
    def descriptor(self) -> int:
        """Of the file, open for reading and writing until `close`."""
        return self._descriptor

    def revoke(self) -> None:
        """After this returns nothing writes any more."""
        with self._writing:
            self._live = False

    @property
    def live(self) -> bool:
        """Whether writes are still taken."""
        return self._live

    def close(self, *, fsync: bool = False) -> None:
        """Revoke, and close the file. Further calls do nothing.

        Args:
            fsync: Whether to force the bytes to the disk first.

        Raises:
            OSError: The disk did not take them.
        """
        self.revoke()
        if not self._open:
            return
        self._open = False
        try:
            if fsync:
                os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)
