"""How an operation of an instance ended, told to the metrics and, within limits, to the log."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from hfbucket_plugin import metrics
from hfbucket_plugin.errors import BucketMissingError
from hfbucket_plugin.loglimit import LimitedLog

if TYPE_CHECKING:
    from hfbucket_plugin.errors import HFBucketError

_log = logging.getLogger(__name__)


class Outcomes:
    """Counts and logs what happened to chunks and operations of one instance.

    Args:
        instance: Its name.
        sink: Where numbers go.
        creates_bucket: Whether a missing bucket is no failure, since the first write creates it.
    """

    def __init__(self, instance: str, sink: metrics.Sink, *, creates_bucket: bool = False) -> None:
        self.instance = instance
        self._creates_bucket = creates_bucket
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

    def excuses(self, error: HFBucketError) -> bool:
        """Whether an error says no more than that nothing is there yet."""
        return self._creates_bucket and isinstance(error, BucketMissingError)

    def failed(self, operation: str, error: HFBucketError, chunks: int, started: float) -> None:
        """Count an operation that failed as a whole, and log why."""
        if self.excuses(error):
            self.chunks(operation, "missing", chunks)
            self.ended(operation, "ok", started)
            return
        self.chunks(operation, error.kind, chunks)
        self.ended(operation, error.kind, started)
        self.warn(operation, error.kind, str(error))

    def in_flight(self, operation: str, calls: int) -> None:
        """Tell how many calls of an operation are under way."""
        self.sink.gauge(metrics.IN_FLIGHT, calls, instance=self.instance, operation=operation)

    def quarantined(self, contents: int) -> None:
        """Tell how many contents are not offered, since they could not be served of late."""
        self.sink.gauge(metrics.QUARANTINED, contents, instance=self.instance)

    def warn_of_size(self, operation: str, what: str, actual: int, size: int | None) -> None:
        """Log that an object is no full chunk, of `size` bytes where that is known."""
        full = "none of 0 bytes" if size is None else str(size)
        self.warn(
            operation,
            "size",
            f"{what}: refused, since the object has {actual} bytes and a full chunk {full}; was it written with another "
            "chunk_size, dtype or layout?",
        )

    def waiting_puts(self, calls: int, amount: int) -> None:
        """Tell how many puts wait or are under way, and their bytes."""
        self.in_flight("put", calls)
        self.sink.gauge(metrics.WAITING_PUT_BYTES, amount, instance=self.instance)

    def warn(self, operation: str, kind: str, message: str) -> None:
        """Log a warning; one a kind and operation within 30 s, and how many were left out."""
        self._limited.warning(f"{operation} {kind}", f"[{self.instance}] {operation}: {message}")
