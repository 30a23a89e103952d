"""Where copies are tried: on threads of this process, or on actors of the configured Ray cluster."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from hfbucket_plugin.core.concurrency import WorkerPool
from jobs.export.copy import CopyMethod

if TYPE_CHECKING:
    from collections.abc import Iterator
    from concurrent.futures import Future
    from datetime import datetime

    from hfbucket_plugin.config.instances import InstanceConfig
    from jobs.batch.apply import Executor
    from jobs.batch.model import ItemBatch, Result
    from jobs.export.copy import Copier
    from jobs.export.plan import CopyItem, ExportOrder


class CarriersInProcess:
    """Copies on threads.

    Args:
        mover: Copies.
        width: How many batches at one time.
    """

    def __init__(self, mover: Copier, width: int) -> None:
        self.width = width
        self._mover = mover
        self._pool = WorkerPool("jobs-export", width)

    def submit(
        self, batch: ItemBatch[CopyItem], _not_after: datetime, seconds: float, _ends: datetime | None
    ) -> Future[Result[CopyItem]]:
        """Begin a try at a batch."""
        return self._pool.submit(self._mover.attempt, batch, seconds)

    def lose(self, _future: Future[Result[CopyItem]]) -> None:
        """Threads end by themselves: every request has its deadline."""

    def close(self) -> None:
        """Begin no more."""
        self._pool.close()


@contextlib.contextmanager
def carrying(
    mover: Copier, named: tuple[InstanceConfig | None, InstanceConfig | None], order: ExportOrder
) -> Iterator[Executor[CopyItem]]:
    """An executor as an order wants it, ended at the end.

    The Hub's own copies are calls from this process, whatever cluster there is; and a directory is one of this machine.

    Args:
        mover: Copies in this process; what actors do is the same.
        named: The instances; None for a directory.
        order: How the export is to be done.

    Raises:
        HFBucketError: The Ray cluster cannot be joined, or its actors cannot have the tokens.
    """
    if mover.how is CopyMethod.STREAM and not order.local and named[0] is not None and named[1] is not None:
        from jobs.export.ray import CopyActors  # noqa: PLC0415 - Ray takes a second to import

        executor: Executor[CopyItem] = CopyActors(
            (named[0], named[1]), (mover.window_bytes, mover.memory_bytes), order.parallel, order.address
        )
    else:
        executor = CarriersInProcess(mover, order.parallel)
    try:
        yield executor
    finally:
        executor.close()
