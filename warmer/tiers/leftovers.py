"""Temporary files in a tier's own directory, told apart by run, and swept when the run that made them is dead.

They must lie in the directory in which they will appear, since a rename is atomic within one file system only. Their
names begin with a dot and do not end in `.data`, so no engine takes them for chunks. Whether a run still lives is told
by its lock file (see `hfbucket_plugin.run_lock`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import time
from collections import defaultdict
from typing import TYPE_CHECKING, Final

from hfbucket_plugin.run_lock import Heartbeat, lock_of_the_dead, take, touch

if TYPE_CHECKING:
    from pathlib import Path

RUN_FILES: Final = ".hfbucket-warm-"
"""What the names of all files of runs begin with."""

_HEAD: Final = RUN_FILES
_LOCK: Final = re.compile(rf"{re.escape(_HEAD)}([0-9a-f]{{16}})\.lock")
_PART: Final = re.compile(rf"{re.escape(_HEAD)}([0-9a-f]{{16}})-.*\.part", re.DOTALL)
_KEPT: Final = "kept"
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


class RunFiles:
    """This process's temporary files in one directory.

    Args:
        directory: Must exist.
        descriptor: Of the directory, which is closed with this; None to open it by its name.
        sweep_now: Whether to remove what dead runs left in it at once; else `sweep` does.

    Attributes:
        descriptor: Of the directory, which stays this one whatever becomes of its name.

    Raises:
        OSError: The directory cannot be written.
    """

    def __init__(self, directory: Path, descriptor: int | None = None, *, sweep_now: bool = True) -> None:
        self._directory = directory
        self._kept: int | None = None
        self.descriptor = os.open(directory, _DIRECTORY) if descriptor is None else descriptor
        try:
            name, lock = take(lambda: f"{_HEAD}{secrets.token_hex(8)}.lock", self.descriptor)
        except BaseException:
            os.close(self.descriptor)
            raise
        self._run = name.removeprefix(_HEAD).removesuffix(".lock")
        self._lock: int | None = lock
        self._heart = Heartbeat(lock)
        try:
            if sweep_now:
                self.sweep()
        except BaseException:
            self.close()
            raise

    @property
    def owner(self) -> int:
        """The user to whom the file system gives what this process makes in the directory.

        Raises:
            OSError: It does not say, or this run was closed.
        """
        if self._lock is None:
            raise OSError(errno.EBADF, "the run was closed")
        return os.fstat(self._lock).st_uid

    def sweep(self) -> list[str]:
        """Remove what dead runs left in the directory, and nothing else; returns the names of those runs.

        Raises:
            OSError: The directory cannot be read.
        """
        return [] if self._lock is None else _sweep(self.descriptor, touch(self._lock))

    def temporary(self, number: int) -> Path:
        """The name of a temporary file."""
        return self._directory / f"{_HEAD}{self._run}-{number}.part"

    def directory(self) -> Path:
        """The name of a directory of this run's, in which nobody else looks for anything."""
        return self._directory / f"{_HEAD}{self._run}-run.part"

    def keep(self, name: str) -> None:
        """Record a file that no run may remove while this one goes on, for those that read `kept`.

        Raises:
            OSError: It cannot be recorded.
        """
        if self._kept is None:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            self._kept = os.open(f"{_HEAD}{self._run}-{_KEPT}.part", flags, 0o644, dir_fd=self.descriptor)
        os.write(self._kept, os.fsencode(name) + b"\0")

    def close(self) -> None:
        """Remove this run's files. Further calls do nothing."""
        descriptor, self._lock = self._lock, None
        if descriptor is None:
            return
        self._heart.stop()
        with contextlib.suppress(OSError):  # what cannot be removed now, the next run sweeps
            _remove(self.descriptor, self._run, _found(self.descriptor).get(self._run, []))
        for one in (descriptor, self._kept, self.descriptor):
            if one is not None:
                os.close(one)


class KeptByRuns:
    """The files of one directory that runs recorded because they found them right, as far as they are known.

    Args:
        directory: Which.

    Raises:
        OSError: The directory cannot be read.
    """

    def __init__(self, directory: Path) -> None:
        self._files = [directory / f"{_HEAD}{run}-{_KEPT}.part" for run in runs(directory)]
        self._read = dict.fromkeys(self._files, 0)
        self._names: set[bytes] = set()

    def __contains__(self, name: str) -> bool:
        """Whether a run recorded a file, up to this moment."""
        for path in self._files:
            with contextlib.suppress(OSError):  # most runs record none
                descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
                try:
                    self._read_on(path, descriptor)
                finally:
                    os.close(descriptor)
        return os.fsencode(name) in self._names

    def _read_on(self, path: Path, descriptor: int) -> None:
        new = os.fstat(descriptor).st_size - self._read[path]
        if new > 0:
            whole, _, _ = os.pread(descriptor, new, self._read[path]).rpartition(b"\0")
            self._names.update(whole.split(b"\0"))
            self._read[path] += len(whole) + 1 if whole else 0


def began(directory: Path) -> int:
    """When the oldest run in a directory that still goes on began, in nanoseconds, by the clock of its file system.

    Raises:
        OSError: The directory cannot be read.
    """
    times = [time.time_ns()]
    for run in runs(directory):
        with contextlib.suppress(FileNotFoundError):  # it has ended meanwhile
            times.append((directory / f"{_HEAD}{run}.lock").lstat().st_mtime_ns)
    return min(times)


def sweep(directory: Path, now_ns: int | None = None) -> list[str]:
    """Remove what dead runs left in a directory, and nothing else.

    Args:
        directory: Which.
        now_ns: The time by the clock of its file system, in nanoseconds; None for the time of this machine.

    Returns:
        The names of those runs.

    Raises:
        OSError: The directory cannot be read.
    """
    descriptor = os.open(directory, _DIRECTORY)
    try:
        return _sweep(descriptor, now_ns)
    finally:
        os.close(descriptor)


def _sweep(directory: int, now_ns: int | None) -> list[str]:
    swept = []
    for run, parts in _found(directory).items():
        descriptor = lock_of_the_dead(f"{_HEAD}{run}.lock", directory, now_ns)
        if descriptor is None:
            continue
        with contextlib.suppress(OSError):  # another user's files are left where they are
            _remove(directory, run, parts)
            swept.append(run)
        os.close(descriptor)
    return swept


def runs(directory: Path) -> list[str]:
    """The runs that have, or left, a lock file in a directory.

    Raises:
        OSError: The directory cannot be read.
    """
    with os.scandir(directory) as entries:
        return [match[1] for entry in entries if (match := _LOCK.fullmatch(entry.name))]


def _found(directory: int) -> dict[str, list[tuple[str, bool]]]:
    """The runs that have, or left, a lock file; of each its other files, and whether they are directories. One listing for all."""
    locks: list[str] = []
    parts: defaultdict[str, list[tuple[str, bool]]] = defaultdict(list)
    own = os.open(
        ".", _DIRECTORY, dir_fd=directory
    )  # descriptors that are copies of one another share their place in a listing
    try:
        with os.scandir(own) as entries:
            for entry in entries:
                if match := _LOCK.fullmatch(entry.name):
                    locks.append(match[1])
                elif match := _PART.fullmatch(entry.name):
                    parts[match[1]].append((entry.name, entry.is_dir(follow_symlinks=False)))
    finally:
        os.close(own)
    return {run: parts[run] for run in locks}


def _remove(directory: int, run: str, parts: list[tuple[str, bool]]) -> None:
    """Remove the files of a run, and its lock file last: without it the others would never be swept."""
    for name, is_directory in parts:
        if is_directory:
            shutil.rmtree(name, dir_fd=directory)
        else:
            _unlink(name, directory)
    _unlink(f"{_HEAD}{run}.lock", directory)


def _unlink(name: str, directory: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=directory)
