"""Xorbs on disk: the bytes in one file each, the chunk tables in the database."""

from array import array
from pathlib import Path

from cachetools import LRUCache

from localhub.formats.hashing import to_hex
from localhub.formats.xorbs import ChunkTable, XorbError, read_xorb
from localhub.state.database import Database
from localhub.state.spool import Spool

_CACHED_CHUNKS = 1 << 20
"""Chunk tables kept in memory, by their chunks: 8 MiB of them, tables of about 64 GiB of data."""


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
        """Return the file of a xorb, whether it is stored or not."""
        name = to_hex(digest)
        return self._directory / name[:2] / name

    def has(self, digest: bytes) -> bool:
        """Whether a xorb is stored."""
        query = "SELECT 1 FROM xorbs WHERE hash = ?"
        return self._database.reader.execute(query, (digest,)).fetchone() is not None

    def adopt(self, spool: Spool, digest: bytes) -> bool:
        """Verify and store an uploaded xorb; return False when it was there already.

        Every chunk is unpacked and hashed: bytes that are not those of the hash never get in. Blocks for about a
        millisecond per MiB.

        Raises:
            XorbError: the bytes are not a xorb, or not that of `digest`.
        """
        with spool.reader() as source:
            xorb = read_xorb(source)
        if xorb.digest != digest:
            raise XorbError(f"the content hashes to {to_hex(xorb.digest)}, not to {to_hex(digest)}")
        target = self.path(digest)
        target.parent.mkdir(exist_ok=True)
        # The file first: a row is a promise that the bytes are there.
        spool.publish(target, xorb.size)
        with self._database.transaction() as connection:
            made = connection.execute(
                "INSERT OR IGNORE INTO xorbs (hash, ends, unpacked_ends, chunk_hashes) VALUES (?, ?, ?, ?)",
                (digest, xorb.table.ends.tobytes(), xorb.table.unpacked_ends.tobytes(), xorb.hashes),
            )
            return made.rowcount == 1

    def table(self, digest: bytes) -> ChunkTable | None:
        """Return a xorb's chunk table, or None when the xorb is not stored. Not for use by several threads."""
        table = self._tables.get(digest)
        if table is None:
            row = self._database.reader.execute(
                "SELECT ends, unpacked_ends FROM xorbs WHERE hash = ?", (digest,)
            ).fetchone()
            if row is None:
                return None
            table = ChunkTable(array("I", row[0]), array("I", row[1]))
            self._tables[digest] = table
        return table

    def chunks(self, digest: bytes) -> tuple[ChunkTable, bytes] | None:
        """Return a xorb's chunk table and its chunks' hashes back to back, or None when the xorb is not stored."""
        row = self._database.reader.execute(
            "SELECT ends, unpacked_ends, chunk_hashes FROM xorbs WHERE hash = ?", (digest,)
        ).fetchone()
        if row is None:
            return None
        return ChunkTable(array("I", row[0]), array("I", row[1])), row[2]
