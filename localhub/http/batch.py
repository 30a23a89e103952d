"""The batch of a bucket: files are added, copied and deleted, each on its own."""

import sqlite3
from collections.abc import Callable, Iterable
from typing import Annotated, Literal

from pydantic import BaseModel, Field, TypeAdapter, ValidationError
from pydantic.alias_generators import to_camel

from localhub.errors import bad_request, problems
from localhub.formats.hashing import EMPTY_FILE_HASH, HashError, from_hex
from localhub.state.buckets import Bucket, now_ms
from localhub.state.database import Database
from localhub.state.objects import ObjectStore
from localhub.state.paths import PathError, check_path

# The years 1 to 9999, which are all that an ISO 8601 time can name.
Milliseconds = Annotated[int, Field(ge=-62_135_596_800_000, le=253_402_300_799_999)]


class _Operation(BaseModel, alias_generator=to_camel):
    path: str


class _PutFile(_Operation):
    xet_hash: str
    mtime: Milliseconds | None = None
    content_type: str | None = None


class AddFile(_PutFile):
    """`addFile`: a path receives an object that was uploaded before."""

    type: Literal["addFile"]


class CopyFile(_PutFile):
    """`copyFile`: a path receives an object of another bucket in the same region."""

    type: Literal["copyFile"]
    source_repo_type: str
    source_repo_id: str


class DeleteFile(_Operation):
    """`deleteFile`: a path is deleted."""

    type: Literal["deleteFile"]


Operation = AddFile | CopyFile | DeleteFile
_OPERATION: TypeAdapter[Operation] = TypeAdapter(Annotated[Operation, Field(discriminator="type")])


class ItemError(Exception):
    """One operation of a batch fails; the message goes to the client."""


FindSource = Callable[[str], Bucket]
"""Returns the bucket of an id to copy from; raises `ItemError` if the caller may not read it."""

Refuse = Callable[[str], str | None]
"""Returns why the operation on a path must fail, or None: how faults reach single items."""


def parse_batch(body: bytes) -> list[Operation]:
    """Return the operations of an NDJSON body.

    Raises:
        HubError: 400 naming the first line that is not an operation. Nothing of the batch is applied then.
    """
    operations: list[Operation] = []
    for number, line in enumerate(body.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            operations.append(_OPERATION.validate_json(line))
        except ValidationError as error:
            raise bad_request(f"line {number} of the batch: {problems(error)[0]}") from error
    if not operations:
        raise bad_request("the batch holds no operation")
    return operations


class Batches:
    """Applies batches.

    Args:
        database: where the files are recorded.
        objects: the contents that files can have.
    """

    def __init__(self, database: Database, objects: ObjectStore) -> None:
        self._database = database
        self._objects = objects

    def apply(
        self,
        bucket: Bucket,
        operations: Iterable[Operation],
        *,
        source: FindSource,
        refuse: Refuse | None = None,
    ) -> list[dict[str, str]]:
        """Apply operations in order; each succeeds or fails on its own.

        Deleting a path that does not exist succeeds, as in other object stores. The time of upload is the server's,
        one for the whole batch.

        Returns:
            The path and the error of each operation that failed.
        """
        failed: list[dict[str, str]] = []
        with self._database.transaction() as connection:
            writer = _Writer(connection, self._objects, bucket, source, refuse)
            for operation in operations:
                try:
                    writer.apply(operation)
                except (ItemError, PathError, HashError) as error:
                    failed.append({"path": operation.path, "error": str(error)})
            writer.finish()
        return failed


class _Writer:
    """Writes one batch inside its transaction."""

    def __init__(
        self,
        connection: sqlite3.Connection,
        objects: ObjectStore,
        bucket: Bucket,
        source: FindSource,
        refuse: Refuse | None,
    ) -> None:
        self._connection = connection
        self._objects = objects
        self._bucket = bucket
        self._source = source
        self._refuse = refuse
        self._now = now_ms()
        self._bytes = 0
        self._files = 0

    def apply(self, operation: Operation) -> None:
        if self._refuse and (reason := self._refuse(operation.path)) is not None:
            raise ItemError(reason)
        check_path(operation.path)
        if isinstance(operation, DeleteFile):
            self._remove(operation.path)
            return
        digest = from_hex(operation.xet_hash)
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

    def _put(self, operation: _PutFile, digest: bytes, size: int) -> None:
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
        stored = self._objects.get(digest)
        if stored is None or not (digest == EMPTY_FILE_HASH or self._objects.may_read(digest, self._bucket.row)):
            raise ItemError("unknown xetHash: upload the file first")
        return stored.size

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
