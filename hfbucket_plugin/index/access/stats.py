"""Heat of keys: the hits that readers report, added up per key; no I/O.

A *hit* is a chunk that was served to an engine. Readers report hits in journals of the key index
(`hfbucket_plugin.index.journal`), in entries with a key's digest, the number of hits, the age of the last one, and the
time of the first report. A builder adds them up in two more columns of the snapshot (`COLUMNS`):

- `last_hit`: time of the last hit. It is a maximum, so repeated, late or reordered reports make no difference.
- `heat`: number of hits, each worth half as much after every `HALF_LIFE_SECS`. It is a sum, so each report must be
  counted once, although growing journals repeat it. A report therefore keeps the time at which it was first made, by
  the Hub's clock as its writer knows it. A snapshot counts the reports of a time window that begins where its
  predecessor's ended (`Span.until`), and each report once if several journals contain it. A report that arrives after
  its window has closed, `LATE_SECS` later, is not counted, so heat never exceeds what was reported.

Recorders are bounded, and also report the number of hits that they dropped, without keys. Heat is complete only since
the last such time: `Span.since` moves to it, as after a gap.

`heat` is the binary logarithm of the sum at `LANDMARK` if the decay had continued from there (*forward decay*: Cormode,
Shkapenyuk, Srivastava and Xu, ICDE 2009). Values change by hits and not with time, so a snapshot without new reads
stays the same, byte for byte. `buckets` returns the coarse values that reports and sort orders use.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from hfbucket_plugin.index.table import ROW, Table

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from hfbucket_plugin.index.table import Rows

HALF_LIFE_SECS: Final = 7 * 86400.0
"""Half-life of a hit: a week, because traffic varies over days and weekends, and older hits should not outweigh current
ones."""

LANDMARK: Final = 1704067200.0
"""2024-01-01 UTC in Unix seconds. Part of the format: all values count from it, and are therefore above 0."""

LATE_SECS: Final = 300.0
"""Maximum delay in seconds of a counted report: several attempts to write a journal."""

GAP_SECS: Final = 86400.0
"""Seconds without a report after which nothing is assumed to have recorded hits; an idle recorder reports hourly."""

COLUMNS: Final = (("last_hit", "<u4"), ("heat", "<f4"))
"""`last_hit`: Unix seconds by the Hub's clock; `heat`: see the module. Both are 0 if no hit is known."""

WARM_ROW: Final = np.dtype([*ROW.descr, *COLUMNS])
"""Row of a snapshot with heat, 68 bytes."""

HIT: Final = np.dtype(
    [("digest_hi", "<u8"), ("digest_lo", "<u8"), ("hits", "<u8"), ("at", "<f8"), ("told", "<u4"), ("writer", "<u8")]
)
"""One report: the key, number of hits, time of the last hit and of the first report (Unix seconds by the Hub's clock),
and the reporter. Digest 0 is no key: it only shows that a recorder is running."""

_HOUR: Final = 3600
_MOST_HITS: Final = 1 << 40
"""Maximum number of hits in a report; more is invalid, and would swamp all others."""


@dataclass(frozen=True, slots=True)
class Span:
    """Period for which heat is known. Times are in Unix seconds by the Hub's clock.

    Attributes:
        since: Start of recording without a gap; 0 if unknown.
        until: Reports before this time are counted.
        reported: Time of the last report; 0 for none.
        lost: Number of hits that recorders dropped since the first report without a gap.
        lost_at: Time of the last dropped hit; 0 for none. `since` is never earlier.
    """

    since: float = 0.0
    until: float = 0.0
    reported: float = 0.0
    lost: int = 0
    lost_at: float = 0.0

    @property
    def known(self) -> bool:
        """Whether heat was recorded."""
        return self.since > 0


class HitLog:
    """Times of reports, detailed enough to find gaps, in memory that does not depend on their number.

    It also holds the hits that recorders dropped, at most one row per writer and time.
    """

    def __init__(self) -> None:
        self._hours: set[int] = set()
        self._last = 0
        self._lost: list[Rows] = []
        self._unread = 0
        self._lost_at = 0.0

    def lose(self, lost: Rows, now: float) -> None:
        """Record hits that recorders dropped.

        Args:
            lost: Rows of `HIT`, with repetitions.
            now: Time of the Hub.
        """
        if len(lost):
            self._lost.append(lost)
            self._lost_at = max(self._lost_at, min(now, float(lost["at"].max())))

    def unread(self, hits: int, at: float) -> None:
        """Record an unreadable journal of hits: its maximum number of hits, and its upload time."""
        self._unread += hits
        self._lost_at = max(self._lost_at, at)

    def add(self, reported: NDArray[np.uint32], now: float) -> None:
        """Record reports, ignoring those from clocks ahead of the Hub's."""
        reported = reported[reported <= now + 60]
        if len(reported):
            self._hours.update(np.unique(reported // _HOUR).tolist())
            self._last = max(self._last, int(reported.max()))

    def span(self, before: Span, now: float, until: float) -> Span:
        """Return the period for which heat is known after these reports.

        Args:
            before: Period before these reports.
            now: Time of the Hub: the start of recording if it starts over, because earlier reads may be unknown.
            until: Reports before this time are counted.
        """
        until = max(before.until, until)
        span = self._whole(before, now, until)
        lost_at = max(before.lost_at if span.since == before.since else 0.0, self._lost_at)
        if not span.known or not lost_at:
            return span
        rows = deduplicated(joined(self._lost))
        fresh = rows["hits"][(rows["told"] >= before.until) & (rows["told"] < until)]
        number = self._unread + int(np.minimum(fresh, _MOST_HITS).sum(dtype=np.uint64))
        number += before.lost if span.since == before.since else 0
        # As after a gap: earlier reads may be unknown.
        return replace(span, since=max(span.since, lost_at), lost=min(number, _MOST_HITS), lost_at=lost_at)

    def _whole(self, before: Span, now: float, until: float) -> Span:
        if self._last <= before.reported:
            return Span(before.since, until, before.reported)
        hours = sorted(hour for hour in self._hours if hour >= before.reported // _HOUR)
        steps = np.diff([before.reported // _HOUR, *hours]) if before.known else np.array([np.inf])
        whole = bool((steps <= GAP_SECS // _HOUR).all())
        return Span(before.since if whole else now, until, float(self._last))


def deduplicated(hits: Rows) -> Rows:
    """Return the reports of several journals, each once, sorted by digest, reporter and time.

    Args:
        hits: Rows of `HIT`, in any order and with repetitions.
    """
    if not len(hits):
        return hits
    hits = hits[np.lexsort((hits["told"], hits["writer"], hits["digest_lo"], hits["digest_hi"]))]
    first = np.ones(len(hits), bool)
    first[1:] = np.zeros(len(hits) - 1, bool)
    for name in ("digest_hi", "digest_lo", "writer", "told"):
        first[1:] |= hits[name][1:] != hits[name][:-1]
    starts = np.flatnonzero(first)
    reported: Rows = hits[starts].copy()
    for name in ("hits", "at"):
        reported[name] = np.maximum.reduceat(hits[name], starts)
    return reported


def with_access_columns(rows: Rows, dtype: np.dtype[Any] = WARM_ROW) -> Rows:
    """Return rows with the heat columns, 0 where missing."""
    if rows.dtype == dtype:
        return rows
    wide = np.zeros(len(rows), dtype)
    for name in rows.dtype.names or ():
        if name in (dtype.names or ()):
            wide[name] = rows[name]
    return wide


def has_access_columns(dtype: np.dtype[Any]) -> bool:
    """Return whether a row type has the heat columns."""
    return all(name in (dtype.names or ()) and dtype[name] == np.dtype(kind) for name, kind in COLUMNS)


def with_earlier_access(rows: Rows, before: Rows) -> Rows:
    """Copy the heat of an earlier snapshot into rows; keys that it lacks have none.

    Args:
        rows: Sorted rows with heat columns; changed in place.
        before: Sorted rows with heat columns.
    """
    where = Table(before).find(_digests(rows))
    known = where >= 0
    for name, _ in COLUMNS:
        rows[name][known] = before[name][where[known]]
    return rows


def warmed(rows: Rows, hits: Rows, begin: float, end: float) -> Rows:
    """Add hits to rows.

    Args:
        rows: Sorted rows with heat columns; changed in place.
        hits: Rows of `HIT`, each report once (`deduplicated`). Missing keys are ignored.
        begin: Reports since this time are counted, in Unix seconds.
        end: Reports before this time are counted, in Unix seconds.
    """
    where = Table(rows).find(_digests(hits)) if len(hits) else np.zeros(0, np.int64)
    hits, where = hits[where >= 0], where[where >= 0]
    np.maximum.at(rows["last_hit"], where, np.clip(hits["at"], 0, 0xFFFFFFFF).astype(np.uint32))
    counted = (hits["told"] >= begin) & (hits["told"] < end) & (hits["hits"] > 0)
    hits, where = hits[counted], where[counted]
    if len(hits):
        keys, number = np.unique(where, return_inverse=True)
        log = np.log2(np.minimum(hits["hits"], _MOST_HITS).astype(np.float64))
        log += _age_of(np.clip(hits["at"], LANDMARK, hits["told"] + LATE_SECS))
        before = rows["heat"][keys].astype(np.float64)
        top = before.copy()
        np.maximum.at(top, number, log)
        total = np.where(before > 0, np.exp2(before - top), 0.0)
        np.add.at(total, number, np.exp2(log - top[number]))
        rows["heat"][keys] = np.maximum(rows["heat"][keys], _down(top + np.log2(total)))
    return rows


def _down(values: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return the largest float32 not above each value."""
    rounded = values.astype(np.float32)
    return np.where(rounded > values, np.nextafter(rounded, np.float32(-np.inf)), rounded)


def _age_of(at: Any) -> Any:
    """Return the half-lives between the landmark and a time."""
    return (at - LANDMARK) / HALF_LIFE_SECS


def counts(heat: NDArray[np.float32], now: float) -> NDArray[np.float64]:
    """Return the number of hits that heat values stand for at a time, with decay."""
    return np.where(heat > 0, np.exp2(heat.astype(np.float64) - _age_of(now)), 0.0)


def buckets(heat: NDArray[np.float32], now: float) -> NDArray[np.uint8]:
    """Return the buckets of heat values: 1 for about one hit, 2 for two, 3 for four, 4 for eight, ...; 0 for fewer."""
    return np.where(heat > 0, np.clip(np.floor(heat - _age_of(now) + 0.5) + 1, 0, 255), 0).astype(np.uint8)


def _digests(rows: Rows) -> NDArray[np.uint64]:
    digests: NDArray[np.uint64] = np.stack([rows["digest_hi"], rows["digest_lo"]], axis=1)
    return digests


def joined(hits: Iterable[Rows]) -> Rows:
    """Concatenate reports of several sources."""
    parts = list(hits)
    return np.concatenate(parts) if parts else np.zeros(0, HIT)
