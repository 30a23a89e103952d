"""A set of keys of any number, in bounded memory: on disk beyond some megabytes."""

from __future__ import annotations

import weakref
from itertools import islice
from typing import TYPE_CHECKING, Final, Self

from hfbucket_plugin.tools.external_sort import open_temporary, temporary_space

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

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
