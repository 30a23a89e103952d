"""Temporary files in a tier's own directory, told apart by run, and swept when the run that made them is dead.

They must lie in the directory in which they will appear, since a rename is atomic within one file system only. Their
names begin with a dot and do not end in `.data`, so no engine takes them for chunks. Whether a run still lives is told
by a lock that the kernel drops with its process.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_HEAD: Final = ".hfbucket-warm-"
_LOCK: Final = re.compile(rf"{re.escape(_HEAD)}([0-9a-f]{{16}})\.lock")


class RunFiles:
    """This process's temporary files in one directory.

    Args:
        directory: Must exist. What dead runs left in it is removed first.

    Raises:
        OSError: The directory cannot be written.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        sweep(directory)
        self._run = secrets.token_hex(8)
        self._lock_path = directory / f"{_HEAD}{self._run}.lock"
        self._lock: int | None = _locked(self._lock_path)

    def temporary(self, number: int) -> Path:
        """The name of a temporary file."""
        return self._directory / f"{_HEAD}{self._run}-{number}.part"

    def directory(self) -> Path:
        """The name of a directory of this run's, in which nobody else looks for anything."""
        return self._directory / f"{_HEAD}{self._run}-run.part"

    def close(self) -> None:
        """Remove this run's files. Further calls do nothing."""
        descriptor, self._lock = self._lock, None
        if descriptor is None:
            return
        with contextlib.suppress(OSError):  # what cannot be removed now, the next run sweeps
            _remove(self._directory, self._run)
        os.close(descriptor)


def began(directory: Path) -> int:
    """When the oldest run in a directory that still goes on began, in nanoseconds, by the clock of its file system.

    Raises:
        OSError: The directory cannot be read.
    """
    times = [time.time_ns()]
    for run in _runs(directory):
        with contextlib.suppress(FileNotFoundError):  # it has ended meanwhile
            times.append((directory / f"{_HEAD}{run}.lock").stat().st_mtime_ns)
    return min(times)


def sweep(directory: Path) -> list[str]:
    """Remove what dead runs left in a directory, and nothing else.

    Returns:
        The names of those runs.

    Raises:
        OSError: The directory cannot be read.
    """
    swept = []
    for run in _runs(directory):
        descriptor = _lock_of_the_dead(directory / f"{_HEAD}{run}.lock")
        if descriptor is None:
            continue
        with contextlib.suppress(OSError):  # another user's files are left where they are
            _remove(directory, run)
            swept.append(run)
        os.close(descriptor)
    return swept


def _runs(directory: Path) -> list[str]:
    with os.scandir(directory) as entries:
        return [match[1] for entry in entries if (match := _LOCK.fullmatch(entry.name))]


def _remove(directory: Path, run: str) -> None:
    """Remove the temporary files of a run, and its lock file last: without it the others would never be swept."""
    for path in _parts(directory, run):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    (directory / f"{_HEAD}{run}.lock").unlink(missing_ok=True)


def _parts(directory: Path, run: str) -> Iterator[Path]:
    head = f"{_HEAD}{run}-"
    with os.scandir(directory) as entries:
        names = [entry.name for entry in entries if entry.name.startswith(head) and entry.name.endswith(".part")]
    return (directory / name for name in names)


def _locked(path: Path) -> int:
    """Make a lock file and take its lock.

    A sweeper that finds the file before it is locked takes it for a dead run's and removes it: then it is made again.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        os.close(descriptor)


def _lock_of_the_dead(path: Path) -> int | None:
    """The lock of a run, held, if nobody else holds it."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
