"""Waiting for what another process does."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_POLL_SECONDS = 0.02


def wait_until(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Ask every 20 ms whether a condition holds, until it does.

    Args:
        condition: Asked once at least.
        timeout_s: How long, in seconds.
        what: It is, for the error.

    Raises:
        TimeoutError: It does not hold in time.
    """
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {timeout_s} s: {what}")
        time.sleep(_POLL_SECONDS)
