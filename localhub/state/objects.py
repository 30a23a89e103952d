"""The contents of files by hash: the chunks that make each of them."""

from dataclasses import dataclass

from localhub.formats.hashing import EMPTY_FILE_HASH
from localhub.formats.shards import check_shard, parse_shard
from localhub.state.database import Database
from localhub.state.xorb_store import XorbStore


@dataclass(frozen=True)
class StoredObject:
    """The content of a file.

    Attributes:
        size: size in bytes.
        terms: its terms in the format of shards, 48 bytes each.
    """

    size: int
    terms: bytes


class ObjectStore:
    """The contents of files.

    Args:
        database: where contents are recorded.
        xorbs: where their bytes are stored.
        only_arrived: whether a bucket accepts and serves only contents that were uploaded or copied to it. Set with access
            control, where knowing a hash must not give access to the bytes.
    """

    def __init__(self, database: Database, xorbs: XorbStore, *, only_arrived: bool) -> None:
        self._database = database
        self._xorbs = xorbs
        self._only_arrived = only_arrived

    def register(self, shard: bytes, bucket: int) -> None:
        """Verify and store an uploaded shard. Blocks.

        Args:
            shard: the bytes of the shard.
            bucket: row number of the bucket of the token.

        Raises:
            ShardError: the shard is malformed or contradicts the stored xorbs. Nothing of it is stored then.
        """
        files, xorbs = parse_shard(shard)
        check_shard(files, xorbs, self._xorbs.chunks)
        with self._database.transaction() as connection:
            connection.executemany(
                "INSERT OR IGNORE INTO objects (hash, size, terms) VALUES (?, ?, ?)",
                [(file.digest, file.size, file.terms) for file in files],
            )
            # Records nothing for a bucket that was deleted meanwhile.
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
        """Whether a bucket's storage tokens may read a hash.

        Content stays readable after its path was overwritten or deleted, until the bucket is deleted: it is addressed by
        hash, and a client may still hold an older listing.
        """
        if not self._only_arrived:
            return True
        arrived = "SELECT 1 FROM arrivals WHERE bucket = ? AND hash = ?"
        return self._database.reader.execute(arrived, (bucket, digest)).fetchone() is not None
