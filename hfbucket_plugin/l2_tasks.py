"""Tasks of one kind that LMCache's controllers submit, poll for by an event, and fetch the results of once."""

from __future__ import annotations

import threading
from typing import Generic, TypeVar

from lmcache.v1.platform import create_event_notifier

_Result = TypeVar("_Result")


class TaskBoard(Generic[_Result]):
    """Hands out task ids, keeps results until they are fetched, and signals each.

    After `close` results are thrown away, since their reader is gone and its event's descriptor may be another file's.
    """

    def __init__(self) -> None:
        self._notifier = create_event_notifier()
        self.fd: int = self._notifier.fileno()
        self._lock = threading.Lock()
        self._next = 0
        self._results: dict[int, _Result] = {}
        self._under_way = 0
        self._closed = False

    def begin(self) -> int:
        """A new task's id."""
        with self._lock:
            self._next += 1
            self._under_way += 1
            return self._next

    def finish(self, task: int, result: _Result) -> None:
        """Keep a task's result, and signal it."""
        with self._lock:
            self._under_way -= 1
            if self._closed:
                return
            self._results[task] = result
            self._notifier.notify()

    def take(self, task: int) -> _Result | None:
        """A task's result, once; None while there is none."""
        with self._lock:
            return self._results.pop(task, None)

    def take_all(self) -> dict[int, _Result]:
        """All results that were not fetched yet."""
        with self._lock:
            results, self._results = self._results, {}
            return results

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
