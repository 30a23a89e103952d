"""Reports: files that take the place of an earlier one only when there is something to put there."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final

from hfbucket_plugin.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable

_FOR_ALL: Final = 0o666
_SPECIAL: Final = ("/dev/fd/", "/dev/std", "/proc/")
"""What stands for an open file of a process. Others below /dev, such as /dev/shm, hold files as any directory does."""


class OutputFile:
    """A text file that is written beside its name, and bears it from `commit` on.

    Until then what bore the name stays as it is. Where the directory takes no new file but the file itself may be written, its
    content is replaced by `commit`. Pipes and devices are written as it comes.

    Args:
        path: Of the file. A link is followed.
        option: That names it, for errors.

    Raises:
        ConfigError: The file cannot be written.
    """

    def __init__(self, path: Path, option: str) -> None:
        self._part: Path | None = None
        self._spooled = False
        try:
            # Not `resolve`: what /dev/stdout names is not a place of its own.
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
            number = os.open(self._target, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe that nobody reads
            os.set_blocking(number, True)
            return os.fdopen(number, "w", encoding="utf-8")
        if found is not None:
            os.close(os.open(self._target, os.O_WRONLY | os.O_CLOEXEC))  # may it be written at all?
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
        """Add text.

        Raises:
            OSError: It cannot be written.
        """
        self._out.write(text)

    def flush(self) -> None:
        """Hand over to the system what was written.

        Raises:
            OSError: It cannot be written.
        """
        self._out.flush()

    def commit(self) -> None:
        """End the file and give it its name.

        Raises:
            OSError: Not all of it could be written; what could be bears the name.
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
        """End without it: what bore the name stays. After `commit`, does nothing."""
        with contextlib.suppress(OSError):
            self._out.close()
        if self._part is not None:
            with contextlib.suppress(OSError):
                self._part.unlink()
            self._part = None


def expect_writable(path: Path, option: str) -> None:
    """Find out whether a file can be written, before there is anything to write.

    Args:
        path: Of the file.
        option: That names it.

    Raises:
        ConfigError: It cannot be.
    """
    OutputFile(path, option).discard()


def write_whole(path: Path, text: str, option: str) -> None:
    """Write a file; it appears whole.

    Args:
        path: Of the file.
        text: Its content.
        option: That names it.

    Raises:
        ConfigError: It cannot be written. What bore the name stays.
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
    """The mask of this process, which only setting it tells."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def expect_apart(outputs: Iterable[tuple[str, Path | None]], inputs: Iterable[tuple[str, Path | None]]) -> None:
    """Refuse a command that would write to a file that it reads, or twice to the same, under whatever names.

    Args:
        outputs: Options with the files that they name to be written; None for an option that was not given.
        inputs: The same of files to be read.

    Raises:
        ConfigError: Two are the same file; the message names both options.
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
            # A terminal may be written twice, and a directory is not overwritten by a file.
            return stat.S_ISREG(one.stat().st_mode)
    except OSError:
        return os.path.realpath(one) == os.path.realpath(other)
    except ValueError:  # a null byte: no such file is there, which whoever opens it says
        return False
    return False
