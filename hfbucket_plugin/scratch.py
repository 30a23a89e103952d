"""Temporary files: each process in a locked subdirectory of its own, swept when the process is dead.

A crash leaves its files behind. Whether a directory's owner still lives is told by a lock that the kernel drops with
the process, not by a process number that another may bear by now.

Files are reached through the descriptor of that subdirectory, never by a path that another user of the machine could
make lead elsewhere: see docs/decisions/0029.
"""

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
from typing import TYPE_CHECKING, Final

from hfbucket_plugin import forks, run_lock
from hfbucket_plugin.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

_log = logging.getLogger(__name__)

_PREFIX: Final = "lmcache-hfbucket-"
_LOCK: Final = ".lock"
_OPEN_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_NEW_FILE: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_OTHERS_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH
_OTHERS: Final = stat.S_IRWXG | stat.S_IRWXO
_ROOT_USER: Final = 0


def default_root() -> Path:
    """Return the default of `download_tmp_dir`: below the system's temporary directory, a directory of this user's own."""
    try:
        base = tempfile.gettempdir()
    except OSError:  # nothing can be written: whoever needs the directory says so, with its name
        base = os.environ.get("TMPDIR") or "/tmp"  # noqa: S108 - the system's own, and only named in an error
    return Path(base) / f"{_PREFIX}{os.geteuid()}"


@dataclass(frozen=True, slots=True)
class _Own:
    """This process's subdirectory.

    Attributes:
        name: Its name below the root.
        root_fd: The root.
        fd: The subdirectory.
        lock_fd: Its lock file, locked.
        pid: The process that made it.
        path: A path to it that no other user can make lead elsewhere.
        heart: Touches the lock file, for sweepers of other nodes.
    """

    name: str
    root_fd: int
    fd: int
    lock_fd: int
    pid: int
    path: Path
    heart: run_lock.Heartbeat

    def close(self) -> None:
        if self.pid == os.getpid():  # a fork has no such thread
            self.heart.stop()
        for fd in (self.root_fd, self.fd, self.lock_fd):
            os.close(fd)


class Scratch:
    """Temporary files below one root, made when first needed.

    Args:
        root: `download_tmp_dir`; made when missing.

    Attributes:
        root: The same.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._lock = forks.Lock()
        self._own: _Own | None = None

    @contextlib.contextmanager
    def file(self) -> Iterator[Path]:
        """Yield the path of a new empty file, removed at the end of the `with` block.

        The path leads through a descriptor of this process, and means nothing to another one.

        Raises:
            ConfigError: The root cannot be made or written to, or belongs to another user.
        """
        own, name = self._own_directory(), secrets.token_hex(8)
        with self._told():
            os.close(os.open(name, _NEW_FILE, 0o600, dir_fd=own.fd))
        path = own.path / name
        try:
            yield path
        finally:
            with self._lock:
                if (
                    self._own is own
                ):  # else it went with the directory, and the number of its descriptor may be another's
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(name, dir_fd=own.fd)

    def directory(self) -> Path:
        """Return the path of this process's own subdirectory, which `close` removes with all that is in it.

        Raises:
            ConfigError: The root cannot be made or written to, or belongs to another user.
        """
        return self._own_directory().path

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
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
            # A fork shares no lock with its parent; and what cleans /tmp up may have removed the directory.
            if own is None or own.pid != os.getpid() or not os.fstat(own.fd).st_nlink:
                self._own = None
                if own is not None:  # if it is the parent's, its lock would live on in us
                    own.close()
                self._own = own = self._make()
            return own

    def _make(self) -> _Own:
        with self._told(), contextlib.ExitStack() as undo:
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
            # Locked before it bears its name, so that no sweeper ever finds it unlocked.
            lock_fd = os.open(f"{_LOCK}.new", _NEW_FILE, 0o600, dir_fd=fd)
            undo.callback(os.close, lock_fd)
            run_lock.mark(lock_fd)
            with contextlib.suppress(OSError):  # there are file systems without locks
                # systemd-tmpfiles leaves a directory alone that is locked itself, however old.
                fcntl.flock(fd, fcntl.LOCK_SH)
            os.rename(f"{_LOCK}.new", _LOCK, src_dir_fd=fd, dst_dir_fd=fd)
            through = Path(f"/proc/self/fd/{fd}")
            path = through if through.exists() else self.root / name
            own = _Own(name, root_fd, fd, lock_fd, os.getpid(), path, run_lock.Heartbeat(lock_fd))
            undo.pop_all()
            return own

    def _open_root(self) -> int:
        """Open the root, and refuse one that others could use against this process.

        Raises:
            ConfigError: It belongs to another user; or it is the default, in which everything has a name that is
                known beforehand, and others may write to it.
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
            The directories removed.

        Raises:
            OSError: The root cannot be looked at.
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
        """As `sweep`, for start-up: what cannot be removed is left, and said."""
        try:
            self.sweep()
        except OSError as error:
            _log.warning("left-over temporary files below %s could not be looked at: %s", self.root, error)

    def close(self) -> None:
        """Remove this process's directory; in a forked child, which has none yet, its parent's is left alone."""
        with self._lock:
            own, self._own = self._own, None
        if own is None:
            return
        if own.pid == os.getpid():
            shutil.rmtree(own.name, ignore_errors=True, dir_fd=own.root_fd)
        own.close()


def _removed_if_dead(root_fd: int, name: str) -> bool:
    """Remove a directory whose process is dead, and return whether that was so.

    A directory without its lock file is being made at this moment, or is not ours: it is left alone, as is another
    user's.
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
