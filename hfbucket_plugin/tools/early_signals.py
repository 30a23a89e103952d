"""Signals that come before a command takes them itself, such as while it imports what it needs."""

from __future__ import annotations

import os
import signal
from typing import Any, Final, NoReturn

_EXIT_BASE: Final = 128
"""What a shell adds to the number of the signal that ended a command."""


def end_by_signals(code: int | None = None) -> None:
    """Let SIGINT and SIGTERM end this process without a traceback, from now on until somebody else takes them.

    For the start of a command: what it imports takes seconds.

    Args:
        code: The exit code; None for what a shell tells of a signal.
    """

    def receive(number: int, _: Any) -> NoReturn:
        os.write(2, b"told to stop\n")  # whatever else is being written at this moment
        raise SystemExit(_EXIT_BASE + number if code is None else code)

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) not in (signal.SIG_IGN, None):
            signal.signal(number, receive)
