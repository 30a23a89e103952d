"""Reset of state in forked children, where the parent's threads, which may have held locks, do not run."""

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
"""Objects and their reset methods. A `WeakMethod` would raise at the end of the interpreter."""

_numbers = itertools.count()


def reset_in_child(reset: Callable[[], None]) -> None:
    """Register a method that a forked child calls before anything else, to recreate locks and state.

    Args:
        reset: Bound method. Its object is not kept alive; the method must not wait or start a thread.
    """
    number = next(_numbers)
    method = cast("MethodType", reset)
    forget = partial(_resets.pop, number)  # bound now, because the name may be gone at the interpreter's end
    _resets[number] = weakref.ref(method.__self__, lambda _gone: forget(None)), method.__func__


class ForkSafeLock:
    """Lock that is free in a forked child, whichever thread of the parent held it. Use it with `with`."""

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
