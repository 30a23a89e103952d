"""The signals that end a process, made to raise where something must be cleaned up first."""

from __future__ import annotations

import contextlib
import signal
from typing import TYPE_CHECKING, Any, Final, Self

if TYPE_CHECKING:
    from collections.abc import Iterator

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_EXIT_BASE: Final = 128
"""What a shell adds to the number of the signal that ended a command."""


class EndingSignals:
    """While it is entered, a signal that would end the process raises `SystemExit` in the main thread, once.

    Inside `held` it waits until the block is over: for the cleaning up itself.
    """

    def __init__(self) -> None:
        self._held = False
        self._waiting: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in _SIGNALS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):  # what nohup has us ignore stays ignored
                self._before[number] = signal.signal(number, self._receive)
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
