"""Batches of copies on Ray actors, through which the bytes go."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hfbucket_plugin.errors import HFBucketError
from hfbucket_plugin.hub import xet_home
from jobs.batch.ray_pool import ActorExecutor, without_token
from jobs.export.bucket import InstanceEnd
from jobs.export.copy import How, Moved, Mover

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from hfbucket_plugin.config.instances import NamedInstance
    from hfbucket_plugin.config.settings import InstanceSettings
    from jobs.batch.model import Batch, Result
    from jobs.export.plan import Move


class _Copier:
    """The actor that carries bytes from one instance to another, a window of them at a time."""

    def __init__(self, ends: Sequence[tuple[str, InstanceSettings]], window_bytes: int, memory_bytes: int) -> None:
        xet_home.claim()
        self._settings = [settings for _, settings in ends]
        source, destination = (InstanceEnd(name, settings) for name, settings in ends)
        self._mover = Mover(source, destination, How.STREAM, window_bytes, memory_bytes)

    def tokens(self) -> list[bool]:
        """Whether its node has a token for each of the two instances."""
        return [settings.resolve_token() is not None for settings in self._settings]

    def attempt(
        self, batch: Batch[Move], _not_after: datetime, seconds: float, _ends: None
    ) -> Result[Move] | HFBucketError:
        """Try at a batch, as `_Deleter` does."""
        try:
            return self._mover.attempt(batch, seconds)
        except HFBucketError as error:
            return error


class CopyActors(ActorExecutor["Move"]):
    """Batches of copies on actors, through which the bytes go.

    Args:
        ends: Where chunks come from, and where they go.
        bounds: Most bytes of chunks that one actor fetches at one time, and of a single chunk.
        width: How many actors.
        address: Of the cluster; None for the configured one.

    Raises:
        ConfigError: A token is written into the configuration, or a node lacks its variable.
        ClusterError: The cluster cannot be joined, or starts no actors.
    """

    def __init__(
        self, ends: tuple[NamedInstance, NamedInstance], bounds: tuple[int, int], width: int, address: str | None
    ) -> None:
        own = [(named.name, without_token(named)) for named in ends]
        super().__init__(width, address, ends, Moved.FAILED, actor=_Copier, arguments=(own, *bounds))
