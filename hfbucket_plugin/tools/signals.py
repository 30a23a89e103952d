"""Signals that end a command: while it starts, while it works, and while it must clean up first.

Imported before anything that takes long to import.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from typing import TYPE_CHECKING, Any, Final, NoReturn, Protocol, Self

from hfbucket_plugin.errors import Interrupted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator


_STOPPING: Final = (signal.SIGTERM, signal.SIGINT)
_ENDING: Final = (*_STOPPING, signal.SIGHUP)
_EXIT_BASE: Final = 128
"""What a shell adds to the number of the signal that ended a command."""


def _take(numbers: Iterable[int], receive: Callable[[int, Any], Any]) -> dict[int, Any]:
    """Handle signals, except those that this process was started to ignore, as by nohup; return the handlers before."""
    taken = [number for number in numbers if signal.getsignal(number) not in (signal.SIG_IGN, None)]
    return {number: signal.signal(number, receive) for number in taken}


def end_by_signals(code: int | None = None) -> None:
    """Let SIGINT and SIGTERM end this process without a traceback, until something else handles them.

    For the start of a command: its imports take seconds.

    Args:
        code: The exit code; None for the one by which a shell reports the signal.
    """

    def receive(number: int, _: Any) -> NoReturn:
        os.write(2, b"told to stop\n")  # other output may be in progress
        raise SystemExit(_EXIT_BASE + number if code is None else code)

    _take(_STOPPING, receive)


class Stop(Protocol):
    """Says whether the run is to stop."""

    @property
    def requested(self) -> bool:
        """Whether it is."""


class ShutdownSignal:
    """Whether the run is to stop.

    Outside of `orderly`, an order raises `Interrupted` wherever the main thread is, such as in a listing. Within it,
    the first order only sets `requested`; a second one raises.
    """

    def __init__(self) -> None:
        self._requested = False
        self._orderly = False
        self._listening = False

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
        previous = {number: signal.getsignal(number) for number in _STOPPING}
        self._listening = True
        self.take_back()
        try:
            yield
        finally:
            self._listening = False
            for number, handler in previous.items():
                signal.signal(number, handler)

    def take_back(self) -> None:
        """Take the signals again, if it took them: `ray.init` puts handlers of its own."""
        if self._listening and threading.current_thread() is threading.main_thread():
            for number in _STOPPING:
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


class EndingSignals:
    """Context in which a signal that would end the process raises `SystemExit` in the main thread, once.

    Inside `held`, where the clean-up happens, signals wait until the block is over.
    """

    def __init__(self) -> None:
        self._held = False
        self._waiting: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._before = _take(_ENDING, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: Any) -> None:
        if self._held:
            self._waiting = number
        else:
            raise SystemExit(_EXIT_BASE + number)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Let signals wait for the length of a `with` block.

        Raises:
            SystemExit: One came meanwhile.
        """
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self._waiting is not None:
            raise SystemExit(_EXIT_BASE + self._waiting)


class ExternalStop(ShutdownSignal):
    """An order to stop that comes from the program that called us: its signal handlers stay as they are.

    Args:
        event: The program sets it to stop in good order; None if it never does.
    """

    def __init__(self, event: threading.Event | None = None) -> None:
        super().__init__()
        self._event = event
        self._handlers = {number: signal.getsignal(number) for number in _STOPPING}

    @property
    def requested(self) -> bool:
        """Whether the program wants us to stop."""
        return self._event is not None and self._event.is_set()

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Give the program its signal handlers back at the end."""
        try:
            yield
        finally:
            self.take_back()

    def take_back(self) -> None:
        """Put the program's signal handlers back: `ray.init` replaces them."""
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._handlers.items():
                if handler is not None:  # one that is not Python's cannot be put back
                    signal.signal(number, handler)
