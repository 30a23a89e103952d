"""Batches on Ray actors."""

from __future__ import annotations

import contextlib
import threading
from collections import defaultdict
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, Generic

import ray
import ray.exceptions

from hfbucket_plugin.core.units import Extent
from hfbucket_plugin.errors import ConfigError, HFBucketError
from jobs.batch.model import TRIES, ItemBatch, ItemOutcome, Result, T
from warmer.cluster.actor_pool import DEATHS
from warmer.cluster.ray import joined
from warmer.report.metrics import CountedBytes
from warmer.report.outcomes import ClusterError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from datetime import datetime
    from enum import StrEnum

    from hfbucket_plugin.config.instances import InstanceConfig
    from hfbucket_plugin.config.settings import InstanceSettings


_TAGS = ("instance", "outcome")


class RayCounts:
    """Counters of one run, by outcome.

    Args:
        instance: Name of the instance that the run changes.
    """

    def __init__(self, instance: str) -> None:
        self._instance = instance
        self._objects = CountedBytes("jobs_objects", "jobs_bytes", "Objects that a job has finished, by outcome", _TAGS)

    def add(self, result: Result[Any]) -> None:
        """Count the objects that ended with a try."""
        ended: defaultdict[str, Extent] = defaultdict(Extent)
        for one in result.ended:
            ended[str(one.outcome)] = ended[str(one.outcome)].plus(one.item.size)
        for outcome, extent in ended.items():
            tags = {"instance": self._instance, "outcome": outcome}
            self._objects.add(extent.objects, extent.bytes, tags)


_START_SECS: Final = 120.0

_LOSSES: Final = 3
"""Number of actor deaths after which the batch counts as their cause."""


class ActorExecutor(Generic[T]):
    """Executor that runs batches on Ray actors, one batch per actor at a time.

    Args:
        width: Number of actors.
        address: Address of the Ray cluster; None for the configured one.
        instances: Instances whose tokens the actors need.
        failed: Outcome of an object whose actors were lost repeatedly.
        actor: Class of the actors.
        arguments: Arguments of that class's constructor.

    Raises:
        ConfigError: If a node lacks the environment variable of a token.
        ClusterError: If the cluster cannot be joined, or starts no actors.
    """

    def __init__(
        self,
        width: int,
        address: str | None,
        instances: Sequence[InstanceConfig],
        failed: StrEnum,
        *,
        actor: type,
        arguments: Sequence[Any],
    ) -> None:
        self.width = width
        self._failed = failed
        self._mutex = threading.Lock()
        self._busy: dict[Future[Result[T]], tuple[Any, ItemBatch[T]]] = {}
        self._dead: list[Any] = []  # not replaced yet
        self._unproven: list[Any] = []  # replacements without an answer so far: Ray may never start them
        self._counts = RayCounts(instances[-1].name)
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(joined(address))
        try:
            remote: Any = ray.remote(num_cpus=0, max_restarts=TRIES)(actor)
            self._start: Callable[[], Any] = lambda: remote.remote(*arguments)
            self._idle: list[Any] = [self._start() for _ in range(width)]
            have = ray.get([one.tokens.remote() for one in self._idle], timeout=_START_SECS)
        except ray.exceptions.RayError as error:
            self.close()
            raise ClusterError(f"the Ray cluster starts no actors: {str(error).splitlines()[0]}") from None
        for place, named in enumerate(instances):
            settings = named.settings
            if settings.resolve_token() is not None and not all(found[place] for found in have):
                self.close()
                raise ConfigError(
                    f"a node of the Ray cluster lacks {settings.token_env} ({named.setting('token_env')} names it)"
                )

    def submit(
        self, batch: ItemBatch[T], not_after: datetime, seconds: float, lock_end: datetime | None
    ) -> Future[Result[T]]:
        """Start a try at a batch on an idle actor; one exists, since at most `width` tries are in progress."""
        # Take the actor that has been idle longest, so that a batch whose actor was lost is retried on another one.
        # one.
        actor = self._idle.pop(0)
        future: Future[Result[T]] = Future()
        try:
            actor = self._living(actor)
        except Exception as error:  # noqa: BLE001 - the future carries it to the waiter
            future.set_exception(error)
            return future
        with self._mutex:
            self._busy[future] = (actor, batch)
        answer = actor.attempt.remote(batch, not_after, seconds, lock_end).future()
        answer.add_done_callback(lambda done: self._settle(future, done))
        return future

    def _settle(self, future: Future[Result[T]], done: Future[Any]) -> None:
        """Pass the answer of an actor, or its error, to the waiting future.

        Ray calls this on its only callback thread, and `ray.kill` waits for that thread: so nothing here may call Ray,
        and
        dead
        a dead actor is replaced only when its place is needed.
        """
        with self._mutex:
            busy = self._busy.pop(future, None)
        if busy is None:  # already given up
            return
        actor, batch = busy
        self._forget(actor)
        try:
            if isinstance(done.exception(), DEATHS):
                with self._mutex:
                    self._dead.append(actor)
            self._idle.append(actor)
            result = self._result(batch, done)
            self._counts.add(result)
        except BaseException as error:  # noqa: BLE001 - the future carries it to the waiter
            future.set_exception(error)
        else:
            future.set_result(result)

    def _result(self, batch: ItemBatch[T], done: Future[Any]) -> Result[T]:
        try:
            result: Result[T] | HFBucketError = done.result()
        except DEATHS as error:
            if batch.losses + 1 < _LOSSES:
                return Result((), replace(_asked(batch), losses=batch.losses + 1))
            return _given_up(batch, self._failed, f"actors that tried it died {_LOSSES} times: {_first_line(error)}")
        except ray.exceptions.RayError as error:
            return _lost(batch, self._failed, _first_line(error))
        if isinstance(result, HFBucketError):
            raise result
        return result

    def _living(self, actor: Any) -> Any:
        """Return the actor, or a replacement if it died."""
        with self._mutex:
            died = any(one is actor for one in self._dead)
            self._dead = [one for one in self._dead if one is not actor]
        return self._replaced(actor) if died else actor

    def _replaced(self, actor: Any) -> Any:
        """Kill an unusable actor, and return its replacement."""
        with contextlib.suppress(ray.exceptions.RayError, ValueError):  # already dead
            ray.kill(actor)
        new = self._start()
        with self._mutex:
            self._unproven.append(new)
        return new

    def _forget(self, actor: Any) -> bool:
        """Mark an actor as having answered; return whether it never had before."""
        with self._mutex:
            was = any(one is actor for one in self._unproven)
            self._unproven = [one for one in self._unproven if one is not actor]
        return was

    def lose(self, future: Future[Result[T]]) -> None:
        """End an actor that does not answer, and replace it."""
        with self._mutex:
            busy = self._busy.pop(future, None)
        if busy is None:
            return
        actor, batch = busy
        if self._forget(actor) and self.width > 1:
            # The actor apparently cannot be started: the others do its work, and this does not count as a try.
            self.width -= 1
            with contextlib.suppress(ray.exceptions.RayError, ValueError):
                ray.kill(actor)
            future.set_result(Result((), _asked(batch)))
            return
        try:
            self._idle.append(self._replaced(actor))
        except Exception as error:  # noqa: BLE001 - as above
            future.set_exception(error)
        else:
            future.set_result(_lost(batch, self._failed, "it did not answer in time"))

    def close(self) -> None:
        """End the actors, and leave the cluster."""
        self._stack.close()


def without_token(named: InstanceConfig) -> InstanceSettings:
    """Return the settings of an instance without its token, as they may leave this process."""
    settings = named.settings.model_copy(update={"token": None})
    if named.settings.resolve_token() is not None and settings.resolve_token() is None:
        raise ConfigError(
            f"{named.setting('token')} is written into the configuration; it would have to travel through Ray, which is "
            f"never done. Set {settings.token_env} on all nodes, or give --local"
        )
    return settings


def _lost(batch: ItemBatch[T], failed: StrEnum, why: str) -> Result[T]:
    """Return the result of a try whose actor was lost: its outcome is unknown, so every object is looked up again."""
    if batch.tries + 1 >= TRIES:
        return _given_up(batch, failed, f"its actor was lost: {why}")
    return Result((), replace(_asked(batch), tries=batch.tries + 1))


def _asked(batch: ItemBatch[T]) -> ItemBatch[T]:
    """Return a batch with unknown outcome, marked for another try."""
    return replace(batch, asked=batch.asked | {item.path for item in batch.items})


def _given_up(batch: ItemBatch[T], failed: StrEnum, why: str) -> Result[T]:
    return Result(tuple(ItemOutcome(item, failed, why) for item in batch.items))


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
