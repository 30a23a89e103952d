"""How far a long run is, as a line now and then on stderr."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from hfbucket_plugin.core.units import Extent
from hfbucket_plugin.tools import console
from jobs.report import note

if TYPE_CHECKING:
    from collections.abc import Callable

_TERMINAL_SECS: Final = 5.0
_LOG_SECS: Final = 60.0


class ProgressLog:
    """Counts what has ended, and says so now and then.

    Args:
        all_of_it: What there is to do.
        name: For people.
        clock: Seconds, monotonic; tests hand in their own.
    """

    def __init__(self, all_of_it: Extent, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._all = all_of_it
        self._name = name
        self._clock = clock
        self._every = _TERMINAL_SECS if console.at_terminal() else _LOG_SECS
        self._last = clock()
        self._done = Extent()

    def add(self, nbytes: int) -> None:
        """Count one object."""
        self._done = self._done.plus(nbytes)
        if self._clock() - self._last >= self._every:
            self._last = self._clock()
            note(f"{self._name}: {self._done} of {self._all}")
