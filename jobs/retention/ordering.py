"""Entries of an instance in the order of their last use, spilled to disk so that memory stays bounded.

The order is an SQLite table in a temporary file, sorted once by SQLite's external sort and read in sequence.
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
"""Rank of an entry: its time and its key."""

FIRST: Final[Rank] = (-(2**63), "")
"""Rank before every entry."""


class State(IntEnum):
    """State of an entry, by itself or among all others."""

    NO_DATE = 0
    TOO_YOUNG = 1
    SHIELDED = 2
    RETIRED = 3
    EXPIRED = 4
    IDLE = 5
    OPEN = 6  # deleted only by a budget
    OVER = 7


class Row(NamedTuple):
    """Spilled entry.

    Attributes:
        used: Last use, in microseconds since 1970; None if unknown.
        at: Upload time by the Hub's clock, in microseconds since 1970; None if unknown.
        key: Its key.
        rule: Number of the first rule that matches it; None if none does.
        size: Size in bytes.
        xet_hash: Xet hash of its content.
        state: State of the entry by itself.
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
        """Rank by last use; entries of unknown time come first."""
        return (FIRST[0] if self.used is None else self.used, self.key)

    @property
    def age_rank(self) -> Rank:
        """Rank by age; entries of unknown time come first."""
        return (FIRST[0] if self.at is None else self.at, self.key)


def ticks_of(moment: datetime) -> int:
    """Convert a time to a number, with the same order and without loss."""
    return (moment - _EPOCH) // _TICK


def moment_of(ticks: int) -> datetime:
    """Convert the result of `ticks_of` back to a time."""
    return _EPOCH + ticks * _TICK


class Ordering:
    """Entries in least recently used order, ties by key. Use it as a context manager, which deletes its file.

    Args:
        directory: Directory of the file; None for the system's directory of temporary files.
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
        """Load all entries; must be called once. Duplicates of a listing are dropped."""
        self._base.execute("BEGIN")
        self._base.executemany("INSERT INTO listed VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
        self._base.execute("COMMIT")
        # Sorting adjacent groups is SQLite's external sort; the order of the rows is then that of the table.
        self._base.executescript(
            "CREATE TABLE sorted AS SELECT * FROM listed GROUP BY used, key, at ORDER BY used, key, at; DROP TABLE listed"
        )

    def unused_first(self) -> Iterator[Row]:
        """Yield all entries, least recently used first, after those of unknown time."""
        cursor = self._base.execute("SELECT * FROM sorted ORDER BY rowid")
        while rows := cursor.fetchmany(_READ_ROWS):
            for used, at, key, rule, size, xet_hash, state in rows:
                yield Row(used, at, key, rule, size, xet_hash, State(state))

    def newest(self, count: int, rule: int | None) -> Rank:
        """Return the rank of the oldest of the `count` newest entries of a rule, or of all entries for None.

        An entry belongs to the first rule that matches it.
        """
        scope = "" if rule is None else " AND rule = :rule"
        query = (
            f"SELECT at, key FROM sorted WHERE at IS NOT NULL{scope} ORDER BY at DESC, key DESC LIMIT 1 OFFSET :before"  # noqa: S608 - two fixed texts
        )
        found = self._base.execute(query, {"before": count - 1, "rule": rule}).fetchone()
        return FIRST if found is None else (found[0], found[1])
