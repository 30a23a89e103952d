"""Threads that work the engines: lookups, gets, puts and deletes of random chunks, each answer compared."""

from __future__ import annotations

import random
import threading
import time
from typing import TYPE_CHECKING, Final

from dev.faults.surface import content

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dev.faults.ledger import Ledger
    from dev.faults.surface import Surface

_THREADS: Final = 4
_CHUNKS: Final = 96
_MOST: Final = 6
"""Chunks of one call."""

_PAUSE_SECS: Final = 0.02
_SERVED_SECS: Final = 60.0
_FRESH: Final = 8


class Workers:
    """Four threads, each at one of the engines at a time.

    Args:
        engines: What they work.
        ledger: Where they note what they saw.
        seed: What they do.
    """

    def __init__(self, engines: Sequence[Surface], ledger: Ledger, seed: int) -> None:
        self._engines = engines
        self._ledger = ledger
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=self._work, args=(random.Random(seed * 100 + number),), daemon=True)
            for number in range(_THREADS)
        ]

    def start(self) -> None:
        """Begin."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End, when each thread's present call has."""
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _work(self, dice: random.Random) -> None:
        while not self._over.is_set():
            engine = dice.choice(self._engines)
            first, count = dice.randrange(_CHUNKS), dice.randint(1, _MOST)
            numbers = [(first + index) % _CHUNKS for index in range(count)]
            act = dice.choices((self._retrieve, self._put, self._delete), (6, 3, 1))[0]
            try:
                act(engine, numbers)
            except Exception as error:  # noqa: BLE001 - nothing may be raised into an engine: noted, and a breach
                self._ledger.note_raised(f"{engine.instance}: {type(error).__name__}: {error}")
            time.sleep(dice.uniform(0, _PAUSE_SECS))

    def _retrieve(self, engine: Surface, numbers: Sequence[int]) -> None:
        began = time.monotonic()
        hits, got = engine.retrieve(numbers)
        late = time.monotonic() - began - engine.deadline("lookup") - engine.deadline("get")
        found = [number for number, hit in zip(numbers, hits, strict=True) if hit]
        self._ledger.note("lookup", len(numbers), len(found), 0.0)
        if found:
            served = [(number, data) for number, data in zip(found, got, strict=True) if data is not None]
            wrong = sum(data != content(number) for number, data in served)
            self._ledger.note("get", len(found), len(served), late, wrong)

    def _put(self, engine: Surface, numbers: Sequence[int]) -> None:
        began = time.monotonic()
        engine.put(numbers)
        self._ledger.note("put", len(numbers), 0, time.monotonic() - began - engine.deadline("put"))

    def _delete(self, engine: Surface, numbers: Sequence[int]) -> None:
        began = time.monotonic()
        engine.delete(numbers[:1])
        self._ledger.note("delete", 1, 0, time.monotonic() - began - engine.deadline("delete"))

    def served_again(self) -> float | None:
        """Seconds until every engine stores and serves chunks that are new; None when they do not in a minute."""
        began = time.monotonic()
        for index, engine in enumerate(self._engines):
            fresh = [_CHUNKS + _FRESH * index + number for number in range(_FRESH)]
            while not self._serves(engine, fresh):
                if time.monotonic() - began > _SERVED_SECS:
                    return None
                time.sleep(0.1)
        return time.monotonic() - began

    def _serves(self, engine: Surface, fresh: Sequence[int]) -> bool:
        self._put(engine, fresh)
        hits, got = engine.retrieve(fresh)
        found = [number for number, hit in zip(fresh, hits, strict=True) if hit]
        right = [data == content(number) for number, data in zip(found, got, strict=True) if data is not None]
        self._ledger.note("lookup", len(fresh), len(found), 0.0)
        self._ledger.note("get", len(found), len(right), 0.0, right.count(False))
        return right == [True] * len(fresh)
