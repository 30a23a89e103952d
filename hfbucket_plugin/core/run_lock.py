"""Lock files that show whether the run that created them is alive, also without file locks or with node-local ones.

A run holds a kernel lock (`flock`) on its file, writes its machine and process into it, and touches it every minute. A
cleanup in the same kernel checks the lock, or the process if the file system has no locks. On a shared file system
`flock` may be local to each node, so a lock of another kernel counts as dead only after ten minutes without a touch.
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
"""Interval in seconds at which a live run touches its lock file."""

STALE_SECS: Final = 600.0
"""Seconds without a touch after which a run of another kernel counts as dead."""

NO_LOCKS: Final = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
"""Errors of `flock` on a file system without locks: Lustre without `flock`, some NFS and FUSE mounts."""

_MOST_BYTES: Final = 4096
_FLAGS: Final = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def take(names: Callable[[], str], directory: int) -> tuple[str, int]:
    """Create a lock file for this process and lock it.

    A cleanup that finds the file before it is locked may remove it as a dead run's; then another one is created.

    Args:
        names: Returns a name that no other file has; called for each attempt.
        directory: Descriptor of the directory.

    Returns:
        The name and the descriptor. Closing the descriptor releases the lock.

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
    """Lock an open, empty file for this process, and write the process's identity into it.

    Raises:
        BlockingIOError: Another process holds the lock.
        OSError: The file cannot be locked for another reason, or cannot be written.
    """
    kind = "flock" if lock(descriptor) else "record"
    os.write(descriptor, json.dumps({"lease": kind, **_this_process()}).encode())


def take_only(name: str, directory: int) -> int | None:
    """Create the lock file that only one process may hold; return None if a live process holds it.

    Args:
        name: Name of the file.
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
    """Remove a file if it is still the open one; another process may have replaced it."""
    aside = f"{name}.{secrets.token_hex(8)}"
    with contextlib.suppress(FileNotFoundError):
        os.rename(name, aside, src_dir_fd=directory, dst_dir_fd=directory)
        if os.stat(aside, dir_fd=directory, follow_symlinks=False).st_ino == os.fstat(descriptor).st_ino:
            os.unlink(aside, dir_fd=directory)
        else:
            os.rename(aside, name, src_dir_fd=directory, dst_dir_fd=directory)


def lock(descriptor: int) -> bool:
    """Take the kernel's lock of an open file without waiting; return False if the file system has no locks.

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
    """Open the lock file of a dead run; return None if the run is alive or its state cannot be determined.

    Args:
        name: Name of the file. A link, or anything that is not a regular file, belongs to no run.
        directory: Descriptor of the directory.
        now_ns: Time by the clock of the file system, in nanoseconds since the epoch; None for this machine's time.
    """
    try:
        descriptor = os.open(name, _FLAGS, dir_fd=directory)
    except OSError:
        return None
    try:
        if _dead(descriptor, time.time_ns() if now_ns is None else now_ns):
            return descriptor
    except OSError:  # held by a live run, or unreadable
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
        return True  # the lock's kernel is this one
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
    """Return the identity of this process: kernel, PID namespace (containers have their own), and start time."""
    pid = os.getpid()
    return {
        "host": os.uname().nodename,
        "boot": _text("/proc/sys/kernel/random/boot_id"),
        "processes": _link("/proc/self/ns/pid"),
        "pid": pid,
        "started": _started(pid),
    }


def _started(pid: object) -> str | None:
    """Return the start time of a process in kernel ticks; None if there is no such process."""
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
    """Touches a lock file every minute from a thread of its own: the change time moves, the modification time does not.

    Args:
        descriptor: Descriptor of the file; it must stay open until `stop`.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="hfbucket-run-lock", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        while not self._stopped.wait(BEAT_SECS):
            with contextlib.suppress(OSError):  # a server may not answer for a while
                touch(self._descriptor)

    def stop(self) -> None:
        """Stop touching the file."""
        self._stopped.set()
        self._thread.join()


def touch(descriptor: int) -> int:
    """Set a file's change time to now and keep its other times; return it in nanoseconds by the file system's clock.

    Raises:
        OSError: The file cannot be changed.
    """
    found = os.fstat(descriptor)
    os.utime(descriptor, ns=(found.st_atime_ns, found.st_mtime_ns))
    return os.fstat(descriptor).st_ctime_ns
