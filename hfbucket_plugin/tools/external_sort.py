"""Sorting, and sets of keys, beyond the size of memory: SQLite spills what exceeds its cache to temporary files."""

from __future__ import annotations

import contextlib
import sqlite3
import weakref
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

from hfbucket_plugin.errors import TempDirError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path


_CACHE_KIB: Final = 32 * 1024
_PAGE_ROWS: Final = 50_000

T = TypeVar("T")


def open_temporary(path: Path | str = "", cache_kib: int = _CACHE_KIB) -> sqlite3.Connection:
    """Open a database for temporary rows, without durability.

    SQLite stores what exceeds its cache below SQLITE_TMPDIR, TMPDIR or /var/tmp.

    Args:
        path: Path of the database; empty for an unnamed file, which is deleted with the connection.
        cache_kib: Size of its cache, in KiB.
    """
    base = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    base.executescript(
        f"PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -{cache_kib}; PRAGMA temp_store = FILE"
    )
    return base


@contextlib.contextmanager
def temporary_space(what: str) -> Iterator[None]:
    """Convert errors of a temporary database to errors that name its purpose.

    Args:
        what: Purpose of the space, such as "a set of keys".

    Raises:
        TempDirError: If the database cannot be written or read.
    """
    try:
        yield
    except sqlite3.Error as error:
        raise TempDirError(
            f"{what} cannot be kept in a temporary file: {error}. Make room below TMPDIR (or /var/tmp), or let it name "
            "another directory"
        ) from None


def sort_rows(
    items: Iterable[T],
    rank: Callable[[T], tuple[Any, ...]],
    path: Path,
    *,
    dump: Callable[[T], str],
    load: Callable[[str], T],
    cut: Callable[[Iterable[T]], Iterator[T]] | None = None,
    page_rows: int = _PAGE_ROWS,
) -> Iterator[T]:
    """Yield items in the order of their ranks.

    Args:
        items: Items in any order.
        rank: Returns the sort key of an item: numbers and texts, the same count for every item.
        path: Path of the temporary sort file, which is overwritten.
        dump: Serializes an item as a line.
        load: Parses the result of `dump`.
        cut: Takes a prefix of ordered items, such as a budget does; the others are dropped. None takes all.
        page_rows: Number of items held in memory at a time.

    Raises:
        TempDirError: If the disk has no room for sorting.
    """
    items = iter(items)
    path.write_bytes(b"")
    with contextlib.closing(open_temporary(path)) as base, temporary_space("an order of chunks"):
        width = 0
        while page := [(rank(item), item) for item in islice(items, page_rows)]:
            if not width:
                width = len(page[0][0])
                base.execute(f"CREATE TABLE rows ({', '.join(f'r{n}' for n in range(width))}, line)")
            if cut is not None:
                # What a budget drops from a page alone, except the first item, it also drops from the whole.
                page.sort(key=lambda row: row[0])
                del page[sum(1 for _ in cut(item for _, item in page)) + 1 :]
            base.execute("BEGIN")
            base.executemany(
                f"INSERT INTO rows VALUES ({', '.join('?' * (width + 1))})",  # noqa: S608 - placeholders only
                ((*ranks, dump(item)) for ranks, item in page),
            )
            base.execute("COMMIT")
        if width:
            order = ", ".join(f"r{n}" for n in range(width))
            lines = base.execute(f"SELECT line FROM rows ORDER BY {order}")  # noqa: S608 - column names generated above
            found = (load(line) for (line,) in lines)
            yield from found if cut is None else cut(found)


_PAGE: Final = 50_000
"""Number of keys per insert: they are sorted, so that each page of the table is touched once."""


class KeySet:
    """Set of keys that records which of them were found. Use it as a context manager, which deletes its file.

    SQLite stores what exceeds its cache in an unnamed file below SQLITE_TMPDIR, TMPDIR or /var/tmp. Use it from one
    thread at a time.

    Args:
        keys: Initial keys.

    Raises:
        TempDirError: If the disk has no room for temporary files.
    """

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._base = open_temporary()
        self._closed = weakref.finalize(self, self._base.close)
        with temporary_space("a set of keys"):
            self._base.executescript(
                "CREATE TABLE keys (key BLOB PRIMARY KEY, found INTEGER NOT NULL DEFAULT 0) WITHOUT ROWID;"
                "CREATE TEMP TABLE page (key BLOB PRIMARY KEY, place INTEGER NOT NULL) WITHOUT ROWID"
            )
        for _ in self.first_seen(keys):
            pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._closed()

    def first_seen(self, keys: Iterable[str]) -> Iterator[str]:
        """Add keys, and yield those that are new, in order and as they arrive.

        Raises:
            TempDirError: If the disk has no room for temporary files.
        """
        keys = iter(keys)
        while page := list(islice(keys, _PAGE)):
            yield from self._add(page)

    def _add(self, page: list[str]) -> list[str]:
        rows = sorted((key.encode(), place) for place, key in enumerate(page))
        with temporary_space("a set of keys"):
            self._base.execute("BEGIN")
            self._base.execute("DELETE FROM page")
            # Also sorted by position: the first of equal keys is kept.
            self._base.executemany("INSERT OR IGNORE INTO page VALUES (?, ?)", rows)
            new = self._base.execute(
                "SELECT place FROM page WHERE NOT EXISTS (SELECT 1 FROM keys WHERE keys.key = page.key)"
            ).fetchall()
            self._base.execute("INSERT OR IGNORE INTO keys (key) SELECT key FROM page ORDER BY key")
            self._base.execute("COMMIT")
        return [page[place] for (place,) in sorted(new)]

    def __contains__(self, key: str) -> bool:
        """Return whether the set contains a key."""
        return self._base.execute("SELECT 1 FROM keys WHERE key = ?", (key.encode(),)).fetchone() is not None

    def __len__(self) -> int:
        """Return the number of keys."""
        (count,) = self._base.execute("SELECT COUNT(*) FROM keys").fetchone()
        return int(count)

    def find(self, key: str) -> bool:
        """Mark a key as found; return whether the set contains it."""
        return self._base.execute("UPDATE keys SET found = 1 WHERE key = ?", (key.encode(),)).rowcount > 0

    def forget(self) -> None:
        """Mark all keys as not found."""
        self._base.execute("UPDATE keys SET found = 0 WHERE found")

    def count_absent(self) -> int:
        """Return the number of keys that were not found."""
        (count,) = self._base.execute("SELECT COUNT(*) FROM keys WHERE NOT found").fetchone()
        return int(count)

    def absent(self, most: int) -> list[str]:
        """Return the first keys that were not found, in byte order.

        Args:
            most: Maximum number of keys.
        """
        rows = self._base.execute("SELECT key FROM keys WHERE NOT found ORDER BY key LIMIT ?", (most,))
        return [bytes(key).decode() for (key,) in rows]
