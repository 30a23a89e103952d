"""Sorting in bounded memory: SQLite sorts what does not fit into its cache with temporary files."""

from __future__ import annotations

import contextlib
import sqlite3
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, TypeVar

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
    cut: Callable[[Iterable[T]], Iterator[T]] = iter,
    page_rows: int = _PAGE_ROWS,
) -> Iterator[T]:
    """Yield items in the order of their ranks.

    Args:
        items: In any order.
        rank: Numbers and texts, as many for each item, by which it is ordered.
        path: Of a file to sort in, which is overwritten.
        dump: Writes an item as a line.
        load: Reads what `dump` wrote.
        cut: Takes the first of any items that are in order, such as a budget does: the others are not kept.
        page_rows: Items held in memory at a time.

    Raises:
        TempDirError: There is no room to sort.
    """
    items = iter(items)
    path.write_bytes(b"")
    with contextlib.closing(open_temporary(path)) as base, temporary_space("an order of chunks"):
        width = 0
        while page := sorted(((rank(item), item) for item in islice(items, page_rows)), key=lambda row: row[0]):
            if not width:
                width = len(page[0][0])
                base.execute(f"CREATE TABLE rows ({', '.join(f'r{n}' for n in range(width))}, line)")
            # What a budget does not take of a page alone, but for the first, it does not take of the whole.
            taken = sum(1 for _ in cut(item for _, item in page)) + 1
            base.execute("BEGIN")
            base.executemany(
                f"INSERT INTO rows VALUES ({', '.join('?' * (width + 1))})",  # noqa: S608 - placeholders only
                ((*ranks, dump(item)) for ranks, item in page[:taken]),
            )
            base.execute("COMMIT")
        if width:
            order = ", ".join(f"r{n}" for n in range(width))
            lines = base.execute(f"SELECT line FROM rows ORDER BY {order}")  # noqa: S608 - names made above
            yield from cut(load(line) for (line,) in lines)
