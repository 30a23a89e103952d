"""What this process knows of single keys better than the index does: what it did itself, and what it was told. Thread-safe.

Notes are looked at before the snapshot and the journals, and go when those say the same or something newer. Their number is
bounded; the oldest go first, which costs a miss at most.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hfbucket_plugin.core.keys import ContentId
    from hfbucket_plugin.index.table import Table

MOST_NOTES: Final = 50_000
"""About 20 MB when full."""

_TOLD: Final = 0


@dataclass(frozen=True, slots=True)
class OverlayEntry:
    """What is known of one key.

    Attributes:
        content: What is there; None where nothing is.
        doubtful: Whether nothing is known at all, whatever the index says: the Hub has to be asked.
        seq: Its number among the entries of this process's journals; 0 for what it was told, and for doubts.
        mono: When it came to be known, in monotonic seconds.
        hub: The same by the Hub's clock, as far as that is known.
    """

    content: ContentId | None
    doubtful: bool
    seq: int
    mono: float
    hub: float

    @property
    def reported(self) -> bool:
        """Whether it is what the Hub said, and nothing that this process did."""
        return self.seq == _TOLD


class LocalOverlay:
    """Notes by digest.

    Args:
        most: How many there may be.
    """

    def __init__(self, most: int = MOST_NOTES) -> None:
        self._lock = threading.Lock()
        self._notes: OrderedDict[bytes, OverlayEntry] = OrderedDict()
        self._most = most

    def forked(self) -> LocalOverlay:
        """The same for a forked child: a thread that is not there may hold the lock of these."""
        recent = LocalOverlay(self._most)
        recent._notes = self._notes.copy()
        return recent

    def __len__(self) -> int:
        return len(self._notes)

    def get(self, digest: bytes) -> OverlayEntry | None:
        """The note of a key."""
        return self._notes.get(digest)

    def did(self, digest: bytes, content: ContentId | None, seq: int, mono: float, hub: float) -> None:
        """Record what this process put, or deleted (None)."""
        self._set(digest, OverlayEntry(content, False, seq, mono, hub))

    def doubt(self, digest: bytes, mono: float, hub: float) -> None:
        """Record that what is known of a key must not be believed."""
        self._set(digest, OverlayEntry(None, True, _TOLD, mono, hub))

    def reported(self, digest: bytes, content: ContentId | None, asked: float, mono: float, hub: float) -> None:
        """Record what the Hub said of a key when it was asked, unless something was done to the key since it was asked."""
        with self._lock:
            note = self._notes.get(digest)
            if note is not None and note.mono >= asked:
                return
        self._set(digest, OverlayEntry(content, False, _TOLD, mono, hub))

    def drop(self, digest: bytes, asked: float) -> None:
        """Forget a note from before a question: the index says what the Hub said."""
        with self._lock:
            note = self._notes.get(digest)
            if note is not None and note.mono < asked:
                del self._notes[digest]

    def _set(self, digest: bytes, note: OverlayEntry) -> None:
        with self._lock:
            self._notes[digest] = note
            self._notes.move_to_end(digest)
            while len(self._notes) > self._most:
                self._notes.popitem(last=False)

    def journalled(self, seq: int) -> None:
        """Forget what this process did up to an entry: the journals that tell of it are folded in."""
        self._drop_where((digest, note) for digest, note in self._copy() if _TOLD < note.seq <= seq)

    def listed(self, *, hub: float | None = None, mono: float | None = None) -> None:
        """Forget what came to be known before a listing began: the snapshot made of it tells.

        Args:
            hub: When it began, by the Hub's clock.
            mono: Or in monotonic seconds.
        """
        self._drop_where(
            (digest, note)
            for digest, note in self._copy()
            if (hub is not None and note.hub < hub) or (mono is not None and note.mono < mono)
        )

    def overruled(self, *changes: Table) -> None:
        """Forget what was told before something newer happened to the key, as journals say."""
        reported = [(digest, note) for digest, note in self._copy() if note.reported]
        if not reported:
            return
        digests = np.frombuffer(b"".join(digest for digest, _ in reported), "<u8").reshape(-1, 2)
        for table in changes:
            newer = zip(reported, table.find(digests).tolist(), strict=True)
            self._drop_where(one for one, at in newer if at >= 0 and table.rows[at]["at"] > one[1].hub)

    def _copy(self) -> list[tuple[bytes, OverlayEntry]]:
        with self._lock:
            return list(self._notes.items())

    def _drop_where(self, notes: Iterable[tuple[bytes, OverlayEntry]]) -> None:
        """Drop notes that are still the same."""
        for digest, note in notes:
            with self._lock:
                if self._notes.get(digest) is note:
                    del self._notes[digest]
