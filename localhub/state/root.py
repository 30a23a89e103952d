"""Validation of the root directory of a Hub."""

import os
import stat
from pathlib import Path
from typing import Final

DATABASE: Final = "hub.sqlite"
UPLOADS: Final = "uploads"
_OWN_BEFORE_DATABASE: Final = frozenset({"stderr.log", "hub.lock"})
"""Files that exist before the database: the log of `localhub.process`, and the lock for creating the database."""

_SQLITE_MAGIC: Final = b"SQLite format 3\0"  # https://www.sqlite.org/fileformat.html#the_database_header


class RootError(RuntimeError):
    """A directory cannot be the root of a Hub; the message names it and the reason."""


def check_root(root: Path) -> None:
    """Create a root that is missing, and refuse a directory that holds anything but a Hub.

    Nothing in a refused directory is changed.

    Raises:
        RootError: the root is not a directory, is neither empty nor the root of a Hub, or its database is not SQLite.
        OSError: the root cannot be created or read.
    """
    if root.exists() and not root.is_dir():
        raise RootError(f"{root} is not a directory; pass a new or empty directory to --root")
    root.mkdir(parents=True, exist_ok=True)
    names = {path.name for path in root.iterdir()}
    if DATABASE in names:
        _check_database(root / DATABASE)
    elif others := sorted(names - _OWN_BEFORE_DATABASE):
        raise RootError(
            f"{root} holds {others[0]!r} and no {DATABASE}, so it is not the root of a Hub; pass a new or empty directory to --root"
        )
    for name in (UPLOADS, "xorbs", "hub.lock", f"{DATABASE}-wal", f"{DATABASE}-shm"):
        if (root / name).is_symlink():
            raise RootError(f"{root / name} is a symbolic link, which a Hub does not follow; remove it")


def _check_database(path: Path) -> None:
    # Opening a FIFO would block, and a link leads to a file outside the root.
    if not stat.S_ISREG(path.lstat().st_mode):
        raise RootError(f"{path} is not a regular file; remove it, or pass another directory to --root")
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        head = os.read(descriptor, len(_SQLITE_MAGIC))
    finally:
        os.close(descriptor)
    if head not in (b"", _SQLITE_MAGIC):
        raise RootError(f"{path} is not an SQLite database; remove it, or pass another directory to --root")
