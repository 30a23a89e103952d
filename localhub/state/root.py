"""The root directory of a Hub: what may become one, and what in it is a Hub's own."""

import os
import stat
from pathlib import Path
from typing import Final

DATABASE: Final = "hub.sqlite"
UPLOADS: Final = "uploads"
_OWN_BEFORE_DATABASE: Final = frozenset({"stderr.log", "hub.lock"})
"""What there may be before the database: the log of `localhub.process`, and the lock under which the database is made."""

_SQLITE_MAGIC: Final = b"SQLite format 3\0"  # https://www.sqlite.org/fileformat.html#the_database_header


class RootError(RuntimeError):
    """A directory cannot be the root of a Hub; the message names it and says why."""


def check_root(root: Path) -> None:
    """Make a root that is missing, and refuse a directory that holds anything but a Hub.

    Nothing in a directory that is refused is changed.

    Raises:
        RootError: It is not a directory, is neither empty nor the root of a Hub, or its database is not one.
        OSError: It cannot be made or read.
    """
    if root.exists() and not root.is_dir():
        raise RootError(f"{root} is not a directory; name a new or empty directory with --root")
    root.mkdir(parents=True, exist_ok=True)
    names = {path.name for path in root.iterdir()}
    if DATABASE in names:
        _check_database(root / DATABASE)
    elif foreign := sorted(names - _OWN_BEFORE_DATABASE):
        raise RootError(
            f"{root} holds {foreign[0]!r} and no {DATABASE}, so it is not the root of a Hub; name a new or empty directory with --root"
        )
    for name in (UPLOADS, "xorbs", "hub.lock", f"{DATABASE}-wal", f"{DATABASE}-shm"):
        if (root / name).is_symlink():
            raise RootError(f"{root / name} is a symbolic link; a Hub follows none in its root")


def _check_database(path: Path) -> None:
    # A FIFO would block the opener, and a link leads to a file that is not in the root.
    if not stat.S_ISREG(path.lstat().st_mode):
        raise RootError(f"{path} is not a regular file; remove it, or name another directory with --root")
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        head = os.read(descriptor, len(_SQLITE_MAGIC))
    finally:
        os.close(descriptor)
    if head not in (b"", _SQLITE_MAGIC):
        raise RootError(f"{path} is not an SQLite database; remove it, or name another directory with --root")
