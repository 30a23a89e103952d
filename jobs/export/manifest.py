"""`MANIFEST.jsonl` of a directory of chunks: its chunks, with a checksum of the manifest itself.

The format is a header, a line per chunk in ascending order of keys, and an end line with their number and the SHA-256
of all lines before it. A manifest that deviates is rejected as a whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import stat
from dataclasses import dataclass
from datetime import datetime
from typing import IO, TYPE_CHECKING, Any, Final

from hfbucket_plugin.core.keys import ContentId, encode_name, parse_key
from hfbucket_plugin.errors import ConfigError, KeyFormatError, RefusedError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

NAME: Final = "MANIFEST.jsonl"
VERSION: Final = 1

_HASH_DIGITS: Final = 64
_MAX_LINE: Final = 64 * 1024


class ManifestError(RefusedError):
    """The manifest of a directory is missing or damaged; nothing is imported."""


@dataclass(frozen=True, slots=True)
class ManifestLine:
    """Manifest line of one chunk.

    Attributes:
        key: Its key string.
        content: Its hash and size.
        uploaded_at: Upload time at the export's source by the Hub's clock; None if unknown.
    """

    key: str
    content: ContentId
    uploaded_at: datetime | None

    def record(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return {
            "key": self.key,
            "size": self.content.size,
            "xet_hash": self.content.xet_hash,
            "uploaded_at": None if self.uploaded_at is None else self.uploaded_at.isoformat(),
        }

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> ManifestLine:
        """Parse the result of `record`.

        Raises:
            ValueError: If the record is invalid or has other fields: file names in particular are derived from keys
                only.
        """
        if record.keys() != {"key", "size", "xet_hash", "uploaded_at"}:
            raise ValueError("a chunk has key, size, xet_hash and uploaded_at, and nothing else")
        key, size, xet_hash, at = (record[name] for name in ("key", "size", "xet_hash", "uploaded_at"))
        if not isinstance(key, str) or type(size) is not int or size < 0:
            raise ValueError("a chunk's key is a text, its size a number")
        if not isinstance(xet_hash, str) or len(xet_hash) != _HASH_DIGITS or set(xet_hash) - set("0123456789abcdef"):
            raise ValueError("a chunk's xet_hash has 64 hexadecimal digits")
        parse_key(key)
        file_name(key)  # raises for an invalid key
        moment = None if at is None else datetime.fromisoformat(at)
        if moment is not None and moment.tzinfo is None:
            raise ValueError("uploaded_at has no time zone")
        return cls(key, ContentId(xet_hash, size), moment)


def file_name(key: str) -> str:
    """Return the file name of a chunk; for any key, it has no slash and is neither `.` nor `..`."""
    return encode_name(key)


def write(directory: Path, lines: Iterable[ManifestLine]) -> int:
    """Write the manifest of a directory, and replace an existing one atomically.

    Args:
        directory: Directory of the chunks.
        lines: Manifest lines in ascending order of keys, without duplicates.

    Returns:
        The number of lines.

    Raises:
        OSError: If the manifest cannot be written.
    """
    part = directory / f".part-{secrets.token_hex(8)}"
    digest = hashlib.sha256()
    count = 0
    try:
        with part.open("xb") as out:
            for record in _records(lines):
                text = (json.dumps(record) + "\n").encode()
                digest.update(text)
                out.write(text)
                count += 1
            end = {"record": "end", "chunks": count - 1, "sha256": digest.hexdigest()}
            out.write((json.dumps(end) + "\n").encode())
            out.flush()
            os.fsync(out.fileno())
        part.replace(directory / NAME)
    finally:
        part.unlink(missing_ok=True)
    sync(directory)
    return count - 1


def _records(lines: Iterable[ManifestLine]) -> Iterator[dict[str, Any]]:
    yield {"record": "manifest", "version": VERSION}
    for line in lines:
        yield line.record()


def expect_whole(directory: Path) -> None:
    """Refuse a damaged manifest; a missing one is accepted.

    Raises:
        ManifestError: If the manifest is damaged.
    """
    if os.path.lexists(directory / NAME):
        next(read(directory), None)


def sync(directory: Path) -> None:
    """Flush the entries of a directory to its disk.

    Raises:
        OSError: If the flush fails.
    """
    number = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def read(directory: Path) -> Iterator[ManifestLine]:
    """Stream the manifest of a directory, after a check of the whole file.

    Raises:
        ManifestError: If the manifest is missing, damaged, or of a newer version.
    """
    path = directory / NAME
    try:
        # A link to another user's file is not a manifest of this directory.
        number = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # opening a FIFO must not block
    except FileNotFoundError:
        raise ManifestError(f"{str(directory)!r} has no {NAME}: the export to it did not end, or it is none") from None
    except OSError as error:
        raise ManifestError(f"{str(path)!r} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise ManifestError(f"{str(path)!r} is no file: nothing of the directory is used")
    with os.fdopen(number, "rb") as file:
        _check(path, file)
        file.seek(0)  # the file that was checked, even if the path has been replaced
        next(file)
        for line in file:
            record = json.loads(line)
            if record.get("record") == "end":
                return
            yield ManifestLine.from_record(record)


def _check(path: Path, file: IO[bytes]) -> None:
    """Check a whole manifest.

    Raises:
        ManifestError: If the manifest is invalid.
    """
    checker, number = _Checker(), 0
    try:
        while text := file.readline(_MAX_LINE):
            number += 1
            checker.take(text)
    except (ValueError, TypeError, AttributeError, KeyFormatError, RecursionError) as error:
        reason = "this is no JSON" if isinstance(error, (json.JSONDecodeError, UnicodeDecodeError)) else error
        raise ManifestError(
            f"{str(path)!r}, line {number}: {reason}; nothing of the directory is used. Export again, or import with "
            "--without-manifest what its files say"
        ) from None
    except OSError as error:
        raise ManifestError(f"{str(path)!r} cannot be read: {error.strerror}") from None
    if not checker.ended:
        raise ManifestError(f"{str(path)!r} has no end: it was not written whole. Export again")


class _Checker:
    """Checker of a manifest, fed line by line."""

    def __init__(self) -> None:
        self.ended = False
        self._digest = hashlib.sha256()
        self._chunks = -1  # the header does not count
        self._last = ""

    def take(self, text: bytes) -> None:
        if self.ended:
            raise ValueError("there is more after its end")
        record = json.loads(text)
        if not isinstance(record, dict) or not text.endswith(b"\n"):
            raise ValueError("this line is not whole")
        if self._chunks < 0:
            if record.get("record") != "manifest" or record.get("version") != VERSION:
                raise ValueError(f"this is no manifest of version {VERSION}")
        elif record.get("record") == "end":
            if record.get("chunks") != self._chunks or record.get("sha256") != self._digest.hexdigest():
                raise ValueError("its checksum is not that of its lines: they were changed")
            self.ended = True
        else:
            key = ManifestLine.from_record(record).key
            if key <= self._last:
                raise ValueError("a key is there twice, or not in its order")
            self._last = key
        self._digest.update(text)
        self._chunks += 1


def expect_directory(directory: Path, option: str) -> None:
    """Refuse a path that is not a directory.

    Raises:
        ConfigError: If the path is not a directory.
    """
    if not directory.is_dir():
        raise ConfigError(f"{option} {str(directory)!r} is no directory")
