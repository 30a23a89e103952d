"""The files that shards describe, by their hash: which chunks make each of them."""

from dataclasses import dataclass

from localhub.formats.hashing import EMPTY_FILE_HASH
from localhub.formats.shards import check_shard, parse_shard
from localhub.state.database import Database
from localhub.state.xorb_store import XorbStore


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

    def get(self, digest: bytes) -> StoredObject | None:
        """Return the content of a hash, or None."""
        if digest == EMPTY_FILE_HASH:
            return StoredObject(0, b"")
        row = self._database.reader.execute("SELECT size, terms FROM objects WHERE hash = ?", (digest,)).fetchone()
        return StoredObject(*row) if row else None

    def may_read(self, digest: bytes, bucket: int) -> bool:
        """Whether a bucket's storage tokens read a hash: what came to the bucket once, or anything without control.

        It stays readable after its path was overwritten or deleted, as long as the bucket is there: content is
        addressed by hash, and a client may still hold an older listing.
        """
        if not self._only_arrived:
            return True
        query = "SELECT 1 FROM arrivals WHERE bucket = ? AND hash = ?"
        return self._database.reader.execute(query, (bucket, digest)).fetchone() is not None
