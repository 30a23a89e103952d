"""Sorts, and sets of keys, of more than fits into memory: SQLite keeps what does not fit into its cache in temporary files."""

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
    """Open a database for rows that nobody needs after a crash.

    SQLite keeps what does not fit into its cache below SQLITE_TMPDIR, TMPDIR or /var/tmp.

    Args:
        path: Of the database; empty for a file without a name, which goes with the connection.
        cache_kib: Memory that it may take.
    """
    base = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    base.executescript(
        f"PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -{cache_kib}; PRAGMA temp_store = FILE"
    )
    return base


@contextlib.contextmanager
def temporary_space(what: str) -> Iterator[None]:
    """Turn errors of a temporary database into errors that name what needs the space.

    Args:
        what: Such as "a set of keys".

    Raises:
        TempDirError: The database cannot be written or read.
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
        items: In any order.
        rank: Numbers and texts, as many for each item, by which it is ordered.
        path: Of a file to sort in, which is overwritten.
        dump: Writes an item as a line.
        load: Reads what `dump` wrote.
        cut: Takes the first of any items that are in order, such as a budget does: the others are not kept. None takes all.
        page_rows: Items held in memory at a time.

    Raises:
        TempDirError: There is no room to sort.
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
                # What a budget does not take of a page alone, but for the first, it does not take of the whole.
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
            lines = base.execute(f"SELECT line FROM rows ORDER BY {order}")  # noqa: S608 - names made above
            found = (load(line) for (line,) in lines)
            yield from found if cut is None else cut(found)


_PAGE: Final = 50_000
"""Keys that are inserted at one time: sorted, so that they touch each page of the table once."""


class KeySet:
    """Keys, each once, and which of them were found. Use it as a context manager: its file goes with it.

    SQLite keeps what does not fit into its cache in a file without a name, below SQLITE_TMPDIR, TMPDIR or /var/tmp. To be used from
    one thread at a time.

    Args:
        keys: What is in it from the start on.

    Raises:
        TempDirError: There is no room for temporary files.
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
        """Add keys, and yield those that were not in it, in their order and as they come.

        Raises:
            TempDirError: There is no room for temporary files.
        """
        keys = iter(keys)
        while page := list(islice(keys, _PAGE)):
            yield from self._add(page)

    def _add(self, page: list[str]) -> list[str]:
        rows = sorted((key.encode(), place) for place, key in enumerate(page))
        with temporary_space("a set of keys"):
            self._base.execute("BEGIN")
            self._base.execute("DELETE FROM page")
            # Sorted by place, too: the first of equal ones stays.
            self._base.executemany("INSERT OR IGNORE INTO page VALUES (?, ?)", rows)
            new = self._base.execute(
                "SELECT place FROM page WHERE NOT EXISTS (SELECT 1 FROM keys WHERE keys.key = page.key)"
            ).fetchall()
            self._base.execute("INSERT OR IGNORE INTO keys (key) SELECT key FROM page ORDER BY key")
            self._base.execute("COMMIT")
        return [page[place] for (place,) in sorted(new)]

    def __contains__(self, key: str) -> bool:
        """Whether it holds a key."""
        return self._base.execute("SELECT 1 FROM keys WHERE key = ?", (key.encode(),)).fetchone() is not None

    def __len__(self) -> int:
        """How many keys it holds."""
        (count,) = self._base.execute("SELECT COUNT(*) FROM keys").fetchone()
        return int(count)

    def find(self, key: str) -> bool:
        """Note that a key was found; returns whether the set holds it."""
        return self._base.execute("UPDATE keys SET found = 1 WHERE key = ?", (key.encode(),)).rowcount > 0

    def forget(self) -> None:
        """Count no key as found."""
        self._base.execute("UPDATE keys SET found = 0 WHERE found")

    def count_absent(self) -> int:
        """How many keys were not found."""
        (count,) = self._base.execute("SELECT COUNT(*) FROM keys WHERE NOT found").fetchone()
        return int(count)

    def absent(self, most: int) -> list[str]:
        """The first keys that were not found, in their order as bytes.

        Args:
            most: How many at most.
        """
        rows = self._base.execute("SELECT key FROM keys WHERE NOT found ORDER BY key LIMIT ?", (most,))
        return [bytes(key).decode() for (key,) in rows]
