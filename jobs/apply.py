"""A plan, carried out: batches side by side, each after the lock was confirmed, retried for what failed of it only."""

from __future__ import annotations

import itertools
import logging
import time
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Generic, Protocol

from hfbucket_plugin.bucket import MAX_BATCH
from hfbucket_plugin.errors import HFBucketError, ThrottledError, TransportError
from hfbucket_plugin.workers import WorkerPool
from jobs.batch import Batch, Result, T, attempt

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from datetime import datetime

    from hfbucket_plugin.bucket import Bucket
    from hfbucket_plugin.deadlines import Deadline
    from jobs.batch import Ended
    from jobs.plan import Item

_log = logging.getLogger(__name__)

_LOOK_SECS: Final = 0.2
"""How often to look whether to stop, while nothing ends."""

_BACKOFF_SECS: Final = 0.5
_ATTEMPT_SECS: Final = 60.0
"""Most seconds of a try, far less than the lock holds."""


class Executor(Protocol[T]):
    """Where batches are tried."""

    width: int
    """How many at one time."""

    def submit(self, batch: Batch[T], not_after: datetime, seconds: float) -> Future[Result[T]]:
        """Begin a try at a batch (see `jobs.batch.attempt`)."""

    def close(self) -> None:
        """Begin no more."""


class InProcess:
    """Batches on threads of this process.

    Args:
        bucket: The instance's.
        width: How many at one time.
    """

    def __init__(self, bucket: Bucket, width: int) -> None:
        self.width = width
        self._bucket = bucket
        self._pool = WorkerPool("jobs-delete", width)

    def submit(self, batch: Batch[Item], not_after: datetime, seconds: float) -> Future[Result[Item]]:
        """Begin a try at a batch."""
        return self._pool.submit(attempt, self._bucket, batch, not_after, seconds)

    def close(self) -> None:
        """Begin no more."""
        self._pool.close()


class Stop(Protocol):
    """Whether to stop."""

    @property
    def requested(self) -> bool:
        """Whether an order came."""


@dataclass(frozen=True, slots=True)
class End:
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
        not_after: An object that was uploaded later is too young.
        told: Is told of every object that has ended.
        stop: Whether to stop.
        until: When to begin no more.
        batch_size: Most objects of a batch.
        batch_bytes: Most bytes of a batch of several; None for no bound.
        attempt_secs: Most seconds of a try.
    """

    def __init__(
        self,
        executor: Executor[T],
        *,
        confirm: Callable[[], float],
        not_after: datetime,
        told: Callable[[Ended[T]], None],
        stop: Stop,
        until: Deadline,
        batch_size: int = MAX_BATCH,
        batch_bytes: int | None = None,
        attempt_secs: float = _ATTEMPT_SECS,
    ) -> None:
        self._executor = executor
        self._confirm = confirm
        self._not_after = not_after
        self._told = told
        self._stop = stop
        self._until = until
        self._size = min(batch_size, MAX_BATCH)
        self._batch_bytes = batch_bytes
        self._attempt_secs = attempt_secs
        self._fresh: Iterator[Batch[T]] = iter(())
        self._exhausted = False
        self._again: list[tuple[float, Batch[T]]] = []
        self._quiet_until = 0.0
        self._why: HFBucketError | OSError | None = None

    def run(self, items: Iterator[T]) -> End:
        """Do what is still as planned. Returns when all has ended that was begun."""
        self._fresh, self._exhausted, self._why = _batches(items, self._size, self._batch_bytes), False, None
        running: set[Future[Result[T]]] = set()
        while True:
            self._feed(running)
            if running:
                done, running = wait(running, _LOOK_SECS, FIRST_COMPLETED)
                for future in done:
                    self._take(future)
            elif self._over or (self._exhausted and not self._again):
                return End(self._why, self._stop.requested)
            else:
                time.sleep(min(_LOOK_SECS, _BACKOFF_SECS))

    def _feed(self, running: set[Future[Result[T]]]) -> None:
        """Begin as many batches as may run."""
        while not self._over and len(running) < self._executor.width and (batch := self._next()) is not None:
            try:
                seconds = min(self._attempt_secs, self._confirm())
            except (ThrottledError, TransportError) as error:  # nobody knows whether the lock is ours
                self._hold(batch, error)
            except HFBucketError as error:
                self._why = error
            else:
                running.add(self._executor.submit(batch, self._not_after, seconds))

    @property
    def _over(self) -> bool:
        return self._why is not None or self._stop.requested or self._until.passed

    def _next(self) -> Batch[T] | None:
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

    def _hold(self, batch: Batch[T], error: HFBucketError) -> None:
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
            self._told(ended)
        if result.wait_secs:
            self._be_quiet(result.wait_secs)
        if result.left is not None:
            backoff = _BACKOFF_SECS * 2**result.left.tries if result.left.tries else 0.0
            self._again.append((time.monotonic() + backoff, result.left))

    def _be_quiet(self, seconds: float) -> None:
        self._quiet_until = max(self._quiet_until, time.monotonic() + seconds)


def _batches(items: Iterator[T], size: int, most_bytes: int | None) -> Iterator[Batch[T]]:
    if most_bytes is None:
        while batch := tuple(itertools.islice(items, size)):
            yield Batch(batch)
        return
    taken: list[T] = []
    nbytes = 0
    for item in items:
        if taken and (len(taken) == size or nbytes + item.size > most_bytes):
            yield Batch(tuple(taken))
            taken, nbytes = [], 0
        taken.append(item)
        nbytes += item.size
    if taken:
        yield Batch(tuple(taken))
