"""What the callers saw, and what the metrics say of the same."""

from __future__ import annotations

import threading
from collections import Counter
from typing import TYPE_CHECKING, Final

from dev.faults.surface import chunks_counted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dev.faults.surface import Surface

OPERATIONS: Final = ("lookup", "get", "put", "delete")


class Ledger:
    """Counts; thread-safe.

    Attributes:
        asked: Chunks of each operation.
        reported: Of lookups and gets, the chunks of which the engine was told yes.
        counted: What the metrics say: operation to outcome to chunks.
        calls: Of each operation.
        wrong: Chunks with wrong bytes.
        raised: What calls raised, in words.
        latest: Seconds by which the slowest call outlasted its deadline.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.asked: Counter[str] = Counter()
        self.reported: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.counted: dict[str, Counter[str]] = {}
        self.wrong = 0
        self.raised: list[str] = []
        self.latest = 0.0

    def note(self, operation: str, asked: int, reported: int, seconds_late: float, wrong: int = 0) -> None:
        """Note a call."""
        with self._lock:
            self.calls[operation] += 1
            self.asked[operation] += asked
            self.reported[operation] += reported
            self.wrong += wrong
            self.latest = max(self.latest, seconds_late)

    def note_raised(self, text: str) -> None:
        """Note that a call raised into the engine."""
        with self._lock:
            self.raised.append(text)

    def read_metrics(self, engines: Sequence[Surface]) -> None:
        """Take what the metrics of all engines say."""
        for operation in OPERATIONS:
            self.counted[operation] = Counter()
            for engine in engines:
                self.counted[operation] += chunks_counted(engine.instance, operation)
