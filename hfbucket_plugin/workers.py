"""Threads for blocking work, which never keep a process from ending.

`concurrent.futures.ThreadPoolExecutor` joins its threads when the interpreter exits: a thread that is blocked in a dead
connection would hold up an engine's shutdown. These threads are daemons; whoever waits for one does so up to a deadline.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

_P = ParamSpec("_P")
_T = TypeVar("_T")
_Task = tuple["Future[Any]", "Callable[..., Any]", tuple[Any, ...], dict[str, Any]]

_log = logging.getLogger(__name__)


class WorkerPool:
    """At most a fixed number of daemon threads, one more than were ever busy, that take tasks in their order.

    Args:
        name: Names the threads, for stack dumps.
        size: Most threads, and so most tasks that run at one time.
        backlog: Most tasks that wait; one more is refused at once instead of being queued without end. 0: no bound,
            for callers that bound their tasks themselves.
    """

    def __init__(self, name: str, size: int, backlog: int = 0) -> None:
        self._name = name
        self._size = size
        self._backlog = backlog
        self._closed = False
        self._start_over()

    def _start_over(self) -> None:
        """Begin without threads: at first, and in a forked child, where those of the parent do not run."""
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads = 0
        self._idle = 0
        self._waiting = 0
        self._pid = os.getpid()

    def submit(self, function: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
        """Run a function on one of the threads.

        Raises:
            RuntimeError: The pool is closed, its backlog is full, or the system has no thread left.
        """
        future: Future[_T] = Future()
        if self._pid != os.getpid():
            self._start_over()
        with self._lock:
            if self._closed:
                raise RuntimeError(f"worker pool {self._name} is closed")
            free = self._size - (self._threads - self._idle)  # threads that are idle, or may yet be started
            if self._backlog and self._waiting >= self._backlog + free:
                raise RuntimeError(f"worker pool {self._name} has {self._waiting} tasks waiting and takes no more")
            if not self._threads:
                self._start_thread()
            self._waiting += 1
            self._tasks.put((future, function, args, kwargs))
        return future

    def prepare(self) -> None:
        """Have the first thread started, so that a first `submit` from an event loop does not wait for it.

        Raises:
            RuntimeError: The system has no thread left.
        """
        with self._lock:
            if not self._threads and not self._closed:
                self._start_thread()

    def _start_thread(self) -> None:
        number = self._threads + 1
        threading.Thread(target=self._run, name=f"{self._name}-{number}", daemon=True).start()
        self._threads = number
        self._idle += 1  # from its birth, so that what it will take up at once is not counted as waiting

    def _wants_successor(self) -> bool:
        """Whether a thread that goes to work starts another one, counted as idle from now on.

        So there is always an idle one as long as there may be more, and those who submit, event loops among them,
        start none: starting a thread waits for it, up to 5 ms while others hold the GIL.
        """
        if self._idle or self._threads >= self._size or self._closed:
            return False
        self._threads += 1
        self._idle += 1
        return True

    def _start_successor(self) -> None:
        try:
            threading.Thread(target=self._run, name=f"{self._name}-{self._threads}", daemon=True).start()
        except RuntimeError:  # the system has none left: the tasks wait for those there are
            with self._lock:
                self._threads -= 1
                self._idle -= 1

    def close(self) -> None:
        """Take no more tasks, and let each thread end when its present task does. Does not wait."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            for _ in range(self._threads):
                self._tasks.put(None)

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            with self._lock:
                self._idle -= 1
                self._waiting -= 1
                successor = self._wants_successor()
            if successor:
                self._start_successor()
            self._perform(*task)
            del task  # else it would keep the last task's buffers alive until the next one comes
            with self._lock:
                self._idle += 1

    @staticmethod
    def _perform(
        future: Future[Any], function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            result = function(*args, **kwargs)
        except BaseException as error:  # noqa: BLE001 - the future carries it to whoever waits
            future.set_exception(error)
        else:
            future.set_result(result)
