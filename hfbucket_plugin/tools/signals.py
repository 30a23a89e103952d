"""Orders to stop: SIGTERM and SIGINT, noticed at once while waiting and in good order while copying."""

from __future__ import annotations

import contextlib
import signal
import threading
from typing import TYPE_CHECKING, Any, Final, Protocol

from hfbucket_plugin.errors import Interrupted

if TYPE_CHECKING:
    from collections.abc import Iterator

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


class Stop(Protocol):
    """Says whether the run is to stop."""

    @property
    def requested(self) -> bool:
        """Whether it is."""


class ShutdownSignal:
    """Whether the run was told to stop.

    Outside of `orderly`, an order raises `Interrupted` wherever the main thread is, such as in a listing. Within it,
    the first order only sets `requested`; a second one raises.
    """

    def __init__(self) -> None:
        self._requested = False
        self._orderly = False

    @property
    def requested(self) -> bool:
        """Whether an order came."""
        return self._requested

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals, and give them back at the end. In other threads than the main one nothing is taken."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.getsignal(number) for number in _SIGNALS}
        self.take_back()
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def take_back(self) -> None:
        """Take the signals again: `ray.init` puts handlers of its own."""
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                signal.signal(number, self._ordered)

    @contextlib.contextmanager
    def orderly(self) -> Iterator[None]:
        """A block that polls `requested` by itself."""
        self._orderly = True
        try:
            yield
        finally:
            self._orderly = False

    def _ordered(self, _number: int, _frame: Any) -> None:
        again, self._requested = self._requested, True
        if again or not self._orderly:
            raise Interrupted
