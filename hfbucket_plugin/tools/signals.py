"""Signals that end a command: during its start, during its work, and when it must clean up first.

Import this module before any slow import.
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
"""Offset that a shell adds to a signal's number for the exit code."""


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
    """Source of stop requests."""

    @property
    def requested(self) -> bool:
        """Whether a stop was requested."""


class ShutdownSignal:
    """Stop request by signals.

    Outside of `orderly`, a request raises `Interrupted` wherever the main thread is, such as in a listing. Within it,
    the first request only sets `requested`; a second one raises.
    """

    def __init__(self) -> None:
        self._requested = False
        self._orderly = False
        self._listening = False

    @property
    def requested(self) -> bool:
        """Whether a stop was requested."""
        return self._requested

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handle signals during a `with` block, then restore the handlers. Does nothing outside the main thread."""
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
        """Reinstall the signal handlers if `listening` installed them: `ray.init` installs its own."""
        if self._listening and threading.current_thread() is threading.main_thread():
            for number in _STOPPING:
                signal.signal(number, self._ordered)

    @contextlib.contextmanager
    def orderly(self) -> Iterator[None]:
        """Mark a block that polls `requested` itself."""
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
        """Defer signals for the length of a `with` block.

        Raises:
            SystemExit: If a signal arrived in the meantime.
        """
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self._waiting is not None:
            raise SystemExit(_EXIT_BASE + self._waiting)


class ExternalStop(ShutdownSignal):
    """Stop request from the calling program, whose signal handlers stay unchanged.

    Args:
        event: Event that the program sets for an orderly stop; None if it never does.
    """

    def __init__(self, event: threading.Event | None = None) -> None:
        super().__init__()
        self._event = event
        self._handlers = {number: signal.getsignal(number) for number in _STOPPING}

    @property
    def requested(self) -> bool:
        """Whether the program has requested a stop."""
        return self._event is not None and self._event.is_set()

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Restore the program's signal handlers at the end of a `with` block."""
        try:
            yield
        finally:
            self.take_back()

    def take_back(self) -> None:
        """Restore the program's signal handlers: `ray.init` replaces them."""
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._handlers.items():
                if handler is not None:  # a handler not installed by Python cannot be restored
                    signal.signal(number, handler)
