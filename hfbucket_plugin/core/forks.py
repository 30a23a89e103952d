"""What a forked child does with state of its parent's: threads that held locks, or were to undo what they did, do not run there."""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from functools import partial
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import MethodType, TracebackType

_resets: dict[int, tuple[weakref.ref[object], Callable[..., None]]] = {}
"""Objects, and what of theirs is called. A `WeakMethod` fails aloud where it ends with the interpreter."""

_numbers = itertools.count()


def reset_in_child(reset: Callable[[], None]) -> None:
    """Have a method called in a forked child, before anything else runs there: it recreates locks and state.

    Args:
        reset: A bound method. Its object is not kept alive; the method waits for nothing and starts no thread.
    """
    number = next(_numbers)
    method = cast("MethodType", reset)
    forget = partial(_resets.pop, number)  # bound: at the interpreter's end the name may be gone
    _resets[number] = weakref.ref(method.__self__, lambda _gone: forget(None)), method.__func__


class ForkSafeLock:
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
    for reference, reset in list(_resets.values()):
        if (owner := reference()) is not None:
            reset(owner)


os.register_at_fork(after_in_child=_reset_all)
