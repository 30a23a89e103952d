"""Keys about which this process knows more than the index: its own changes and recent answers of the Hub; thread-safe.

Entries take precedence over the snapshot and the journals, and are dropped when those contain the same or newer state.
Their number is bounded; the oldest are dropped first, which costs at most a miss.
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
"""Maximum number of entries, about 20 MB."""

_TOLD: Final = 0


@dataclass(frozen=True, slots=True)
class OverlayEntry:
    """State of one key.

    Attributes:
        content: Existing content; None if the object does not exist.
        doubtful: Whether the state is unknown, whatever the index says, so that the Hub has to be asked.
        seq: Number among the entries of this process's journals; 0 for answers of the Hub and for doubts.
        mono: Time of the observation in monotonic seconds.
        hub: Time of the observation by the Hub's clock, as far as known.
    """

    content: ContentId | None
    doubtful: bool
    seq: int
    mono: float
    hub: float

    @property
    def reported(self) -> bool:
        """Whether it is an answer of the Hub rather than a change by this process."""
        return self.seq == _TOLD


class LocalOverlay:
    """Entries by digest.

    Args:
        most: Maximum number of entries.
    """

    def __init__(self, most: int = MOST_NOTES) -> None:
        self._lock = threading.Lock()
        self._notes: OrderedDict[bytes, OverlayEntry] = OrderedDict()
        self._most = most

    def forked(self) -> LocalOverlay:
        """Return a copy for a forked child, where the lock may be held by a thread that does not run."""
        recent = LocalOverlay(self._most)
        recent._notes = self._notes.copy()
        return recent

    def __len__(self) -> int:
        return len(self._notes)

    def get(self, digest: bytes) -> OverlayEntry | None:
        """Return the entry of a key."""
        return self._notes.get(digest)

    def did(self, digest: bytes, content: ContentId | None, seq: int, mono: float, hub: float) -> None:
        """Record that this process put a content, or deleted the object (None)."""
        self._set(digest, OverlayEntry(content, False, seq, mono, hub))

    def doubt(self, digest: bytes, mono: float, hub: float) -> None:
        """Record that the known state of a key must not be trusted."""
        self._set(digest, OverlayEntry(None, True, _TOLD, mono, hub))

    def reported(self, digest: bytes, content: ContentId | None, asked: float, mono: float, hub: float) -> None:
        """Record the Hub's answer about a key, unless the key was changed after the request."""
        with self._lock:
            note = self._notes.get(digest)
            if note is not None and note.mono >= asked:
                return
        self._set(digest, OverlayEntry(content, False, _TOLD, mono, hub))

    def drop(self, digest: bytes, asked: float) -> None:
        """Forget an entry from before a request, because the index agrees with the Hub's answer."""
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
        """Forget this process's changes up to an entry, because the view includes their journals."""
        self._drop_where((digest, note) for digest, note in self._copy() if _TOLD < note.seq <= seq)

    def listed(self, *, hub: float | None = None, mono: float | None = None) -> None:
        """Forget observations from before a listing, because the snapshot made from it includes them.

        Args:
            hub: Start of the listing by the Hub's clock.
            mono: Start of the listing in monotonic seconds.
        """
        self._drop_where(
            (digest, note)
            for digest, note in self._copy()
            if (hub is not None and note.hub < hub) or (mono is not None and note.mono < mono)
        )

    def overruled(self, *changes: Table) -> None:
        """Forget answers of the Hub that are older than a change in the journals."""
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
        """Drop entries that have not changed."""
        for digest, note in notes:
            with self._lock:
                if self._notes.get(digest) is note:
                    del self._notes[digest]
