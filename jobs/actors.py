"""Batches on actors of a Ray cluster: the only part of the jobs that knows of Ray.

The driver confirms the lock before each batch and says for how long it holds; an actor asks nothing of the Hub after that.
"""

from __future__ import annotations

import contextlib
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Final

import ray
import ray.exceptions

from hfbucket_plugin.errors import ConfigError, HFBucketError
from hfbucket_plugin.instance import open_bucket
from hfbucket_plugin.metrics import Tally
from jobs.batch import TRIES, Batch, Ended, Outcome, Result, attempt
from warmer.cluster import joined
from warmer.errors import ClusterError

if TYPE_CHECKING:
    from datetime import datetime

    from hfbucket_plugin.named import NamedInstance
    from hfbucket_plugin.settings import InstanceSettings

_REQUEST_SECS: Final = 60.0
_START_SECS: Final = 120.0


class _Deleter:
    """The actor: one door to the bucket, one batch at a time."""

    def __init__(self, settings: InstanceSettings, instance: str) -> None:
        self._settings = settings
        self._bucket = open_bucket(settings, instance, Tally(), _REQUEST_SECS)

    def has_token(self) -> bool:
        """Whether its node has a token for the instance."""
        return self._settings.resolve_token() is not None

    def attempt(self, batch: Batch, not_after: datetime, seconds: float) -> Result | HFBucketError:
        """Try at a batch. Errors are returned: raised ones would come wrapped in Ray's."""
        try:
            return attempt(self._bucket, batch, not_after, seconds)
        except HFBucketError as error:
            return error


class OnActors:
    """Batches on actors, as many as may run at one time.

    Args:
        named: The instance. Its settings travel to the actors, its token does not.
        width: How many actors.
        address: Of the cluster; None for the configured one.

    Raises:
        ConfigError: A token is written into the configuration, or a node lacks its variable.
        ClusterError: The cluster cannot be joined, or starts no actors.
    """

    def __init__(self, named: NamedInstance, width: int, address: str | None) -> None:
        settings = named.settings.model_copy(update={"token": None})
        expected = named.settings.resolve_token() is not None
        if expected and settings.resolve_token() is None:
            raise ConfigError(
                f"{named.setting('token')} is written into the configuration; it would have to travel through Ray, which is "
                f"never done. Set {settings.token_env} on all nodes, or give --local"
            )
        self.width = width
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(joined(address))
        try:
            remote = ray.remote(num_cpus=0, max_restarts=TRIES)(_Deleter)
            self._idle: list[Any] = [remote.remote(settings, named.name) for _ in range(width)]
            have = ray.get([actor.has_token.remote() for actor in self._idle], timeout=_START_SECS)
        except ray.exceptions.RayError as error:
            self.close()
            raise ClusterError(f"the Ray cluster starts no actors: {str(error).splitlines()[0]}") from None
        if expected and not all(have):
            self.close()
            raise ConfigError(
                f"a node of the Ray cluster lacks {settings.token_env} ({named.setting('token_env')} names it)"
            )

    def submit(self, batch: Batch, not_after: datetime, seconds: float) -> Future[Result]:
        """Begin a try at a batch on an idle actor; there is one, since no more than `width` are under way."""
        actor = self._idle.pop()
        told: Future[Result] = Future()

        def settle(done: Future[Any]) -> None:
            self._idle.append(actor)
            try:
                result = done.result()
            except ray.exceptions.RayError as error:
                result = _lost(batch, str(error).splitlines()[0])
            if isinstance(result, HFBucketError):
                told.set_exception(result)
            else:
                told.set_result(result)

        actor.attempt.remote(batch, not_after, seconds).future().add_done_callback(settle)
        return told

    def close(self) -> None:
        """End the actors, and leave the cluster."""
        self._stack.close()


def _lost(batch: Batch, why: str) -> Result:
    """What came of a try whose actor was lost: nobody knows, so every object is looked up again."""
    if batch.tries + 1 >= TRIES:
        return Result(tuple(Ended(item, Outcome.FAILED, f"its actor was lost: {why}") for item in batch.items))
    asked = batch.asked | {item.path for item in batch.items}
    return Result((), Batch(batch.items, batch.tries + 1, asked))
