"""Pending changes and hits of a process, and the journals that report them to others; no I/O, thread-safe.

Journals are objects, which cost calls to list, so a writer's last journal grows: each report rewrites it with old and
new entries in place of the previous one, until it has `entries` entries and the next one begins. A lost response costs
nothing.

The number of pending entries is bounded: while the Hub accepts no journals, the oldest are dropped and counted. Others
then learn of those keys from the next snapshot.
"""

from __future__ import annotations

import math
import secrets
import threading
from collections import deque
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

import numpy as np

from hfbucket_plugin.index.format import ACCESS_JOURNAL, JOURNAL, to_bytes
from hfbucket_plugin.index.store import JournalName
from hfbucket_plugin.index.table import DELETED, LOST, PUT, READ, hash_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from hfbucket_plugin.core.keys import ContentId
    from hfbucket_plugin.index.access.recorder import Hits

_LONGEST_AGE_MS: Final = 0xFFFFFFFF
_WRITER_BYTES: Final = 8


@dataclass(frozen=True, slots=True)
class JournalEntry:
    """Event of one key.

    Attributes:
        seq: Number among the writer's entries, from 1.
        at: Time in monotonic seconds.
        digest: Digest of the object name, 16 bytes.
        content: Content that was put; None for a delete and for hits.
        hits: Number of hits, if the entry reports hits; `at` is then the last one.
        reported: Time of the first report of hits, in Unix seconds by the Hub's clock; 0 for puts and deletes.
        lost: Whether the entry stands for dropped hits of unknown keys.
    """

    seq: int
    at: float
    digest: bytes
    content: ContentId | None
    hits: int = 0
    reported: int = 0
    lost: bool = False


@dataclass(frozen=True, slots=True)
class JournalDraft:
    """Journal to write.

    Attributes:
        name: Name of its object.
        data: Bytes of its object.
        instead_of: Name of the journal that it replaces, if any.
        entries: Entries in it.
        fresh: Number of entries that are in no journal yet.
    """

    name: JournalName
    data: bytes
    instead_of: str | None
    entries: Sequence[JournalEntry]
    fresh: int


class JournalWriter:
    """Journal entries of one process and instance.

    Args:
        entries: Maximum number of entries of one journal.
        waiting: Maximum number of pending entries.
        hits: Whether it reports only hits, in separate journals that readers need not fetch.
    """

    def __init__(self, entries: int, waiting: int, *, hits: bool = False) -> None:
        self.writer = secrets.token_hex(_WRITER_BYTES)
        self._most = entries
        self._most_waiting = waiting
        self._lock = threading.Lock()
        self._seq = 0
        self._last_name = ""
        self.reported = 0
        """Number of the last entry that is in a journal."""

        self._waiting: deque[JournalEntry] = deque()
        self._attempt_ended = -math.inf
        self._growing: Sequence[JournalEntry] = ()
        self._growing_name: str | None = None
        self._hits = hits
        self._hits_reported = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def note(self, digest: bytes, content: ContentId | None, at: float) -> tuple[int, int]:
        """Add an entry; see `JournalEntry`.

        Returns:
            The number of the entry, and the number of entries dropped to make room.
        """
        with self._lock:
            self._seq += 1
            self._waiting.append(JournalEntry(self._seq, at, digest, content))
            dropped = 0
            while len(self._waiting) > self._most_waiting:
                self._waiting.popleft()
                dropped += 1
            return self._seq, dropped

    def tell(self, hits: Sequence[Hits], hub_now: float) -> None:
        """Add reports of hits.

        Args:
            hits: Hits by key.
            hub_now: Time of the Hub in Unix seconds.
        """
        if not hits:
            return
        with self._lock:
            # Reports of a key never share a time, so that builders can recognize repetitions.
            self._hits_reported = max(self._hits_reported + 1, int(hub_now))
            for one in hits:
                self._seq += 1
                self._waiting.append(
                    JournalEntry(self._seq, one.last, one.digest, None, one.number, self._hits_reported, one.lost)
                )

    def draft(self, now: float, today: datetime | None = None) -> JournalDraft | None:
        """Return the next journal to write; None without new entries.

        Args:
            now: Time in monotonic seconds.
            today: Time for its name; by default this machine's clock.
        """
        with self._lock:
            fresh = [self._after_attempts(one) for _, one in zip(range(self._most), self._waiting, strict=False)]
            if not fresh:
                return None
            grows = len(self._growing) + len(fresh) <= self._most
            entries = [*self._growing, *fresh] if grows else fresh
            name = JournalName.make(self.writer, fresh[-1].seq, today or datetime.now(UTC), hits=self._hits)
            if name.text <= self._last_name:  # the clock was set back, but the names of a writer must stay in order
                name = replace(name, text=self._last_name[:18] + name.text[18:])
            self._last_name = name.text
            return JournalDraft(
                name, _bytes_of(entries, now), self._growing_name if grows else None, entries, len(fresh)
            )

    def _after_attempts(self, entry: JournalEntry) -> JournalEntry:
        """Return an entry with its time moved after everything already reported.

        The Hub's timestamp, from which ages count back, may lag the start of a journal by a second in one case and less
        in the next. Otherwise a put and a delete of one key in two journals could change order.
        """
        if entry.reported or entry.at >= self._attempt_ended:
            return entry
        return replace(entry, at=self._attempt_ended)

    def attempted(self, now: float) -> None:
        """Record that an attempt to write a journal has ended; the journal may exist even after a failure.

        Args:
            now: Time in monotonic seconds.
        """
        with self._lock:
            self._attempt_ended = max(self._attempt_ended, now)

    def written(self, draft: JournalDraft) -> None:
        """Record that a journal was written."""
        with self._lock:
            while self._waiting and self._waiting[0].seq <= draft.name.seq:
                self._waiting.popleft()
            self._growing, self._growing_name = draft.entries, draft.name.text
            self.reported = draft.name.seq

    def forget_before(self, at: float, heat_until: float = math.inf) -> int:
        """Drop entries that a snapshot now includes.

        Args:
            at: Drop puts and deletes before this time, in monotonic seconds.
            heat_until: Drop hits reported before this time, in Unix seconds.

        Returns:
            The number of dropped entries that were pending.
        """

        def kept(entries: Iterable[JournalEntry]) -> Iterator[JournalEntry]:
            return (entry for entry in entries if (entry.reported >= heat_until if entry.reported else entry.at >= at))

        with self._lock:
            before = len(self._waiting)
            self._waiting = deque(kept(self._waiting))
            self._growing = list(kept(self._growing))
            if not self._growing:  # the builder prunes it
                self._growing_name = None
            return before - len(self._waiting)


def _last_of_each(entries: Sequence[JournalEntry]) -> Sequence[JournalEntry]:
    """Return the last put or delete of each key, which alone counts; their times may be equal."""
    last = {entry.digest: entry.seq for entry in entries if not entry.reported}
    return [entry for entry in entries if entry.reported or last[entry.digest] == entry.seq]


def _bytes_of(reported: Sequence[JournalEntry], now: float) -> bytes:
    entries = _last_of_each(reported)
    heat = any(entry.reported for entry in entries)
    rows = np.zeros(len(entries), ACCESS_JOURNAL if heat else JOURNAL)
    digests = np.frombuffer(b"".join(entry.digest for entry in entries), "<u8").reshape(-1, 2)
    rows["digest_hi"], rows["digest_lo"] = digests[:, 0], digests[:, 1]
    rows["age_ms"] = [min(_LONGEST_AGE_MS, max(0, int((now - entry.at) * 1000))) for entry in entries]
    rows["kind"] = [_kind_of(entry) for entry in entries]
    rows["size"] = [entry.hits if entry.content is None else entry.content.size for entry in entries]
    if heat:
        rows["told"] = [entry.reported for entry in entries]
    for index, entry in enumerate(entries):
        if entry.content is not None:
            rows["xet_hash"][index] = hash_bytes(entry.content.xet_hash)
    return to_bytes(rows)


def _kind_of(entry: JournalEntry) -> int:
    if entry.reported:
        return LOST if entry.lost else READ
    return DELETED if entry.content is None else PUT
