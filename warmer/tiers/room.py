"""What the directories of a tier may still take, and what goes to make room when the user allows it."""

from __future__ import annotations

import contextlib
import heapq
import os
import threading
from typing import TYPE_CHECKING, Final, NamedTuple

from warmer.errors import TierFullError
from warmer.tiers.leftovers import began
from warmer.tiers.listing import chunk_files

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from warmer.tiers.declaration import DirectoryDeclaration

_CANDIDATES: Final = 256
"""As many files are picked in one look at a directory: memory does not grow with it."""

_ROUNDS: Final = 3
"""So often files go for a disk that gets no emptier: some file systems free space late, and all would be gone."""

_SHARE: Final = 16
"""After this part of the budget is written, the directory is looked at again: engines and other runs write there too."""


_BLOCK_BYTES: Final = 512
"""What `st_blocks` counts, whatever the file system's blocks are."""


class Room:
    """The bytes that a tier may still take. All is done under its `lock`, which the caller holds.

    Args:
        declaration: Of the tier, on this node.

    Attributes:
        lock: Held from the look at what is free to the moment in which it is taken.

    Raises:
        OSError: A directory cannot be read.
    """

    def __init__(self, declaration: DirectoryDeclaration) -> None:
        self.lock = threading.RLock()
        self._declaration = declaration
        self._options = declaration.options
        self._directories = list(dict.fromkeys(declaration.base_paths))
        self._drafts = 0
        self._there = 0
        self._written = 0
        self._refused = 0
        self._unreserved: dict[Path, tuple[int, int]] = {}
        self._devices = {path: path.stat().st_dev for path in self._directories}
        self._kept: set[str] = set()
        self._oldest: dict[tuple[Path, ...], _Oldest] = {}
        self._look()

    def take(self, directory: Path, size: int, on_disk: int, replaced: int = 0) -> None:
        """Take room for one chunk.

        Args:
            directory: Where it will lie.
            size: Bytes of its file.
            on_disk: Bytes that it needs until then.
            replaced: Bytes of the file in whose place it comes.

        Raises:
            TierFullError: There is none, and none could be made.
        """
        over = self._over_budget(size - replaced)
        if over and self._worth_a_look():
            self._look()
            over = self._over_budget(size - replaced)
        if over and (self._too_large(size) or not self._evict(self._directories, over)):
            self._refused += 1
            raise TierFullError(
                f"tier {self._declaration.name!r}: no room for {size} bytes: its chunks take {self._there + self._drafts} "
                f"of the {self._options.max_bytes} that max_bytes allows"
            )
        self._keep_free(directory, on_disk)
        self._drafts += size
        self._refused = 0

    def plenty(self, directory: Path) -> bool:
        """Whether there is room for twice what is under way: enough to do without blocks that are reserved."""
        return free_bytes(directory) - (self._options.min_free_bytes or 0) >= 2 * self._drafts

    def expect(self, path: Path, directory: Path, size: int) -> None:
        """A file of that size will be written, on the disk of a directory, whose blocks are not reserved."""
        self._unreserved[path] = (self._devices[directory], size)

    def expect_no_more(self, path: Path) -> None:
        """It is written, or reserved now, or is not to be any more."""
        self._unreserved.pop(path, None)

    def _awaited(self, directory: Path) -> int:
        """What such files on the disk of a directory are still to take; ext4 and xfs count what is not on the disk yet."""
        here = self._devices[directory]
        return sum(max(0, size - _allocated(path)) for path, (disk, size) in self._unreserved.items() if disk == here)

    def give_back(self, size: int) -> None:
        """A chunk for which room was taken does not appear."""
        self._drafts -= size

    def appeared(self, size: int, replaced: int) -> None:
        """A chunk for which room was taken is there.

        Args:
            size: Bytes of its file.
            replaced: Bytes of the file that was there before.
        """
        self._drafts -= size
        self._there += size - replaced
        self._written += size
        if self._options.max_bytes is not None and self._written * _SHARE > self._options.max_bytes:
            self._look()

    def make(self, directory: Path, size: int) -> bool:
        """Make room on a disk that said to be full; false where that is not allowed, or there is nothing to remove."""
        return self._evict([directory], size)

    def keep(self, file: Path) -> None:
        """A file is as it is to be: it is not among those that make room in this run."""
        if not self._options.evict:
            return
        try:
            os.utime(file)
        except OSError:
            self._kept.add(file.name)

    def _worth_a_look(self) -> bool:
        """Whether to see if somebody made room, before a chunk is refused: ever more seldom while nobody does."""
        return self._refused & (self._refused - 1) == 0

    def _over_budget(self, size: int) -> int:
        if self._options.max_bytes is None:
            return 0
        return max(0, self._there + self._drafts + size - self._options.max_bytes)

    def _too_large(self, size: int) -> bool:
        return self._options.max_bytes is not None and size + self._drafts > self._options.max_bytes

    def _keep_free(self, directory: Path, size: int) -> None:
        """Leave the floor, and what files under way are still to take: those that came first go first."""
        floor = self._options.min_free_bytes
        if not floor and not self._unreserved:  # then the disk says by itself when it is full
            return
        for _ in range(_ROUNDS + 1):
            room = free_bytes(directory) - floor - size
            if room >= sum(size for _, size in self._unreserved.values()):  # without a look at each
                return
            lacking = self._awaited(directory) - room
            if lacking <= 0:
                return
            if not self._evict([directory], lacking):
                break
        raise TierFullError(
            f"tier {self._declaration.name!r}: no room for {size} bytes: {directory} has {free_bytes(directory)} free, "
            f"min_free_bytes keeps {floor}, and what is under way is to take {self._awaited(directory)}"
        )

    def _look(self) -> None:
        """See what is there. Only a budget needs to know, and millions of files take seconds."""
        self._written = 0
        if self._options.max_bytes is not None:
            files = (file for path in self._directories for file in chunk_files(self._declaration, path))
            self._there = sum(file.size for file in files)

    def _evict(self, directories: Sequence[Path], size: int) -> bool:
        """Remove the files written longest ago, until that many bytes are gone; none if all would not be enough."""
        if not self._options.evict:
            return False
        oldest = self._oldest.setdefault(tuple(directories), _Oldest(self._declaration, directories))
        while size > 0:
            files = oldest.take(size)
            if not files:
                return False
            size -= sum(map(self._remove, files))
        return True

    def _remove(self, file: _Candidate) -> int:
        """Remove a file, unless it was written anew meanwhile; returns how many bytes that gave."""
        with contextlib.suppress(OSError):  # gone, or another user's: then it gives no room
            if file.path.name not in self._kept and file.path.lstat().st_mtime_ns == file.written:
                file.path.unlink()
                self._there -= file.size
                return file.size
        return 0


class _Candidate(NamedTuple):
    """A file that may go; in the order in which they do."""

    written: int
    path: Path
    size: int


class _Oldest:
    """The files of some directories that were written before any run that still goes on, oldest first."""

    def __init__(self, declaration: DirectoryDeclaration, directories: Sequence[Path]) -> None:
        self._declaration = declaration
        self._directories = directories
        self._files: list[_Candidate] = []
        self._more = True

    def take(self, size: int) -> list[_Candidate]:
        """The next files, of that many bytes; fewer where more have to be looked for, none where there are no more."""
        if not self._files and self._more:
            self._files = heapq.nsmallest(_CANDIDATES, self._candidates())[::-1]
            self._more = len(self._files) == _CANDIDATES
        if not self._more and sum(file.size for file in self._files) < size:
            return []
        taken = []
        while self._files and size > 0:
            taken.append(self._files.pop())
            size -= taken[-1].size
        return taken

    def _candidates(self) -> Iterator[_Candidate]:
        before = min(began(directory) for directory in self._directories)
        for directory in self._directories:
            for file in chunk_files(self._declaration, directory):
                if file.written < before:
                    yield _Candidate(file.written, directory / file.name, file.size)


def _allocated(path: Path) -> int:
    try:
        return path.stat().st_blocks * _BLOCK_BYTES
    except OSError:  # not made yet, or gone
        return 0


def free_bytes(directory: Path) -> int:
    """Bytes that an ordinary user may still write there."""
    found = os.statvfs(directory)
    return found.f_bavail * found.f_frsize
