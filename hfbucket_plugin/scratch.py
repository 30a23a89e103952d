"""Temporary files: each process in a locked subdirectory of its own, swept when the process is dead.

A crash leaves its files behind. Whether a directory's owner still lives is told by a lock that the kernel drops with
the process, not by a process number that another may bear by now.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Final

from hfbucket_plugin.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

_log = logging.getLogger(__name__)

_PREFIX: Final = "lmcache-hfbucket-"
_LOCK: Final = ".lock"


class Scratch:
    """Temporary files below one root, made when first needed.

    Args:
        root: `download_tmp_dir`; made when missing.
    """

    def __init__(self, root: Path) -> None:
        self._root = root.expanduser()
        self._lock = threading.Lock()
        self._directory: Path | None = None
        self._lock_fd: int | None = None
        self._pid = 0

    @contextlib.contextmanager
    def file(self) -> Iterator[Path]:
        """The path of a new empty file, removed at the end of the `with` block.

        Raises:
            ConfigError: The root cannot be made or written to.
        """
        try:
            fd, name = tempfile.mkstemp(dir=self._own_directory())
        except OSError as error:
            raise ConfigError(f"download_tmp_dir {str(self._root)!r} cannot be used: {error}") from None
        os.close(fd)
        path = Path(name)
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def _own_directory(self) -> Path:
        with self._lock:
            if self._directory is None or self._pid != os.getpid():  # a fork shares no lock with its parent
                self._root.mkdir(parents=True, exist_ok=True)
                self.sweep()
                if self._lock_fd is not None:  # the parent's, whose lock would live on in us
                    os.close(self._lock_fd)
                directory = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=self._root))
                # Locked before it bears its name, so that no sweeper ever finds it unlocked.
                self._lock_fd = os.open(directory / f"{_LOCK}.new", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                fcntl.flock(self._lock_fd, fcntl.LOCK_EX)
                (directory / f"{_LOCK}.new").rename(directory / _LOCK)
                self._directory, self._pid = directory, os.getpid()
            return self._directory

    def sweep(self) -> list[Path]:
        """Remove what dead processes left below the root, and nothing else.

        Returns:
            The directories removed.
        """
        removed = []
        for directory in sorted(self._root.glob(f"{_PREFIX}*")):
            if directory != self._directory and not directory.is_symlink() and _owner_is_dead(directory):
                shutil.rmtree(directory, ignore_errors=True)
                removed.append(directory)
        if removed:
            _log.info("removed temporary files of %d dead processes below %s", len(removed), self._root)
        return removed

    def sweep_quietly(self) -> None:
        """As `sweep`, for start-up: what cannot be removed is left, and said."""
        try:
            self.sweep()
        except OSError as error:
            _log.warning("left-over temporary files below %s could not be looked at: %s", self._root, error)

    def close(self) -> None:
        """Remove this process's directory; in a forked child, which has none yet, its parent's is left alone."""
        with self._lock:
            directory, self._directory = self._directory, None
            fd, self._lock_fd = self._lock_fd, None
            own = self._pid == os.getpid()
        if directory is not None and own:
            shutil.rmtree(directory, ignore_errors=True)
        if fd is not None:
            os.close(fd)


def _owner_is_dead(directory: Path) -> bool:
    """A directory without its lock file is being made at this moment, or is not ours: it is left alone."""
    try:
        fd = os.open(directory / _LOCK, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    else:
        return True
    finally:
        os.close(fd)
