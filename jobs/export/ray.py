"""Batches of copies on Ray actors, through which the bytes go."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hfbucket_plugin.errors import HFBucketError
from hfbucket_plugin.hub import xet_home
from jobs.batch.ray_pool import ActorExecutor, without_token
from jobs.export.bucket import InstanceEnd
from jobs.export.copy import Copier, CopyMethod, CopyOutcome

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from hfbucket_plugin.config.instances import InstanceConfig
    from hfbucket_plugin.config.settings import InstanceSettings
    from jobs.batch.model import ItemBatch, Result
    from jobs.export.plan import CopyItem


class _Copier:
    """Actor that streams bytes from one instance to another, a window at a time."""

    def __init__(self, endpoints: Sequence[tuple[str, InstanceSettings]], window_bytes: int, memory_bytes: int) -> None:
        xet_home.claim()
        self._settings = [settings for _, settings in endpoints]
        source, destination = (InstanceEnd(name, settings) for name, settings in endpoints)
        self._mover = Copier(source, destination, CopyMethod.STREAM, window_bytes, memory_bytes)

    def tokens(self) -> list[bool]:
        """Return whether the actor's node has a token for each of the two instances."""
        return [settings.resolve_token() is not None for settings in self._settings]

    def attempt(
        self, batch: ItemBatch[CopyItem], _not_after: datetime, seconds: float, _endpoints: None
    ) -> Result[CopyItem] | HFBucketError:
        """Make one try at a batch. Errors are returned, because Ray would wrap raised ones."""
        try:
            return self._mover.attempt(batch, seconds)
        except HFBucketError as error:
            return error


class CopyActors(ActorExecutor["CopyItem"]):
    """Executor that runs batches of copies on Ray actors, which stream the bytes.

    Args:
        endpoints: Source and destination.
        bounds: Maximum bytes of chunks that one actor fetches at a time, and of a single chunk.
        width: Number of actors.
        address: Address of the Ray cluster; None for the configured one.

    Raises:
        ConfigError: If a token is written into the configuration, or a node lacks its environment variable.
        ClusterError: If the cluster cannot be joined, or starts no actors.
    """

    def __init__(
        self, endpoints: tuple[InstanceConfig, InstanceConfig], bounds: tuple[int, int], width: int, address: str | None
    ) -> None:
        own = [(named.name, without_token(named)) for named in endpoints]
        super().__init__(width, address, endpoints, CopyOutcome.FAILED, actor=_Copier, arguments=(own, *bounds))
