"""The entries of an instance in the order of their last use, spilled to disk: a million of them take no memory.

A table of SQLite in a temporary file, sorted once by SQLite's external sort and read in sequence.
"""

from __future__ import annotations

import tempfile
from datetime import UTC, datetime, timedelta
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, Self

from hfbucket_plugin.tools.external_sort import open_temporary

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_TICK: Final = timedelta(microseconds=1)
_READ_ROWS: Final = 1000

Rank = tuple[int, str]
"""Where an entry stands: its time and its key."""

FIRST: Final[Rank] = (-(2**63), "")
"""Before every entry."""


class State(IntEnum):
    """What is known of an entry, by itself or beside all others."""

    NO_DATE = 0
    TOO_YOUNG = 1
    SHIELDED = 2
    RETIRED = 3
    EXPIRED = 4
    IDLE = 5
    OPEN = 6  # goes only if a budget asks for it
    OVER = 7


class Row(NamedTuple):
    """An entry as it is spilled.

    Attributes:
        used: When it was last used, in microseconds since 1970; None where its time is not known.
        at: When the Hub took it, in the same.
        key: Its key.
        rule: The number of the first rule that matches it; None when none does.
        size: Bytes.
        xet_hash: Of its content.
        state: What is known of it by itself.
    """

    used: int | None
    at: int | None
    key: str
    rule: int | None
    size: int
    xet_hash: str
    state: State

    @property
    def rank(self) -> Rank:
        """Where it stands by its last use; one whose time is not known stands before all."""
        return (FIRST[0] if self.used is None else self.used, self.key)

    @property
    def age_rank(self) -> Rank:
        """The same by its age."""
        return (FIRST[0] if self.at is None else self.at, self.key)


def ticks_of(moment: datetime) -> int:
    """A moment as a number that orders as moments do, and loses nothing."""
    return (moment - _EPOCH) // _TICK


def moment_of(ticks: int) -> datetime:
    """The moment that `ticks_of` made a number of."""
    return _EPOCH + ticks * _TICK


class Ordering:
    """Entries, longest unused first, ties by key. Use it as a context manager: its file goes with it.

    Args:
        directory: Where the file is made; None for the system's directory of temporary files.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="retention-", dir=directory)
        self._base = open_temporary(Path(self._directory.name, "entries.sqlite"))
        self._base.execute(
            "CREATE TABLE listed (used INTEGER, at INTEGER, key TEXT, rule INTEGER, size INTEGER, hash TEXT, state INTEGER)"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._base.close()
        self._directory.cleanup()

    def fill(self, rows: Iterable[Row]) -> None:
        """Take all entries, once. One that a listing named twice is taken once."""
        self._base.execute("BEGIN")
        self._base.executemany("INSERT INTO listed VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
        self._base.execute("COMMIT")
        # Sorting groups beside each other is SQLite's external sort; the order of the rows is then that of the table.
        self._base.executescript(
            "CREATE TABLE sorted AS SELECT * FROM listed GROUP BY used, key, at ORDER BY used, key, at; DROP TABLE listed"
        )

    def unused_first(self) -> Iterator[Row]:
        """All entries; those whose time is not known come before the others."""
        cursor = self._base.execute("SELECT * FROM sorted ORDER BY rowid")
        while rows := cursor.fetchmany(_READ_ROWS):
            for used, at, key, rule, size, xet_hash, state in rows:
                yield Row(used, at, key, rule, size, xet_hash, State(state))

    def newest(self, count: int, rule: int | None) -> Rank:
        """The rank of the oldest of the `count` newest entries that a rule matches first, or of all for None."""
        scope = "" if rule is None else " AND rule = :rule"
        query = (
            f"SELECT at, key FROM sorted WHERE at IS NOT NULL{scope} ORDER BY at DESC, key DESC LIMIT 1 OFFSET :before"  # noqa: S608 - two fixed texts
        )
        found = self._base.execute(query, {"before": count - 1, "rule": rule}).fetchone()
        return FIRST if found is None else (found[0], found[1])
