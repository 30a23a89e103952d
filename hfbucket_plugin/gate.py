"""A bound on bytes in flight, shared by threads."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from typing import TYPE_CHECKING

from hfbucket_plugin import forks
from hfbucket_plugin.errors import UnsentError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hfbucket_plugin.deadlines import Deadline


class ByteGate:
    """Lets threads in, in the order in which they came, as long as what they hold together stays within a number of bytes.

    One that waits for much room thus holds up those behind it for a while, and is not passed by them for ever. One that wants more than the whole bound is let in alone: it would wait for ever otherwise.

    Args:
        limit: Most bytes.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._start_over()
        forks.reset_in_child(self._start_over)

    def _start_over(self) -> None:
        """Hold nothing: at first, and in a forked child, where those that held something do not run."""
        self._held = 0
        self._queue: deque[object] = deque()
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def hold(self, amount: int, deadline: Deadline, what: str) -> Iterator[None]:
        """Hold some bytes for the length of a `with` block.

        Raises:
            DeadlineError: There was no room before the deadline; the message names `what`.
        """
        wanted = min(amount, self._limit)
        turn = object()
        changed = self._changed
        with changed:
            self._queue.append(turn)
            try:
                if not changed.wait_for(
                    lambda: self._queue[0] is turn and self._held + wanted <= self._limit, deadline.remaining()
                ):
                    raise UnsentError(f"{what}: no room within {deadline.seconds:g} s; the call was abandoned")
                self._held += wanted
            finally:
                self._queue.remove(turn)
                changed.notify_all()
        try:
            yield
        finally:
            if changed is self._changed:  # else a fork began anew
                with changed:
                    self._held -= wanted
                    changed.notify_all()
