"""A plan, carried out: batches side by side, each after the lock was confirmed, retried for what failed of it only."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import time
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Generic, Protocol

from hfbucket_plugin.core.concurrency import WorkerPool
from hfbucket_plugin.core.deadline import Deadline
from hfbucket_plugin.errors import ConfigError, HFBucketError, ThrottledError, TransportError
from hfbucket_plugin.hub.bucket import MAX_BATCH
from jobs.batch.model import ItemBatch, Result, T

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from datetime import datetime

    from hfbucket_plugin.tools.signals import Stop
    from jobs.batch.model import ItemOutcome

_log = logging.getLogger(__name__)

_LOOK_SECS: Final = 0.2
"""How often to look whether to stop, while nothing ends."""

_BACKOFF_SECS: Final = 0.5
_ATTEMPT_SECS: Final = 60.0
"""Most seconds of a try, far less than the lock holds."""

_LOST_SECS: Final = 10.0
"""A try that has not ended so long after it should have is lost."""

_KEEP_SECS: Final = 5.0
"""How long to leave the Hub alone after the lock could not be renewed, while tries are in progress."""


class Executor(Protocol[T]):
    """Where batches are tried."""

    width: int
    """How many at one time."""

    def submit(
        self, batch: ItemBatch[T], not_after: datetime, seconds: float, lock_end: datetime | None
    ) -> Future[Result[T]]:
        """Begin a try at a batch.

        Args:
            batch: What it is about.
            not_after: See `jobs.deletion.attempt.attempt`.
            seconds: How long it may take, from now on.
            lock_end: When, by the Hub's clock, nothing more may be deleted; None where nothing is.
        """

    def lose(self, future: Future[Result[T]]) -> None:
        """Give a try up that should have ended long ago; where that is possible, it ends by this."""

    def close(self) -> None:
        """Begin no more."""


class InProcess(Generic[T]):
    """Batches on threads of this process.

    Args:
        name: Names the threads.
        width: How many at one time.
        attempt: Makes one attempt at a batch; see `Executor.submit` for its first two arguments. The third is its deadline.
    """

    def __init__(self, name: str, width: int, attempt: Callable[[ItemBatch[T], datetime, Deadline], Result[T]]) -> None:
        self.width = width
        self._attempt = attempt
        self._pool = WorkerPool(name, width)

    def submit(
        self, batch: ItemBatch[T], not_after: datetime, seconds: float, _lock_end: datetime | None
    ) -> Future[Result[T]]:
        """Begin an attempt at a batch. However late its thread gets to it, it ends in time."""
        return self._pool.submit(self._attempt, batch, not_after, Deadline.after(seconds))

    def lose(self, _future: Future[Result[T]]) -> None:
        """Threads end by themselves: every request has its deadline."""

    def close(self) -> None:
        """Begin no more."""
        self._pool.close()


_RAY_VARIABLES: Final = ("RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR")
"""Without one of them no cluster is configured (`warmer.cluster.ray`)."""


def in_process(address: str | None, *, local: bool, at_once: bool = False) -> bool:
    """Whether to delete in this process: when that was asked for, or no Ray cluster is configured.

    Args:
        address: `--address`.
        local: `--local`.
        at_once: Whether the cluster is needed for sure. Else an address of the environment that cannot be joined is an error only
            when the cluster is to be joined: a command that only plans, or copies to a directory, joins none.

    Raises:
        ConfigError: The address is of a kind that cannot be used.
    """
    if local or not (address or any(os.environ.get(name) for name in _RAY_VARIABLES)):
        return True
    from warmer.cluster.ray import configured_address  # noqa: PLC0415 - Ray takes a second to import

    try:
        return configured_address(address) is None
    except ConfigError:
        if address or at_once:
            raise
        return False


@dataclass(frozen=True, slots=True)
class ApplyResult:
    """How applying ended.

    Attributes:
        why: None when the plan was carried out to its end; else why it was not.
    """

    why: HFBucketError | OSError | None = None
    stopped: bool = False


class Applier(Generic[T]):
    """Carries plans out.

    Args:
        executor: Where batches are tried.
        confirm: Makes sure that the lock is held, and says for how many seconds it is; raises when it is not.
        lock_end: Until when, by the Hub's clock, it then is.
        keep: Keeps the lock meanwhile; raises when it is not held.
        not_after: An object that was uploaded later is too young.
        on_end: Is told of every object that has ended.
        stop: Whether to stop.
        until: When to begin no more.
        batch_size: Most objects of a batch.
        batch_bytes: Most bytes of a batch of several; None for no bound.
        attempt_secs: Most seconds of a try.

    Attributes:
        undrained: Whether `run` broke off while tries were in progress that did not end.
    """

    def __init__(
        self,
        executor: Executor[T],
        *,
        confirm: Callable[[], float],
        not_after: datetime,
        on_end: Callable[[ItemOutcome[T]], None],
        stop: Stop,
        until: Deadline,
        batch_size: int = MAX_BATCH,
        batch_bytes: int | None = None,
        attempt_secs: float = _ATTEMPT_SECS,
        lock_end: Callable[[], datetime | None] = lambda: None,
        keep: Callable[[], None] = lambda: None,
    ) -> None:
        self._executor = executor
        self._confirm = confirm
        self._not_after = not_after
        self._on_end = on_end
        self._stop = stop
        self._until = until
        self._size = min(batch_size, MAX_BATCH)
        self._batch_bytes = batch_bytes
        self._attempt_secs = attempt_secs
        self._lock_end = lock_end
        self._keep = keep
        self._keep_at = 0.0
        self.undrained = False
        self._fresh: Iterator[ItemBatch[T]] = iter(())
        self._exhausted = False
        self._again: list[tuple[float, ItemBatch[T]]] = []
        self._quiet_until = 0.0
        self._why: HFBucketError | OSError | None = None

    def run(self, items: Iterator[T]) -> ApplyResult:
        """Do what is still as planned. Returns when all has ended that was begun.

        An error waits for what was begun, too, and counts it: nothing is deleted after this has ended, unless `undrained`.
        """
        self._fresh, self._exhausted, self._why = _batches(items, self._size, self._batch_bytes), False, None
        running: dict[Future[Result[T]], float] = {}
        try:
            while True:
                self._feed(running)
                if running:
                    for future in self._ended(running):
                        self._take(future)
                    self._keep_lock()
                elif self._over or (self._exhausted and not self._again):
                    return ApplyResult(self._why, self._stop.requested)
                else:
                    time.sleep(min(_LOOK_SECS, _BACKOFF_SECS))
        except BaseException as error:
            # A second order to stop does not wait for long.
            self._drain(running, self._attempt_secs + 2 * _LOST_SECS if isinstance(error, Exception) else _LOOK_SECS)
            raise

    def _drain(self, running: dict[Future[Result[T]], float], seconds: float) -> None:
        """Wait for what is in progress, and count it; nothing new is begun."""
        self.undrained = bool(running)
        until = Deadline.after(seconds)
        while running:
            for future in self._ended(running):
                with contextlib.suppress(Exception):  # one error is being told already
                    self._take(future)
            if until.passed:
                break
        self.undrained = bool(running)

    def _ended(self, running: dict[Future[Result[T]], float]) -> Iterator[Future[Result[T]]]:
        """Tries that have ended, taken out of those that are in progress; what should have, long ago, is given up."""
        done, _ = wait(running, _LOOK_SECS, FIRST_COMPLETED)
        for future in done:
            del running[future]
            yield future
        late = [future for future, lost_at in running.items() if time.monotonic() >= lost_at]
        for future in late:
            running[future] = math.inf
            self._executor.lose(future)

    def _keep_lock(self) -> None:
        """Keep the lock while tries are in progress: those who wait for it must not get it before they have ended."""
        if self._why is not None or time.monotonic() < self._keep_at:
            return
        try:
            self._keep()
        except (ThrottledError, TransportError) as error:
            _log.warning("the lock could not be renewed yet: %s", error)
            self._keep_at = time.monotonic() + _KEEP_SECS
        except HFBucketError as error:
            self._why = error

    def _feed(self, running: dict[Future[Result[T]], float]) -> None:
        """Begin as many batches as may run."""
        while not self._over and len(running) < self._executor.width and (batch := self._next()) is not None:
            try:
                seconds = min(self._attempt_secs, self._confirm())
            except (ThrottledError, TransportError) as error:  # nobody knows whether the lock is ours
                self._hold(batch, error)
            except HFBucketError as error:
                self._why = error
            else:
                future = self._executor.submit(batch, self._not_after, seconds, self._lock_end())
                running[future] = time.monotonic() + seconds + _LOST_SECS

    @property
    def _over(self) -> bool:
        return self._why is not None or self._stop.requested or self._until.passed

    def _next(self) -> ItemBatch[T] | None:
        """The batch that is due; None where there is none now."""
        now = time.monotonic()
        if now < self._quiet_until:
            return None
        for place, (ready_at, batch) in enumerate(self._again):
            if ready_at <= now:
                del self._again[place]
                return batch
        batch_or_none = next(self._fresh, None)
        self._exhausted = batch_or_none is None
        return batch_or_none

    def _hold(self, batch: ItemBatch[T], error: HFBucketError) -> None:
        asked = error.retry_after if isinstance(error, ThrottledError) else None
        _log.warning("waiting, since the lock could not be confirmed: %s", error)
        self._be_quiet(asked or _BACKOFF_SECS)
        self._again.append((0.0, batch))

    def _take(self, future: Future[Result[T]]) -> None:
        try:
            result = future.result()
        except (HFBucketError, OSError) as error:  # an OSError is a disk's
            self._why = self._why or error
            return
        for ended in result.ended:
            self._on_end(ended)
        if result.wait_secs:
            self._be_quiet(result.wait_secs)
        if result.left is not None:
            backoff = _BACKOFF_SECS * 2**result.left.tries if result.left.tries else 0.0
            self._again.append((time.monotonic() + backoff, result.left))

    def _be_quiet(self, seconds: float) -> None:
        self._quiet_until = max(self._quiet_until, time.monotonic() + seconds)


def _batches(items: Iterator[T], size: int, most_bytes: int | None) -> Iterator[ItemBatch[T]]:
    if most_bytes is None:
        while batch := tuple(itertools.islice(items, size)):
            yield ItemBatch(batch)
        return
    taken: list[T] = []
    nbytes = 0
    for item in items:
        if taken and (len(taken) == size or nbytes + item.size > most_bytes):
            yield ItemBatch(tuple(taken))
            taken, nbytes = [], 0
        taken.append(item)
        nbytes += item.size
    if taken:
        yield ItemBatch(tuple(taken))
