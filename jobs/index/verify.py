"""Comparison of an instance's key index, as a reader sees it, with a listing. Read-only.

The view is built first, and the listing is compared with it page by page, so that names are available; an index holds
no names, so keys that the listing lacks are known only by digest. The instance is in use during the comparison:
differences are looked up in newer journals, and again after the time within which a writer must record a change; only
unrecorded ones count. A young key is not a difference either: its journal may be in flight.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from hfbucket_plugin.core.deadline import Deadline
from hfbucket_plugin.errors import HFBucketError, MissingError, TransportError
from hfbucket_plugin.index import build
from hfbucket_plugin.index.format import FormatError, read_header
from hfbucket_plugin.index.refresh import listed_rows
from hfbucket_plugin.index.store import CLOCK_MARGIN_SECS
from hfbucket_plugin.index.table import NO_CHANGES, ROW, Table, newest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from hfbucket_plugin.hub.bucket import Bucket, ObjectInfo
    from hfbucket_plugin.index.build import BuiltSnapshot
    from hfbucket_plugin.index.store import IndexStore
    from hfbucket_plugin.index.table import Rows

_PAGE: Final = 1000
_NAMED: Final = 10
_TRIES: Final = 3
_UNSEEN_ROWS: Final = 100_000


@dataclass
class Differences:
    """Result of a verification.

    Attributes:
        keys: Number of keys in the index.
        listed: Number of keys in the listing.
        missing: Keys in the listing but not in the index: false misses.
        surplus: Keys in the index but not in the listing: false hits.
        different: Keys in both, with different contents.
        young: Keys in the listing but not in the index, too young for readers to know; not differences.
        meanwhile: Changes recorded during the verification; not differences.
        examples: The first keys of each kind, by name if known, otherwise by digest.
    """

    keys: int = 0
    listed: int = 0
    missing: int = 0
    surplus: int = 0
    different: int = 0
    young: int = 0
    meanwhile: int = 0
    examples: dict[str, list[str]] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Number of differences that count."""
        return self.missing + self.surplus + self.different

    def record(self) -> dict[str, Any]:
        """Return the fields for JSON, described in `docs/index.md`."""
        return {
            "keys": self.keys,
            "listed": self.listed,
            "missing": self.missing,
            "surplus": self.surplus,
            "different": self.different,
            "young": self.young,
            "meanwhile": self.meanwhile,
            "examples": self.examples,
        }

    def lines(self) -> Iterator[str]:
        """Lines of the result for the terminal."""
        yield (
            f"{self.keys:,} keys in the index, {self.listed:,} in the listing: {self.missing:,} missing, "
            f"{self.surplus:,} surplus, {self.different:,} different; {self.young:,} too young to be known, "
            f"{self.meanwhile:,} changed meanwhile"
        )
        for kind, names in self.examples.items():
            for name in names:
                yield f"{kind}: {name}"


@dataclass
class _Suspects:
    """Rows of one kind of difference, from the listing (`surplus`: from the index), with the first names."""

    rows: list[Rows] = field(default_factory=list)
    names: dict[bytes, str] = field(default_factory=dict)

    @property
    def all(self) -> Rows:
        return np.concatenate(self.rows) if self.rows else np.zeros(0, ROW)


class Verification:
    """Verification of one key index.

    Args:
        bucket: Client of the instance's bucket.
        store: Its index.
        temp_dir: Empty directory for temporary files, used by no other process.
        page_secs: Timeout of a listing page, in seconds.
        request_secs: Timeout of a request, in seconds.
        window_secs: Maximum delay until readers know of a put or a delete, in seconds.
        tell_secs: Maximum delay until a writer has recorded it, in seconds.
        each_page: Called periodically; what it raises ends the verification.
        sleep: Sleeps for a number of seconds; tests inject their own.
    """

    def __init__(
        self,
        bucket: Bucket,
        store: IndexStore,
        temp_dir: Path,
        *,
        page_secs: float,
        request_secs: float,
        window_secs: float,
        tell_secs: float,
        each_page: Callable[[], None] = lambda: None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._bucket = bucket
        self._store = store
        self._temp_dir = temp_dir
        self._page_secs = page_secs
        self._request_secs = request_secs
        self._window_secs = window_secs
        self._tell_secs = tell_secs
        self._each_page = each_page
        self._sleep = sleep
        self._missing, self._surplus, self._different = _Suspects(), _Suspects(), _Suspects()

    def run(self) -> Differences:
        """Compare the index with a listing.

        Raises:
            MissingError: If there is no snapshot.
            HFBucketError: If an object or a listing cannot be read; the result is then unknown.
        """
        built = self._view()
        rows = _on_disk(built.path)
        view = Table(rows)
        seen = np.zeros(len(view), bool)
        found = Differences(keys=len(view))
        infos = self._bucket.list_objects(self._bucket.handle.join(""), self._page_secs, self._each_page)
        while page := list(islice(infos, _PAGE)):
            self._compare(page, view, seen, found, built.covers - self._window_secs)
        for start in range(0, len(view), _UNSEEN_ROWS):
            unseen = np.flatnonzero(~seen[start : start + _UNSEEN_ROWS]) + start
            if len(unseen):
                self._surplus.rows.append(_plain(rows[unseen]))
        self._count(found, built)
        return found

    def _view(self) -> BuiltSnapshot:
        """Build the index as a reader sees it."""
        for number in range(_TRIES):
            self._each_page()
            directory = self._temp_dir / str(number)
            directory.mkdir()
            try:
                return build.from_journals(self._bucket, self._store, directory, self._request_secs)
            except MissingError:
                if number == _TRIES - 1:  # otherwise a writer replaced its last journal just before it was read
                    raise
        raise AssertionError("not reached")

    def _compare(
        self, page: list[ObjectInfo], view: Table, seen: NDArray[np.bool_], found: Differences, known_before: float
    ) -> None:
        rows = listed_rows(page, self._bucket.handle)
        found.listed += len(rows)
        if not len(rows):
            return
        where = view.find(_digests(rows))
        there = where >= 0
        seen[where[there]] = True
        young = ~there & (rows["uploaded_at"] >= known_before)
        found.young += int(young.sum())
        absent = rows[~there & ~young]
        listed, known = rows[there], view.rows[where[there]]
        other = (listed["size"] != known["size"]) | (listed["xet_hash"] != known["xet_hash"]).any(axis=1)
        for suspects, some in ((self._missing, absent), (self._different, listed[other])):
            if len(some):
                suspects.rows.append(some)
                self._name(suspects, some, page)

    def _name(self, suspects: _Suspects, rows: Rows, page: list[ObjectInfo]) -> None:
        """Record the names of the first suspects, which rows do not contain."""
        if len(suspects.names) >= _PAGE:
            return
        wanted = {_digest(row) for row in rows}
        for info in page:
            for row in listed_rows([info], self._bucket.handle):
                if _digest(row) in wanted:
                    suspects.names[_digest(row)] = info.path

    # --- changes during the verification
    # --------------------------------------------------------------------------------

    def _count(self, found: Differences, built: BuiltSnapshot) -> None:
        kinds = {"missing": self._missing, "surplus": self._surplus, "different": self._different}
        suspects = {kind: one.all for kind, one in kinds.items()}
        total = sum(map(len, suspects.values()))
        for pause in (0.0, self._tell_secs):
            if not any(map(len, suspects.values())):
                break
            self._sleep(pause)
            changes = self._changes(built)
            suspects = {kind: _unreported(rows, changes) for kind, rows in suspects.items()}
        for kind, rows in suspects.items():
            setattr(found, kind, len(rows))
            if len(rows):
                found.examples[kind] = [kinds[kind].names.get(_digest(row)) or _described(row) for row in rows[:_NAMED]]
        found.meanwhile = total - found.total

    def _changes(self, built: BuiltSnapshot) -> Table:
        """Return the newest changes recorded since the view was built."""
        self._each_page()
        since = built.covers
        listing = self._store.list(Deadline.patient(self._page_secs))
        if listing.crowded:
            raise TransportError(f"not all journals could be listed: {listing.crowded}")
        late = [journal for journal in listing.journals if journal.at >= since and not journal.name.hits]
        tables: list[Rows] = []
        for _, changes in self._store.read_journals(late, Deadline.patient(self._page_secs)):
            if isinstance(changes, FormatError):
                continue
            if isinstance(changes, HFBucketError):
                raise TransportError(f"a journal could not be read: {changes}")
            tables.append(changes[changes["at"] >= since - CLOCK_MARGIN_SECS])
        return Table(newest(*tables)) if tables else NO_CHANGES


def _unreported(rows: Rows, changes: Table) -> Rows:
    """Return the differences that no recorded change explains, whether the listing passed before or after it."""
    unreported: Rows = rows[changes.find(_digests(rows)) < 0]
    return unreported


def _on_disk(path: Path) -> Rows:
    """Map the rows of a snapshot on disk: only accessed pages are loaded into memory."""
    with path.open("rb") as file:
        header = read_header(file, str(path))
    if not header.rows:
        return np.zeros(0, header.dtype)
    return np.memmap(path, header.dtype, "r", header.offset, (header.rows,))


def _plain(rows: Rows) -> Rows:
    """Return rows in memory, reduced to the columns of `ROW`."""
    plain = np.zeros(len(rows), ROW)
    for name in ROW.names or ():
        plain[name] = rows[name]
    return plain


def _digests(rows: Rows) -> NDArray[np.uint64]:
    digests: NDArray[np.uint64] = np.stack([rows["digest_hi"], rows["digest_lo"]], axis=1)
    return digests


def _digest(row: Any) -> bytes:
    return bytes(row["digest_hi"].tobytes() + row["digest_lo"].tobytes())


def _described(row: Any) -> str:
    return f"digest {_digest(row).hex()}, {row['size']} bytes, Xet hash {row['xet_hash'].tobytes().hex()}"
