"""Tasks of one kind that LMCache's controllers submit, poll for by an event, and fetch the results of once."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Generic, TypeVar

from lmcache.v1.platform import create_event_notifier

from hfbucket_plugin.l2_locks import FORGOTTEN_SECS

if TYPE_CHECKING:
    from collections.abc import Callable

_Result = TypeVar("_Result")


class TaskBoard(Generic[_Result]):
    """Hands out task ids, keeps results until they are fetched, and signals each.

    Results of requests that LMCache aborted are never fetched, and are dropped after `FORGOTTEN_SECS`. After `close` all are,
    since their reader is gone and its event's descriptor may be another file's.

    Args:
        clock: Seconds, monotonic; tests pass their own.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._notifier = create_event_notifier()
        self.fd: int = self._notifier.fileno()
        self._lock = threading.Lock()
        self._next = 0
        self._results: dict[int, tuple[float, _Result]] = {}
        self._under_way = 0
        self._closed = False

    def begin(self) -> int:
        """A new task's id."""
        before = self._clock() - FORGOTTEN_SECS
        with self._lock:
            for task, (since, _) in list(self._results.items()):
                if since > before:
                    break
                del self._results[task]
            self._next += 1
            self._under_way += 1
            return self._next

    def finish(self, task: int, result: _Result) -> None:
        """Keep a task's result, and signal it."""
        with self._lock:
            self._under_way -= 1
            if self._closed:
                return
            self._results[task] = (self._clock(), result)
            self._notifier.notify()

    def take(self, task: int) -> _Result | None:
        """A task's result, once; None while there is none."""
        with self._lock:
            found = self._results.pop(task, None)
        return None if found is None else found[1]

    def take_all(self) -> dict[int, _Result]:
        """All results that were not fetched yet."""
        with self._lock:
            results, self._results = self._results, {}
        return {task: result for task, (_, result) in results.items()}

    @property
    def under_way(self) -> int:
        """Tasks without a result."""
        return self._under_way

    def close(self) -> None:
        """Signal no more."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._results.clear()
                self._notifier.close()
