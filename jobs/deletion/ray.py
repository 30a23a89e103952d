"""Batches of deletes on Ray actors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hfbucket_plugin.core.deadline import Deadline
from hfbucket_plugin.core.telemetry import MemorySink
from hfbucket_plugin.errors import HFBucketError
from hfbucket_plugin.hub import xet_home
from hfbucket_plugin.hub.connect import REQUEST_SECS, open_bucket
from jobs.batch.model import ItemBatch, Outcome, Result
from jobs.batch.ray_pool import ActorExecutor, without_token
from jobs.deletion.attempt import attempt

if TYPE_CHECKING:
    from datetime import datetime

    from hfbucket_plugin.config.instances import InstanceConfig
    from hfbucket_plugin.config.settings import InstanceSettings
    from jobs.deletion.plan import Item


class _Deleter:
    """Actor that deletes: one bucket client, one batch at a time."""

    def __init__(self, settings: InstanceSettings, instance: str) -> None:
        xet_home.claim()
        self._settings = settings
        self._bucket = open_bucket(settings, instance, MemorySink(), REQUEST_SECS)

    def tokens(self) -> list[bool]:
        """Return whether the actor's node has a token for the instance."""
        return [self._settings.resolve_token() is not None]

    def attempt(
        self, batch: ItemBatch[Item], not_after: datetime, seconds: float, lock_end: datetime
    ) -> Result[Item] | HFBucketError:
        """Make one try at a batch. Errors are returned, because Ray would wrap raised ones."""
        try:
            return attempt(self._bucket, batch, not_after, Deadline.after(seconds), lock_end)
        except HFBucketError as error:
            return error


class DeletionActors(ActorExecutor["Item"]):
    """Executor that runs batches of deletes on Ray actors.

    Args:
        named: The instance.
        width: Number of actors.
        address: Address of the Ray cluster; None for the configured one.

    Raises:
        ConfigError: If a token is written into the configuration, or a node lacks its environment variable.
        ClusterError: If the cluster cannot be joined, or starts no actors.
    """

    def __init__(self, named: InstanceConfig, width: int, address: str | None) -> None:
        arguments = (without_token(named), named.name)
        super().__init__(width, address, [named], Outcome.FAILED, actor=_Deleter, arguments=arguments)
