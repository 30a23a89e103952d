"""Application of a plan in concurrent batches; the lock is confirmed before each, and only failed items are retried."""

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
"""Seconds between checks for a stop request while no try ends."""

_BACKOFF_SECS: Final = 0.5
_ATTEMPT_SECS: Final = 60.0
"""Maximum duration of a try in seconds, far less than the lifetime of the lock."""

_LOST_SECS: Final = 10.0
"""Seconds after its deadline at which a try that has not ended counts as lost."""

_KEEP_SECS: Final = 5.0
"""Seconds without requests after a failed renewal of the lock while tries are in progress."""


class Executor(Protocol[T]):
    """Backend that runs tries at batches."""

    width: int
    """Maximum number of concurrent tries."""

    def submit(
        self, batch: ItemBatch[T], not_after: datetime, seconds: float, lock_end: datetime | None
    ) -> Future[Result[T]]:
        """Start a try at a batch.

        Args:
            batch: The items to process.
            not_after: Objects uploaded later are too young; see `jobs.deletion.attempt.attempt`.
            seconds: Maximum duration of the try, from now.
            lock_end: Time, by the Hub's clock, after which nothing may be deleted; None for work that deletes nothing.
        """

    def lose(self, future: Future[Result[T]]) -> None:
        """Give up a try that is far past its deadline, and end it if possible."""

    def close(self) -> None:
        """Stop accepting batches."""


class InProcess(Generic[T]):
    """Executor that runs batches on threads of this process.

    Args:
        name: Prefix of the thread names.
        width: Maximum number of concurrent batches.
        attempt: Function that makes one try at a batch. Its first two arguments are those of `Executor.submit`;
            the third is its deadline.
    """

    def __init__(self, name: str, width: int, attempt: Callable[[ItemBatch[T], datetime, Deadline], Result[T]]) -> None:
        self.width = width
        self._attempt = attempt
        self._pool = WorkerPool(name, width)

    def submit(
        self, batch: ItemBatch[T], not_after: datetime, seconds: float, _lock_end: datetime | None
    ) -> Future[Result[T]]:
        """Start a try at a batch. Its deadline counts from now, even if its thread starts late."""
        return self._pool.submit(self._attempt, batch, not_after, Deadline.after(seconds))

    def lose(self, _future: Future[Result[T]]) -> None:
        """Do nothing: threads end by themselves, because every request has a deadline."""

    def close(self) -> None:
        """Stop accepting batches."""
        self._pool.close()


_RAY_VARIABLES: Final = ("RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR")
"""Environment variables; if none is set, no Ray cluster is configured (`warmer.cluster.ray`)."""


def in_process(address: str | None, *, local: bool, at_once: bool = False) -> bool:
    """Return whether to work in this process: if requested, or if no Ray cluster is configured.

    Args:
        address: Value of `--address`.
        local: Value of `--local`.
        at_once: Whether the cluster is certainly needed. If false, an unusable address from the environment is an error
            only
            only when the cluster is joined: commands that only plan, or that copy to a directory, join none.

    Raises:
        ConfigError: If the address is of an unsupported kind.
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
    """Result of the application of a plan.

    Attributes:
        why: Why the plan was not carried out to its end; None if it was.
    """

    why: HFBucketError | OSError | None = None
    stopped: bool = False


class Applier(Generic[T]):
    """Applies a plan with an executor.

    Args:
        executor: Backend that runs the tries.
        confirm: Confirms that the lock is held, and returns the seconds for which it is; raises if it is not.
        lock_end: Returns the end of the confirmed lock, by the Hub's clock.
        keep: Renews the lock when due; raises if it is not held.
        not_after: Objects uploaded later are too young.
        on_end: Called with the outcome of every object.
        stop: Signal that requests a stop.
        until: Deadline after which no try starts.
        batch_size: Maximum number of objects per batch.
        batch_bytes: Maximum bytes of a batch of more than one object; None for no limit.
        attempt_secs: Maximum duration of a try, in seconds.

    Attributes:
        undrained: Whether `run` ended while tries were in progress that did not end in time.
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
        """Apply the items that are still as planned, and return after every started try has ended.

        On an error, the tries in progress are also awaited and counted: nothing is deleted after the return, unless
        `undrained`.
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
            # A second stop request does not wait for long.
            self._drain(running, self._attempt_secs + 2 * _LOST_SECS if isinstance(error, Exception) else _LOOK_SECS)
            raise

    def _drain(self, running: dict[Future[Result[T]], float], seconds: float) -> None:
        """Wait for the tries in progress, and count them; start nothing new."""
        self.undrained = bool(running)
        until = Deadline.after(seconds)
        while running:
            for future in self._ended(running):
                with contextlib.suppress(Exception):  # one error is already being raised
                    self._take(future)
            if until.passed:
                break
        self.undrained = bool(running)

    def _ended(self, running: dict[Future[Result[T]], float]) -> Iterator[Future[Result[T]]]:
        """Remove and yield the tries that have ended; give up those that are far past their deadline."""
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
            except (ThrottledError, TransportError) as error:  # whether the lock is held is unknown
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
        """Return the next batch that is due, or None."""
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
        except (HFBucketError, OSError) as error:  # an OSError comes from the disk
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
