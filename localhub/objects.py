"""The files that shards describe, by their hash: which chunks make each of them."""

from dataclasses import dataclass

from localhub.database import Database
from localhub.hashing import EMPTY_FILE_HASH
from localhub.shards import check_shard, parse_shard
from localhub.xorb_store import XorbStore


@dataclass(frozen=True)
class StoredObject:
    """The content of a file.

    Attributes:
        size: its bytes.
        terms: its terms as they are in a shard, 48 bytes each.
    """

    size: int
    terms: bytes


class ObjectStore:
    """The contents of files.

    Args:
        database: where they are recorded.
        xorbs: where their bytes are.
        only_arrived: whether a bucket's tokens read only what came to that bucket: so with access control.
    """

    def __init__(self, database: Database, xorbs: XorbStore, *, only_arrived: bool) -> None:
        self._database = database
        self._xorbs = xorbs
        self._only_arrived = only_arrived

    def register(self, shard: bytes, bucket: int) -> None:
        """Take in an uploaded shard for a bucket. Blocks.

        Args:
            shard: its bytes.
            bucket: row number of the bucket whose token brought it.

        Raises:
            ShardError: it is malformed or does not agree with the stored xorbs; nothing of it is kept then.
        """
        files, xorbs = parse_shard(shard)
        check_shard(files, xorbs, self._xorbs.chunks)
        with self._database.transaction() as connection:
            connection.executemany(
                "INSERT OR IGNORE INTO objects (hash, size, terms) VALUES (?, ?, ?)",
                [(file.digest, file.size, file.terms) for file in files],
            )
            # A bucket that was deleted meanwhile takes nothing in.
            connection.executemany(
                "INSERT OR IGNORE INTO arrivals SELECT id, ? FROM buckets WHERE id = ?",
                [(file.digest, bucket) for file in files],
            )

    def find(self, digest: bytes, bucket: int) -> StoredObject | None:
        """Return the content of a hash as far as a bucket's token may read it, or None."""
        if digest == EMPTY_FILE_HASH:
            return StoredObject(0, b"")
        query = "SELECT size, terms FROM objects WHERE hash = ?"
        parameters: tuple[bytes | int, ...] = (digest,)
        if self._only_arrived:
            query += " AND EXISTS (SELECT 1 FROM arrivals WHERE bucket = ? AND hash = objects.hash)"
            parameters += (bucket,)
        row = self._database.reader.execute(query, parameters).fetchone()
        return StoredObject(*row) if row else None
