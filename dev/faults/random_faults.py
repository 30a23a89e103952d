"""Faults that come and go at random, from a seed."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Final

from dev.faults.injections import FAULTS, OPERATIONS, WHOLE_HUB, injected, routes

if TYPE_CHECKING:
    from collections.abc import Callable

    from localhub.process import RunningHub

_LASTS_SECS: Final = (0.3, 4.0)
_CALM_SECS: Final = (0.3, 3.0)


class RandomFaults:
    """Switches faults on and off in a thread of its own.

    Args:
        hub: A local Hub with faults.
        seed: What comes when.
        tell: Called with each fault that begins, in words.
    """

    def __init__(self, hub: RunningHub, seed: int, tell: Callable[[str], None]) -> None:
        self._hub = hub
        self._random = random.Random(seed)
        self._notify = tell
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="random-faults", daemon=True)
        self.seen: Counter[str] = Counter()
        self.problem = ""

    def start(self) -> None:
        """Let it begin."""
        self._thread.start()

    def clear(self) -> None:
        """Let it end: no fault is left, and the Hub runs."""
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._over.wait(self._random.uniform(*_CALM_SECS)):
                self._one()
        except Exception as error:  # noqa: BLE001 - told at the end
            self.problem = f"{type(error).__name__}: {error}"

    def _one(self) -> None:
        surface, fault = self._random.choice(("classic", "mp")), self._random.choice(FAULTS)
        on = [route for operation in OPERATIONS for route in routes(surface, fault, operation)]
        route = self._random.choice(on)
        lasts = self._random.uniform(*_LASTS_SECS)
        self.seen[fault] += 1
        self._notify(f"{fault} on {route} for {lasts:.1f} s")
        end = time.monotonic() + lasts
        if route == WHOLE_HUB:
            self._hub.kill()
            self._over.wait(lasts)
            self._hub.restart()
            return
        # Items of a batch and chunks are chosen by a digit of their name: half of them.
        rule = injected(fault, route, self._random.choice("02468ace"))
        self._hub.control.add_fault(rule)
        self._over.wait(max(0.0, end - time.monotonic()))
        self._hub.control.clear_faults()
