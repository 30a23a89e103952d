"""Writing chunks: what is refused, what is there already, and commits of bounded bytes."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, Protocol

from hfbucket_plugin.errors import (
    BucketMissingError,
    DeadlineError,
    HFBucketError,
    IntegrityError,
    ItemFailure,
)
from hfbucket_plugin.keys import encode_name, is_probe
from hfbucket_plugin.transfer import Upload
from hfbucket_plugin.workers import WorkerPool

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from hfbucket_plugin.bucket import Bucket
    from hfbucket_plugin.deadlines import Deadline
    from hfbucket_plugin.existence import Existence
    from hfbucket_plugin.outcomes import Outcomes
    from hfbucket_plugin.settings import InstanceSettings
    from hfbucket_plugin.transfer import Content


class Source(Protocol):
    """One chunk to be stored, in memory of the engine's."""

    @property
    def key(self) -> str:
        """Its key string."""

    @property
    def view(self) -> memoryview:
        """Its bytes. They stay as they are until `release`."""

    def release(self) -> None:
        """The bytes are not needed any more. Called once for every source, whatever became of it."""


class Putter:
    """Writes the chunks of one instance.

    Args:
        bucket: Where to.
        existence: Says what is there already, and is told what was written.
        outcomes: Where results are told.
        settings: The instance's.
    """

    def __init__(self, bucket: Bucket, existence: Existence, outcomes: Outcomes, settings: InstanceSettings) -> None:
        self._bucket = bucket
        self._existence = existence
        self._outcomes = outcomes
        self._settings = settings
        self._threads = WorkerPool(f"hfbucket-put-{outcomes.instance}", settings.max_parallel_writes)
        self._lock = threading.Lock()
        self._under_way: set[str] = set()
        self._bucket_is_there = False

    def write_many(self, sources: Sequence[Source], size: int, deadline: Deadline) -> list[ItemFailure]:
        """Store chunks; returns when all are stored or failed, at the deadline at the latest.

        A key that is there at the right size is not written again, nor is one that is being written at this moment.
        LMCache's own probe key always is: its health check would never recover otherwise.

        Args:
            sources: The chunks. Each is released exactly once, when nothing reads its memory any more.
            size: Bytes of a full chunk; a source of another size is refused.
            deadline: When to give up.

        Returns:
            What failed, item by item; the others are stored.
        """
        started = time.monotonic()
        mine, failures = self._claim(sources, size)
        claimed = [source.key for source in mine]
        try:
            todo = self._drop_present(mine, size, deadline)
        except BaseException as error:  # noqa: BLE001 - whatever it is, the memory is the engine's again
            failures += _release_unwritten(mine, _kind(error), str(error))
        else:
            failures += self._commit_all(todo, deadline)
        finally:
            with self._lock:
                self._under_way.difference_update(claimed)
        self._tell(failures, started)
        return failures

    def _claim(self, sources: Sequence[Source], size: int) -> tuple[list[Source], list[ItemFailure]]:
        """Refuse what is no full chunk, pass over what is being written already, and mark the rest as ours."""
        mine: list[Source] = []
        failures: list[ItemFailure] = []
        for source in sources:
            actual = len(source.view)
            if actual != size:
                message = f"{source.key}: {actual} bytes are no full chunk of {size}; partial uploads are refused"
                failures.append(ItemFailure(source.key, "refused", message))
                source.release()
                continue
            with self._lock:
                taken = source.key in self._under_way
                self._under_way.add(source.key)
            if taken:
                self._outcomes.chunks("put", "under_way", 1)
                source.release()
            else:
                mine.append(source)
        return mine, failures

    def _drop_present(self, sources: Sequence[Source], size: int, deadline: Deadline) -> list[Source]:
        """Release the sources that need no writing, and return the others; where it raises it released none."""
        asked = [source.key for source in sources if not is_probe(source.key)]
        try:
            contents = self._existence.contents(asked, deadline) if asked else {}
        except BucketMissingError:
            if not self._settings.create_bucket_if_missing:
                raise
            contents = {}
        present = {key for key, content in contents.items() if content is not None and content.size == size}
        if len(present) < len(sources):
            self._create_bucket_once(deadline)
        for source in sources:
            if source.key in present:
                self._outcomes.chunks("put", "present", 1)
                source.release()
        return [source for source in sources if source.key not in present]

    def _create_bucket_once(self, deadline: Deadline) -> None:
        if self._settings.create_bucket_if_missing and not self._bucket_is_there:
            self._bucket.create(deadline)
            self._bucket_is_there = True

    def _commit_all(self, sources: Sequence[Source], deadline: Deadline) -> list[ItemFailure]:
        """Write commits side by side, and abandon those that the deadline finds unfinished."""
        tasks: dict[Future[list[ItemFailure]], tuple[list[Source], Upload]] = {}
        failures: list[ItemFailure] = []
        for commit in self._cut(sources):
            upload = Upload()
            try:
                tasks[self._threads.submit(self._commit, commit, deadline, upload)] = (commit, upload)
            except RuntimeError as error:
                failures += _release_unwritten(commit, "transport", str(error))
        finished, unfinished = wait(tasks, timeout=deadline.remaining())
        for future in finished:
            failures += future.result()
        for future in unfinished:
            commit, upload = tasks[future]
            message = f"not stored within {deadline.seconds:g} s; abandoned"
            if future.cancel():  # it had not begun, so nothing reads its memory
                failures += _release_unwritten(commit, DeadlineError.kind, message)
            else:
                self._bucket.transfer.abandon(upload)
                failures += [ItemFailure(s.key, DeadlineError.kind, f"{s.key}: {message}") for s in commit]
        return failures

    def _cut(self, sources: Sequence[Source]) -> Iterator[list[Source]]:
        """Cut into commits: hf_xet peaks near twice a commit in memory, and several are written side by side."""
        limit = self._settings.commit_bytes
        commit: list[Source] = []
        amount = 0
        for source in sources:
            if commit and amount + len(source.view) > limit:
                yield commit
                commit, amount = [], 0
            commit.append(source)
            amount += len(source.view)
        if commit:
            yield commit

    def _commit(self, sources: list[Source], deadline: Deadline, upload: Upload) -> list[ItemFailure]:
        try:
            files, failed = self._write(sources, deadline, upload)
        except BaseException as error:  # noqa: BLE001 - hf_xet's panics too: whoever waits must be told
            for source in sources:  # they may be there, and only the answer be missing
                self._existence.cache.drop(source.key)
            return [ItemFailure(source.key, _kind(error), f"{source.key}: {error}") for source in sources]
        finally:
            for source in sources:
                source.release()
        return self._settle(sources, files, failed)

    def _write(
        self, sources: Sequence[Source], deadline: Deadline, upload: Upload
    ) -> tuple[dict[str, Content], dict[str, ItemFailure]]:
        """Upload contents, then name them; return them by path, and what failed."""
        handle = self._bucket.handle
        contents = self._bucket.transfer.upload([source.view for source in sources], deadline, upload)
        for source, content in zip(sources, contents, strict=True):
            if content.size != len(source.view):
                raise IntegrityError(f"{content.size} of {len(source.view)} bytes were taken")
        files = {handle.join(encode_name(s.key)): c for s, c in zip(sources, contents, strict=True)}
        return files, self._bucket.add(files, deadline)

    def _settle(
        self, sources: Sequence[Source], files: Mapping[str, Content], failed: Mapping[str, ItemFailure]
    ) -> list[ItemFailure]:
        """Tell item by item what became of a commit."""
        failures = []
        written = 0
        for source, (path, content) in zip(sources, files.items(), strict=True):
            if path in failed:
                failures.append(ItemFailure(source.key, failed[path].kind, f"{source.key}: {failed[path].message}"))
                self._existence.cache.drop(source.key)
            else:
                self._existence.cache.put(source.key, content)
                written += content.size
        self._outcomes.chunks("put", "stored", len(sources) - len(failures))
        self._outcomes.bytes("write", written)
        return failures

    def _tell(self, failures: Sequence[ItemFailure], started: float) -> None:
        for failure in failures:
            self._outcomes.chunks("put", failure.kind, 1)
            self._outcomes.warn("put", failure.kind, failure.message)
        self._outcomes.ended("put", failures[0].kind if failures else "ok", started)

    def close(self) -> None:
        """Take no more work."""
        self._threads.close()


def _kind(error: BaseException) -> str:
    return error.kind if isinstance(error, HFBucketError) else HFBucketError.kind


def _release_unwritten(sources: Sequence[Source], kind: str, message: str) -> list[ItemFailure]:
    for source in sources:
        source.release()
    return [ItemFailure(source.key, kind, f"{source.key}: {message}") for source in sources]
