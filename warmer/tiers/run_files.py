"""Files of runs beside a tier: owners, and what killed runs left."""

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


_LEAVE = -1
"""What `chown` takes for an id that stays."""


class Ownership:
    """Gives files away.

    Args:
        tier: Names it in errors.
        options: `chown` and `chmod` of them.

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
        """Give an open file its owner, group and mode.

        Args:
            descriptor: Of the file.
            directory: What `stat` says of the directory in which it lies.

        Raises:
            TierError: What was asked for is not permitted.
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
                with contextlib.suppress(OSError):  # as far as it goes: `check_readable` looks at what came of it
                    os.chown(file, *ids)

    def check_readable(self, descriptor: int, directory: os.stat_result) -> None:
        """See whether the owner of the directory, most likely the engine, could read a file that was given away.

        Raises:
            TierError: It could not.
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
        """Make a directory where there is none; see `open`."""
        os.close(self.open(directory))

    def open(self, directory: Path) -> int:
        """Open a directory; make it where there is none, and those above it; each as its parent is, or as was asked for.

        What was made is reached by descriptors from then on. The owner of the parent may have put something else in its place meanwhile,
        which must not be given away.

        Returns:
            Its descriptor.

        Raises:
            OSError: It cannot be made.
            TierError: What was asked for is not permitted; or something else came in the place of what was made.
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
        """Make a directory inside of another one, or open the one that is there.

        Args:
            parent: Descriptor of the directory in which it is to lie.
            name: Of the new one.
            below: What another process may have made in it already, beside the files of its run.

        Returns:
            Its descriptor.

        Raises:
            OSError: It cannot be made.
            TierError: See `make`.
        """
        try:
            os.mkdir(name, dir_fd=parent)
        except FileExistsError:  # another raylet was faster; or something that is no directory is in its place
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
