"""Where batches are tried: in this process, or on actors of the configured Ray cluster."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Final

from hfbucket_plugin.core.concurrency import WorkerPool
from hfbucket_plugin.core.deadline import Deadline
from hfbucket_plugin.errors import ConfigError
from jobs.deletion.attempt import attempt

if TYPE_CHECKING:
    from collections.abc import Iterator
    from concurrent.futures import Future
    from datetime import datetime

    from hfbucket_plugin.config.instances import InstanceConfig
    from hfbucket_plugin.hub.bucket import Bucket
    from jobs.batch.apply import Executor
    from jobs.batch.model import ItemBatch, ReferenceEndpoint, Result
    from jobs.deletion.plan import DeletionOrder, Item

_RAY_VARIABLES: Final = ("RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR")
"""Without one of them no cluster is configured (`warmer.cluster.ray`)."""


@contextlib.contextmanager
def executing(named: InstanceConfig, bucket: Bucket, order: DeletionOrder) -> Iterator[Executor[Item]]:
    """An executor as an order wants it, ended at the end.

    Raises:
        HFBucketError: The Ray cluster cannot be joined, or its actors cannot have the instance's token.
    """
    if order.local:
        executor: Executor[Item] = InProcess(bucket, order.parallel, order.source)
    else:
        from jobs.deletion.ray import DeletionActors  # noqa: PLC0415 - Ray takes a second to import

        executor = DeletionActors(named, order.parallel, order.address)
    try:
        yield executor
    finally:
        executor.close()


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


class InProcess:
    """Batches on threads of this process.

    Args:
        bucket: The instance's.
        width: How many at one time.
        source: Of a mirror.
    """

    def __init__(self, bucket: Bucket, width: int, source: ReferenceEndpoint | None = None) -> None:
        self.width = width
        self._bucket = bucket
        self._source = source
        self._pool = WorkerPool("jobs-delete", width)

    def submit(
        self, batch: ItemBatch[Item], not_after: datetime, seconds: float, _ends: datetime | None
    ) -> Future[Result[Item]]:
        """Begin a try at a batch. However late its thread gets to it, it ends in time."""
        deadline = Deadline.after(seconds)
        return self._pool.submit(attempt, self._bucket, batch, not_after, deadline, source=self._source)

    def lose(self, _future: Future[Result[Item]]) -> None:
        """Threads end by themselves: every request has its deadline."""

    def close(self) -> None:
        """Begin no more."""
        self._pool.close()
