"""Files that say whether the run that made them still lives, also on file systems without locks or with locks of one node only.

A run holds a kernel lock (`flock`) on its file, writes into it which process of which machine it is, and touches it every
minute. A sweeper of the same kernel goes by the lock, or by the process where the file system has no locks. On a file system that
several nodes share, `flock` may be local to each node: a lock of another kernel counts as dead only after ten minutes without a touch.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import stat
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable

BEAT_SECS: Final = 60.0
"""How often a live run touches its lock file."""

STALE_SECS: Final = 600.0
"""A run of another kernel whose lock file was not touched for so long is dead."""

NO_LOCKS: Final = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
"""What `flock` says on a file system without locks: Lustre without `flock`, some NFS and FUSE mounts."""

_MOST_BYTES: Final = 4096
_FLAGS: Final = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def take(names: Callable[[], str], directory: int) -> tuple[str, int]:
    """Make a lock file of this process, and hold its lock.

    A sweeper that finds the file before it is locked may take it for a dead run's and remove it: then another one is made.

    Args:
        names: A name that no other file has; asked again for each try.
        directory: Descriptor of the directory.

    Returns:
        The name and the descriptor. The lock ends with the descriptor.

    Raises:
        OSError: The directory cannot be written.
    """
    while True:
        name = names()
        descriptor = os.open(name, _FLAGS | os.O_CREAT | os.O_EXCL, 0o666, dir_fd=directory)
        try:
            with contextlib.suppress(BlockingIOError, FileNotFoundError):
                mark(descriptor)
                if os.stat(name, dir_fd=directory, follow_symlinks=False).st_ino == os.fstat(descriptor).st_ino:
                    return name, descriptor
        except BaseException:
            os.close(descriptor)
            with contextlib.suppress(OSError):
                os.unlink(name, dir_fd=directory)
            raise
        os.close(descriptor)


def mark(descriptor: int) -> None:
    """Lock an open, empty file as this process's, and write into it which process that is.

    Raises:
        BlockingIOError: Another process holds it.
        OSError: The file cannot be locked for another reason, or not be written.
    """
    kind = "flock" if lock(descriptor) else "record"
    os.write(descriptor, json.dumps({"lease": kind, **_this_process()}).encode())


def take_only(name: str, directory: int) -> int | None:
    """Make the lock file that one process may have at a time; None where a live one has it.

    Args:
        name: Of the file.
        directory: Descriptor of the directory.

    Returns:
        Its descriptor. Removing the file and then closing the descriptor releases the lock.

    Raises:
        OSError: The directory cannot be written.
    """
    while True:
        try:
            return take(lambda: name, directory)[1]
        except FileExistsError:
            dead = lock_of_the_dead(name, directory)
        if dead is None:
            return None
        try:
            _remove_if(dead, name, directory)
        finally:
            os.close(dead)


def _remove_if(descriptor: int, name: str, directory: int) -> None:
    """Remove a file, if it is still the one that is open; another process may have replaced it."""
    aside = f"{name}.{secrets.token_hex(8)}"
    with contextlib.suppress(FileNotFoundError):
        os.rename(name, aside, src_dir_fd=directory, dst_dir_fd=directory)
        if os.stat(aside, dir_fd=directory, follow_symlinks=False).st_ino == os.fstat(descriptor).st_ino:
            os.unlink(aside, dir_fd=directory)
        else:
            os.rename(aside, name, src_dir_fd=directory, dst_dir_fd=directory)


def lock(descriptor: int) -> bool:
    """Take the kernel's lock of an open file without waiting; False where its file system has no locks.

    Raises:
        BlockingIOError: Another process holds it.
        OSError: The file cannot be locked for another reason.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NO_LOCKS:
            return False
        raise
    return True


def lock_of_the_dead(name: str, directory: int, now_ns: int | None = None) -> int | None:
    """The open lock file of a run that is dead; None where the run lives, or this cannot be told.

    Args:
        name: Of the file. A link, or anything that is not a regular file, belongs to no run.
        directory: Descriptor of the directory.
        now_ns: The time by the clock of the file system, in nanoseconds since the epoch; None for the time of this machine.
    """
    try:
        descriptor = os.open(name, _FLAGS, dir_fd=directory)
    except OSError:
        return None
    try:
        if _dead(descriptor, time.time_ns() if now_ns is None else now_ns):
            return descriptor
    except OSError:  # held by a live run, or not to be read
        pass
    os.close(descriptor)
    return None


def _dead(descriptor: int, now_ns: int) -> bool:
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        return False
    locked = lock(descriptor)
    record, own = _record(descriptor), _this_process()
    if locked and (not record or (record.get("lease") == "flock" and record.get("boot") == own["boot"])):
        return True  # the kernel that would hold the lock is this one
    if record.get("boot") == own["boot"] and record.get("processes") == own["processes"]:
        return _started(record.get("pid")) != record.get("started")
    return now_ns - found.st_ctime_ns > STALE_SECS * 1e9


def _record(descriptor: int) -> dict[str, Any]:
    try:
        found = json.loads(os.pread(descriptor, _MOST_BYTES, 0))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _this_process() -> dict[str, Any]:
    """Which process this is: of which kernel, of which numbering of processes (containers have their own), since when."""
    pid = os.getpid()
    return {
        "host": os.uname().nodename,
        "boot": _text("/proc/sys/kernel/random/boot_id"),
        "processes": _link("/proc/self/ns/pid"),
        "pid": pid,
        "started": _started(pid),
    }


def _started(pid: object) -> str | None:
    """When a process started, as the kernel counts; None where there is no such process."""
    if not isinstance(pid, int):
        return None
    fields = _text(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 else None  # noqa: PLR2004 - `starttime`, see proc(5)


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""


def _link(path: str) -> str:
    try:
        return str(Path(path).readlink())
    except OSError:
        return ""


class Heartbeat:
    """Touches a lock file every minute, from a thread of its own: its change time moves, its modification time stays.

    Args:
        descriptor: Of the file; it must stay open until `stop`.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="hfbucket-run-lock", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        while not self._stopped.wait(BEAT_SECS):
            with contextlib.suppress(OSError):  # a server that does not answer for a while
                touch(self._descriptor)

    def stop(self) -> None:
        """Touch it no more."""
        self._stopped.set()
        self._thread.join()


def touch(descriptor: int) -> int:
    """Move a file's change time to now and leave its other times; returns it, in nanoseconds by the file system's clock.

    Raises:
        OSError: The file cannot be changed.
    """
    found = os.fstat(descriptor)
    os.utime(descriptor, ns=(found.st_atime_ns, found.st_mtime_ns))
    return os.fstat(descriptor).st_ctime_ns
