"""Files that are written atomically, and temporary directories."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import secrets
import shutil
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final

from hfbucket_plugin.core import forks, run_lock
from hfbucket_plugin.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


_FOR_ALL: Final = 0o666
_SPECIAL: Final = ("/dev/fd/", "/dev/std", "/proc/")
"""Paths that stand for open files of a process. Other paths below /dev, such as /dev/shm, are normal directories."""


class OutputFile:
    """Text file that is written to a temporary name, and renamed by `commit`.

    Until then an existing file stays unchanged. If the directory accepts no new file but the file itself is writable,
    `commit` replaces its content. Pipes and devices are written directly.

    Args:
        path: Path of the file. A link is followed.
        option: Option that names the file, for errors.

    Raises:
        ConfigError: The file cannot be written.
    """

    def __init__(self, path: Path, option: str) -> None:
        self._part: Path | None = None
        self._spooled = False
        try:
            # Not `resolve`, because the target of /dev/stdout is not a path of its own.
            self._target = path if str(path.absolute()).startswith(_SPECIAL) else Path(os.path.realpath(path))
            self._out = self._open()
        except (OSError, ValueError) as error:  # ValueError: a null byte in the path
            why = error.strerror if isinstance(error, OSError) else error
            raise ConfigError(f"{option} {str(path)!r} cannot be written: {why}") from None

    def _open(self) -> IO[str]:
        found: os.stat_result | None = None
        with contextlib.suppress(FileNotFoundError):
            found = self._target.stat()
        if found is not None and stat.S_ISDIR(found.st_mode):
            raise IsADirectoryError(21, "it is a directory")
        if str(self._target).startswith(_SPECIAL) or (found is not None and not stat.S_ISREG(found.st_mode)):
            number = os.open(
                self._target, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC
            )  # fails for a pipe without a reader
            os.set_blocking(number, True)
            return os.fdopen(number, "w", encoding="utf-8")
        if found is not None:
            os.close(os.open(self._target, os.O_WRONLY | os.O_CLOEXEC))  # checks that it can be written at all
        try:
            number, name = tempfile.mkstemp(prefix=f"{self._target.name}.", suffix=".part", dir=self._target.parent)
        except PermissionError:
            if found is None:
                raise
            self._spooled = True
            return tempfile.TemporaryFile("w+", encoding="utf-8")
        self._part = Path(name)
        os.fchmod(number, stat.S_IMODE(found.st_mode) if found is not None else _FOR_ALL & ~_umask())
        if found is not None:
            with contextlib.suppress(OSError):
                os.fchown(number, found.st_uid, found.st_gid)
        return os.fdopen(number, "w", encoding="utf-8")

    def write(self, text: str) -> None:
        """Append text.

        Raises:
            OSError: The text cannot be written.
        """
        self._out.write(text)

    def flush(self) -> None:
        """Flush buffered text to the system.

        Raises:
            OSError: The text cannot be written.
        """
        self._out.flush()

    def commit(self) -> None:
        """Close the file and give it its final name.

        Raises:
            OSError: Not everything could be written; the part that could has the final name.
        """
        try:
            try:
                self._out.flush()
                if self._spooled:
                    self._out.seek(0)
                    with self._target.open("w", encoding="utf-8") as target:
                        shutil.copyfileobj(self._out, target)
            finally:
                if self._part is not None:
                    self._part.replace(self._target)
                    self._part = None
            self._out.close()
        finally:
            self.discard()

    def discard(self) -> None:
        """Discard the new file and keep the existing one. Does nothing after `commit`."""
        with contextlib.suppress(OSError):
            self._out.close()
        if self._part is not None:
            with contextlib.suppress(OSError):
                self._part.unlink()
            self._part = None


def expect_writable(path: Path, option: str) -> None:
    """Check that a file can be written, before there is anything to write.

    Args:
        path: Path of the file.
        option: Option that names the file, for errors.

    Raises:
        ConfigError: The file cannot be written.
    """
    OutputFile(path, option).discard()


def write_whole(path: Path, text: str, option: str) -> None:
    """Write a file atomically.

    Args:
        path: Path of the file.
        text: Content.
        option: Option that names the file, for errors.

    Raises:
        ConfigError: The file cannot be written. An existing file stays unchanged.
    """
    out = OutputFile(path, option)
    try:
        out.write(text)
        out.flush()
        out.commit()
    except OSError as error:
        raise ConfigError(f"{option} {str(path)!r} cannot be written: {error.strerror}") from None
    finally:
        out.discard()


def _umask() -> int:
    """Return the umask of this process, which can be read only by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def expect_apart(outputs: Iterable[tuple[str, Path | None]], inputs: Iterable[tuple[str, Path | None]]) -> None:
    """Reject a command that would write to a file that it reads, or twice to the same file, under any path.

    Args:
        outputs: Paths to write, by option; None for an option that was not given.
        inputs: Paths to read, likewise.

    Raises:
        ConfigError: Two options name the same file; the message names both.
    """
    seen = [(option, path) for option, path in inputs if path is not None]
    for option, path in outputs:
        if path is None:
            continue
        for other, taken in seen:
            if _same(path, taken):
                raise ConfigError(
                    f"{option} {str(path)!r} is the file of {other} {str(taken)!r}, and would be overwritten: give another name"
                )
        seen.append((option, path))


def _same(one: Path, other: Path) -> bool:
    try:
        if one.samefile(other):
            # A terminal may be written twice, and a file cannot overwrite a directory.
            return stat.S_ISREG(one.stat().st_mode)
    except OSError:
        return os.path.realpath(one) == os.path.realpath(other)
    except ValueError:  # a null byte: no such file exists, which opening it reports
        return False
    return False


_log = logging.getLogger(__name__)

_PREFIX: Final = "lmcache-hfbucket-"
_LOCK: Final = ".lock"
_OPEN_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_NEW_FILE: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_OTHERS_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH
_OTHERS: Final = stat.S_IRWXG | stat.S_IRWXO
_ROOT_USER: Final = 0


def default_root() -> Path:
    """Return the default of `download_tmp_dir`: this user's own directory below the system's temporary directory."""
    try:
        base = tempfile.gettempdir()
    except OSError:  # not writable: the code that needs the directory reports it by name
        base = os.environ.get("TMPDIR") or "/tmp"  # noqa: S108 - the system's default, only named in an error
    return Path(base) / f"{_PREFIX}{os.geteuid()}"


@dataclass(frozen=True, slots=True)
class _Own:
    """Subdirectory of this process.

    Attributes:
        name: Name below the root.
        root_fd: Descriptor of the root.
        fd: Descriptor of the subdirectory.
        lock_fd: Descriptor of its lock file, locked.
        pid: Process that created it.
        path: Path that no other user can redirect.
        heart: Thread that touches the lock file, for cleanups on other nodes.
    """

    name: str
    root_fd: int
    fd: int
    lock_fd: int
    pid: int
    path: Path
    heart: run_lock.Heartbeat

    def close(self) -> None:
        if self.pid == os.getpid():  # a fork does not have the thread
            self.heart.stop()
        for fd in (self.root_fd, self.fd, self.lock_fd):
            os.close(fd)


class TempDir:
    """Temporary files below one root, created on first use.

    Args:
        root: `download_tmp_dir`; created if missing.

    Attributes:
        root: `download_tmp_dir`.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._lock = forks.ForkSafeLock()
        self._own: _Own | None = None

    @contextlib.contextmanager
    def file(self) -> Iterator[Path]:
        """Yield the path of a new empty file, removed at the end of the `with` block.

        The path leads through a descriptor of this process, and is invalid in other processes.

        Raises:
            ConfigError: The root cannot be created or written to, or belongs to another user.
        """
        own, name = self._own_directory(), secrets.token_hex(8)
        with self._reported():
            os.close(os.open(name, _NEW_FILE, 0o600, dir_fd=own.fd))
        path = own.path / name
        try:
            yield path
        finally:
            with self._lock:
                if (
                    self._own is own
                ):  # otherwise it was removed with the directory, and its descriptor number may be reused
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(name, dir_fd=own.fd)

    def directory(self) -> Path:
        """Return the path of this process's own subdirectory, which `close` removes with its content.

        Raises:
            ConfigError: The root cannot be created or written to, or belongs to another user.
        """
        return self._own_directory().path

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigError(
                f"download_tmp_dir {str(self.root)!r} cannot be used: {error.strerror or error}; set it to a directory "
                "that this user may write to, or set TMPDIR"
            ) from None
        except RuntimeError as error:
            raise ConfigError(
                f"download_tmp_dir {str(self.root)!r} is not used, since its lock file needs a thread: {error}; raise the limit of "
                "threads of this user or container"
            ) from None

    def _own_directory(self) -> _Own:
        with self._lock:
            own = self._own
            # A fork shares no lock with its parent, and a cleanup of /tmp may have removed the directory.
            if own is None or own.pid != os.getpid() or not os.fstat(own.fd).st_nlink:
                self._own = None
                if own is not None:  # close the parent's, whose lock would otherwise live on here
                    own.close()
                self._own = own = self._make()
            return own

    def _make(self) -> _Own:
        with self._reported(), contextlib.ExitStack() as undo:
            self.root.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                self.root.mkdir(mode=0o700)
            root_fd = self._open_root()
            undo.callback(os.close, root_fd)
            self._sweep(root_fd, None)
            while True:
                name = f"{_PREFIX}{os.getpid()}-{secrets.token_hex(4)}"
                with contextlib.suppress(FileExistsError):
                    os.mkdir(name, 0o700, dir_fd=root_fd)
                    break
            fd = os.open(name, _OPEN_DIRECTORY | os.O_NOFOLLOW, dir_fd=root_fd)
            undo.callback(os.close, fd)
            found = os.fstat(fd)
            if found.st_uid != os.geteuid() or found.st_mode & _OTHERS:
                raise ConfigError(
                    f"download_tmp_dir {str(self.root)!r} cannot be used: a directory made in it belongs to user "
                    f"{found.st_uid} with mode {stat.S_IMODE(found.st_mode):03o}; set it to one on a local disk"
                )
            undo.callback(shutil.rmtree, name, ignore_errors=True, dir_fd=root_fd)
            # Locked before it gets its name, so that no cleanup ever finds it unlocked.
            lock_fd = os.open(f"{_LOCK}.new", _NEW_FILE, 0o600, dir_fd=fd)
            undo.callback(os.close, lock_fd)
            run_lock.mark(lock_fd)
            with contextlib.suppress(OSError):  # some file systems have no locks
                # systemd-tmpfiles skips a locked directory, however old it is.
                fcntl.flock(fd, fcntl.LOCK_SH)
            os.rename(f"{_LOCK}.new", _LOCK, src_dir_fd=fd, dst_dir_fd=fd)
            through = Path(f"/proc/self/fd/{fd}")
            path = through if through.exists() else self.root / name
            own = _Own(name, root_fd, fd, lock_fd, os.getpid(), path, run_lock.Heartbeat(lock_fd))
            undo.pop_all()
            return own

    def _open_root(self) -> int:
        """Open the root, and reject one that other users could use against this process.

        Raises:
            ConfigError: It belongs to another user; or it is the default, with predictable names, and others may write
                to it.
            OSError: It cannot be opened.
        """
        is_default = self.root == default_root()
        fd = os.open(self.root, _OPEN_DIRECTORY | (os.O_NOFOLLOW if is_default else 0))
        found, user = os.fstat(fd), os.geteuid()
        owners = {user} if is_default else {user, _ROOT_USER}
        if found.st_uid in owners and not (is_default and found.st_mode & _OTHERS_WRITE):
            return fd
        os.close(fd)
        raise ConfigError(
            f"download_tmp_dir {str(self.root)!r} is not used: it belongs to user {found.st_uid} with mode "
            f"{stat.S_IMODE(found.st_mode):03o}, and this process runs as user {user}; remove it, or set download_tmp_dir "
            "to a directory of this user's"
        )

    def sweep(self) -> list[Path]:
        """Remove what dead processes of this user left below the root, and nothing else.

        Returns:
            The removed directories.

        Raises:
            OSError: The root cannot be read.
        """
        try:
            fd = os.open(self.root, _OPEN_DIRECTORY)
        except FileNotFoundError:
            return []
        try:
            own = self._own
            return self._sweep(fd, own.name if own is not None else None)
        finally:
            os.close(fd)

    def _sweep(self, root_fd: int, own: str | None) -> list[Path]:
        removed = [
            self.root / name
            for name in sorted(os.listdir(root_fd))
            if name.startswith(_PREFIX) and name != own and _removed_if_dead(root_fd, name)
        ]
        if removed:
            _log.info("removed temporary files of %d dead processes below %s", len(removed), self.root)
        return removed

    def sweep_quietly(self) -> None:
        """Run `sweep` at startup; log what cannot be removed, and leave it."""
        try:
            self.sweep()
        except OSError as error:
            _log.warning("left-over temporary files below %s could not be looked at: %s", self.root, error)

    def close(self) -> None:
        """Remove this process's directory; a forked child leaves its parent's alone."""
        with self._lock:
            own, self._own = self._own, None
        if own is None:
            return
        if own.pid == os.getpid():
            shutil.rmtree(own.name, ignore_errors=True, dir_fd=own.root_fd)
        own.close()


def _removed_if_dead(root_fd: int, name: str) -> bool:
    """Remove a directory if its process is dead; return whether it was.

    A directory without its lock file is just being created or foreign; it is left alone, as is another user's.
    """
    with contextlib.ExitStack() as opened:
        try:
            fd = os.open(name, _OPEN_DIRECTORY | os.O_NOFOLLOW, dir_fd=root_fd)
            opened.callback(os.close, fd)
            if os.fstat(fd).st_uid != os.geteuid():
                return False
            lock_fd = run_lock.lock_of_the_dead(_LOCK, fd)
        except OSError:
            return False
        if lock_fd is None:
            return False
        opened.callback(os.close, lock_fd)
        shutil.rmtree(name, ignore_errors=True, dir_fd=root_fd)
    return True
