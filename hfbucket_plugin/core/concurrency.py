"""Bounded threads: a daemon pool, byte and read limits, and a call with a deadline."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections import OrderedDict, deque
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, Any, Final, ParamSpec, TypeVar

from hfbucket_plugin.core import forks
from hfbucket_plugin.core.deadline import Deadline
from hfbucket_plugin.errors import DeadlineError, UnsentError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class ByteSemaphore:
    """Semaphore that limits the bytes held by threads, and admits them in order of arrival.

    A thread that waits for much room delays those behind it, and is never overtaken for ever. One that wants more than
    the limit is admitted alone, because it would otherwise never be.

    Args:
        limit: Maximum number of bytes.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._start_over()
        forks.reset_in_child(self._start_over)

    def _start_over(self) -> None:
        """Reset to nothing held, initially and in a forked child, where the parent's holders do not run."""
        self._held = 0
        self._queue: deque[object] = deque()
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def hold(self, amount: int, deadline: Deadline, what: str) -> Iterator[None]:
        """Hold some bytes for the duration of a `with` block.

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
            if changed is self._changed:  # otherwise a fork has reset this
                with changed:
                    self._held -= wanted
                    changed.notify_all()


class ReadPriority:
    """Counter of reads in progress, for which writers wait."""

    def __init__(self) -> None:
        self._start_over()
        forks.reset_in_child(self._start_over)

    def _start_over(self) -> None:
        """Reset to no reads, initially and in a forked child, where the parent's reads do not continue."""
        self._reads = 0
        self._quiet = threading.Condition()

    @property
    def reads(self) -> int:
        """Number of reads in progress."""
        return self._reads

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Count as a read for the duration of a `with` block."""
        quiet = self._quiet
        with quiet:
            self._reads += 1
        try:
            yield
        finally:
            if quiet is self._quiet:  # otherwise a fork has reset this
                with quiet:
                    self._reads -= 1
                    if not self._reads:
                        quiet.notify_all()

    def let_reads_pass(self, deadline: Deadline) -> None:
        """Wait until no read is in progress, or until the deadline."""
        with self._quiet:
            self._quiet.wait_for(lambda: not self._reads, deadline.remaining())


_P = ParamSpec("_P")
_T = TypeVar("_T")
_Task = tuple["Future[Any]", "Callable[..., Any]", tuple[Any, ...], dict[str, Any]]

_log = logging.getLogger(__name__)


class WorkerPool:
    """Pool of daemon threads that run tasks in order; it starts threads as needed, plus a spare one, up to a maximum.

    Args:
        name: Prefix of the thread names.
        size: Maximum number of threads, and thus of concurrent tasks.
        backlog: Maximum number of waiting tasks; further ones are refused at once. 0 means no limit, for callers that
            limit their tasks themselves.
    """

    def __init__(self, name: str, size: int, backlog: int = 0) -> None:
        self._name = name
        self._size = size
        self._backlog = backlog
        self._closed = False
        self._start_over()
        forks.reset_in_child(self._start_over)

    def _start_over(self) -> None:
        """Reset to no threads, initially and in a forked child, where the parent's do not run."""
        self._tasks: queue.SimpleQueue[_Task | None] | _Turns = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads = 0
        self._idle = 0
        self._waiting = 0

    def submit(self, function: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
        """Run a function in the pool.

        Raises:
            RuntimeError: The pool is closed, its backlog is full, or the system has no thread left.
        """
        future: Future[_T] = Future()
        self._submit(lambda: self._tasks.put((future, function, args, kwargs)))
        return future

    def _submit(self, enqueue: Callable[[], None]) -> None:
        with self._lock:
            if self._closed:
                raise RuntimeError(f"worker pool {self._name} is closed")
            free = self._size - (self._threads - self._idle)  # threads that are idle or can still be started
            if self._backlog and self._waiting >= self._backlog + free:
                raise RuntimeError(f"worker pool {self._name} has {self._waiting} tasks waiting and takes no more")
            if not self._threads:
                self._start_thread()
            self._waiting += 1
            enqueue()

    def prepare(self) -> None:
        """Start the first thread, so that a first `submit` from an event loop does not wait for it.

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
        self._idle += 1  # idle from its start, so that the task it takes next does not count as waiting

    def _wants_successor(self) -> bool:
        """Return whether a thread that starts a task must start another thread, counted as idle from now on.

        This keeps one thread idle while more may be started, so that callers of `submit`, including event loops, start
        none: starting a thread waits for it, for up to 5 ms while others hold the GIL.
        """
        if self._idle or self._threads >= self._size or self._closed:
            return False
        self._threads += 1
        self._idle += 1
        return True

    def _start_successor(self) -> None:
        try:
            threading.Thread(target=self._run, name=f"{self._name}-{self._threads}", daemon=True).start()
        except RuntimeError:  # the system has no thread left: the tasks wait for the existing ones
            with self._lock:
                self._threads -= 1
                self._idle -= 1

    def close(self) -> None:
        """Refuse new tasks, and let each thread end after its present task. Does not wait."""
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
            self._performed(task[0])
            del task  # otherwise it would keep the task's buffers alive until the next task
            with self._lock:
                self._idle += 1

    def _performed(self, future: Future[Any]) -> None:
        """Record that a task has ended, or was cancelled before it began."""

    @staticmethod
    def _perform(
        future: Future[Any], function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            result = function(*args, **kwargs)
        except BaseException as error:  # noqa: BLE001 - the future passes it to the waiting caller
            future.set_exception(error)
        else:
            future.set_result(result)


class FairPool(WorkerPool):
    """Pool shared by requests: their tasks take turns, and requests with a waiting caller take precedence.

    A request of a thousand tasks thus delays a single task only by about the length of one task. Background tasks wait
    until no other task does, and never occupy all threads, because a task that hangs keeps its thread for long.

    Args:
        name: Prefix of the thread names.
        size: Maximum number of threads.
        background: Maximum number of threads for background tasks while others run; while none does, at most three
            quarters of all threads. Unlimited by default.
    """

    def __init__(self, name: str, size: int, background: int | None = None) -> None:
        self._background = size if background is None else background
        super().__init__(name, size)

    def _start_over(self) -> None:
        super()._start_over()
        idle = self._size if self._background == self._size else max(self._background, self._size * 3 // 4)
        self._turns = self._tasks = _Turns(self._background, idle)

    def submit_for(
        self,
        request: object,
        background: bool,
        function: Callable[_P, _T],
        /,
        *args: _P.args,
        **kwargs: _P.kwargs,
    ) -> Future[_T]:
        """Run a function in the pool when it is the turn of its request.

        Args:
            request: Request that the task belongs to, compared by identity.
            background: Whether no caller waits for it.
            function: Function to run.
            *args: Arguments of the function.
            **kwargs: Keyword arguments of the function.

        Raises:
            RuntimeError: See `WorkerPool.submit`.
        """
        future: Future[_T] = Future()
        self._submit(lambda: self._turns.add(request, (future, function, args, kwargs), background=background))
        return future

    def _performed(self, future: Future[Any]) -> None:
        self._turns.ended(future)


class _Turns:
    """Task queue for `WorkerPool` that takes one task of each request in turn."""

    def __init__(self, background: int, background_alone: int) -> None:
        self._ready = threading.Condition()
        self._online: OrderedDict[int, deque[_Task]] = OrderedDict()
        self._behind: OrderedDict[int, deque[_Task]] = OrderedDict()
        self._most_behind = max(1, background)
        self._most_behind_alone = max(1, background_alone)
        self._held: set[Future[Any]] = set()
        self._serving = 0
        self._ends = 0

    def put(self, task: _Task | None) -> None:
        """Add a task as a request of its own; None ends a thread when no task is left for it."""
        if task is not None:
            self.add(task[0], task, background=False)
            return
        with self._ready:
            self._ends += 1
            self._ready.notify()

    def add(self, request: object, task: _Task, *, background: bool) -> None:
        """Add a task of a request. The request's identity may be reused when all its tasks have begun."""
        with self._ready:
            (self._behind if background else self._online).setdefault(id(request), deque()).append(task)
            self._ready.notify()

    def get(self) -> _Task | None:
        """Return the next task, blocking until there is one; None ends the thread."""
        with self._ready:
            while True:
                if self._online:
                    self._serving += 1
                    return _take_turn(self._online)
                most = self._most_behind if self._serving else self._most_behind_alone
                if self._behind and len(self._held) < most:
                    task = _take_turn(self._behind)
                    self._held.add(task[0])
                    return task
                if self._ends:
                    self._ends -= 1
                    return None
                self._ready.wait()

    def ended(self, future: Future[Any]) -> None:
        """Record the end of a task, which may make room for a background task."""
        with self._ready:
            if future in self._held:
                self._held.discard(future)
                self._ready.notify()
            else:
                self._serving -= 1
                if not self._serving and self._behind:
                    self._ready.notify_all()


def _take_turn(requests: OrderedDict[int, deque[_Task]]) -> _Task:
    request, tasks = next(iter(requests.items()))
    task = tasks.popleft()
    if tasks:
        requests.move_to_end(request)
    else:
        del requests[request]
    return task


def result_of(future: Future[_T], deadline: Deadline, what: str) -> _T:
    """Wait for the result of a future until the deadline.

    Args:
        future: Future to wait for.
        deadline: When to give up.
        what: Name of the call, for errors.

    Raises:
        DeadlineError: The call did not end in time, or failed with this error.
        BaseException: The exception of the future.
    """
    if not wait([future], deadline.remaining()).done:
        raise DeadlineError(f"{what}: no answer within {deadline.seconds:g} s; the call was abandoned")
    return future.result()


_GRACE_SECS: Final = 0.5
"""Extra time in seconds for a call to raise its own deadline error, which says better what it was waiting for."""


def call_with_deadline(what: str, function: Callable[[Deadline], _T], seconds: float) -> _T:
    """Call a function with a deadline, on a daemon thread of its own.

    A client's timeout does not bound everything: name resolution and hf_xet's uploads have none.

    Args:
        what: Name of the call, for errors.
        function: Function to call with the deadline.
        seconds: Maximum time in seconds.

    Raises:
        DeadlineError: The call did not end in time. Its thread continues, and its result is dropped.
        BaseException: The exception of the function.
    """
    pool = WorkerPool("hfbucket-cli", 1)
    try:
        future = pool.submit(function, Deadline.after(seconds))
        return result_of(future, Deadline(time.monotonic() + seconds + _GRACE_SECS, seconds), what)
    finally:
        pool.close()
