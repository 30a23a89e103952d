"""LMCache directories as a tier: each chunk is a file that appears atomically."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import stat
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

from hfbucket_plugin.core.buffers import RevocableBuffer
from warmer.report.outcomes import TierError, TierFullError
from warmer.tiers.disk_budget import DiskBudget
from warmer.tiers.inventory import chunk_files
from warmer.tiers.naming import file_name, unambiguous
from warmer.tiers.run_files import Ownership, RunFiles

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from warmer.tiers.declare import DirectoryDeclaration


FULL: Final = (errno.ENOSPC, errno.EDQUOT)
"""Error numbers of a full disk and of an exceeded quota."""


class FileLease(RevocableBuffer):
    """Lets several threads write disjoint ranges of one file, until it is revoked.

    Args:
        descriptor: File descriptor open for writing; the lease closes it.
        size: Size of the file in bytes.
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
            False if the lease was revoked; the caller must then stop reading.

        Raises:
            ValueError: The piece would extend past the end of the file; nothing was written.
            TierError: The disk did not accept the piece; a distinct error, so that the object store is not blamed.
        """
        if at < 0 or at + len(piece) > self.size:
            raise ValueError(f"{len(piece)} bytes at {at} do not fit into a file of {self.size}")
        # Checked under the lock of the write: after a revoke, the descriptor may be closed and its number reused.
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
        """Descriptor of the file, open for reading and writing until `close`."""
        return self._descriptor

    def revoke(self) -> None:
        """Revoke the lease; after the return, no thread writes any more."""
        with self._writing:
            self._live = False

    @property
    def live(self) -> bool:
        """Whether writes are still accepted."""
        return self._live

    def close(self, *, fsync: bool = False) -> None:
        """Revoke the lease and close the file. Further calls do nothing.

        Args:
            fsync: Whether to flush the bytes to the disk first.

        Raises:
            OSError: The disk did not accept the bytes.
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


_T = TypeVar("_T")

_PRIVATE: Final = 0o700
_RIGHTS: Final = 0o777


class HeldChunk(NamedTuple):
    """A chunk that a tier holds.

    Attributes:
        key: Key string of the chunk.
        size: Bytes of the chunk, including the padding in tiers whose files are padded.
    """

    key: str
    size: int


class DirectoryTier:
    """Directories of one declaration, on this node.

    Args:
        declaration: Declaration without placeholders. The directories are created if missing, as LMCache does, and files
            that dead runs left in them are removed.

    Raises:
        TierError: A directory cannot be created or written, or its files cannot be given to the configured owner.
    """

    def __init__(self, declaration: DirectoryDeclaration) -> None:
        self.declaration = declaration
        self.ownership = Ownership(declaration.name, declaration.options)
        self._runs: dict[Path, RunFiles] = {}
        self._modes: dict[Path, int] = {}
        self._private: dict[Path, int | None] = {}
        self._numbers = itertools.count(1)
        self.room: DiskBudget = DiskBudget(declaration, self._runs)
        try:
            for path in dict.fromkeys(declaration.base_paths):
                with _named(declaration.name, path):
                    self._runs[path] = RunFiles(path, self.ownership.open(path), sweep_now=False)
                    self._try_ownership(path)
            with _named(declaration.name, declaration.base_paths[0]):
                self.room.open()
        except TierError:
            self.close()
            raise

    def _try_ownership(self, directory: Path) -> None:
        """Check at the start, not at the end of the first chunk, whether files can be given their owner."""
        path, descriptor = self.temporary(directory)
        try:
            self.ownership.check_readable(descriptor, self._stat(directory))
            self._modes[directory] = stat.S_IMODE(os.fstat(descriptor).st_mode)
        finally:
            os.close(descriptor)
            self.unlink(path)

    def descriptor(self, directory: Path) -> int:
        """Return the descriptor of a directory of the tier."""
        return self._runs[directory].descriptor

    def _stat(self, directory: Path) -> os.stat_result:
        return os.fstat(self.descriptor(directory))

    def at(self, path: Path) -> tuple[str, int | None]:
        """Return a file's name and the descriptor of its directory, which stays valid if the directory is renamed.

        Returns:
            The name and the descriptor, as functions of `os` accept them; the path and None if the file is in no directory
            of the tier.
        """
        run = self._runs.get(path.parent)
        return (str(path), None) if run is None else (path.name, run.descriptor)

    def unlink(self, path: Path) -> None:
        """Remove a file, if it exists.

        Raises:
            OSError: The file cannot be removed.
        """
        name, directory = self.at(path)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=directory)

    def rename(self, path: Path, target: Path) -> None:
        """Rename a file to its final name.

        Raises:
            OSError: The file cannot be renamed.
        """
        (old, source), (new, directory) = self.at(path), self.at(target)
        os.replace(old, new, src_dir_fd=source, dst_dir_fd=directory)

    def lstat(self, path: Path) -> os.stat_result | None:
        """Return the status of the entry at a path, without following a link; None if nothing is there.

        Raises:
            OSError: The status cannot be read.
        """
        name, directory = self.at(path)
        try:
            return os.stat(name, dir_fd=directory, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def size_of(self, path: Path) -> int:
        """Return the size of the file at a path in bytes; 0 if there is none.

        Raises:
            OSError: The size cannot be read.
        """
        found = self.lstat(path)
        return 0 if found is None else found.st_size

    def temporary(self, directory: Path) -> tuple[Path, int]:
        """Create a temporary file with the owner and mode of the tier's files, open for reading and writing.

        Raises:
            OSError: The file cannot be created.
            TierError: The file cannot be given to its configured owner.
        """
        path = self.name(directory)
        return path, self.create(path)

    def name(self, directory: Path) -> Path:
        """Return a unique name for a temporary file."""
        return self._runs[directory].temporary(next(self._numbers))

    def private(self, directory: Path) -> Path | None:
        """Return a name for a temporary file that hf_xet creates, in a directory that only this user can access.

        hf_xet would follow a symbolic link placed there, and creates world-readable files. The name goes through a descriptor,
        not a path, so that a rename of the directory has no effect; a removed directory is not created again.

        Returns:
            The name; None if the file system does not keep the mode of a new directory, as network shares and FUSE may.

        Raises:
            OSError: The private directory is absent and cannot be created.
        """
        with self.room.lock:
            if directory not in self._private:
                self._private[directory] = self._make_private(directory)
            descriptor = self._private[directory]
        return None if descriptor is None else Path(f"/proc/self/fd/{descriptor}/{next(self._numbers)}.part")

    def _make_private(self, directory: Path) -> int | None:
        run = self._runs[directory]
        name, parent = self.at(run.directory())
        os.mkdir(name, mode=_PRIVATE, dir_fd=parent)
        made = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        found = os.fstat(made)
        # Not compared with this process's user: a network share may map root's files to another user.
        ours = found.st_uid == run.owner
        if ours and found.st_mode & _RIGHTS == _PRIVATE:
            return made
        os.close(made)
        if ours:
            return None
        raise TierError(
            f"tier {self.declaration.name!r}: {directory / name} was replaced while it was being made, by a process that may write to "
            f"the tier: it belongs to user {found.st_uid} with the mode {found.st_mode & _RIGHTS:o}; nothing is written there"
        )

    def create(self, path: Path) -> int:
        """Create a temporary file with the owner and mode of the tier's files; return its descriptor.

        Raises:
            OSError, TierError: See `temporary`.
        """
        mode = self.declaration.layout.mode
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        name, directory = self.at(path)
        descriptor = os.open(name, flags, mode, dir_fd=directory)
        try:
            self.ownership.give(descriptor, self._stat(path.parent))
        except BaseException:
            os.close(descriptor)
            self.unlink(path)
            raise
        return descriptor

    def adopt(self, path: Path, directory: Path, stored: int, *, fsync: bool) -> None:
        """Give a file that another component created the owner, mode and size of the tier's files.

        Args:
            path: Path of the temporary file.
            directory: Directory in which the file will appear.
            stored: Final size in bytes, including the padding at the end.
            fsync: Whether to flush the file to the disk.

        Raises:
            OSError, TierError: See `temporary`.
        """
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            self.ownership.give(descriptor, self._stat(directory))
            found, mode = os.fstat(descriptor), self._modes[directory]
            if stat.S_IMODE(found.st_mode) != mode:
                os.fchmod(descriptor, mode)
            if found.st_size != stored:
                os.ftruncate(descriptor, stored)
            if fsync:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def holds(self, key: str, size: int) -> bool:
        """Return whether the chunk's file exists with the right size.

        Raises:
            KeyFormatError: The key is not valid for the tier.
            TierError: The directory cannot be read.
        """
        file = self.declaration.file(key)
        with _named(self.declaration.name, file), self.room.lock:
            found = self.lstat(file)
            if found is None:
                return False
            right = stat.S_ISREG(found.st_mode) and found.st_size == self.declaration.layout.stored(size)
            if right:
                self.room.keep(file)
            return right

    def remove(self, key: str) -> None:
        """Remove the chunk's file, if it exists.

        Raises:
            KeyFormatError: The key is not valid for the tier.
            TierError: The file cannot be removed.
        """
        file = self.declaration.file(key)
        with _named(self.declaration.name, file), self.room.lock:
            size = self.size_of(file)
            self.unlink(file)
            self.room.removed(size)

    def draft(self, key: str, size: int) -> DirectoryDraft:
        """Create a draft of a chunk, with its room reserved.

        Raises:
            KeyFormatError: The key is not valid for the tier.
            TierFullError: There is no room.
            TierError: Permission is denied, or the chunk does not belong to this engine.
        """
        parsed = unambiguous(key, self.declaration.takes)
        layout = self.declaration.layout
        header = layout.head(parsed, size)
        directory, stored = self.declaration.directory(parsed), layout.stored(size)
        target = directory / file_name(parsed)
        on_disk = stored + size if header else stored
        with _named(self.declaration.name, target), self.room.lock:
            self.room.take(directory, stored, on_disk, self.size_of(target))
            try:
                roomy = self.room.plenty(directory)
                return self.fitted(directory, on_disk, lambda: DirectoryDraft(self, target, size, header, roomy=roomy))
            except BaseException:
                self.room.give_back(stored)
                raise

    def fitted(self, directory: Path, size: int, make: Callable[[], _T]) -> _T:
        """Call a function that takes room on a disk; if the disk is full, evict files and call it once more."""
        try:
            return make()
        except OSError as error:
            if not _is_full(error) or not self.room.make(directory, size):
                raise
        return make()

    def inventory(self) -> Iterator[HeldChunk]:
        """Yield the chunks that the tier holds, by the names and sizes of its files.

        Raises:
            TierError: A directory cannot be read.
        """
        for directory in dict.fromkeys(self.declaration.base_paths):
            with _named(self.declaration.name, directory):
                for file in chunk_files(self.declaration, directory):
                    size = self.declaration.layout.content(file.size)
                    if size is not None:
                        yield HeldChunk(str(file.key), size)

    def close(self) -> None:
        """Remove the lock files and drafts of this process."""
        self.room.close()
        for run in self._runs.values():
            run.close()
        while self._private:
            descriptor = self._private.popitem()[1]
            if descriptor is not None:
                os.close(descriptor)


class DirectoryDraft:
    """Temporary file of one chunk, in the directory in which the chunk will appear.

    Args:
        tier: Tier of the chunk. Its room is already reserved; a caller that fails to create a draft releases it.
        target: Final path of the file.
        size: Bytes of the chunk.
        header: Header before the chunk's bytes.
        roomy: Whether the file need not be created before the lease is requested.

    Attributes:
        path: Path of the temporary file, which holds exactly the chunk's bytes.

    Raises:
        OSError: There is no room, or permission is denied; nothing is left behind.
    """

    def __init__(self, tier: DirectoryTier, target: Path, size: int, header: bytes, *, roomy: bool) -> None:
        self._tier = tier
        self._target = target
        self._size = size
        self._stored = tier.declaration.layout.stored(size)
        self._counted = False
        self._whole: _Whole | None = None
        self._lease: FileLease | None = None
        private = tier.private(target.parent) if roomy else None
        self.path = private or tier.name(target.parent)
        try:
            if header:
                self._whole = _Whole(tier, target.parent, header, size)
            if private is not None:
                tier.room.expect(self.path, target.parent, size)
            else:
                self._open()
        except BaseException:
            self.discard()
            raise
        self._counted = True

    def _open(self) -> FileLease:
        path, descriptor = self._tier.temporary(self._target.parent)
        try:
            _reserve(descriptor, self._size)
        except BaseException:
            os.close(descriptor)
            self._tier.unlink(path)
            raise
        self._tier.room.expect_no_more(self.path)
        self.path, self._lease = path, FileLease(descriptor, self._size)
        return self._lease

    @property
    def roomy(self) -> bool:
        """See `Draft`."""
        return self._lease is None

    @property
    def lease(self) -> FileLease:
        """See `Draft`."""
        if self._lease is not None:
            return self._lease
        with _named(self._tier.declaration.name, self._target), self._tier.room.lock:
            return self._tier.fitted(self._target.parent, self._size, self._open)

    def publish(self) -> None:
        """Rename the file to its final name.

        Raises:
            TierError: The file could not be published; a file that was there before is unchanged.
        """
        fsync = self._tier.declaration.options.fsync
        with _named(self._tier.declaration.name, self._target):
            self._complete(fsync=fsync)
            path = self.path if self._whole is None else self._whole.path
            with self._tier.room.lock:
                replaced = self._tier.size_of(self._target)
                self._tier.rename(path, self._target)
                if self._counted:
                    self._counted = False
                    self._tier.room.appeared(self._stored, replaced)
        self.discard()

    def _complete(self, *, fsync: bool) -> None:
        """Complete the file that will appear: content, size, owner and mode."""
        if self._lease is not None:
            self._lease.revoke()
        elif (there := self.path.stat().st_size) != self._size:
            raise TierError(f"{self._target}: {there} bytes are there of the {self._size} of the chunk")
        if self._whole is not None:
            self._fill_whole(self._whole, fsync=fsync)
        elif self._lease is None:
            self._tier.adopt(self.path, self._target.parent, self._stored, fsync=fsync)
        else:
            if self._stored != self._size:
                os.ftruncate(self._lease.descriptor, self._stored)
            self._lease.close(fsync=fsync)

    def _fill_whole(self, whole: _Whole, *, fsync: bool) -> None:
        if self._lease is not None:
            whole.fill(self._lease.descriptor, fsync=fsync)
            return
        descriptor = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            whole.fill(descriptor, fsync=fsync)
        finally:
            os.close(descriptor)

    def discard(self) -> None:
        """Remove the temporary files, if they are still there."""
        if self._lease is not None:
            with contextlib.suppress(OSError):  # the next run removes what cannot be removed now
                self._lease.close()
        if self._whole is not None:
            self._whole.discard()
        with contextlib.suppress(OSError):
            self._tier.unlink(self.path)
        with self._tier.room.lock:
            self._tier.room.expect_no_more(self.path)
            if self._counted:
                self._counted = False
                self._tier.room.give_back(self._stored)


class _Whole:
    """File with a header, beside a file of the chunk's own bytes, which are hashed without the header."""

    def __init__(self, tier: DirectoryTier, directory: Path, header: bytes, size: int) -> None:
        self._tier = tier
        self.path, self._descriptor = tier.temporary(directory)
        self._open = True
        self._at = len(header)
        try:
            _reserve(self._descriptor, self._at + size)
            os.pwrite(self._descriptor, header, 0)
        except BaseException:
            self.discard()
            raise

    def fill(self, content: int, *, fsync: bool) -> None:
        at = self._at
        while copied := _copy(content, self._descriptor, at - self._at, at):
            at += copied
        if fsync:
            os.fsync(self._descriptor)
        self._close()

    def discard(self) -> None:
        self._close()
        with contextlib.suppress(OSError):
            self._tier.unlink(self.path)

    def _close(self) -> None:
        if self._open:
            self._open = False
            os.close(self._descriptor)


_PIECE: Final = 8 * 1024 * 1024


def _copy(source: int, target: int, start: int, at: int) -> int:
    """Copy a piece between files, inside the kernel if possible; return the bytes copied, 0 at the end."""
    try:
        return os.copy_file_range(source, target, _PIECE, start, at)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
            raise
    return os.pwrite(target, os.pread(source, _PIECE, start), at)


def _reserve(descriptor: int, size: int) -> None:
    """Reserve the blocks of a file, so that a full disk is an error now and not in the middle of a chunk."""
    if size == 0:
        return
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(descriptor, size)  # the file system cannot reserve blocks


def _is_full(error: OSError) -> bool:
    return isinstance(error, TierFullError) or error.errno in FULL


@contextlib.contextmanager
def _named(tier: str, path: Path) -> Iterator[None]:
    try:
        yield
    except TierError:
        raise
    except OSError as error:
        reason = error.strerror or type(error).__name__
        kind = TierFullError if error.errno in FULL else TierError
        raise kind(f"tier {tier!r}: {path}: {reason}") from None
    except (
        ValueError
    ) as error:  # a key may hold characters that are invalid in a file name, such as NUL: fail this chunk only
        raise TierError(f"tier {tier!r}: {str(path)!r}: {error}") from None
