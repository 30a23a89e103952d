"""Writes of chunks, in commits of bounded size, with checks for refused and existing chunks."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import Future, wait
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol, Self

from hfbucket_plugin.core import forks
from hfbucket_plugin.core.buffers import KEPT, RevocableBuffer
from hfbucket_plugin.core.concurrency import ByteSemaphore, FairPool
from hfbucket_plugin.core.keys import RESERVED, encode_name, is_probe
from hfbucket_plugin.core.units import batches
from hfbucket_plugin.errors import (
    BreakerOpenError,
    BucketMissingError,
    DeadlineError,
    HFBucketError,
    IntegrityError,
    ItemFailure,
    TransportError,
    UnsentError,
)
from hfbucket_plugin.hub.records import RecordStore
from hfbucket_plugin.hub.transfer import Upload
from hfbucket_plugin.store.committer import BatchCommitter

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hfbucket_plugin.core.deadline import Deadline
    from hfbucket_plugin.core.keys import ContentId
    from hfbucket_plugin.core.telemetry import Telemetry
    from hfbucket_plugin.store.guarded import GuardedBucket
    from hfbucket_plugin.store.lookup import Existence
    from hfbucket_plugin.store.quarantine import Quarantine

_YIELD_SECS: Final = 1.0
_YIELD_BYTES: Final = 32 * 1024 * 1024
"""Bytes after which a commit lets reads go first again, as it does before it begins. Each wait is bounded, so that
engines that read continuously cannot block puts for ever."""

_PROBES: Final = 16
"""Maximum number of concurrent probes; see `CircuitBreakers`."""


class PutSource(Protocol):
    """One chunk to store, in the engine's memory."""

    @property
    def key(self) -> str:
        """Key string of the chunk."""

    @property
    def view(self) -> memoryview:
        """Bytes of the chunk, unchanged until `release`."""

    def release(self) -> None:
        """Return the memory; called exactly once for every source, whatever its outcome."""


@dataclass(slots=True)
class PutReport:
    """Outcome of a put.

    Attributes:
        failures: Chunks that were not stored.
        stored: Keys that were written, without those that existed already or that another put wrote.
        replaced: Sizes in bytes of previous objects under the keys to write, as far as they are known.
    """

    failures: list[ItemFailure] = field(default_factory=list)
    stored: list[str] = field(default_factory=list)
    replaced: dict[str, int] = field(default_factory=dict)

    def __iadd__(self, other: PutReport) -> Self:
        self.failures += other.failures
        self.stored += other.stored
        self.replaced |= other.replaced
        return self


class _Commit:
    """Sources that are uploaded together; the memory of each is returned once, when nothing can read it any more."""

    def __init__(self, sources: Sequence[PutSource]) -> None:
        self.sources = sources
        self.leases = [RevocableBuffer(source.view, getattr(source, "memory", KEPT)) for source in sources]
        self.upload = Upload()
        self.files: Mapping[str, ContentId] = {}
        self.begun = False
        self._lock = threading.Lock()
        self._held = dict(zip(self.leases, sources, strict=True))

    def release(self, *leases: RevocableBuffer) -> None:
        """Return the memory of one source, or of all."""
        with self._lock:
            gone = {lease: self._held.pop(lease) for lease in leases or self.leases if lease in self._held}
        for lease, source in gone.items():
            lease.revoke()
            source.release()

    def failures(self, kind: str, message: str) -> list[ItemFailure]:
        return [ItemFailure(source.key, kind, f"{source.key}: {message}") for source in self.sources]


class Writer:
    """Writes the chunks of one instance.

    Args:
        guarded: Bucket to write to.
        existence: Source of the keys that exist already; learns what was written.
        outcomes: Telemetry for results.
        quarantine: Contents that cannot be served; they are written again even though they exist.
    """

    def __init__(
        self,
        guarded: GuardedBucket,
        existence: Existence,
        outcomes: Telemetry,
        quarantine: Quarantine,
    ) -> None:
        settings = guarded.settings
        self._bucket = guarded.bucket
        self._settings = settings
        self._breakers = guarded.breakers
        self._read_priority = guarded.read_priority
        self._existence = existence
        self._outcomes = outcomes
        self._quarantine = quarantine
        self._committer = BatchCommitter(guarded.bucket, settings.put_window_secs)
        self._semaphore = ByteSemaphore(settings.max_inflight_bytes)
        self._threads = FairPool(f"hfbucket-put-{outcomes.instance}", settings.max_parallel_writes)
        self._probes = RecordStore(guarded.bucket, f"probe-{outcomes.instance}", _PROBES)
        self._closed = False
        self._bucket_is_there = False
        self._start_over()
        forks.reset_in_child(self._start_over)

    def _start_over(self) -> None:
        """Reset to no writes, initially and in a forked child, where the parent's puts do not continue."""
        self._lock = threading.Lock()
        self._in_progress: dict[str, Future[ItemFailure | None]] = {}
        self._commits: set[_Commit] = set()

    def write_many(self, sources: Sequence[PutSource], size: int | None, deadline: Deadline) -> PutReport:
        """Store chunks; return when all are stored or have failed, at the deadline at the latest.

        A key that exists with the right size is not written again. If another put is writing the key, this put waits
        for it and takes over its outcome. LMCache's own probe key is always written, because its health check would never
        recover otherwise.

        Args:
            sources: Chunks to store. Each is released exactly once, when nothing reads its memory any more.
            size: Full chunk size in bytes; sources of another size are refused. None accepts any size.
            deadline: When to give up.

        Returns:
            The keys that were written, and the failures.
        """
        started = time.monotonic()
        try:
            deadline.check("put")  # time spent in the own queue is not a fault of the Hub or the store
            self._breakers.admit("write")
        except (BreakerOpenError, DeadlineError) as error:
            report = PutReport(_release_unwritten(sources, error.kind, str(error)))
            self._notify(report.failures, started)
            return report
        mine, others, refused = self._claim(sources, size)
        report = PutReport(refused)
        try:
            todo = self._drop_present(mine, deadline, report)
        except BaseException as error:  # noqa: BLE001 - on any error the memory must go back to the engine
            failures = _release_unwritten(mine, _kind(error), str(error))
            self._unclaim(mine, failures)
            report.failures += failures
        else:
            report += self._commit_all(todo, deadline)
        report.failures += self._await(others, deadline)
        self._notify(report.failures, started)
        return report

    def _claim(
        self, sources: Sequence[PutSource], size: int | None
    ) -> tuple[list[PutSource], list[tuple[str, Future[ItemFailure | None]]], list[ItemFailure]]:
        """Refuse sources that are not full chunks, and claim the others unless another put is writing them.

        Returns:
            The claimed sources; the keys that other puts are writing, with their future outcomes; the refused sources.
        """
        mine: list[PutSource] = []
        others: list[tuple[str, Future[ItemFailure | None]]] = []
        failures: list[ItemFailure] = []
        for source in sources:
            actual = len(source.view)
            if not actual or size not in (None, actual):
                wanted = f"no full chunk of {size}; partial uploads are refused" if actual else "no chunk"
                message = f"{source.key}: {actual} bytes are {wanted}"
                failures.append(ItemFailure(source.key, "refused", message))
                source.release()
                continue
            with self._lock:
                outcome = self._in_progress.get(source.key)
                if outcome is None:
                    self._in_progress[source.key] = Future()
            if outcome is None:
                mine.append(source)
            else:
                others.append((source.key, outcome))
                source.release()
        return mine, others, failures

    def _unclaim(self, sources: Sequence[PutSource], failures: Sequence[ItemFailure] = ()) -> None:
        """Resolve the futures of callers that wait for these keys: stored or present, unless listed as failed."""
        failed = {failure.item: failure for failure in failures}
        with self._lock:
            outcomes = [(source.key, self._in_progress.pop(source.key, None)) for source in sources]
        for key, outcome in outcomes:
            if outcome is not None:
                outcome.set_result(failed.get(key))

    def _await(self, others: Sequence[tuple[str, Future[ItemFailure | None]]], deadline: Deadline) -> list[ItemFailure]:
        """Wait for keys that other puts are writing, and return those that were not stored."""
        failures: list[ItemFailure] = []
        for key, outcome in others:
            try:
                failure = outcome.result(timeout=deadline.remaining())
            except FutureTimeoutError:
                late = f"{key}: another put of it did not end within {deadline.seconds:g} s"
                failure = ItemFailure(key, DeadlineError.kind, late)
            if failure is None:
                self._outcomes.chunks("put", "under_way", 1)
            else:
                failures.append(failure)
        return failures

    def _drop_present(self, sources: Sequence[PutSource], deadline: Deadline, report: PutReport) -> list[PutSource]:
        """Release the sources that exist already, and return the others. An error releases none.

        Sources whose existence the Hub does not report fail; the others are still written.
        """
        asked = [source.key for source in sources if not is_probe(source.key)]
        contents: Mapping[str, ContentId | None] = {}
        failure: HFBucketError | None = None
        if asked:
            contents, failure = self._existence.answers(asked, deadline, patient=True, believe="hits")
        if isinstance(failure, BucketMissingError):
            self._forget_bucket()
            if self._settings.create_bucket_if_missing:
                failure = None
        unknown = [key for key in asked if key not in contents] if failure is not None else []
        if failure is not None and len(unknown) == len(sources):
            raise failure
        present = [source for source in sources if self._is_there(source, contents.get(source.key))]
        if len(present) + len(unknown) < len(sources):
            self._create_bucket_once(deadline)
        if failure is not None:
            lost = [source for source in sources if source.key in set(unknown)]
            failures = _release_unwritten(lost, failure.kind, str(failure))
            self._unclaim(lost, failures)
            report.failures += failures
        self._unclaim(present)
        for source in present:
            self._outcomes.chunks("put", "present", 1)
            source.release()
        gone = {source.key for source in present} | set(unknown)
        todo = [source for source in sources if source.key not in gone]
        report.replaced = {source.key: old.size for source in todo if (old := contents.get(source.key)) is not None}
        return todo

    def _is_there(self, source: PutSource, content: ContentId | None) -> bool:
        return (
            content is not None
            and content.size == len(source.view)
            and not is_probe(source.key)
            and not self._quarantine.knows(content.xet_hash)
        )

    def _create_bucket_once(self, deadline: Deadline) -> None:
        if self._settings.create_bucket_if_missing and not self._bucket_is_there:
            self._bucket.create(deadline)
            self._bucket_is_there = True

    def _forget_bucket(self) -> None:
        """Forget all objects of a deleted bucket; the next put creates the bucket again if it may."""
        self._bucket_is_there = False
        self._existence.cache.clear()

    # --- commits ----------------------------------------------------------------------------------------------------

    def _commit_all(self, sources: Sequence[PutSource], deadline: Deadline) -> PutReport:
        """Write commits concurrently, and abandon those unfinished at the deadline."""
        tasks: dict[Future[Future[dict[str, ItemFailure]]], _Commit] = {}
        failures: list[ItemFailure] = []
        for batch in batches(sources, self._settings.commit_bytes, lambda source: len(source.view)):
            commit = _Commit(batch)  # bounds the loss from a failure to one commit
            try:
                with self._lock:
                    if self._closed:
                        raise RuntimeError(f"instance {self._outcomes.instance!r} is closed")  # noqa: TRY301 - as the pool
                    self._commits.add(commit)
                future = self._threads.submit_for(tasks, False, self._upload, commit, deadline)
            except RuntimeError as error:
                self._end(commit)
                refused = commit.failures("transport", str(error))
                self._unclaim(commit.sources, refused)
                failures += refused
            else:
                tasks[future] = commit
        namings, lost = self._wait_for_uploads(tasks, deadline)
        report = self._wait_for_names(namings, deadline)
        report.failures += failures + lost
        return report

    def _wait_for_uploads(
        self, tasks: Mapping[Future[Future[dict[str, ItemFailure]]], _Commit], deadline: Deadline
    ) -> tuple[dict[_Commit, Future[dict[str, ItemFailure]]], list[ItemFailure]]:
        """Return the naming futures of completed uploads, and the failures; the memory of all sources is returned."""
        namings, failures = {}, []
        unfinished = set(tasks)
        while unfinished and not deadline.passed:
            patience = min(deadline.remaining(), max(0.05, self._committer.window_secs))
            _, unfinished = wait(unfinished, timeout=patience)
            self._committer.flush(only_due=True)
        for future, commit in tasks.items():
            if future in unfinished:
                if not future.cancel():
                    self._bucket.transfer.abandon(commit.upload)
                error: BaseException | None = DeadlineError(f"not stored within {deadline.seconds:g} s; abandoned")
            else:
                error = future.exception()
            self._end(commit)
            if error is None:
                namings[commit] = future.result()
            else:
                failures += self._lost(commit, error)
        return namings, failures

    def _wait_for_names(
        self, namings: Mapping[_Commit, Future[dict[str, ItemFailure]]], deadline: Deadline
    ) -> PutReport:
        report = PutReport()
        for commit, naming in namings.items():
            while not naming.done() and not deadline.passed:
                self._committer.flush(only_due=True)
                wait([naming], timeout=min(deadline.remaining(), max(0.05, self._committer.window_secs)))
            if not naming.done():
                asked = DeadlineError if naming.running() else UnsentError
                report.failures += self._lost(commit, asked(f"not named within {deadline.seconds:g} s; abandoned"))
            elif (error := naming.exception()) is not None:
                report.failures += self._lost(commit, error)
            else:
                self._breakers.succeeded("write")
                report += self._settle(commit, naming.result())
        return report

    def _lost(self, commit: _Commit, error: BaseException) -> list[ItemFailure]:
        if (
            not self._closed and commit.begun
        ):  # otherwise it waited for other commits of this process, which says nothing about the store
            self._breakers.ended("write", error if isinstance(error, HFBucketError) else TransportError(str(error)))
        if isinstance(error, BucketMissingError):
            self._forget_bucket()
        for source in commit.sources:  # they may have been stored with only the response lost
            self._existence.drop(source.key)
        failures = commit.failures(_kind(error), str(error))
        # An abandoned upload may continue, but will not be named, so the next process that puts the key must upload it.
        self._unclaim(commit.sources, failures)
        return failures

    def _end(self, commit: _Commit) -> None:
        commit.release()
        with self._lock:
            self._commits.discard(commit)

    def _upload(self, commit: _Commit, deadline: Deadline) -> Future[dict[str, ItemFailure]]:
        """Upload a commit, return its memory, and have its contents named."""
        sizes = [lease.size for lease in commit.leases]
        with self._committer.expecting(), self._semaphore.hold(sum(sizes), deadline, "put"):
            unyielding = 0

            def taken(lease: RevocableBuffer) -> None:
                nonlocal unyielding
                commit.release(lease)
                unyielding += lease.size
                if unyielding >= _YIELD_BYTES:
                    unyielding = 0
                    self._read_priority.let_reads_pass(deadline.within(_YIELD_SECS))

            self._read_priority.let_reads_pass(deadline.within(_YIELD_SECS))
            commit.begun = True
            try:
                contents = self._bucket.transfer.upload(commit.leases, deadline, commit.upload, taken)
            finally:
                commit.release()
            if [content.size for content in contents] != sizes:
                raise IntegrityError(f"{[content.size for content in contents]} of {sizes} bytes were taken")
            if commit.upload.abandoned:
                raise DeadlineError("abandoned")
            join = self._bucket.handle.join
            files = {join(encode_name(s.key)): c for s, c in zip(commit.sources, contents, strict=True)}
            commit.files = files
            return self._committer.name(files, deadline)

    def _settle(self, commit: _Commit, failed: Mapping[str, ItemFailure]) -> PutReport:
        """Report the outcome of each source of a commit."""
        report = PutReport()
        written = 0
        for source, (path, content) in zip(commit.sources, commit.files.items(), strict=True):
            if path in failed:
                message = f"{source.key}: {failed[path].message}"
                report.failures.append(ItemFailure(source.key, failed[path].kind, message))
                self._existence.drop(source.key)
            else:
                report.stored.append(source.key)
                self._existence.wrote(source.key, content)
                written += content.size
        self._unclaim(commit.sources, report.failures)
        self._outcomes.chunks("put", "stored", len(report.stored))
        self._outcomes.bytes("write", written)
        return report

    def _notify(self, failures: Sequence[ItemFailure], started: float) -> None:
        for failure in failures:
            self._outcomes.chunks("put", failure.kind, 1)
            self._outcomes.warn("put", failure.kind, failure.message)
        self._outcomes.ended("put", failures[0].kind if failures else "ok", started)

    # --- probing ----------------------------------------------------------------------------------------------------

    def probe(self, deadline: Deadline) -> None:
        """Upload a few bytes that no object names, and delete an object that does not exist, to check that writes work.

        Raises:
            HFBucketError: Writes do not work, or not before the deadline.
        """
        self._probes.upload(os.urandom(64), deadline)  # not in the pool of puts, whose threads may all hang
        self._bucket.delete([self._bucket.handle.join(f"{RESERVED}/probe/none")], deadline)

    def close(self) -> None:
        """Refuse new work, stop naming contents, and stop reading the engine's memory."""
        with self._lock:
            self._closed = True
            commits = list(self._commits)
        self._threads.close()
        self._probes.close()
        self._committer.close()
        for commit in commits:
            self._bucket.transfer.abandon(commit.upload)
            commit.release()


def _kind(error: BaseException) -> str:
    return error.kind if isinstance(error, HFBucketError) else HFBucketError.kind


def _release_unwritten(sources: Sequence[PutSource], kind: str, message: str) -> list[ItemFailure]:
    for source in sources:
        source.release()
    return [ItemFailure(source.key, kind, f"{source.key}: {message}") for source in sources]
