"""What an engine's process reads, counted per key until it is told of. Bounded in memory, and in what is told.

The hot path leaves keys on a heap, in one call that takes no lock; a thread that writes journals anyway counts them (`due`).
Each time so many keys are told of, with all of their hits: half of them those with the most hits, so that what is hot is known
soon, and half those that wait longest, so that what is read once in a while is known at all, and nothing that is read is
called idle. The others wait. What does not fit is dropped and counted: heat is a sample, and never more than the truth.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Final

from hfbucket_plugin.index_table import DIGEST_BYTES, digests_of
from hfbucket_plugin.keys import encode_name, is_probe

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hfbucket_plugin.settings import InstanceSettings

_FRESH_KEYS: Final = 8192
"""Hits on the heap between two looks at it: 270 a second, with defaults. Key strings: 1.5 MB; counting them takes 0.2 s."""

_WAITING_KEYS: Final = 8192
"""Keys that wait to be told of: 2 MB."""

_SIGN_SECS: Final = 3600.0
"""How often a recorder says that it records, if it has nothing else to tell."""

NO_KEY: Final = bytes(DIGEST_BYTES)


@dataclass(frozen=True, slots=True)
class Hits:
    """Hits of one key.

    Attributes:
        digest: Of its object's name; `NO_KEY` for the sign that somebody records.
        number: How many.
        last: When the last one was, in monotonic seconds: never too early, and late by a journal's interval at most.
    """

    digest: bytes
    number: int
    last: float


class HeatRecorder:
    """The hits of one process and instance. `read` is for any thread, the rest for one at a time.

    Args:
        keys: Most keys that are told of at a time.
        secs: Least seconds between two times.
        began: Since when, in monotonic seconds: the first time is so much later.
    """

    def __init__(self, keys: int, secs: float, began: float) -> None:
        self._keys = keys
        self._secs = secs
        self._fresh: deque[str] = deque(maxlen=_FRESH_KEYS)
        self._waiting: dict[bytes, list[float]] = {}
        self._told_at = self._sign_at = began
        self._dropped = 0

    def read(self, keys: Iterable[str]) -> None:
        """Note that chunks were served. Takes a microsecond; of more than fit, the oldest are lost."""
        self._fresh.extend(keys)

    def due(self, now: float) -> list[Hits]:
        """Count what was read, and take out what is to be told of now; nothing before it is time.

        Args:
            now: Monotonic seconds.
        """
        self._count(now)
        if now - self._told_at < self._secs:
            return []
        told = self._hottest() | self._longest_waiting()
        if not told and now - self._sign_at < _SIGN_SECS:
            return []
        self._told_at = self._sign_at = now
        if not told:
            return [Hits(NO_KEY, 0, now)]
        return [Hits(digest, int(number), last) for digest, (number, last) in told.items()]

    def take_dropped(self) -> int:
        """Hits that nobody will be told of, since too many keys wait; counted since the last call."""
        dropped, self._dropped = self._dropped, 0
        return dropped

    def _count(self, now: float) -> None:
        read = Counter(key for key in (self._fresh.popleft() for _ in range(len(self._fresh))) if not is_probe(key))
        digests = digests_of(map(encode_name, read))
        for row, number in zip(digests, read.values(), strict=True):
            digest = row.tobytes()
            waiting = self._waiting.get(digest)
            if waiting is not None:
                waiting[0] += number
                waiting[1] = now
            elif len(self._waiting) < _WAITING_KEYS:
                self._waiting[digest] = [number, now]
            else:
                self._dropped += number

    def _hottest(self) -> dict[bytes, list[float]]:
        hottest = heapq.nlargest(self._keys // 2, self._waiting.items(), key=lambda one: (one[1][0], one[0]))
        return {digest: self._waiting.pop(digest) for digest, _ in hottest}

    def _longest_waiting(self) -> dict[bytes, list[float]]:
        longest = list(islice(self._waiting, self._keys - self._keys // 2))  # a dict keeps its order
        return {digest: self._waiting.pop(digest) for digest in longest}


def recorder_of(settings: InstanceSettings, now: float) -> HeatRecorder | None:
    """The recorder of an instance; None where its settings leave nothing to record, or nobody to tell.

    Args:
        settings: The instance's.
        now: Monotonic seconds.
    """
    if settings.heat == "off" or settings.index != "snapshot" or not (settings.reads and settings.writes):
        return None
    return HeatRecorder(min(settings.heat_keys, settings.index_journal_entries), settings.heat_secs, now)


def why_not(settings: InstanceSettings) -> str:
    """Why nothing is recorded though `heat` is on, where somebody should know; else empty."""
    if settings.heat == "off" or not settings.reads:
        return ""
    if settings.index != "snapshot":
        asked = "heat" in settings.model_fields_set
        return f"heat is not recorded: it needs index: snapshot, and index is {settings.index}" if asked else ""
    if not settings.writes:
        return (
            f"heat is not recorded: role is {settings.role}, so nobody is told of what is read here. A cleanup by max_idle may "
            "delete what only such engines read"
        )
    return ""
