"""Space that the directories of a tier may still take, and eviction of files if the user allows it."""

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
"""Minimum number of files picked in one listing of a directory."""

_PART: Final = 16
"""At least one in this many of a directory's files is picked in one listing, so that an eviction lists as many files whatever the
size of the directory. Memory: about 300 bytes for each picked file, 20 MB for a directory of a million."""

_ROUNDS: Final = 3
"""Evictions for a disk that stays full: some file systems free space late, and otherwise all files would be removed."""

_SHARE: Final = 16
"""Divisor of the budget: after this part is written, the directory is listed again, as engines and other runs write too."""

_VISITS: Final = 64
"""Files that may be listed for each chunk that needs room, on average over many chunks."""

_OPENING_SECS: Final = 5.0
"""Seconds that the start of a node waits for the first listing; with millions of files, the first chunk waits instead."""

_BLOCK_BYTES: Final = 512
"""Unit of `st_blocks`, independent of the block size of the file system."""


class DiskBudget:
    """Bytes that a tier may still take. The caller holds `lock` for every method except `open` and `close`.

    Args:
        declaration: Declaration of the tier, on this node.
        runs: Files of this run, by directory of the tier; complete when `open` is called.

    Attributes:
        lock: Held from the check of the free space until the space is taken.
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
        """Remove files of dead runs and list the directories, in the background if it takes long.

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
        """Stop the listing of directories."""
        with self._opened:
            self._closed = True
            self._opened.notify_all()
        if self._opening is not None:
            self._opening.join()

    def _expect_open(self) -> None:
        """Wait for the first listing.

        Raises:
            OSError: A directory cannot be read.
        """
        self._opened.wait_for(lambda: self._ready or self._closed)
        if self._trouble is not None:
            raise self._trouble
        if self._closed:
            raise TierError(f"tier {self._declaration.name!r}: it was closed")

    def take(self, directory: Path, size: int, on_disk: int, replaced: int = 0) -> None:
        """Reserve room for one chunk.

        Args:
            directory: Directory of the chunk's file.
            size: Bytes of the file.
            on_disk: Bytes on the disk that the chunk needs until it is published.
            replaced: Bytes of the file that the chunk replaces.

        Raises:
            TierFullError: There is no room, and none could be made.
            OSError: A directory cannot be read.
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
        """Return whether the budget allows a file of `size` bytes that adds `more` bytes, after eviction if it is allowed."""
        over = self._over_budget(more)
        return not over or (not self._too_large(size) and self._evict(self._directories, over))

    def _fits_after_a_look(self, size: int, more: int) -> bool:
        self._look()
        return self._fits(size, more)

    def plenty(self, directory: Path) -> bool:
        """Return whether there is room for twice the drafts in progress, which is enough to write without reserved blocks."""
        return free_bytes(directory) - (self._options.min_free_bytes or 0) >= 2 * self._drafts

    def expect(self, path: Path, directory: Path, size: int) -> None:
        """Record that a file of `size` bytes will be written, without reserved blocks, on the disk of a directory."""
        self._unreserved[path] = (self._devices[directory], size)

    def expect_no_more(self, path: Path) -> None:
        """Record that a file was written, has its blocks reserved now, or will not be written."""
        self._unreserved.pop(path, None)

    def _awaited(self, directory: Path) -> int:
        """Return the bytes that such files will still take on a directory's disk; ext4 and xfs count unflushed bytes as used."""
        here = self._devices[directory]
        return sum(max(0, size - _allocated(path)) for path, (disk, size) in self._unreserved.items() if disk == here)

    def give_back(self, size: int) -> None:
        """Release the reserved room of a chunk that will not be published."""
        self._drafts -= size

    def appeared(self, size: int, replaced: int) -> None:
        """Record that a chunk with reserved room was published.

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
        """Record that a file of `size` bytes was removed."""
        self._there -= size

    def make(self, directory: Path, size: int) -> bool:
        """Evict files from a full disk; return False if eviction is not allowed or there is nothing to remove."""
        return self._evict([directory], size)

    def keep(self, file: Path) -> None:
        """Protect a right file from eviction by this run, and by other runs for as long as this one continues."""
        run = self._runs[file.parent]
        try:
            os.utime(file.name, dir_fd=run.descriptor, follow_symlinks=False)
        except OSError:  # the file belongs to another user
            self._kept.add(file.name)
            with contextlib.suppress(OSError):
                run.keep(file.name)

    def _worth_a_look(self) -> bool:
        """Return whether to list again before refusing a chunk: less often after each refusal, and as costs permit."""
        return self._refused & (self._refused - 1) == 0 or self._visits >= self._files

    def _over_budget(self, size: int) -> int:
        if self._options.max_bytes is None:
            return 0
        return max(0, self._there + self._drafts + size - self._options.max_bytes)

    def _too_large(self, size: int) -> bool:
        return self._options.max_bytes is not None and size + self._drafts > self._options.max_bytes

    def _keep_free(self, directory: Path, size: int) -> None:
        """Evict files until the floor, and the room that files in progress still need, stay free; oldest files go first."""
        floor = self._options.min_free_bytes
        if not floor and not self._unreserved:  # all blocks are reserved, so a full disk reports itself
            return
        for _ in range(_ROUNDS + 1):
            room = free_bytes(directory) - floor - size
            if room >= sum(size for _, size in self._unreserved.values()):  # without a check of each file
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
        """List the files and the candidates for eviction; only with a budget, as millions of files take seconds."""
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
        """Evict the files written longest ago until `size` bytes are free; none if all candidates would not suffice."""
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
        """Remove a file, unless it was rewritten or found right in the meantime; return the bytes freed."""
        directory = self._runs[file.directory].descriptor
        with contextlib.suppress(OSError):  # already removed, or another user's: it frees no room
            found = os.stat(file.name, dir_fd=directory, follow_symlinks=False)
            if file.name not in self._kept and found.st_mtime_ns == file.written and not oldest.kept(file):
                os.unlink(file.name, dir_fd=directory)
                self._there -= file.size
                return file.size
        return 0


class _Candidate(NamedTuple):
    """A file that may be evicted; sorts in the order of eviction."""

    written: int
    name: str
    size: int
    directory: Path


class _Oldest:
    """Files of some directories that were written before any active run began, oldest first.

    Attributes:
        more: Whether there may be more files than those picked.
    """

    def __init__(self, declaration: DirectoryDeclaration, directories: Sequence[Path]) -> None:
        self._declaration = declaration
        self._directories = directories
        self._files: list[_Candidate] = []
        self._kept: dict[Path, KeptByRuns] = {}
        self.more = True

    def take(self, size: int) -> list[_Candidate]:
        """Return the next files, of `size` bytes in total; fewer if another listing is needed, none at the end."""
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
        """Return whether an active run recorded a file as right because it could not update the file's time."""
        return file.name in self._kept[file.directory]

    def look(self, seen: _Seen | None = None, stopped: Callable[[], bool] = lambda: False) -> None:
        """List the directories once, and pick the oldest files.

        Args:
            seen: Receives the number and the bytes of the files.
            stopped: Returns whether to stop early, with the files found so far.
        """
        most = max(_CANDIDATES, sum(map(_entries, self._directories)) // _PART)
        files = _files(self._declaration, self._directories, seen or _Seen(), stopped)
        before = min(began(directory) for directory in self._directories)
        self._kept = {directory: KeptByRuns(directory) for directory in self._directories}
        self._files = heapq.nsmallest(most, (file for file in files if file.written < before))[::-1]
        self.more = len(self._files) == most


@dataclass(slots=True)
class _Seen:
    """Number and bytes of the files found in a listing of directories."""

    files: int = 0
    bytes: int = 0


def _files(
    declaration: DirectoryDeclaration, directories: Sequence[Path], seen: _Seen, stopped: Callable[[], bool]
) -> Iterator[_Candidate]:
    """Yield the chunk files of directories, and add them to the totals."""
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
    except OSError:  # not created yet, or removed
        return 0


def free_bytes(directory: Path) -> int:
    """Return the bytes that an unprivileged user may still write to a directory's file system."""
    found = os.statvfs(directory)
    return found.f_bavail * found.f_frsize
