"""Buckets and the files in them, as rows."""

import json
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any

from localhub.errors import bad_request
from localhub.formats.hashing import to_hex
from localhub.state.database import Database

REGIONS = ("us", "eu")
"""The storage regions of the Hub (`huggingface_hub.constants.REPO_REGIONS`); the first is the default."""

_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?")
_EPOCH = datetime(1970, 1, 1)  # noqa: DTZ001 - UTC, without the suffix that isoformat would write


@dataclass(frozen=True)
class Bucket:
    """One bucket.

    Attributes:
        row: row number, never reused.
        namespace: the user or organization.
        name: the name in the namespace.
        private: whether only tokens with a right on the bucket may see it.
        region: where the bytes are stored; a server-side copy stays within one region.
        created_ms: time of creation, in milliseconds since 1970.
        size: bytes of all files.
        files: number of files.
    """

    row: int
    namespace: str
    name: str
    private: bool
    region: str
    created_ms: int
    size: int
    files: int

    @property
    def id(self) -> str:
        """`namespace/name`."""
        return f"{self.namespace}/{self.name}"

    def info(self) -> dict[str, object]:
        """Return the response to `bucket_info`."""
        return {
            "id": self.id,
            "private": self.private,
            "visibility": "private" if self.private else "public",
            "region": self.region,
            "createdAt": iso(self.created_ms),
            "size": self.size,
            "totalFiles": self.files,
        }


class BucketStore:
    """Reads and writes buckets, and reads their files. `localhub.http.batch` writes files.

    Args:
        database: where buckets and files are recorded.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def find(self, namespace: str, name: str) -> Bucket | None:
        """Return a bucket, or None when it does not exist."""
        row = self._database.reader.execute(
            "SELECT * FROM buckets WHERE namespace = ? AND name = ?", (namespace, name)
        ).fetchone()
        return _bucket(row) if row else None

    def create(self, namespace: str, name: str, *, private: bool, region: str) -> bool:
        """Create a bucket; return False, changing nothing, when it exists.

        Raises:
            HubError: 400 for an invalid name or region.
        """
        for part in (namespace, name):
            if not _NAME.fullmatch(part) or ".." in part:
                raise bad_request(f"invalid bucket name: {namespace}/{name}")
        if region not in REGIONS:
            raise bad_request(f"unknown region {region!r}: expected one of {', '.join(REGIONS)}")
        with self._database.transaction() as connection:
            made = connection.execute(
                "INSERT OR IGNORE INTO buckets (namespace, name, private, region, created_ms) VALUES (?, ?, ?, ?, ?)",
                (namespace, name, private, region, now_ms()),
            )
            return made.rowcount == 1

    def delete(self, bucket: Bucket) -> None:
        """Delete a bucket and its files."""
        with self._database.transaction() as connection:
            connection.execute("DELETE FROM buckets WHERE id = ?", (bucket.row,))

    def set_private(self, bucket: Bucket, private: bool) -> None:
        """Change the visibility of a bucket."""
        with self._database.transaction() as connection:
            connection.execute("UPDATE buckets SET private = ? WHERE id = ?", (private, bucket.row))

    def of_namespace(self, namespace: str, search: str, after: str, limit: int) -> list[Bucket]:
        """Return up to `limit` buckets of a namespace, by name, whose name is greater than `after` and contains `search`."""
        rows = self._database.reader.execute(
            "SELECT * FROM buckets"
            " WHERE namespace = ? AND name > ? AND instr(lower(name), lower(?)) ORDER BY name LIMIT ?",
            (namespace, after, search, limit),
        )
        return [_bucket(row) for row in rows]

    def file(self, bucket: Bucket, path: str) -> dict[str, Any] | None:
        """Return the entry of one file, or None."""
        row = self._database.reader.execute(
            "SELECT * FROM files WHERE bucket = ? AND path = ?", (bucket.row, path)
        ).fetchone()
        return entry(row) if row else None

    def files(self, bucket: Bucket, paths: Sequence[str]) -> list[dict[str, Any]]:
        """Return the entries of those paths that are files, sorted by hash.

        The Hub guarantees no order. A client that relies on the order of its request fails here.
        """
        rows = self._database.reader.execute(
            # CROSS JOIN fixes the order of the loops; otherwise the planner scans the bucket by hash.
            "SELECT files.* FROM json_each(?) AS wanted CROSS JOIN files ON files.bucket = ? AND files.path = wanted.value"
            " ORDER BY files.hash DESC, files.path DESC",
            (json.dumps(list(dict.fromkeys(paths))), bucket.row),
        )
        return [entry(row) for row in rows]

    def snapshot(self) -> AbstractContextManager[object]:
        """Return a context in which all reads of this thread see the same state."""
        return self._database.snapshot()

    def scan(self, bucket: Bucket, start: str, stop: str | None, limit: int) -> Iterator[dict[str, Any]]:
        """Yield the entries of up to `limit` files with `start <= path < stop`, by path."""
        rows = self._database.reader.execute(
            "SELECT * FROM files WHERE bucket = ? AND path >= ? AND (? IS NULL OR path < ?) ORDER BY path LIMIT ?",
            (bucket.row, start, stop, stop, limit),
        )
        return map(entry, rows)

    def newest_ms(self, bucket: Bucket, start: str, stop: str) -> int:
        """Return the time of upload of the newest file with `start <= path < stop`; at least one must exist."""
        query = "SELECT max(uploaded_ms) FROM files WHERE bucket = ? AND path >= ? AND path < ?"
        row = self._database.reader.execute(query, (bucket.row, start, stop)).fetchone()
        return int(row[0])


def entry(row: tuple[Any, ...]) -> dict[str, Any]:
    """Return a row of `files` in the form that the clients read."""
    _, path, digest, size, mtime_ms, uploaded_ms, content_type = row
    item = {
        "type": "file",
        "path": path,
        "size": size,
        "xetHash": to_hex(digest),
        "uploadedAt": iso(uploaded_ms),
    }
    if mtime_ms is not None:
        item["mtime"] = iso(mtime_ms)
    if content_type is not None:
        item["contentType"] = content_type
    return item


def now_ms() -> int:
    """Return the current time in milliseconds since 1970."""
    return time.time_ns() // 1_000_000


@lru_cache(maxsize=8192)  # the files of one batch share a time
def iso(milliseconds: int) -> str:
    """Return a time in the Hub's format: UTC, with millisecond precision.

    Raises:
        OverflowError: the time is outside the years 1 to 9999.
    """
    return (_EPOCH + timedelta(milliseconds=milliseconds)).isoformat(timespec="milliseconds") + "Z"


def _bucket(row: tuple[Any, ...]) -> Bucket:
    number, namespace, name, private, region, created_ms, size, files = row
    return Bucket(number, namespace, name, bool(private), region, created_ms, size, files)
