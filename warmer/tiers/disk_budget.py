"""What the directories of a tier may still take, and what goes to make room when the user allows it."""

from __future__ import annotations

import contextlib
import heapq
import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from warmer.report.outcomes import TierError, TierFullError
from warmer.tiers.inventory import chunk_files
from warmer.tiers.run_files import KeptByRuns, began

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from warmer.tiers.declare import DirectoryDeclaration
    from warmer.tiers.run_files import RunFiles

_CANDIDATES: Final = 256
"""At least as many files are picked in one look at a directory."""

_PART: Final = 16
"""At least this part of a directory's files is picked in one look at it, so that an eviction costs a look at so many files whatever
the size of the directory. Memory: about 300 bytes for each file picked, 20 MB where there are a million."""

_ROUNDS: Final = 3
"""So often files go for a disk that gets no emptier: some file systems free space late, and all would be gone."""

_SHARE: Final = 16
"""After this part of the budget is written, the directory is looked at again: engines and other runs write there too."""

_VISITS: Final = 64
"""Files that may be looked at for each chunk that asks for room, as the mean over many chunks."""

_OPENING_SECS: Final = 5.0
"""How long a node's start waits for the first look. A directory of millions of files takes longer: then the first chunk waits."""

_BLOCK_BYTES: Final = 512
"""What `st_blocks` counts, whatever the file system's blocks are."""


class DiskBudget:
    """The bytes that a tier may still take. All but `open` and `close` is done under its `lock`, which the caller holds.

    Args:
        declaration: Of the tier, on this node.
        runs: The files of this run, by directory of the tier; complete when `open` is called.

    Attributes:
        lock: Held from the look at what is free to the moment in which it is taken.
    """

    def __init__(self, declaration: DirectoryDeclaration, runs: Mapping[Path, RunFiles]) -> None:
        self.lock = threading.RLock()
        self._declaration = declaration
        self._options = declaration.options
        self._directories = list(dict.fromkeys(declaration.base_paths))
        self._runs = runs
        self._drafts = 0
        self._there = 0
        self._files = 0
        self._written = 0
        self._refused = 0
        self._visits = 0
        self._unreserved: dict[Path, tuple[int, int]] = {}
        self._devices: dict[Path, int] = {}
        self._kept: set[str] = set()
        self._oldest: dict[tuple[Path, ...], _Oldest] = {}
        self._opened = threading.Condition(self.lock)
        self._opening: threading.Thread | None = None
        self._trouble: OSError | None = None
        self._ready = False
        self._closed = False

    def open(self) -> None:
        """Sweep what dead runs left and look at what is there, beside the caller where it takes long.

        Raises:
            OSError: A directory cannot be read.
        """
        for path in self._directories:
            self._devices[path] = os.fstat(self._runs[path].descriptor).st_dev
        self._opening = threading.Thread(target=self._open, name="warmer-room", daemon=True)
        self._opening.start()
        self._opening.join(_OPENING_SECS)
        if self._trouble is not None:
            raise self._trouble

    def _open(self) -> None:
        try:
            for path in self._directories:
                self._runs[path].sweep()
            self._look()
        except OSError as error:
            self._trouble = error
        finally:
            with self._opened:
                self._ready = True
                self._opened.notify_all()

    def close(self) -> None:
        """Look at nothing any more."""
        with self._opened:
            self._closed = True
            self._opened.notify_all()
        if self._opening is not None:
            self._opening.join()

    def _expect_open(self) -> None:
        """Wait for the first look.

        Raises:
            OSError: A directory could not be read.
        """
        self._opened.wait_for(lambda: self._ready or self._closed)
        if self._trouble is not None:
            raise self._trouble
        if self._closed:
            raise TierError(f"tier {self._declaration.name!r}: it was closed")

    def take(self, directory: Path, size: int, on_disk: int, replaced: int = 0) -> None:
        """Take room for one chunk.

        Args:
            directory: Where it will lie.
            size: Bytes of its file.
            on_disk: Bytes that it needs until then.
            replaced: Bytes of the file in whose place it comes.

        Raises:
            TierFullError: There is none, and none could be made.
            OSError: A directory could not be read.
        """
        self._expect_open()
        self._visits += _VISITS
        more = size - replaced
        if not self._fits(size, more) and not (self._worth_a_look() and self._fits_after_a_look(size, more)):
            self._refused += 1
            raise TierFullError(
                f"tier {self._declaration.name!r}: no room for {size} bytes: its chunks take {self._there + self._drafts} "
                f"of the {self._options.max_bytes} that max_bytes allows"
            )
        self._keep_free(directory, on_disk)
        self._drafts += size

    def _fits(self, size: int, more: int) -> bool:
        """Whether the budget allows a file of some size that adds some bytes; what is in its way goes, where that is allowed."""
        over = self._over_budget(more)
        return not over or (not self._too_large(size) and self._evict(self._directories, over))

    def _fits_after_a_look(self, size: int, more: int) -> bool:
        self._look()
        return self._fits(size, more)

    def plenty(self, directory: Path) -> bool:
        """Whether there is room for twice what is in progress: enough to do without blocks that are reserved."""
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

    def removed(self, size: int) -> None:
        """A file of that many bytes is there no more."""
        self._there -= size

    def make(self, directory: Path, size: int) -> bool:
        """Make room on a disk that said to be full; false where that is not allowed, or there is nothing to remove."""
        return self._evict([directory], size)

    def keep(self, file: Path) -> None:
        """A file is as it is to be: it makes no room for this run, nor for another one as long as this one goes on."""
        run = self._runs[file.parent]
        try:
            os.utime(file.name, dir_fd=run.descriptor, follow_symlinks=False)
        except OSError:  # another user's
            self._kept.add(file.name)
            with contextlib.suppress(OSError):
                run.keep(file.name)

    def _worth_a_look(self) -> bool:
        """Whether to see if somebody made room, before a chunk is refused: ever more seldom, and as seldom as the look is dear."""
        return self._refused & (self._refused - 1) == 0 or self._visits >= self._files

    def _over_budget(self, size: int) -> int:
        if self._options.max_bytes is None:
            return 0
        return max(0, self._there + self._drafts + size - self._options.max_bytes)

    def _too_large(self, size: int) -> bool:
        return self._options.max_bytes is not None and size + self._drafts > self._options.max_bytes

    def _keep_free(self, directory: Path, size: int) -> None:
        """Leave the floor, and what files in progress are still to take: those that came first go first."""
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
            f"min_free_bytes keeps {floor}, and what is in progress is to take {self._awaited(directory)}"
        )

    def _look(self) -> None:
        """See what is there, and what may go. Only a budget needs to know, and millions of files take seconds."""
        self._written = self._visits = 0
        self._oldest = {paths: oldest for paths, oldest in self._oldest.items() if oldest.more}
        if self._options.max_bytes is None:
            return
        seen = _Seen()
        if self._options.evict:
            oldest = _Oldest(self._declaration, self._directories)
            oldest.look(seen, lambda: self._closed)
            self._oldest[tuple(self._directories)] = oldest
        else:
            for _ in _files(self._declaration, self._directories, seen, lambda: self._closed):
                pass
        self._files, self._there = seen.files, seen.bytes

    def _evict(self, directories: Sequence[Path], size: int) -> bool:
        """Remove the files written longest ago, until that many bytes are gone; none if all would not be enough."""
        if not self._options.evict:
            return False
        oldest = self._oldest.setdefault(tuple(directories), _Oldest(self._declaration, directories))
        while size > 0:
            files = oldest.take(size)
            if not files:
                return False
            size -= sum(self._remove(file, oldest) for file in files)
        return True

    def _remove(self, file: _Candidate, oldest: _Oldest) -> int:
        """Remove a file, unless it was rewritten, or found right, meanwhile; returns how many bytes that gave."""
        directory = self._runs[file.directory].descriptor
        with contextlib.suppress(OSError):  # gone, or another user's: then it gives no room
            found = os.stat(file.name, dir_fd=directory, follow_symlinks=False)
            if file.name not in self._kept and found.st_mtime_ns == file.written and not oldest.kept(file):
                os.unlink(file.name, dir_fd=directory)
                self._there -= file.size
                return file.size
        return 0


class _Candidate(NamedTuple):
    """A file that may go; in the order in which they do."""

    written: int
    name: str
    size: int
    directory: Path


class _Oldest:
    """The files of some directories that were written before any run that still goes on, oldest first.

    Attributes:
        more: Whether there may be more than those that are picked.
    """

    def __init__(self, declaration: DirectoryDeclaration, directories: Sequence[Path]) -> None:
        self._declaration = declaration
        self._directories = directories
        self._files: list[_Candidate] = []
        self._kept: dict[Path, KeptByRuns] = {}
        self.more = True

    def take(self, size: int) -> list[_Candidate]:
        """The next files, of that many bytes; fewer where more have to be looked for, none where there are no more."""
        if not self._files and self.more:
            self.look()
        if not self.more and sum(file.size for file in self._files) < size:
            return []
        taken = []
        while self._files and size > 0:
            taken.append(self._files.pop())
            size -= taken[-1].size
        return taken

    def kept(self, file: _Candidate) -> bool:
        """Whether a run that goes on recorded a file as right, which it could not touch."""
        return file.name in self._kept[file.directory]

    def look(self, seen: _Seen | None = None, stopped: Callable[[], bool] = lambda: False) -> None:
        """List the directories once, and pick the oldest files.

        Args:
            seen: Is given what there is.
            stopped: Whether to stop, and pick what was found by then.
        """
        most = max(_CANDIDATES, sum(map(_entries, self._directories)) // _PART)
        files = _files(self._declaration, self._directories, seen or _Seen(), stopped)
        before = min(began(directory) for directory in self._directories)
        self._kept = {directory: KeptByRuns(directory) for directory in self._directories}
        self._files = heapq.nsmallest(most, (file for file in files if file.written < before))[::-1]
        self.more = len(self._files) == most


@dataclass(slots=True)
class _Seen:
    """What a look at directories found."""

    files: int = 0
    bytes: int = 0


def _files(
    declaration: DirectoryDeclaration, directories: Sequence[Path], seen: _Seen, stopped: Callable[[], bool]
) -> Iterator[_Candidate]:
    """List the chunk files of directories, and add them up."""
    for directory in directories:
        for file in chunk_files(declaration, directory):
            if stopped():
                return
            seen.files, seen.bytes = seen.files + 1, seen.bytes + file.size
            yield _Candidate(file.written, file.name, file.size, directory)


def _entries(directory: Path) -> int:
    with os.scandir(directory) as entries:
        return sum(1 for _ in entries)


def _allocated(path: Path) -> int:
    try:
        return path.stat().st_blocks * _BLOCK_BYTES
    except OSError:  # not made yet, or gone
        return 0


def free_bytes(directory: Path) -> int:
    """Bytes that an ordinary user may still write there."""
    found = os.statvfs(directory)
    return found.f_bavail * found.f_frsize
