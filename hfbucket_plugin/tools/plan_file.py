"""Plan files: JSON Lines, written atomically and sealed."""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import os
import stat
import tempfile
import weakref
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, Generic, Self, TypeVar

from hfbucket_plugin.errors import ConfigError, RefusedError
from hfbucket_plugin.tools.lines import open_regular

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


Record = dict[str, Any]
"""A line of a plan."""

H = TypeVar("H")
E = TypeVar("E")

_LINES: Final = 1000
_SEGMENT_BYTES: Final = 8 * 1024 * 1024
"""Maximum lines and bytes of a segment: only one segment is in memory at a time."""

MOST_LINE_BYTES: Final = 1024 * 1024
"""Maximum length of a line in bytes: a header with hundreds of models takes a tenth of it."""


_READ_BYTES: Final = 256 * 1024


class _At(io.RawIOBase):
    """View of an open file from an offset on. It has its own position, and does not close the file."""

    def __init__(self, number: int, at: int) -> None:
        super().__init__()
        self._number = number
        self._at = at

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = os.preadv(self._number, [buffer], self._at)
        self._at += count
        return count


class Segment:
    """Consecutive lines of a file: their offset, their length, and their digest when they were first read.

    Args:
        at: Offset of its first byte.
        line: Number of its first line, if lines are counted.
    """

    __slots__ = ("_digest", "at", "length", "line")

    def __init__(self, at: int, line: int = 0) -> None:
        self.at = at
        self.line = line
        self.length = 0
        self._digest = hashlib.sha256()

    def add(self, raw: bytes) -> None:
        """Add a line."""
        self.length += len(raw)
        self._digest.update(raw)

    @property
    def digest(self) -> bytes:
        """Return the SHA-256 of its lines."""
        return self._digest.digest()


class Sealed:
    """File of lines, held open, whose content must not change between reads.

    Args:
        path: Path of the file.
        what: Kind of the file in errors, such as `plan`.
        longest: Maximum length of a line in bytes.

    Attributes:
        status: Result of `fstat`: owner, mode and more.

    Raises:
        ConfigError: If the file cannot be read, or is not a regular file.
    """

    def __init__(self, path: Path, what: str, longest: int = MOST_LINE_BYTES) -> None:
        self._longest = longest
        self._name = f"{what} {str(path)!r}"
        self._segments: list[Segment] = []
        file = open_regular(path, what)
        weakref.finalize(self, file.close)
        self._number = file.fileno()
        self.status = os.fstat(self._number)

    def expect_ours(self) -> None:
        """Refuse a file that another user could have written.

        Raises:
            RefusedError: If the file belongs to another user, or is writable by others.
        """
        if self.status.st_uid != os.geteuid() or self.status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise RefusedError(
                f"{self._name} belongs to another user, or others may write to it. It may have been changed, so "
                "nothing of it is carried out. Plan again; or review it, and copy it with `install -m 600 PLAN COPY`"
            )

    def raw_lines(self, start: int = 0) -> Iterator[bytes]:
        """Stream the current lines without verification.

        Args:
            start: Offset of the first line.

        Raises:
            ValueError: If the line after the last yielded one is too long.
            OSError: If the file cannot be read.
        """
        with io.BufferedReader(_At(self._number, start), _READ_BYTES) as file:
            while line := file.readline(self._longest + 1):
                if len(line) > self._longest:
                    raise ValueError(f"the line after it is longer than {self._longest} bytes")
                yield line

    def lines(self) -> Iterator[bytes]:
        """Stream all lines for the first time, and record their digests.

        Raises:
            ValueError: If the line after the last yielded one is too long.
            OSError: If the file cannot be read.
        """
        self._segments.clear()
        at = 0
        for number, line in enumerate(self.raw_lines()):
            if number % _LINES == 0 or self._segments[-1].length >= _SEGMENT_BYTES:
                self._segments.append(Segment(at))
            self._segments[-1].add(line)
            at += len(line)
            yield line

    def lines_again(self) -> Iterator[bytes]:
        """Stream all lines again, verified against the first read.

        Raises:
            RefusedError: If the file has changed since it was read.
            OSError: If the file can no longer be read.
        """
        for segment in self._segments:
            yield from io.BytesIO(self.again(segment))

    def again(self, segment: Segment) -> bytes:
        """Read the lines of a segment again, verified against the first read.

        Raises:
            RefusedError: If the lines have changed since.
            OSError: If the lines can no longer be read.
        """
        whole = self._read(segment.at, segment.length)
        if hashlib.sha256(whole).digest() != segment.digest:
            raise RefusedError(f"{self._name} was changed after it was checked: nothing more of it is carried out")
        return whole

    def _read(self, at: int, length: int) -> bytes:
        pieces: list[bytes] = []
        while length and (piece := os.pread(self._number, length, at)):
            pieces.append(piece)
            at, length = at + len(piece), length - len(piece)
        return b"".join(pieces)


class PlanOutput:
    """Writer of a plan's lines, which are JSON objects. Use it as a context manager.

    Args:
        path: Path of the plan.
        header: First line of the plan.

    Raises:
        ConfigError: If the file cannot be written.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            number, self._part = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        except OSError as error:
            raise ConfigError(f"plan {str(path)!r} cannot be written: {error.strerror}") from None
        self._out: IO[str] = os.fdopen(number, "w", encoding="utf-8")
        self._write(header)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._out.close()
        Path(self._part).unlink(missing_ok=True)

    def _write(self, record: dict[str, Any]) -> None:
        self._out.write(json.dumps(record) + "\n")

    def _end(self, totals: dict[str, Any]) -> None:
        """Write the last line, and move the plan to its path."""
        self._write({"record": "end"} | totals)
        self._out.flush()
        os.fsync(self._out.fileno())
        Path(self._part).replace(self._path)


class PlanReader(Generic[H, E]):
    """Reader of the files of `PlanOutput`: a header, items, and an end line without which the plan is invalid.

    Args:
        path: Path of the plan.
        ours: Whether to refuse a file that another user could have written.

    Raises:
        ConfigError: If the file cannot be read, or is not a regular file.
        RefusedError: If another user may have written the file.
    """

    def __init__(self, path: Path, *, ours: bool) -> None:
        self._name = f"plan {str(path)!r}"
        self._lines = Sealed(path, "plan")
        if ours:
            self._lines.expect_ours()

    def read(
        self, header: Callable[[Record], H], item: Callable[[H, Record], None], end: Callable[[Record], E]
    ) -> tuple[H, E]:
        """Read and check every line.

        Args:
            header: Parses the first line.
            item: Checks an item's line against the header.
            end: Parses the last line.

        Raises:
            ConfigError: If a line is invalid, or the end is missing; the message names the line.
            RefusedError: If one of the arguments refuses a line.
        """
        number, first, last = 0, None, None
        try:
            for number, line in enumerate(self._lines.lines(), 1):  # noqa: B007 - errors name the line
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise ValueError("this line is not a JSON object")  # noqa: TRY004, TRY301 - as the others
                if last is not None:
                    raise ValueError("there is more after its end")  # noqa: TRY301 - as above
                if first is None:
                    first = header(record)
                elif record.get("record") == "end":
                    last = end(record)
                else:
                    item(first, record)
        except OSError as error:
            raise ConfigError(f"{self._name} cannot be read: {error.strerror}") from None
        except RefusedError as error:
            raise RefusedError(f"{self._name}, line {number}: {error}") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigError(f"{self._name}, line {number}: {error}") from None
        if first is None or last is None:
            raise ConfigError(f"{self._name} has no end: it was not written whole; make a new plan")
        return first, last

    def items(self) -> Iterator[Record]:
        """Stream the items again, as they were when the plan was first read.

        Raises:
            RefusedError: If the file has changed since.
            OSError: If the file can no longer be read.
        """
        records = map(json.loads, self._lines.lines_again())
        next(records)
        return itertools.takewhile(lambda record: record.get("record") != "end", records)


def default_plan_dir() -> Path:
    """Return the default directory of plans."""
    return Path(tempfile.gettempdir()) / f"lmcache-hfbucket-plans-{os.getuid()}"


def remove_if_temporary(path: Path) -> None:
    """Remove a temporary plan, which lies in the default directory."""
    with contextlib.suppress(OSError):
        if path.parent == default_plan_dir():
            path.unlink()


def plan_dir(wanted: Path | None) -> Path:
    """Return the directory for a plan: the requested one, or one that only this user can access.

    Raises:
        RefusedError: If other users could write to the default directory, or its path is not a directory.
        OSError: If the directory cannot be created.
    """
    if wanted is not None:
        return wanted
    directory = default_plan_dir()
    with contextlib.suppress(FileExistsError):
        directory.mkdir(mode=0o700, parents=True)
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise RefusedError(
            f"{str(directory)!r}, where plans go, is no directory that is only yours: others could change a plan there. Take "
            "it away, or give --plan-dir DIR"
        )
    return directory
