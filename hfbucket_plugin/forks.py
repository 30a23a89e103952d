"""What a forked child does with state of its parent's: threads that held locks, or were to undo what they did, do not run there."""

from __future__ import annotations

import itertools
import os
import threading
from typing import TYPE_CHECKING
from weakref import WeakMethod

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

_resets: dict[int, WeakMethod[Callable[[], None]]] = {}
_numbers = itertools.count()


def reset_in_child(reset: Callable[[], None]) -> None:
    """Have a method called in a forked child, before anything else runs there: it makes locks and state anew.

    Args:
        reset: A bound method. Its object is not kept alive; the method waits for nothing and starts no thread.
    """
    number = next(_numbers)
    _resets[number] = WeakMethod(reset, lambda _gone: _resets.pop(number, None))


class Lock:
    """A lock that is free in a forked child, whichever thread of the parent held it. Use it with `with`."""

    def __init__(self) -> None:
        self._renew()
        reset_in_child(self._renew)

    def _renew(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()


def _reset_all() -> None:
    for reference in list(_resets.values()):
        if (reset := reference()) is not None:
            reset()


os.register_at_fork(after_in_child=_reset_all)
