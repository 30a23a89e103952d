"""A classic `fs` directory as a tier: raw chunks, each a file that appears whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import stat
from typing import TYPE_CHECKING

from warmer.errors import TierError
from warmer.tiers.file_lease import FileLease
from warmer.tiers.leftovers import RunFiles

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from warmer.tiers.fs_declaration import FsDeclaration


class FsTier:
    """The directories of one declaration, on this node.

    Args:
        declaration: Which directories. They are made when missing, as LMCache's connector does; what dead runs left
            in them is removed.

    Raises:
        TierError: A directory cannot be made or written.
    """

    def __init__(self, declaration: FsDeclaration) -> None:
        self._declaration = declaration
        self._runs: dict[Path, RunFiles] = {}
        try:
            for path in dict.fromkeys(declaration.base_paths):
                with _named(declaration.name, path):
                    path.mkdir(parents=True, exist_ok=True)
                    self._runs[path] = RunFiles(path)
        except TierError:
            self.close()
            raise
        self._numbers = itertools.count(1)

    def holds(self, key: str, size: int) -> bool:
        """Whether the chunk's file is there at that size.

        Raises:
            TierError: The directory cannot be looked into.
        """
        file = self._declaration.file(key)
        with _named(self._declaration.name, file):
            try:
                found = file.stat()
            except FileNotFoundError:
                return False
        return stat.S_ISREG(found.st_mode) and found.st_size == size

    def draft(self, key: str, size: int) -> FsDraft:
        """Begin a chunk, with the room for it reserved.

        Raises:
            TierError: There is no room, or no right.
        """
        file = self._declaration.file(key)
        temporary = self._runs[file.parent].temporary(next(self._numbers))
        return FsDraft(self._declaration, temporary, file, size)

    def close(self) -> None:
        """Remove this process's lock files and drafts."""
        for run in self._runs.values():
            run.close()


class FsDraft:
    """One chunk's temporary file, in the directory in which it will appear.

    Args:
        declaration: Of the tier.
        temporary: The file while it is filled.
        target: The file that appears.
        size: Bytes.

    Attributes:
        path: The temporary file.
        lease: Where a reader writes.
    """

    def __init__(self, declaration: FsDeclaration, temporary: Path, target: Path, size: int) -> None:
        self._declaration = declaration
        self._target = target
        self.path = temporary
        with _named(declaration.name, target):
            # The mode that the engine's own files get: the engine may run as another user.
            descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self.lease = FileLease(descriptor, size)
        try:
            with _named(declaration.name, target):
                _reserve(descriptor, size)
        except TierError:
            self.discard()
            raise

    def publish(self) -> None:
        """Rename the file into its place.

        Raises:
            TierError: It could not be; the file that was there before, if any, is as it was.
        """
        with _named(self._declaration.name, self._target):
            self.lease.close(fsync=self._declaration.fsync)
            self.path.replace(self._target)

    def discard(self) -> None:
        """Remove the temporary file, if it is still there."""
        self.lease.close()
        with contextlib.suppress(OSError):  # what cannot be removed now, the next run sweeps
            self.path.unlink(missing_ok=True)


def _reserve(descriptor: int, size: int) -> None:
    """Reserve the blocks, so that a full disk is an error here and not in the middle of a chunk."""
    if size == 0:
        return
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(descriptor, size)  # a file system that cannot reserve


@contextlib.contextmanager
def _named(tier: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise TierError(f"tier {tier!r}: {path}: {reason}") from None
    except ValueError as error:  # a key may hold what no file name can, such as NUL: that chunk fails, and no other
        raise TierError(f"tier {tier!r}: {str(path)!r}: {error}") from None
