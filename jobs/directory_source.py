"""A directory of chunks as the source of an import: what its manifest names, each file checked, no link followed."""

from __future__ import annotations

import errno
import os
import stat
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Final

from hfbucket_plugin.catalog import ChunkEntry
from hfbucket_plugin.content import Content
from hfbucket_plugin.errors import ConfigError, HFBucketError, IntegrityError, KeyFormatError, ObjectMissingError
from hfbucket_plugin.key_set import KeySet
from hfbucket_plugin.keys import decode_name, parse_key
from hfbucket_plugin.transfer import xet_hashes
from jobs import manifest
from jobs.ends import Held
from warmer.key_files import keys_of

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Iterator, Mapping, Sequence
    from io import FileIO

    from hfbucket_plugin.deadlines import Deadline
    from warmer.choose import Choice

_HASHED_AT_ONCE: Final = 256
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


class DirectorySource:
    """A directory to import from.

    Args:
        directory: Of the chunks.
        believe_files: Whether files are imported that no manifest vouches for: `--without-manifest`.

    Raises:
        ConfigError: There is no such directory.
    """

    def __init__(self, directory: Path, *, believe_files: bool = False) -> None:
        manifest.expect_directory(directory, "--from")
        self._directory = directory
        self._believe_files = believe_files

    @property
    def name(self) -> str:
        """The directory."""
        return str(self._directory)

    def entries(self, choice: Choice, skipped: Counter[str]) -> Iterator[ChunkEntry]:
        """See `Source`."""
        lines = scanned(self._directory, skipped) if self._believe_files else manifest.read(self._directory)
        with KeySet(key for path in choice.keys_from for key in keys_of(path)) as wanted:
            for line in lines:
                if not choice.keys_from or line.key in wanted:
                    yield ChunkEntry(line.key, parse_key(line.key), line.content, line.uploaded_at)

    @staticmethod
    def gone(_wanted: Mapping[str, Content], _deadline: Deadline) -> frozenset[str]:
        """See `Source`. A file that is not what its manifest says is damage, and no deletion."""
        return frozenset()

    def fetch(self, wanted: Mapping[str, Content], deadline: Deadline) -> dict[str, bytearray | HFBucketError]:
        """See `Source`."""
        return {key: self._read(key, content, deadline) for key, content in wanted.items()}

    def _read(self, key: str, content: Content, deadline: Deadline) -> bytearray | HFBucketError:
        path = self._directory / manifest.file_name(key)
        try:
            deadline.check(key)
            number = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # a FIFO must not hold us up
        except FileNotFoundError:
            return ObjectMissingError(f"{str(path)!r}, of {key!r}, is not there: copy it back, or export anew")
        except OSError as error:
            why = "is a link, and links are not followed" if error.errno == errno.ELOOP else f"{error.strerror}"
            return IntegrityError(f"{str(path)!r}, of {key!r}: {why}")
        except HFBucketError as error:
            return error
        with os.fdopen(number, "rb", buffering=0) as file:
            found = os.fstat(number)
            if not stat.S_ISREG(found.st_mode) or found.st_size != content.size:
                return IntegrityError(
                    f"{str(path)!r}, of {key!r}, is no file of {content.size} bytes: it was changed. Export anew"
                )
            data = bytearray(content.size)
            try:
                return data if _filled(file, data) else IntegrityError(f"{str(path)!r} shrank while it was read")
            except OSError as error:
                return IntegrityError(f"{str(path)!r}, of {key!r}, cannot be read: {error.strerror}")

    def close(self) -> None:
        """Nothing is kept open."""


def _filled(file: FileIO, data: bytearray) -> bool:
    view, at = memoryview(data), 0
    while at < len(data):
        count = file.readinto(view[at:])
        if not count:
            return False
        at += count
    return True


def moment_of(found: os.stat_result) -> datetime:
    """The time of a file, to the microsecond."""
    return _EPOCH + timedelta(microseconds=found.st_mtime_ns // 1000)


def look_up(directory: Path, keys: Sequence[str]) -> dict[str, Held]:
    """What a directory holds of some keys, hashed, however long that takes: a disk that is slow is none that hangs.

    Raises:
        ConfigError: Something lies there that is no file, or cannot be read.
    """
    files: dict[str, tuple[Path, os.stat_result]] = {}
    for key in keys:
        path = directory / manifest.file_name(key)
        try:
            found = path.lstat()
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENAMETOOLONG, errno.ENOTDIR):
                continue
            raise ConfigError(f"{str(path)!r} cannot be read: {error.strerror}") from None
        if not stat.S_ISREG(found.st_mode):
            raise ConfigError(f"{str(path)!r} is no file, and bears the name of {key!r}: move it away")
        files[key] = (path, found)
    held: dict[str, Held] = {}
    names = iter(files)
    while some := list(islice(names, _HASHED_AT_ONCE)):
        try:
            hashes = xet_hashes(files[key][0] for key in some)
        except OSError as error:
            raise ConfigError(f"{str(directory)!r}: its files cannot be read: {error}") from None
        for key, xet_hash in zip(some, hashes, strict=True):
            found = files[key][1]
            held[key] = Held(Content(xet_hash, found.st_size), moment_of(found))
    return held


def scanned(directory: Path, skipped: Counter[str]) -> Iterator[manifest.Line]:
    """The files of a directory that bear the names of keys, hashed; what else lies there is counted as ``no_chunk``.

    Raises:
        ConfigError: It cannot be read.
    """
    for some in _pages(directory, skipped):
        try:
            hashes = xet_hashes(path for _, path, _ in some)
        except OSError as error:
            raise ConfigError(f"{str(directory)!r}: its files cannot be read: {error}") from None
        for (key, _, found), xet_hash in zip(some, hashes, strict=True):
            yield manifest.Line(key, Content(xet_hash, found.st_size), moment_of(found))


def _pages(directory: Path, skipped: Counter[str]) -> Iterator[list[tuple[str, Path, os.stat_result]]]:
    page: list[tuple[str, Path, os.stat_result]] = []
    for key, path, found in chunk_files(directory, skipped):
        page.append((key, path, found))
        if len(page) == _HASHED_AT_ONCE:
            yield page
            page = []
    if page:
        yield page


def chunk_files(directory: Path, skipped: Counter[str]) -> Iterator[tuple[str, Path, os.stat_result]]:
    """The files of a directory that bear the names of keys.

    Raises:
        ConfigError: It cannot be read.
    """
    try:
        with os.scandir(directory) as found:
            for one in found:
                key = _key_of(one.name)
                if key is None or not one.is_file(follow_symlinks=False):
                    if one.name != manifest.NAME:
                        skipped["no_chunk"] += 1
                    continue
                yield key, Path(one.path), one.stat(follow_symlinks=False)
    except OSError as error:
        raise ConfigError(f"{str(directory)!r} cannot be read: {error.strerror}") from None


def _key_of(name: str) -> str | None:
    try:
        key = decode_name(name)
        parse_key(key)
    except KeyFormatError:
        return None
    return key
