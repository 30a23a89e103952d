"""Bounded queue of puts: chunks beyond the byte limit are refused and reported rather than queued without limit."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, Final

from hfbucket_plugin.core import forks
from hfbucket_plugin.core.concurrency import WorkerPool
from hfbucket_plugin.errors import ItemFailure
from hfbucket_plugin.store.write import PutReport

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hfbucket_plugin.config.settings import InstanceSettings
    from hfbucket_plugin.core.deadline import Deadline
    from hfbucket_plugin.core.telemetry import Telemetry
    from hfbucket_plugin.store.write import PutSource, Writer

_BACKLOG: Final = 1024
"""Maximum number of waiting put calls; usually the byte limit is reached first."""

_NOT_TAKEN: Final = "not_taken"


class PutQueue:
    """Runs puts on threads of their own.

    Args:
        writer: Writer that stores the chunks.
        outcomes: Telemetry for refusals.
        settings: Settings of the instance.
    """

    def __init__(self, writer: Writer, outcomes: Telemetry, settings: InstanceSettings) -> None:
        self._writer = writer
        self._outcomes = outcomes
        self._limit = settings.max_waiting_put_bytes
        self._writes = settings.writes
        self._pool = WorkerPool(f"hfbucket-put-call-{outcomes.instance}", settings.max_parallel_writes, _BACKLOG)
        self._pool.prepare()
        self._start_over()
        forks.reset_in_child(self._start_over)

    def _start_over(self) -> None:
        """Reset to an empty queue, initially and in a forked child, where the parent's puts do not continue."""
        self._lock = threading.Lock()
        self._bytes = 0
        self._calls = 0
        self.pending: set[Future[PutReport]] = set()

    @property
    def waiting_bytes(self) -> int:
        """Bytes of chunks whose puts wait or are in progress."""
        return self._bytes

    def submit(self, sources: Sequence[PutSource], size: int | None, deadline: Deadline) -> Future[PutReport]:
        """Queue chunks for storing; return at once.

        Args:
            sources: See `Writer.write_many`. Cancelling the future before the put starts releases them.
            size: Full chunk size in bytes; see `Writer.write_many`.
            deadline: When to give up, including the time in the queue.

        Returns:
            A future with the outcome, including refusals.
        """
        if not self._writes:
            return self._done(self._refuse(sources, "role", "the instance's role is read-only"))
        taken, amount = self._admit(sources)
        refused = self._refuse(sources[len(taken) :], _NOT_TAKEN, self._full()) if len(taken) < len(sources) else []
        if not taken:
            return self._done(refused)
        try:
            future = self._pool.submit(self._write, taken, size, deadline, refused)
        except RuntimeError as error:
            self._leave(amount)
            return self._done(refused + self._refuse(taken, _NOT_TAKEN, str(error)))
        with self._lock:
            self.pending.add(future)
        future.add_done_callback(lambda done: self._ended(done, taken, amount))
        return future

    def _full(self) -> str:
        return f"more than max_waiting_put_bytes ({self._limit}) of chunks wait to be stored"

    def _admit(self, sources: Sequence[PutSource]) -> tuple[Sequence[PutSource], int]:
        """Admit as many leading sources as fit: the start of a prompt is worth more than its end."""
        with self._lock:
            room = self._limit - self._bytes
            amount = 0
            count = 0
            for source in sources:
                if amount + len(source.view) > room:
                    break
                amount += len(source.view)
                count += 1
            self._bytes += amount
            self._calls += bool(count)
        self._notify()
        return sources[:count], amount

    def _write(
        self, sources: Sequence[PutSource], size: int | None, deadline: Deadline, refused: list[ItemFailure]
    ) -> PutReport:
        report = self._writer.write_many(sources, size, deadline)
        report.failures += refused
        return report

    def _ended(self, future: Future[PutReport], sources: Sequence[PutSource], amount: int) -> None:
        with self._lock:
            self.pending.discard(future)
        if future.cancelled():
            self._refuse(sources, _NOT_TAKEN, "cancelled before their turn")
        self._leave(amount)

    def _leave(self, amount: int) -> None:
        with self._lock:
            self._bytes -= amount
            self._calls -= 1
        self._notify()

    def _notify(self) -> None:
        self._outcomes.waiting_puts(self._calls, self._bytes)

    def _refuse(self, sources: Sequence[PutSource], kind: str, why: str) -> list[ItemFailure]:
        for source in sources:
            source.release()
        self._outcomes.chunks("put", kind, len(sources))
        if kind == _NOT_TAKEN:
            self._outcomes.warn("put", kind, f"{len(sources)} chunks were not stored: {why}")
        return [ItemFailure(source.key, kind, f"{source.key}: {why}") for source in sources]

    @staticmethod
    def _done(failures: list[ItemFailure]) -> Future[PutReport]:
        future: Future[PutReport] = Future()
        future.set_result(PutReport(failures))
        return future

    def close(self) -> None:
        """Refuse new puts, and cancel those that wait."""
        self._pool.close()
        with self._lock:
            pending = list(self.pending)
        for future in pending:
            future.cancel()
