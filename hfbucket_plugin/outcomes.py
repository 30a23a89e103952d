"""How an operation of an instance ended, told to the metrics and, within limits, to the log."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from hfbucket_plugin import metrics
from hfbucket_plugin.loglimit import LimitedLog

if TYPE_CHECKING:
    from hfbucket_plugin.errors import HFBucketError

_log = logging.getLogger(__name__)


class Outcomes:
    """Counts and logs what happened to chunks and operations of one instance.

    Args:
        instance: Its name.
        sink: Where numbers go.
    """

    def __init__(self, instance: str, sink: metrics.Sink) -> None:
        self.instance = instance
        self.sink = sink
        self._limited = LimitedLog(_log)

    def chunks(self, operation: str, outcome: str, chunks: int) -> None:
        """Count chunks of an operation that ended alike."""
        if chunks:
            self.sink.count(metrics.CHUNKS, chunks, instance=self.instance, operation=operation, outcome=outcome)

    def bytes(self, direction: str, amount: int) -> None:
        """Count bytes of chunks that were moved, ``read`` or ``write``."""
        if amount:
            self.sink.count(metrics.BYTES, amount, instance=self.instance, direction=direction)

    def ended(self, operation: str, outcome: str, started: float) -> None:
        """Count an operation, and how long it took since `started` on the monotonic clock."""
        self.sink.count(metrics.OPERATIONS, instance=self.instance, operation=operation, outcome=outcome)
        self.sink.observe(metrics.SECONDS, time.monotonic() - started, instance=self.instance, operation=operation)

    def failed(self, operation: str, error: HFBucketError, chunks: int, started: float) -> None:
        """Count an operation that failed as a whole, and log why."""
        self.chunks(operation, error.kind, chunks)
        self.ended(operation, error.kind, started)
        self.warn(operation, error.kind, str(error))

    def warn(self, operation: str, kind: str, message: str) -> None:
        """Log a warning; one a kind and operation within 30 s, and how many were left out."""
        self._limited.warning(f"{operation} {kind}", f"[{self.instance}] {operation}: {message}")
