"""One SQLite database for everything but bulk data, safe for many threads and several processes."""

import contextlib
import fcntl
import os
import secrets
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

_VERSION = 1
_BUSY_SECONDS = 60.0
_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE buckets (
    -- Never reused: a token for a deleted bucket must not open a later one of that name.
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    namespace TEXT NOT NULL,
    name TEXT NOT NULL,
    private INTEGER NOT NULL,
    region TEXT NOT NULL,
    created_ms INTEGER NOT NULL,
    -- Maintained by batches, so that reading them costs the same however much is stored.
    size INTEGER NOT NULL DEFAULT 0,
    files INTEGER NOT NULL DEFAULT 0,
    UNIQUE (namespace, name)
);
CREATE TABLE files (
    bucket INTEGER NOT NULL REFERENCES buckets ON DELETE CASCADE,
    path TEXT NOT NULL,
    hash BLOB NOT NULL,
    size INTEGER NOT NULL,
    mtime_ms INTEGER,
    uploaded_ms INTEGER NOT NULL,
    content_type TEXT,
    PRIMARY KEY (bucket, path)
) WITHOUT ROWID;
CREATE INDEX files_by_hash ON files (bucket, hash);
CREATE TABLE xorbs (
    hash BLOB PRIMARY KEY,
    ends BLOB NOT NULL,
    unpacked_ends BLOB NOT NULL,
    chunk_hashes BLOB NOT NULL
);
CREATE TABLE objects (hash BLOB PRIMARY KEY, size INTEGER NOT NULL, terms BLOB NOT NULL);
-- The objects that were ever added to a bucket: what its tokens may read and add.
CREATE TABLE arrivals (
    bucket INTEGER NOT NULL REFERENCES buckets ON DELETE CASCADE,
    hash BLOB NOT NULL,
    PRIMARY KEY (bucket, hash)
) WITHOUT ROWID;
"""

_TABLES = frozenset({"meta", "buckets", "files", "xorbs", "objects", "arrivals"})


class Database:
    """The database of one root directory.

    Every thread keeps its own connection until `close`, because opening one costs more than most queries.

    Args:
        path: the database file; created with its schema when missing.

    Raises:
        RuntimeError: the file was created by another version of this package or by another program, or is damaged.
        OSError: the lock beside it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._local = threading.local()
        self._connections: list[sqlite3.Connection] = []
        self._lock = threading.Lock()
        # SQLite waits by polling, with pauses of up to 100 ms; a lock avoids that among the threads of one process.
        self._writing = threading.Lock()
        self._create()

    @property
    def reader(self) -> sqlite3.Connection:
        """This thread's connection, for reading."""
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = self._local.connection = self._connect()
        return connection

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Give this thread's connection inside a write transaction: committed at the end, rolled back on an exception."""
        connection = self.reader
        with self._writing, connection:
            connection.execute("BEGIN IMMEDIATE")
            yield connection

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[sqlite3.Connection]:
        """Give this thread's connection for several reads of one state, regardless of concurrent writes."""
        connection = self.reader
        connection.execute("BEGIN")
        try:
            yield connection
        finally:
            connection.execute("ROLLBACK")

    def secret(self) -> bytes:
        """Return the key that signs tokens and links: created once, shared by every process on this root."""
        row = self.reader.execute("SELECT value FROM meta WHERE key = 'secret'").fetchone()
        return bytes(row[0])

    def close(self) -> None:
        """Close every thread's connection. The database cannot be used afterwards."""
        with self._lock:
            for connection in self._connections:
                connection.close()
            self._connections.clear()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self._path,
            timeout=_BUSY_SECONDS,
            isolation_level=None,
            check_same_thread=False,
            cached_statements=256,
        )
        # A killed process loses nothing; a power cut may lose the last transactions.
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("PRAGMA foreign_keys = ON")
        with self._lock:
            self._connections.append(connection)
        return connection

    def _create(self) -> None:
        # SQLite does not wait for a lock to switch to WAL, so processes that start at the same time wait here.
        lock = os.open(self._path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.reader.execute("PRAGMA journal_mode = WAL")
            self._make_schema()
        except sqlite3.DatabaseError as error:
            self.close()
            raise RuntimeError(
                f"{self._path} cannot be used: {error}; choose another root, or remove the file if nothing needs it"
            ) from error
        finally:
            os.close(lock)

    def _make_schema(self) -> None:
        with self.transaction() as connection:
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master")}
            if version == 0 and not tables:
                for statement in _SCHEMA.split(";\n"):
                    connection.execute(statement)
                connection.execute("INSERT INTO meta VALUES ('secret', ?)", (secrets.token_bytes(32),))
                connection.execute(f"PRAGMA user_version = {_VERSION}")
            elif version not in {0, _VERSION}:
                raise sqlite3.DatabaseError(f"its schema version is {version}, this package supports {_VERSION}")
            elif version == 0 or not tables >= _TABLES:
                raise sqlite3.DatabaseError("it is the database of another program")
