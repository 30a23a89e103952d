"""Directories of LMCache's as a tier: each chunk a file that appears whole or not at all."""

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
"""What a full disk, or a full quota of it, says."""


class FileLease(RevocableBuffer):
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


_T = TypeVar("_T")

_PRIVATE: Final = 0o700
_RIGHTS: Final = 0o777


class HeldChunk(NamedTuple):
    """A chunk that a tier holds.

    Attributes:
        key: Its key string.
        size: Its bytes; with the padding, where the tier's files have one.
    """

    key: str
    size: int


class DirectoryTier:
    """The directories of one declaration, on this node.

    Args:
        declaration: Which directories, without placeholders. They are made when missing, as LMCache does; what dead
            runs left in them is removed.

    Raises:
        TierError: A directory cannot be made or written, or its files cannot be given to whom they are to belong.
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
        """Find out now, and not at the end of the first chunk, whether files can be given away."""
        path, descriptor = self.temporary(directory)
        try:
            self.ownership.check_readable(descriptor, self._stat(directory))
            self._modes[directory] = stat.S_IMODE(os.fstat(descriptor).st_mode)
        finally:
            os.close(descriptor)
            self.unlink(path)

    def descriptor(self, directory: Path) -> int:
        """Of a directory of the tier."""
        return self._runs[directory].descriptor

    def _stat(self, directory: Path) -> os.stat_result:
        return os.fstat(self.descriptor(directory))

    def at(self, path: Path) -> tuple[str, int | None]:
        """A file by its name and the descriptor of its directory, which stays this one whatever becomes of the directory's name.

        Returns:
            The name and the descriptor, as functions of `os` take them; the path and None where it lies in no directory of the tier.
        """
        run = self._runs.get(path.parent)
        return (str(path), None) if run is None else (path.name, run.descriptor)

    def unlink(self, path: Path) -> None:
        """Remove a file, if it is there.

        Raises:
            OSError: It cannot be removed.
        """
        name, directory = self.at(path)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=directory)

    def rename(self, path: Path, target: Path) -> None:
        """Let a file appear under another name.

        Raises:
            OSError: It cannot be.
        """
        (old, source), (new, directory) = self.at(path), self.at(target)
        os.replace(old, new, src_dir_fd=source, dst_dir_fd=directory)

    def lstat(self, path: Path) -> os.stat_result | None:
        """What lies at a path, itself where it is a link; None where nothing is there.

        Raises:
            OSError: This cannot be told.
        """
        name, directory = self.at(path)
        try:
            return os.stat(name, dir_fd=directory, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def size_of(self, path: Path) -> int:
        """Bytes of the file at a path; 0 where there is none.

        Raises:
            OSError: This cannot be told.
        """
        found = self.lstat(path)
        return 0 if found is None else found.st_size

    def temporary(self, directory: Path) -> tuple[Path, int]:
        """A new temporary file, as the files of the tier are to be, open for reading and writing.

        Raises:
            OSError: It cannot be made.
            TierError: It cannot be given to whom it is to belong.
        """
        path = self.name(directory)
        return path, self.create(path)

    def name(self, directory: Path) -> Path:
        """A name for a temporary file, which nobody else has."""
        return self._runs[directory].temporary(next(self._numbers))

    def private(self, directory: Path) -> Path | None:
        """A name for a temporary file that hf_xet makes, where only this user can put or read anything.

        It would follow a link that somebody put there, and makes files that everybody may read. By a descriptor and not by its path, so
        that the directory is this one whatever becomes of its name; one that is gone is not made again.

        Returns:
            The name; None where the file system gives directories other modes than they are made with, as shares and FUSE may.

        Raises:
            OSError: There is no such place, and none can be made.
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
        # Not this process's user: a share may give what root makes to another one.
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
        """Make a temporary file, as the files of the tier are to be; returns its descriptor.

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
        """Make a file that somebody else has made what the files of the tier are to be.

        Args:
            path: Of the file, a temporary one.
            directory: In which it is to appear.
            stored: Bytes that it is to have, with the padding at its end.
            fsync: Whether to force it to the disk.

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
        """Whether the chunk's file is there at that size.

        Raises:
            KeyFormatError: The tier can hold no chunk of that key.
            TierError: The directory cannot be looked into.
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
        """Remove what lies in the place of a chunk, if anything does.

        Raises:
            KeyFormatError: The tier can hold no chunk of that key.
            TierError: It cannot be removed.
        """
        file = self.declaration.file(key)
        with _named(self.declaration.name, file), self.room.lock:
            size = self.size_of(file)
            self.unlink(file)
            self.room.removed(size)

    def draft(self, key: str, size: int) -> DirectoryDraft:
        """Begin a chunk, with the room for it reserved.

        Raises:
            KeyFormatError: The tier can hold no chunk of that key.
            TierFullError: There is no room.
            TierError: There is no right; or the chunk is none of this engine's.
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
        """Make something that takes room on a disk; where that is full, once more with what eviction frees."""
        try:
            return make()
        except OSError as error:
            if not _is_full(error) or not self.room.make(directory, size):
                raise
        return make()

    def inventory(self) -> Iterator[HeldChunk]:
        """Stream the chunks that the tier holds, by the names and sizes of its files.

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
        """Remove this process's lock files and drafts."""
        self.room.close()
        for run in self._runs.values():
            run.close()
        while self._private:
            descriptor = self._private.popitem()[1]
            if descriptor is not None:
                os.close(descriptor)


class DirectoryDraft:
    """One chunk's temporary file, in the directory in which it will appear.

    Args:
        tier: Whose it is. Room was taken for it; a caller that fails to make a draft gives it back.
        target: The file that appears.
        size: Bytes of the chunk.
        header: Stands before them.
        roomy: Whether the file need not be made before somebody asks for the lease.

    Attributes:
        path: The temporary file: the chunk's bytes and nothing else.

    Raises:
        OSError: There is no room, or no right; nothing is left behind.
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
        """Rename the file into its place.

        Raises:
            TierError: It could not be; the file that was there before, if any, is as it was.
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
        """Have the file that is to appear be as it is to be, and all of it there."""
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
            with contextlib.suppress(OSError):  # what cannot be removed now, the next run sweeps
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
    """The file with a header, beside the chunk's own bytes, which are hashed without it."""

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
    """Copy a piece between files, inside the kernel where it can; 0 at the end."""
    try:
        return os.copy_file_range(source, target, _PIECE, start, at)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
            raise
    return os.pwrite(target, os.pread(source, _PIECE, start), at)


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
    except ValueError as error:  # a key may hold what no file name can, such as NUL: that chunk fails, and no other
        raise TierError(f"tier {tier!r}: {str(path)!r}: {error}") from None
