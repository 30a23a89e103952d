"""Xorbs on disk: one file each for the bytes, and the chunk tables in the database."""

from array import array
from pathlib import Path

from cachetools import LRUCache

from localhub.formats.hashing import to_hex
from localhub.formats.xorbs import ChunkTable, XorbError, read_xorb
from localhub.state.database import Database
from localhub.state.spool import Spool

_CACHED_CHUNKS = 1 << 20
"""Capacity of the cache of chunk tables, in chunks: 8 MiB of tables for about 64 GiB of data."""


class XorbStore:
    """The xorbs of one root directory.

    Args:
        root: the directory.
        database: the database of the same root.
    """

    def __init__(self, root: Path, database: Database) -> None:
        self._directory = root / "xorbs"
        self._directory.mkdir(exist_ok=True)
        self._database = database
        self._tables: LRUCache[bytes, ChunkTable] = LRUCache(_CACHED_CHUNKS, getsizeof=len)

    def path(self, digest: bytes) -> Path:
        """Return the path of a xorb, which need not be stored."""
        name = to_hex(digest)
        return self._directory / name[:2] / name

    def has(self, digest: bytes) -> bool:
        """Whether a xorb is stored."""
        row = self._database.reader.execute("SELECT 1 FROM xorbs WHERE hash = ?", (digest,)).fetchone()
        return row is not None

    def adopt(self, spool: Spool, digest: bytes) -> bool:
        """Verify and store an uploaded xorb; return False when it was stored before.

        Every chunk is unpacked and hashed, so that only the bytes of the hash are stored. Blocks for about a millisecond
        per MiB.

        Raises:
            XorbError: the bytes are not a xorb, or not the one of `digest`.
        """
        with spool.reader() as source:
            xorb = read_xorb(source)
        if xorb.digest != digest:
            raise XorbError(f"the content hashes to {to_hex(xorb.digest)}, not to {to_hex(digest)}")
        target = self.path(digest)
        target.parent.mkdir(exist_ok=True)
        # The file first: a row guarantees that the bytes are stored.
        spool.publish(target, xorb.size)
        with self._database.transaction() as connection:
            made = connection.execute(
                "INSERT OR IGNORE INTO xorbs (hash, ends, unpacked_ends, chunk_hashes) VALUES (?, ?, ?, ?)",
                (digest, xorb.table.ends.tobytes(), xorb.table.unpacked_ends.tobytes(), xorb.hashes),
            )
            return made.rowcount == 1

    def table(self, digest: bytes) -> ChunkTable | None:
        """Return a xorb's chunk table, or None when the xorb is not stored. Not thread-safe."""
        table = self._tables.get(digest)
        if table is None:
            found = self.chunks(digest)
            if found is None:
                return None
            table = self._tables[digest] = found[0]
        return table

    def chunks(self, digest: bytes) -> tuple[ChunkTable, bytes] | None:
        """Return a xorb's chunk table and its concatenated chunk hashes, or None when the xorb is not stored."""
        row = self._database.reader.execute(
            "SELECT ends, unpacked_ends, chunk_hashes FROM xorbs WHERE hash = ?", (digest,)
        ).fetchone()
        if row is None:
            return None
        return ChunkTable(array("I", row[0]), array("I", row[1])), row[2]
