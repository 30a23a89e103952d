"""Files of runs beside a tier: locks, temporary files, their removal after a run was killed, and ownership of files."""

from __future__ import annotations

import contextlib
import errno
import grp
import os
import pwd
import re
import secrets
import shutil
import stat
import time
from collections import defaultdict
from typing import TYPE_CHECKING, Final

from hfbucket_plugin.core.run_lock import Heartbeat, lock_of_the_dead, take, touch
from warmer.report.outcomes import TierError

if TYPE_CHECKING:
    from pathlib import Path

    from warmer.tiers.declare import TierOptions


RUN_FILES: Final = ".hfbucket-warm-"
"""Prefix of the names of all files of runs."""

_HEAD: Final = RUN_FILES
_LOCK: Final = re.compile(rf"{re.escape(_HEAD)}([0-9a-f]{{16}})\.lock")
_PART: Final = re.compile(rf"{re.escape(_HEAD)}([0-9a-f]{{16}})-.*\.part", re.DOTALL)
_KEPT: Final = "kept"
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


class RunFiles:
    """Temporary files of this process in one directory.

    Args:
        directory: Existing directory.
        descriptor: Descriptor of the directory, which is closed with this object; None to open the directory by name.
        sweep_now: Whether to remove files of dead runs at once; otherwise `sweep` does so.

    Attributes:
        descriptor: Descriptor of the directory, which stays valid if the directory is renamed.

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
        """Return the user id that the file system gives to files that this process creates in the directory.

        Raises:
            OSError: The id cannot be read, or this run was closed.
        """
        if self._lock is None:
            raise OSError(errno.EBADF, "the run was closed")
        return os.fstat(self._lock).st_uid

    def sweep(self) -> list[str]:
        """Remove only the files of dead runs from the directory; return the names of those runs.

        Raises:
            OSError: The directory cannot be read.
        """
        return [] if self._lock is None else _sweep(self.descriptor, touch(self._lock))

    def temporary(self, number: int) -> Path:
        """Return the name of a temporary file."""
        return self._directory / f"{_HEAD}{self._run}-{number}.part"

    def directory(self) -> Path:
        """Return the path of a private directory of this run, which other runs and engines ignore."""
        return self._directory / f"{_HEAD}{self._run}-run.part"

    def keep(self, name: str) -> None:
        """Record a file that no run may remove while this one is active, for readers of `kept`.

        Raises:
            OSError: The file cannot be recorded.
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
        with contextlib.suppress(OSError):  # the next run removes what cannot be removed now
            _remove(self.descriptor, self._run, _found(self.descriptor).get(self._run, []))
        for one in (descriptor, self._kept, self.descriptor):
            if one is not None:
                os.close(one)


class KeptByRuns:
    """Files of one directory that runs recorded as right, as far as they are known.

    Args:
        directory: Directory of the tier.

    Raises:
        OSError: The directory cannot be read.
    """

    def __init__(self, directory: Path) -> None:
        self._files = [directory / f"{_HEAD}{run}-{_KEPT}.part" for run in runs(directory)]
        self._read = dict.fromkeys(self._files, 0)
        self._names: set[bytes] = set()

    def __contains__(self, name: str) -> bool:
        """Return whether a run has recorded a file so far."""
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
    """Return when the oldest active run in a directory began, in nanoseconds by the clock of its file system.

    Raises:
        OSError: The directory cannot be read.
    """
    times = [time.time_ns()]
    for run in runs(directory):
        with contextlib.suppress(FileNotFoundError):  # the run has ended in the meantime
            times.append((directory / f"{_HEAD}{run}.lock").lstat().st_mtime_ns)
    return min(times)


def sweep(directory: Path, now_ns: int | None = None) -> list[str]:
    """Remove only the files of dead runs from a directory.

    Args:
        directory: Directory of the tier.
        now_ns: Time by the clock of its file system, in nanoseconds; None for the time of this machine.

    Returns:
        The names of the dead runs.

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
        with contextlib.suppress(OSError):  # files of other users stay
            _remove(directory, run, parts)
            swept.append(run)
        os.close(descriptor)
    return swept


def runs(directory: Path) -> list[str]:
    """Return the names of the runs that have a lock file in a directory, dead runs included.

    Raises:
        OSError: The directory cannot be read.
    """
    with os.scandir(directory) as entries:
        return [match[1] for entry in entries if (match := _LOCK.fullmatch(entry.name))]


def _found(directory: int) -> dict[str, list[tuple[str, bool]]]:
    """List the directory once; return the other files of each run with a lock file, and whether each is a directory."""
    locks: list[str] = []
    parts: defaultdict[str, list[tuple[str, bool]]] = defaultdict(list)
    own = os.open(".", _DIRECTORY, dir_fd=directory)  # a duplicated descriptor would share its position in a listing
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
    """Remove the files of a run, its lock file last: files without a lock file would never be removed."""
    for name, is_directory in parts:
        if is_directory:
            shutil.rmtree(name, dir_fd=directory)
        else:
            _unlink(name, directory)
    _unlink(f"{_HEAD}{run}.lock", directory)


def _unlink(name: str, directory: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=directory)


_LEAVE = -1
"""Id for which `chown` leaves the owner or group unchanged."""


class Ownership:
    """Owner, group and mode of the files of a tier.

    Args:
        tier: Name of the tier, for errors.
        options: Options with `chown` and `chmod`.

    Raises:
        TierError: This node has no such user or group.
    """

    def __init__(self, tier: str, options: TierOptions) -> None:
        self._tier = tier
        self._chmod = options.chmod
        self._asked = options.chown
        self._ids = (_LEAVE, _LEAVE)
        if options.chown is not None:
            user, _, group = options.chown.partition(":")
            self._ids = (self._user(user), self._group(group))

    def _user(self, name: str) -> int:
        if not name:
            return _LEAVE
        if name.isascii() and name.isdigit():
            return int(name)
        try:
            return pwd.getpwnam(name).pw_uid
        except KeyError:
            raise TierError(f"tier {self._tier!r}: this node has no user {name!r} for --chown") from None

    def _group(self, name: str) -> int:
        if not name:
            return _LEAVE
        if name.isascii() and name.isdigit():
            return int(name)
        try:
            return grp.getgrnam(name).gr_gid
        except KeyError:
            raise TierError(f"tier {self._tier!r}: this node has no group {name!r} for --chown") from None

    def give(self, descriptor: int, directory: os.stat_result) -> None:
        """Set the owner, group and mode of an open file.

        Args:
            descriptor: Descriptor of the file.
            directory: Result of `stat` of the file's directory.

        Raises:
            TierError: The requested owner, group or mode is not permitted.
        """
        self._chown(descriptor, directory)
        if self._chmod is not None:
            try:
                os.fchmod(descriptor, self._chmod)
            except OSError as error:
                raise TierError(
                    f"tier {self._tier!r}: files cannot get the mode {self._chmod:o}: {error.strerror}"
                ) from None

    def _chown(self, file: int, directory: os.stat_result) -> None:
        if self._asked is not None:
            try:
                os.chown(file, *self._ids)
            except OSError as error:
                raise TierError(
                    f"tier {self._tier!r}: files cannot be given to {self._asked!r}: {error.strerror}; only root may "
                    "give files to another user, and only to a group of its own may another user"
                ) from None
            return
        found = os.fstat(file)
        for ids in ((directory.st_uid, _LEAVE), (_LEAVE, directory.st_gid)):
            if ids not in ((found.st_uid, _LEAVE), (_LEAVE, found.st_gid)):
                with contextlib.suppress(OSError):  # best effort: `check_readable` checks the result
                    os.chown(file, *ids)

    def check_readable(self, descriptor: int, directory: os.stat_result) -> None:
        """Check that the owner of the directory, most likely the engine, can read a file after `give`.

        Raises:
            TierError: The owner cannot read the file.
        """
        if self._asked is not None or self._chmod is not None or directory.st_uid == 0:
            return
        found = os.fstat(descriptor)
        if found.st_uid == directory.st_uid:
            readable = found.st_mode & stat.S_IRUSR
        else:
            shared = stat.S_IRGRP if found.st_gid == directory.st_gid else 0
            readable = found.st_mode & (shared | stat.S_IROTH)
        if not readable:
            raise TierError(
                f"tier {self._tier!r}: files would belong to user {found.st_uid} with the mode "
                f"{stat.S_IMODE(found.st_mode):o}, and the directory's owner, user {directory.st_uid}, could not read "
                "them; set --chmod, or --chown, or the umask of Ray's workers"
            )

    def make(self, directory: Path) -> None:
        """Create a directory if it is missing; see `open`."""
        os.close(self.open(directory))

    def open(self, directory: Path) -> int:
        """Open a directory; create it and its parents if missing, each with the parent's or the requested owner and mode.

        New directories are accessed by descriptor, because the owner of the parent may replace them in the meantime, and the
        replacement must not be given away.

        Returns:
            The descriptor of the directory.

        Raises:
            OSError: The directory cannot be created.
            TierError: The requested owner or mode is not permitted, or a new directory was replaced.
        """
        missing = []
        while not directory.is_dir() and directory != directory.parent:
            missing.append(directory)
            directory = directory.parent
        opened = os.open(directory, _DIRECTORY)
        while missing:
            one = missing.pop()
            parent = opened
            try:
                opened = self.make_in(parent, one.name, missing[-1].name if missing else "")
            finally:
                os.close(parent)
        return opened

    def make_in(self, parent: int, name: str, below: str = "") -> int:
        """Create a directory inside another one, or open the existing one.

        Args:
            parent: Descriptor of the parent directory.
            name: Name of the directory.
            below: Entry that another process may already have created in it, besides the files of its run.

        Returns:
            The descriptor of the directory.

        Raises:
            OSError: The directory cannot be created.
            TierError: See `open`.
        """
        try:
            os.mkdir(name, dir_fd=parent)
        except FileExistsError:  # another process was faster, or the entry is not a directory, which `os.open` reports
            return os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
        made = os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
        try:
            self._expect_new(made, name, below)
            self._chown(made, os.fstat(parent))
        except BaseException:
            os.close(made)
            raise
        return made

    def _expect_new(self, made: int, name: str, below: str) -> None:
        with os.scandir(made) as entries:
            others = any(entry.name != below and not entry.name.startswith(RUN_FILES) for entry in entries)
        if others or os.fstat(made).st_uid != os.geteuid():
            raise TierError(
                f"tier {self._tier!r}: directory {name!r} was replaced while it was being made, by a process that may write to "
                "its parent; nothing was given away. Make the directory beforehand, as its owner"
            )
