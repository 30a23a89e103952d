"""Where batches are tried: in this process, or on actors of the configured Ray cluster."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Final

from hfbucket_plugin.errors import ConfigError
from jobs.batch.apply import InProcess

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hfbucket_plugin.config.instances import NamedInstance
    from hfbucket_plugin.hub.bucket import Bucket
    from jobs.batch.apply import Executor
    from jobs.deletion.job import Order
    from jobs.deletion.plan import Item

_RAY_VARIABLES: Final = ("RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR")
"""Without one of them no cluster is configured (`warmer.cluster.ray`)."""


@contextlib.contextmanager
def executing(named: NamedInstance, bucket: Bucket, order: Order) -> Iterator[Executor[Item]]:
    """An executor as an order wants it, ended at the end.

    Raises:
        HFBucketError: The Ray cluster cannot be joined, or its actors cannot have the instance's token.
    """
    if order.local:
        executor: Executor[Item] = InProcess(bucket, order.parallel, order.source)
    else:
        from jobs.batch.ray_pool import OnActors  # noqa: PLC0415 - Ray takes a second to import

        executor = OnActors(named, order.parallel, order.address)
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
