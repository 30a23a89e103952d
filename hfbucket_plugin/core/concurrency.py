"""Threads with bounds: a daemon pool, byte and read limits, and one call with a deadline."""

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
    """Lets threads in, in the order in which they came, as long as what they hold together stays within a number of bytes.

    One that waits for much room thus holds up those behind it for a while, and is not skipped them for ever. One that wants more than the whole bound is let in alone: it would wait for ever otherwise.

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
            if changed is self._changed:  # else a fork started over
                with changed:
                    self._held -= wanted
                    changed.notify_all()


class ReadPriority:
    """Counts reads in progress, and lets writers wait until there are none."""

    def __init__(self) -> None:
        self._start_over()
        forks.reset_in_child(self._start_over)

    def _start_over(self) -> None:
        """Count none: at first, and in a forked child, where those of the parent do not go on."""
        self._reads = 0
        self._quiet = threading.Condition()

    @property
    def reads(self) -> int:
        """Reads in progress."""
        return self._reads

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Be counted as a read for the length of a `with` block."""
        quiet = self._quiet
        with quiet:
            self._reads += 1
        try:
            yield
        finally:
            if quiet is self._quiet:  # else a fork started over
                with quiet:
                    self._reads -= 1
                    if not self._reads:
                        quiet.notify_all()

    def let_reads_pass(self, deadline: Deadline) -> None:
        """Wait until no read is in progress, at most until a deadline."""
        with self._quiet:
            self._quiet.wait_for(lambda: not self._reads, deadline.remaining())


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
        forks.reset_in_child(self._start_over)

    def _start_over(self) -> None:
        """Begin without threads: at first, and in a forked child, where those of the parent do not run."""
        self._tasks: queue.SimpleQueue[_Task | None] | _Turns = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads = 0
        self._idle = 0
        self._waiting = 0

    def submit(self, function: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
        """Run a function on one of the threads.

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
            free = self._size - (self._threads - self._idle)  # threads that are idle, or may yet be started
            if self._backlog and self._waiting >= self._backlog + free:
                raise RuntimeError(f"worker pool {self._name} has {self._waiting} tasks waiting and takes no more")
            if not self._threads:
                self._start_thread()
            self._waiting += 1
            enqueue()

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
            self._performed(task[0])
            del task  # else it would keep the last task's buffers alive until the next one comes
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
        except BaseException as error:  # noqa: BLE001 - the future carries it to the waiter
            future.set_exception(error)
        else:
            future.set_result(result)


class FairPool(WorkerPool):
    """A pool that requests share: their tasks take turns, and those of requests that somebody waits for go first.

    A request of a thousand tasks thus delays one of a single task by about the length of a task, not by its own. Tasks in
    the background wait until no other task does, and never hold all threads: one that hangs keeps its thread for long.

    Args:
        name: See `WorkerPool`.
        size: Most threads.
        background: Most of them that tasks in the background take while others run; while none does, three quarters of all
            threads at most. By default there is no limit.
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
        """Run a function on one of the threads when it is the turn of its request.

        Args:
            request: Tells whose task it is; by its identity.
            background: Whether no caller waits for it.
            function: What to run.
            *args: Its arguments.
            **kwargs: The same.

        Raises:
            RuntimeError: See `submit`.
        """
        future: Future[_T] = Future()
        self._submit(lambda: self._turns.add(request, (future, function, args, kwargs), background=background))
        return future

    def _performed(self, future: Future[Any]) -> None:
        self._turns.ended(future)


class _Turns:
    """Tasks of many requests, one of each at a time; a queue as `WorkerPool` takes it."""

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
        """Add a task that is a request by itself; None ends a thread when no task is left for it."""
        if task is not None:
            self.add(task[0], task, background=False)
            return
        with self._ready:
            self._ends += 1
            self._ready.notify()

    def add(self, request: object, task: _Task, *, background: bool) -> None:
        """Add a task of a request. Its identity may be used again when all its tasks have begun."""
        with self._ready:
            (self._behind if background else self._online).setdefault(id(request), deque()).append(task)
            self._ready.notify()

    def get(self) -> _Task | None:
        """The next task; blocks until there is one. None when its thread is to end."""
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
        """Record the end of a task: it may make room for one in the background."""
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
    """Wait for the result of a future, as long as there is time.

    Args:
        future: What to wait for.
        deadline: When to give up.
        what: Names the call in errors.

    Raises:
        DeadlineError: It did not end in time, or failed with this error itself.
        BaseException: What it failed with.
    """
    if not wait([future], deadline.remaining()).done:
        raise DeadlineError(f"{what}: no answer within {deadline.seconds:g} s; the call was abandoned")
    return future.result()


_GRACE_SECS: Final = 0.5
"""A call that notices its deadline itself says better what it was waiting for: it gets so much longer to say it."""


def call_with_deadline(what: str, function: Callable[[Deadline], _T], seconds: float) -> _T:
    """Call a function with a deadline, on a thread of its own that never keeps the process from ending.

    A client's timeout does not bound everything: resolving a name has none, and neither have hf_xet's uploads.

    Args:
        what: Names the call in errors.
        function: Given the deadline.
        seconds: How long it may take.

    Raises:
        DeadlineError: It did not end in time. Its thread goes on, and its outcome is dropped.
        BaseException: What the function raised.
    """
    pool = WorkerPool("hfbucket-cli", 1)
    try:
        future = pool.submit(function, Deadline.after(seconds))
        return result_of(future, Deadline(time.monotonic() + seconds + _GRACE_SECS, seconds), what)
    finally:
        pool.close()
