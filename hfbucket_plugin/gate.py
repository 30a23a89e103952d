"""A bound on bytes in flight, shared by threads."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

from hfbucket_plugin.errors import DeadlineError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hfbucket_plugin.deadlines import Deadline


class ByteGate:
    """Lets threads in as long as what they hold together stays within a number of bytes.

    One that wants more than the whole bound is let in alone: it would wait for ever otherwise.

    Args:
        limit: Most bytes.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = 0
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def hold(self, amount: int, deadline: Deadline, what: str) -> Iterator[None]:
        """Hold some bytes for the length of a `with` block.

        Raises:
            DeadlineError: There was no room before the deadline; the message names `what`.
        """
        wanted = min(amount, self._limit)
        with self._changed:
            if not self._changed.wait_for(lambda: self._held + wanted <= self._limit, deadline.remaining()):
                raise DeadlineError(f"{what}: no room within {deadline.seconds:g} s; the call was abandoned")
            self._held += wanted
        try:
            yield
        finally:
            with self._changed:
                self._held -= wanted
                self._changed.notify_all()
