"""What an engine's process reads, counted per key until it is told of. Bounded in memory, and in what is told.

The hot path leaves keys on a heap, in one call that takes no lock; a thread that writes journals anyway counts them (`due`).
Each time everything that waits is told of, up to a bound that is `_SURGE` times `heat_keys`. Where more waits, half of what
is told are the keys with the most hits, so that what is hot is known soon, and half those that wait longest, so that what is
read once in a while is known at all. What does not fit is dropped, counted, and told of too (`take_lost`): a job that deletes by
use must know that there were reads of which nobody will hear.
"""

from __future__ import annotations

import heapq
import threading
from collections import Counter, deque
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING, Final

from hfbucket_plugin.core.keys import encode_name, is_probe
from hfbucket_plugin.index.table import DIGEST_BYTES, digests_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hfbucket_plugin.config.settings import InstanceSettings

_FRESH_KEYS: Final = 32_768
"""Hits on the heap between two looks at it: 1,000 a second, with defaults. Key strings: 6 MB; counting them takes 0.3 s."""

_WAITING_KEYS: Final = 32_768
"""Keys that wait to be told of: 9 MB."""

_SURGE: Final = 40
"""How many times `heat_keys` are told of at a time under load: 8,000 with defaults, 27 other chunks a second."""

MOST_TOLD: Final = 16_384
"""Keys of one time, whatever the settings say."""

HITS_ENTRIES: Final = 32_768
"""Entries of a journal of hits: 2.1 MB. So many that readers have few journals to list, however much is read."""

_SIGN_SECS: Final = 3600.0
"""How often a recorder says that it records, if it has nothing else to tell."""

NO_KEY: Final = bytes(DIGEST_BYTES)


@dataclass(frozen=True, slots=True)
class Hits:
    """Hits of one key, or hits that were lost.

    Attributes:
        digest: Of its object's name; `NO_KEY` for the sign that somebody records, and for hits that were lost.
        number: How many.
        last: When the last one was, in monotonic seconds: never too early, and late by a journal's interval at most.
        lost: Whether their keys are not known.
    """

    digest: bytes
    number: int
    last: float
    lost: bool = False


class AccessRecorder:
    """The hits of one process and instance. `read` is for any thread, the rest for one at a time.

    Args:
        keys: Keys that are told of at a time; under load up to `_SURGE` times as many.
        secs: Least seconds between two times.
        began: Since when, in monotonic seconds: the first time is so much later.
    """

    def __init__(self, keys: int, secs: float, began: float) -> None:
        self._keys = min(keys * _SURGE, MOST_TOLD)
        self._secs = secs
        self._fresh: deque[tuple[str, ...]] = deque()
        self._fresh_keys = 0
        self._overflow = 0
        self._overflow_lock = threading.Lock()
        self._waiting: dict[bytes, list[float]] = {}
        self._reported_at = self._sign_at = began
        self._dropped = 0
        self._lost: Hits | None = None

    def __len__(self) -> int:
        return len(self._waiting) + len(self._fresh)

    def read(self, keys: Iterable[str]) -> None:
        """Record that chunks were served. Takes a microsecond; what does not fit until the next look is counted as lost."""
        batch = tuple(keys)
        room = _FRESH_KEYS - self._fresh_keys  # threads that meet here may pass the bound by a batch each
        if len(batch) > room:
            with self._overflow_lock:
                self._overflow += len(batch) - max(0, room)
            batch = batch[: max(0, room)]
        if batch:
            self._fresh_keys += len(batch)
            self._fresh.append(batch)

    def look(self, now: float) -> None:
        """Count what was read since the last look; at least as often as `_FRESH_KEYS` chunks are served.

        Args:
            now: Monotonic seconds.
        """
        batches = [self._fresh.popleft() for _ in range(len(self._fresh))]
        self._fresh_keys = 0  # what comes meanwhile is bounded by the next look
        with self._overflow_lock:
            self._lose(self._overflow, now)
            self._overflow = 0
        read = Counter(key for key in chain.from_iterable(batches) if not is_probe(key))
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
                self._lose(number, now)

    def _lose(self, number: int, now: float) -> None:
        if number:
            self._dropped += number
            self._lost = Hits(NO_KEY, number + (0 if self._lost is None else self._lost.number), now, lost=True)

    def due(self, now: float, *, last: bool = False) -> list[Hits]:
        """Count what was read, and take out what is to be told of now; nothing before it is time.

        Args:
            now: Monotonic seconds.
            last: Whether nothing will be told after it, so that it is time in any case.
        """
        self.look(now)
        if now - self._reported_at < self._secs and not last:
            return []
        reported = self._hottest() | self._longest_waiting()
        if not reported and self._lost is None and now - self._sign_at < _SIGN_SECS:
            return []
        self._reported_at = self._sign_at = now
        if not reported:
            return [Hits(NO_KEY, 0, now)]
        return [Hits(digest, int(number), last) for digest, (number, last) in reported.items()]

    def take_lost(self) -> Hits | None:
        """Hits of which nobody will be told, since the last call, and when the last of them was; to be told with what is due."""
        lost, self._lost = self._lost, None
        return lost

    def take_dropped(self) -> int:
        """How many hits were lost since the last call, for counters."""
        dropped, self._dropped = self._dropped, 0
        return dropped

    def _hottest(self) -> dict[bytes, list[float]]:
        if len(self._waiting) <= self._keys:
            reported, self._waiting = self._waiting, {}
            return reported
        hottest = heapq.nlargest(self._keys // 2, self._waiting.items(), key=lambda one: (one[1][0], one[0]))
        return {digest: self._waiting.pop(digest) for digest, _ in hottest}

    def _longest_waiting(self) -> dict[bytes, list[float]]:
        longest = list(islice(self._waiting, self._keys - self._keys // 2))  # a dict keeps its order
        return {digest: self._waiting.pop(digest) for digest in longest}


def recorder_of(settings: InstanceSettings, now: float) -> AccessRecorder | None:
    """The recorder of an instance; None where its settings leave nothing to record, or nobody to tell.

    Args:
        settings: The instance's.
        now: Monotonic seconds.
    """
    if settings.heat == "off" or settings.index != "snapshot" or not (settings.reads and settings.writes):
        return None
    return AccessRecorder(settings.heat_keys, settings.heat_secs, now)


def why_not(settings: InstanceSettings) -> str:
    """Why nothing is recorded though `heat` is on, where somebody should know; else empty."""
    if settings.heat == "off" or not settings.reads:
        return ""
    if settings.index != "snapshot":
        asked = "heat" in settings.model_fields_set
        return f"heat is not recorded: it needs index: snapshot, and index is {settings.index}" if asked else ""
    if not settings.writes:
        return (
            f"heat is not recorded: role is {settings.role}, so reads are not reported. A cleanup by max_idle may "
            "delete what only such engines read"
        )
    return ""
