"""Directory as the source or the destination of an export."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import secrets
import sqlite3
import stat
import tempfile
from collections import Counter
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from hfbucket_plugin.core import run_lock
from hfbucket_plugin.core.keys import ContentId, decode_name, parse_key
from hfbucket_plugin.errors import (
    ConfigError,
    HFBucketError,
    IntegrityError,
    KeyFormatError,
    ObjectMissingError,
    RefusedError,
)
from hfbucket_plugin.hub.listing import ChunkEntry
from hfbucket_plugin.hub.transfer import xet_hashes
from hfbucket_plugin.tools.external_sort import KeySet
from jobs.export import manifest
from jobs.export.endpoint import EndpointObject
from warmer.plan.key_files import keys_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from io import FileIO

    from hfbucket_plugin.core.deadline import Deadline
    from hfbucket_plugin.tools.selection import Selection
    from jobs.export.endpoint import Chunk


_HASHED_AT_ONCE: Final = 256
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


class DirectorySource:
    """Source endpoint that is a directory of chunks.

    Args:
        directory: Path of the directory.
        believe_files: Whether to import files that no manifest lists: `--without-manifest`.

    Raises:
        ConfigError: If the directory does not exist.
    """

    def __init__(self, directory: Path, *, believe_files: bool = False) -> None:
        manifest.expect_directory(directory, "--from")
        self._directory = directory
        self._believe_files = believe_files

    @property
    def name(self) -> str:
        """Path of the directory."""
        return str(self._directory)

    def entries(self, selection: Selection, skipped: Counter[str]) -> Iterator[ChunkEntry]:
        """See `SourceEndpoint`."""
        lines = scanned(self._directory, skipped) if self._believe_files else manifest.read(self._directory)
        with KeySet(key for path in selection.keys_from for key in keys_of(path)) as wanted:
            for line in lines:
                if not selection.keys_from or line.key in wanted:
                    yield ChunkEntry(line.key, parse_key(line.key), line.content, line.uploaded_at)

    @staticmethod
    def gone(_wanted: Mapping[str, ContentId], _deadline: Deadline) -> frozenset[str]:
        """See `SourceEndpoint`. A file that differs from its manifest is damaged, not deleted."""
        return frozenset()

    def fetch(self, wanted: Mapping[str, ContentId], deadline: Deadline) -> dict[str, bytearray | HFBucketError]:
        """See `SourceEndpoint`."""
        return {key: self._read(key, content, deadline) for key, content in wanted.items()}

    def _read(self, key: str, content: ContentId, deadline: Deadline) -> bytearray | HFBucketError:
        path = self._directory / manifest.file_name(key)
        try:
            deadline.check(key)
            number = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # opening a FIFO must not block
        except FileNotFoundError:
            return ObjectMissingError(f"{str(path)!r}, of {key!r}, is not there: copy it back, or export again")
        except OSError as error:
            why = "is a link, and links are not followed" if error.errno == errno.ELOOP else f"{error.strerror}"
            return IntegrityError(f"{str(path)!r}, of {key!r}: {why}")
        except HFBucketError as error:
            return error
        with os.fdopen(number, "rb", buffering=0) as file:
            found = os.fstat(number)
            if not stat.S_ISREG(found.st_mode) or found.st_size != content.size:
                return IntegrityError(
                    f"{str(path)!r}, of {key!r}, is no file of {content.size} bytes: it was changed. Export again"
                )
            data = bytearray(content.size)
            try:
                return data if _filled(file, data) else IntegrityError(f"{str(path)!r} shrank while it was read")
            except OSError as error:
                return IntegrityError(f"{str(path)!r}, of {key!r}, cannot be read: {error.strerror}")

    def close(self) -> None:
        """Do nothing: no file stays open."""


def _filled(file: FileIO, data: bytearray) -> bool:
    view, at = memoryview(data), 0
    while at < len(data):
        count = file.readinto(view[at:])
        if not count:
            return False
        at += count
    return True


def moment_of(found: os.stat_result) -> datetime:
    """Return the modification time of a file, to the microsecond."""
    return _EPOCH + timedelta(microseconds=found.st_mtime_ns // 1000)


def look_up(directory: Path, keys: Sequence[str]) -> dict[str, EndpointObject]:
    """Look up keys in a directory, and hash their files without a deadline: a slow disk is not a hanging one.

    Raises:
        ConfigError: If an entry is not a file, or cannot be read.
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
    held: dict[str, EndpointObject] = {}
    names = iter(files)
    while some := list(islice(names, _HASHED_AT_ONCE)):
        try:
            hashes = xet_hashes(files[key][0] for key in some)
        except OSError as error:
            raise ConfigError(f"{str(directory)!r}: its files cannot be read: {error}") from None
        for key, xet_hash in zip(some, hashes, strict=True):
            found = files[key][1]
            held[key] = EndpointObject(ContentId(xet_hash, found.st_size), moment_of(found))
    return held


def scanned(directory: Path, skipped: Counter[str]) -> Iterator[manifest.ManifestLine]:
    """Hash the files of a directory whose names are those of keys; count the others as ``no_chunk``.

    Raises:
        ConfigError: If the directory cannot be read.
    """
    for some in _pages(directory, skipped):
        try:
            hashes = xet_hashes(path for _, path, _ in some)
        except OSError as error:
            raise ConfigError(f"{str(directory)!r}: its files cannot be read: {error}") from None
        for (key, _, found), xet_hash in zip(some, hashes, strict=True):
            yield manifest.ManifestLine(key, ContentId(xet_hash, found.st_size), moment_of(found))


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
    """Yield the files of a directory whose names are those of keys; count the others.

    Raises:
        ConfigError: If the directory cannot be read.
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


_PART: Final = ".part-"
_LOCK: Final = ".hfbucket-export.lock"
_NO_LINKS: Final = (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS)
"""Error numbers of file systems without hard links."""


class DirectoryDestination:
    """Destination endpoint that is a directory of chunks.

    Args:
        directory: Path of the directory; created if missing.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._number: int | None = None
        self._lock: int | None = None
        self._heart: run_lock.Heartbeat | None = None

    @property
    def name(self) -> str:
        """Path of the directory."""
        return str(self._directory)

    def begin(self) -> None:
        """Lock out other exports, and remove the files that a killed one left.

        Raises:
            RefusedError: If another export writes to the directory, or its manifest is damaged.
            ConfigError: If the directory cannot be created or written to.
        """
        if self._number is not None:
            return
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._number = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            run_lock.lock(self._number)  # the lock that earlier versions hold; a no-op where locks are unsupported
            self._expect_alone(self._number)
            for left in self._directory.glob(f"{_PART}*"):
                left.unlink()
            manifest.expect_whole(self._directory)
        except BlockingIOError:
            raise RefusedError(self._taken) from None
        except OSError as error:
            raise ConfigError(f"--to {self.name!r} cannot be written to: {error.strerror}") from None

    @property
    def _taken(self) -> str:
        return f"another export writes to {self.name!r} now; nothing is copied. Run again later"

    def _expect_alone(self, directory: int) -> None:
        """Create the lock file, which keeps out other nodes' exports where file locks are node-local or unsupported."""
        self._lock = run_lock.take_only(_LOCK, directory)
        if self._lock is None:
            raise RefusedError(self._taken)
        self._heart = run_lock.Heartbeat(self._lock)

    @property
    def fresh_secs(self) -> float:
        """See `DestinationEndpoint`. No limit: other exports are locked out, and new files never replace others."""
        return math.inf

    def look_up(self, keys: Sequence[str], _deadline: Deadline, *, patient: bool = True) -> dict[str, EndpointObject]:  # noqa: ARG002 - no Hub is asked
        """See `DestinationEndpoint`. The contents are hashed."""
        return look_up(self._directory, keys)

    def put(self, chunks: Mapping[str, Chunk], deadline: Deadline) -> dict[str, Any]:
        """See `DestinationEndpoint`. The written bytes are read back and hashed.

        Raises:
            OSError: If the disk is full or fails.
        """
        staged: dict[str, Any] = {}
        try:
            for key, chunk in chunks.items():
                deadline.check(key)
                staged[key] = self._write(chunk)
            written = {key: one for key, one in staged.items() if isinstance(one, Path)}
            for (key, part), xet_hash in zip(written.items(), xet_hashes(written.values()), strict=True):
                chunk = chunks[key]
                found = ContentId(xet_hash, part.stat().st_size)
                if found != chunk.content:
                    part.unlink()
                    staged[key] = IntegrityError(
                        f"{key}: its bytes have the hash {found.xet_hash}, and should have {chunk.content.xet_hash}; they "
                        "were not kept. Its copy at the source is damaged"
                    )
        except BaseException:
            self.drop(staged)
            raise
        return staged

    def _write(self, chunk: Chunk) -> Path:
        part = self._directory / f"{_PART}{secrets.token_hex(8)}"
        try:
            with part.open("xb") as out:
                out.write(chunk.data)
                out.flush()
                if chunk.uploaded_at is not None:
                    nanos = (chunk.uploaded_at - _EPOCH) // timedelta(microseconds=1) * 1000
                    os.utime(out.fileno(), ns=(nanos, nanos))
                os.fsync(out.fileno())
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        return part

    def publish(self, staged: Mapping[str, Path], replacing: frozenset[str], _deadline: Deadline) -> dict[str, str]:
        """See `DestinationEndpoint`."""
        failed: dict[str, str] = {}
        for key, part in staged.items():
            path = self._directory / manifest.file_name(key)
            try:
                _move(part, path, replace=key in replacing)
            except FileExistsError:
                failed[key] = f"{str(path)!r} appeared meanwhile, and stays"
            except OSError as error:
                failed[key] = f"{str(path)!r} cannot be written: {error.strerror}"
        return failed

    def drop(self, staged: Mapping[str, Any]) -> None:
        """See `DestinationEndpoint`."""
        for part in staged.values():
            if isinstance(part, Path):
                with contextlib.suppress(OSError):
                    part.unlink()

    def finish(self, known: KnownChunks) -> int:
        """Write the manifest of all chunks in the directory, those of earlier exports included.

        Args:
            known: Files written by this export. Other files are hashed, unless the current manifest lists them; a file
                that
                differs from the current manifest keeps its line, so that an import refuses it, and is recorded as
                damaged.

        Returns:
            The number of chunks.

        Raises:
            ManifestError: If the current manifest was damaged in the meantime.
            ConfigError: If the manifest cannot be written.
        """
        try:
            if os.path.lexists(self._directory / manifest.NAME):
                known.add_older(manifest.read(self._directory))
            return manifest.write(self._directory, known.lying_in(self._directory))
        except OSError as error:
            raise ConfigError(f"{self.name!r}: its manifest cannot be written: {error.strerror}") from None

    def close(self) -> None:
        """Release the lock, so that other exports can start."""
        if self._heart is not None and self._lock is not None and self._number is not None:
            self._heart.stop()
            with contextlib.suppress(OSError):  # the next export detects that the lock has no holder
                os.unlink(_LOCK, dir_fd=self._number)
            os.close(self._lock)
        self._heart = self._lock = None
        if self._number is not None:
            os.close(self._number)
            self._number = None


def _move(part: Path, path: Path, *, replace: bool) -> None:
    """Rename a file; replace an existing one only if requested."""
    if not replace:
        try:
            path.hardlink_to(part)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            if path.exists():
                raise FileExistsError(errno.EEXIST, "File exists") from None
        else:
            part.unlink()
            return
    part.replace(path)


class KnownChunks:
    """Set of files with known hashes, in a temporary file. Use it as a context manager.

    Attributes:
        damaged: Names of files that differ from their known hashes.
    """

    def __init__(self) -> None:
        self.damaged: list[str] = []
        self._directory = tempfile.TemporaryDirectory(prefix="manifest-")
        self._base = sqlite3.connect(
            Path(self._directory.name, "known.sqlite"), isolation_level=None, check_same_thread=False
        )
        self._base.executescript(
            "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;"
            "CREATE TABLE known (key TEXT PRIMARY KEY, hash TEXT, size INTEGER, at TEXT) WITHOUT ROWID;"
            "CREATE TABLE there (key TEXT PRIMARY KEY, hash TEXT, size INTEGER, at TEXT) WITHOUT ROWID; BEGIN"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._base.close()
        self._directory.cleanup()

    def add(self, line: manifest.ManifestLine) -> None:
        """Add a file that this export wrote."""
        self._base.execute("INSERT OR REPLACE INTO known VALUES (?, ?, ?, ?)", _row(line))

    def add_older(self, lines: Iterator[manifest.ManifestLine]) -> None:
        """Add the files of an earlier manifest."""
        self._base.executemany("INSERT OR IGNORE INTO known VALUES (?, ?, ?, ?)", (_row(line) for line in lines))

    def lying_in(self, directory: Path) -> Iterator[manifest.ManifestLine]:
        """Yield the manifest lines of the files in a directory, by key.

        A known hash is reused if size and time of the file are unchanged; otherwise the file is hashed. A file with
        another
        hash than the known one is damaged: its known line is kept.

        Raises:
            ConfigError: If the directory cannot be read.
        """
        passed_by: Counter[str] = Counter()
        for key, path, found in chunk_files(directory, passed_by):
            line = self._line(key, path, found)
            self._base.execute("INSERT OR REPLACE INTO there VALUES (?, ?, ?, ?)", _row(line))
        rows = self._base.execute("SELECT key, hash, size, at FROM there ORDER BY key")
        for row in rows:
            yield _line_of(*row)

    def _line(self, key: str, path: Path, found: os.stat_result) -> manifest.ManifestLine:
        row = self._base.execute("SELECT key, hash, size, at FROM known WHERE key = ?", (key,)).fetchone()
        known = None if row is None else _line_of(*row)
        if known is not None and (known.content.size, known.uploaded_at) == (found.st_size, moment_of(found)):
            return known
        line = manifest.ManifestLine(key, ContentId(xet_hashes([path])[0], found.st_size), moment_of(found))
        if known is None or known.content == line.content:
            return line
        self.damaged.append(path.name)
        return known


def _line_of(key: str, xet_hash: str, size: int, at: str | None) -> manifest.ManifestLine:
    return manifest.ManifestLine(key, ContentId(xet_hash, size), None if at is None else datetime.fromisoformat(at))


def _row(line: manifest.ManifestLine) -> tuple[str, str, int, str | None]:
    at = None if line.uploaded_at is None else line.uploaded_at.isoformat()
    return line.key, line.content.xet_hash, line.content.size, at
