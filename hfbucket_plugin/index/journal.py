"""What a process tells others of what it did, or read: entries that wait, and the journals that hold them. Pure; thread-safe.

A journal is an object, and objects cost calls to list: a writer's last journal therefore *grows*. Each time there is news it
is rewritten, old entries and new ones, and takes the place of the one before, until it is full (`entries`) and the next
one begins. So at any time there is one journal for each `entries` entries and writer, and a lost answer costs nothing.

What waits is bounded: while the Hub does not take journals the oldest entries are dropped, and counted. Others then learn of
those keys by the next snapshot.
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
    """What happened to one key.

    Attributes:
        seq: Its number among the writer's entries, from 1.
        at: When, in monotonic seconds.
        digest: Of the name, 16 bytes.
        content: What was put; None for a delete, and for hits.
        hits: How many, of an entry that tells of hits; `at` is then the last one.
        reported: When they were told first, in seconds since 1970 by the Hub's clock; 0 for puts and deletes.
        lost: Whether they are hits that were dropped, of no key in particular.
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
    """A journal to be written.

    Attributes:
        name: Of its object.
        data: Its bytes.
        instead_of: The name of the journal whose place it takes, if any.
        entries: What is in it.
        fresh: How many of them are in no journal yet.
    """

    name: JournalName
    data: bytes
    instead_of: str | None
    entries: Sequence[JournalEntry]
    fresh: int


class JournalWriter:
    """The entries of one process and instance.

    Args:
        entries: Most entries of one journal.
        waiting: Most entries that wait to be written.
        hits: Whether hits alone are told of: in journals apart, which readers need not fetch.
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
        """Take an entry in; see `JournalEntry`.

        Returns:
            Its number, and how many entries were dropped to make room.
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
        """Take in what is told of hits.

        Args:
            hits: Of each key.
            hub_now: The Hub's time, in seconds since 1970.
        """
        if not hits:
            return
        with self._lock:
            # No two tells of a key share a moment: that is how those who add them up know one from its repetition.
            self._hits_reported = max(self._hits_reported + 1, int(hub_now))
            for one in hits:
                self._seq += 1
                self._waiting.append(
                    JournalEntry(self._seq, one.last, one.digest, None, one.number, self._hits_reported, one.lost)
                )

    def draft(self, now: float, today: datetime | None = None) -> JournalDraft | None:
        """The journal to be written next, or None when there is no news.

        Args:
            now: Monotonic seconds.
            today: For its name; by default this machine's clock.
        """
        with self._lock:
            fresh = [self._after_attempts(one) for _, one in zip(range(self._most), self._waiting, strict=False)]
            if not fresh:
                return None
            grows = len(self._growing) + len(fresh) <= self._most
            entries = [*self._growing, *fresh] if grows else fresh
            name = JournalName.make(self.writer, fresh[-1].seq, today or datetime.now(UTC), hits=self._hits)
            if name.text <= self._last_name:  # a clock that was set back: names of a writer go on in order
                name = replace(name, text=self._last_name[:18] + name.text[18:])
            self._last_name = name.text
            return JournalDraft(
                name, _bytes_of(entries, now), self._growing_name if grows else None, entries, len(fresh)
            )

    def _after_attempts(self, entry: JournalEntry) -> JournalEntry:
        """An entry as it may be told now: not before what was told already.

        The Hub's stamp, from which ages count back, comes some time after a journal was begun: a second in one, less in the
        next. A put and a delete of one key, told by two journals, would else change places.
        """
        if entry.reported or entry.at >= self._attempt_ended:
            return entry
        return replace(entry, at=self._attempt_ended)

    def attempted(self, now: float) -> None:
        """Record that an attempt to write a journal has ended, well or not: it may be there.

        Args:
            now: Monotonic seconds.
        """
        with self._lock:
            self._attempt_ended = max(self._attempt_ended, now)

    def written(self, draft: JournalDraft) -> None:
        """Record that a journal is there."""
        with self._lock:
            while self._waiting and self._waiting[0].seq <= draft.name.seq:
                self._waiting.popleft()
            self._growing, self._growing_name = draft.entries, draft.name.text
            self.reported = draft.name.seq

    def forget_before(self, at: float, heat_until: float = math.inf) -> int:
        """Drop what a snapshot tells of by now.

        Args:
            at: Puts and deletes before then, in monotonic seconds.
            heat_until: Hits that were told before then, in seconds since 1970.

        Returns:
            How many entries of those that waited.
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
    """Of the puts and deletes of one key the last one, which alone counts: their times may be the same."""
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
