"""The batch of a bucket: adding, copying and deleting files, each on its own."""

import sqlite3
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, Field, TypeAdapter, ValidationError
from pydantic.alias_generators import to_camel

from localhub.errors import bad_request
from localhub.formats.hashing import EMPTY_FILE_HASH, from_hex
from localhub.http.wire import first_problem
from localhub.state.buckets import Bucket, now_ms
from localhub.state.database import Database
from localhub.state.paths import PathError, check_path

# What a time can be written with: the years 1 to 9999.
Milliseconds = Annotated[int, Field(ge=-62_135_596_800_000, le=253_402_300_799_999)]


class _Operation(BaseModel, alias_generator=to_camel):
    path: str


class AddFile(_Operation):
    """`addFile`: a path gets an object that was uploaded before."""

    type: Literal["addFile"]
    xet_hash: str
    mtime: Milliseconds | None = None
    content_type: str | None = None


class CopyFile(_Operation):
    """`copyFile`: a path gets an object that another bucket of the region holds."""

    type: Literal["copyFile"]
    xet_hash: str
    source_repo_type: str
    source_repo_id: str
    mtime: Milliseconds | None = None
    content_type: str | None = None


class DeleteFile(_Operation):
    """`deleteFile`: a path goes."""

    type: Literal["deleteFile"]


Operation = Annotated[AddFile | CopyFile | DeleteFile, Field(discriminator="type")]
_OPERATION: TypeAdapter[AddFile | CopyFile | DeleteFile] = TypeAdapter(Operation)


@dataclass(frozen=True)
class Outcome:
    """What became of a batch.

    Attributes:
        processed: number of operations.
        failed: the path and the reason of each that failed.
    """

    processed: int
    failed: list[dict[str, str]]

    @property
    def status(self) -> int:
        """200, or 422 when every operation failed."""
        return 422 if self.failed and len(self.failed) == self.processed else 200

    def body(self) -> dict[str, object]:
        """Return the answer's body."""
        return {
            "success": not self.failed,
            "processed": self.processed,
            "succeeded": self.processed - len(self.failed),
            "failed": self.failed,
        }


class ItemError(Exception):
    """One operation of a batch fails; the message goes to the client."""


FindSource = Callable[[str], Bucket]
"""Returns the bucket of an id for copying from; raises `ItemError` where the caller may not."""

Refuse = Callable[[str], str | None]
"""Returns why the operation on a path is to fail, or None: how faults reach single items."""


def parse_batch(body: bytes) -> list[AddFile | CopyFile | DeleteFile]:
    """Return the operations of an NDJSON body.

    Raises:
        HubError: 400 naming the first line that is not an operation. Nothing of the batch is applied then.
    """
    operations = []
    for number, line in enumerate(body.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            operations.append(_OPERATION.validate_json(line))
        except ValidationError as error:
            raise bad_request(f"line {number} of the batch: {first_problem(error)}") from error
    if not operations:
        raise bad_request("the batch holds no operation")
    return operations


class Batches:
    """Applies batches.

    Args:
        database: where the files are.
        only_arrived: whether `addFile` takes only objects that were uploaded or copied to the bucket before, and
            not any that the Hub holds: so with access control, where a hash must not be a key to others' bytes.
    """

    def __init__(self, database: Database, *, only_arrived: bool) -> None:
        self._database = database
        self._only_arrived = only_arrived

    def apply(
        self,
        bucket: Bucket,
        operations: Iterable[AddFile | CopyFile | DeleteFile],
        *,
        source: FindSource,
        refuse: Refuse | None = None,
    ) -> Outcome:
        """Apply operations in order, each succeeding or failing on its own.

        Deleting a path that is not there succeeds, as in the object stores that buckets are modelled after. The
        time of upload is the server's, one for the whole batch.
        """
        failed: list[dict[str, str]] = []
        processed = 0
        with self._database.transaction() as connection:
            work = _Work(connection, bucket, source, only_arrived=self._only_arrived)
            for operation in operations:
                processed += 1
                reason = refuse(operation.path) if refuse else None
                if reason is None:
                    reason = work.try_to_apply(operation)
                if reason is not None:
                    failed.append({"path": operation.path, "error": reason})
            work.finish()
        return Outcome(processed, failed)


class _Work:
    """One batch inside its transaction."""

    def __init__(
        self, connection: sqlite3.Connection, bucket: Bucket, source: FindSource, *, only_arrived: bool
    ) -> None:
        self._connection = connection
        self._bucket = bucket
        self._source = source
        self._only_arrived = only_arrived
        self._now = now_ms()
        self._bytes = 0
        self._files = 0

    def try_to_apply(self, operation: AddFile | CopyFile | DeleteFile) -> str | None:
        """Apply an operation; return why it failed, or None."""
        try:
            self._apply(operation)
        except (ItemError, PathError) as error:
            return str(error)
        return None

    def _apply(self, operation: AddFile | CopyFile | DeleteFile) -> None:
        check_path(operation.path)
        if isinstance(operation, DeleteFile):
            self._remove(operation.path)
            return
        digest = _digest(operation.xet_hash)
        if isinstance(operation, CopyFile):
            size = self._size_in_source(operation, digest)
        else:
            size = self._size_of_object(digest)
        self._put(operation, digest, size)

    def finish(self) -> None:
        self._connection.execute(
            "UPDATE buckets SET size = size + ?, files = files + ? WHERE id = ?",
            (self._bytes, self._files, self._bucket.row),
        )

    def _put(self, operation: AddFile | CopyFile, digest: bytes, size: int) -> None:
        self._remove(operation.path)
        self._connection.execute(
            "INSERT INTO files (bucket, path, hash, size, mtime_ms, uploaded_ms, content_type)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                self._bucket.row,
                operation.path,
                digest,
                size,
                operation.mtime,
                self._now,
                operation.content_type,
            ),
        )
        self._connection.execute("INSERT OR IGNORE INTO arrivals VALUES (?, ?)", (self._bucket.row, digest))
        self._bytes += size
        self._files += 1

    def _remove(self, path: str) -> None:
        row = self._connection.execute(
            "DELETE FROM files WHERE bucket = ? AND path = ? RETURNING size", (self._bucket.row, path)
        ).fetchone()
        if row is not None:
            self._bytes -= row[0]
            self._files -= 1

    def _size_of_object(self, digest: bytes) -> int:
        if digest == EMPTY_FILE_HASH:
            return 0
        row = self._connection.execute("SELECT size FROM objects WHERE hash = ?", (digest,)).fetchone()
        if row is None or (self._only_arrived and not self._arrived(digest)):
            raise ItemError("xetHash is not known: upload the file first")
        return int(row[0])

    def _arrived(self, digest: bytes) -> bool:
        query = "SELECT 1 FROM arrivals WHERE bucket = ? AND hash = ?"
        return self._connection.execute(query, (self._bucket.row, digest)).fetchone() is not None

    def _size_in_source(self, operation: CopyFile, digest: bytes) -> int:
        if operation.source_repo_type != "bucket":
            raise ItemError(f"cannot copy from a {operation.source_repo_type}: this Hub holds buckets only")
        source = self._source(operation.source_repo_id)
        if source.region != self._bucket.region:
            raise ItemError(
                f"cannot copy from {source.id}: it is stored in region {source.region}, not in {self._bucket.region}"
            )
        row = self._connection.execute(
            "SELECT size FROM files WHERE bucket = ? AND hash = ? LIMIT 1", (source.row, digest)
        ).fetchone()
        if row is None:
            raise ItemError(f"xetHash is not in {source.id}")
        return int(row[0])


def _digest(text: str) -> bytes:
    try:
        return from_hex(text)
    except ValueError as error:
        raise ItemError(str(error)) from error
