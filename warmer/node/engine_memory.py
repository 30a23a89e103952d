"""Loads planned chunks into the memory of the classic engine's workers on one node. Plain Python.

A worker loads all files of a directory. Chunks are therefore staged as in any directory tier, in a directory for each worker,
and each batch is loaded at once from a directory of its own: staging needs space for the batches in progress only, and the
end of a load shows which chunks of its batch are in memory.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from hfbucket_plugin.core.deadline import Deadline
from hfbucket_plugin.errors import HFBucketError
from warmer.node.worker import open_node
from warmer.report.outcomes import Copied, EngineError, Failed, TierError, TierFullError
from warmer.tiers.directory import DirectoryDraft, DirectoryTier, HeldChunk
from warmer.tiers.engine_http import FAILURES, HICCUP_SECS
from warmer.tiers.local_cpu import EngineWorker, find_workers, load
from warmer.tiers.naming import unambiguous
from warmer.tiers.run_files import Ownership, RunFiles

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from hfbucket_plugin.tools.selection import ChunkRef
    from warmer.node.receive import Bytes
    from warmer.node.worker import NodeConfig, NodeWarmer
    from warmer.report.outcomes import Outcome
    from warmer.tiers import LocalCPUDeclaration, NodeInfo
    from warmer.tiers.declare import DirectoryDeclaration


_Ended = TypeVar("_Ended", bound="Outcome | None")


class _Batch(NamedTuple):
    """Chunks that are loaded together: their own directory, its descriptor, and the names of the files in it."""

    path: Path
    descriptor: int
    files: list[str]


class StagingDirectory:
    """Staging directory of one worker, with the state of the worker's memory. Thread-safe.

    Args:
        declaration: Declaration of the directory, without placeholders. The directory is created if missing.
        worker: Worker that loads from the directory.
        address: Address of the worker's internal API.
        keep: Whether to keep the files after they are loaded.

    Attributes:
        worker: Worker that loads from the directory.

    Raises:
        TierError: The directory cannot be created or written.
    """

    def __init__(self, declaration: DirectoryDeclaration, worker: EngineWorker, address: str, *, keep: bool) -> None:
        self.worker = worker
        self._address = address
        self._keep = keep
        self._home = declaration.base_paths[0]
        self._batches = itertools.count(1)
        self._lock = threading.Lock()
        most = declaration.options.max_bytes
        self._free = worker.room if most is None else min(worker.room, most)
        self._taken: dict[str, int] = {}
        self._broken: HFBucketError | None = None
        self._failures = 0  # consecutive loads that failed because of the worker
        options = replace(declaration.options, max_bytes=None, evict=False)
        with _named(self._home):
            self._run = RunFiles(self._home, Ownership(declaration.name, options).open(self._home))
        try:
            # A directory of this run alone: other runs ignore it, and it is removed when the run ends.
            here = self._run.directory()
            self._declaration = replace(declaration, base_paths=(here,), options=options)
            self.tier = DirectoryTier(self._declaration)
        except HFBucketError:
            self._run.close()
            raise

    def draft(self, key: str, size: int) -> DirectoryDraft:
        """Create a draft of a chunk, with its room in the worker's memory reserved.

        Raises:
            TierFullError: There is no room in memory or in the directory.
            EngineError: The worker no longer answers.
            TierError: The directory cannot be written.
        """
        with self._lock:
            if self._broken is not None:
                raise EngineError(f"{key}: {self._broken}")
            if key not in self._taken:  # otherwise this is a retry, whose room is already reserved
                if size > self._free:
                    raise TierFullError(
                        f"{key}: worker {self.worker.id} has no room for it: {self.worker.room} bytes of its memory are for what "
                        "is loaded (80 % of max_local_cpu_size, or --tier-max-bytes)"
                    )
                self._free -= size
                self._taken[key] = size
        return self.tier.draft(key, size)

    def settle(self, key: str, *, loaded: bool) -> None:
        """Record the end of a chunk, and release its room if it was not loaded."""
        with self._lock:
            size = self._taken.pop(key, 0)
            if not loaded:
                self._free += size

    def load(self, chunks: Sequence[ChunkRef], secs: float) -> dict[str, HFBucketError]:
        """Make the worker load staged chunks.

        Args:
            chunks: Staged chunks.
            secs: Maximum duration in seconds.

        Returns:
            The error of each chunk that is not in the worker's memory, by key.
        """
        try:
            with _named(self._home):
                batch = self._gather(chunks)
                directory = batch.path
                try:
                    done = load(
                        self._address,
                        replace(self._declaration, base_paths=(directory,)),
                        wait_secs=min(secs, HICCUP_SECS),
                        load_secs=secs,
                    )
                finally:
                    self._scatter(batch)
        except HFBucketError as error:
            if isinstance(error, EngineError):
                self._missed(error)
            return {chunk.key: error for chunk in chunks}
        with self._lock:
            self._failures = 0
        failed = set(done.failed)
        words = f"the engine at {self._address} did not load it; its log says why"
        if done.files != len(chunks) or done.chunks + len(failed) < len(chunks):  # the chunks that failed are unknown
            failed = {chunk.key for chunk in chunks}
            words = (
                f"the engine at {self._address} found {done.files} files in {str(directory)!r} and loaded {done.chunks}, where "
                f"{len(chunks)} were staged; does it see the same directory?"
            )
        return {chunk.key: EngineError(f"{chunk.key}: {words}") for chunk in chunks if chunk.key in failed}

    def _missed(self, error: EngineError) -> None:
        """Record a load that failed because of the worker; after several consecutive failures, give up the worker."""
        with self._lock:
            self._failures += 1
            if self._failures >= FAILURES:
                self._broken = EngineError(f"{self._failures} loads failed one after the other, the last one: {error}")

    def _gather(self, chunks: Sequence[ChunkRef]) -> _Batch:
        """Move chunks into a new directory, by descriptors because the engine's user may rename what is in the directory."""
        here = self._declaration.base_paths[0]
        name = f"batch-{next(self._batches)}"
        batch = _Batch(here / name, self.tier.ownership.make_in(self.tier.descriptor(here), name), [])
        try:
            for chunk in chunks:
                file = self._declaration.file(chunk.key).name
                os.rename(file, file, src_dir_fd=self.tier.descriptor(here), dst_dir_fd=batch.descriptor)
                batch.files.append(file)
        except BaseException:
            os.close(batch.descriptor)
            raise
        return batch

    def _scatter(self, batch: _Batch) -> None:
        """Keep or remove the files of a batch after its load."""
        try:
            for file in batch.files:
                if self._keep:
                    os.replace(file, file, src_dir_fd=batch.descriptor, dst_dir_fd=self._run.descriptor)
                else:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(file, dir_fd=batch.descriptor)
        finally:
            os.close(batch.descriptor)
        os.rmdir(batch.path.name, dir_fd=self.tier.descriptor(batch.path.parent))

    def close(self) -> None:
        """Remove all files of this run except those that must be kept."""
        self.tier.close()
        self._run.close()


class StagedTier:
    """Memory of a node's workers as a tier: a published chunk is staged, not yet loaded.

    Args:
        name: Name of the tier in messages.
        declaration: Declaration of the staging directories, which determines the valid keys.
        stages: Staging directories by worker number.
        absent: Why other workers of this node are absent, by worker number.
    """

    def __init__(
        self,
        name: str,
        declaration: DirectoryDeclaration,
        stages: Mapping[int, StagingDirectory],
        absent: Mapping[int, HFBucketError],
    ) -> None:
        self._name = name
        self._declaration = declaration
        self._stages = stages
        self._absent = absent

    def stage(self, key: str) -> StagingDirectory:
        """Return the staging directory of the worker that reads a chunk.

        Raises:
            KeyFormatError: The key is not valid for the tier.
            EngineError: The worker is absent.
            TierError: No worker on this node reads the chunk.
        """
        parsed = unambiguous(key, self._declaration.takes)
        for stage in self._stages.values():
            if stage.worker.reads(parsed):
                return stage
        if parsed.worker_id in self._absent:
            raise EngineError(f"{key}: {self._absent[parsed.worker_id]}")
        workers = ", ".join(
            f"worker {one.worker.id} of {one.worker.world_size} of {one.worker.meta.get('model_name')!r}"
            for one in self._stages.values()
        )
        raise TierError(f"{key}: tier {self._name!r}: none of this node's workers reads it: {workers}")

    def holds(self, key: str, size: int) -> bool:  # noqa: ARG002 - the protocol's; an engine does not report its content
        """Return False for a valid key: an engine does not report which chunks it holds, so every chunk is loaded.

        Raises:
            KeyFormatError: The key is not valid for the tier.
        """
        unambiguous(key, self._declaration.takes)
        return False

    def draft(self, key: str, size: int) -> DirectoryDraft:
        """Create a draft of a chunk; see `StagingDirectory.draft` and `stage`."""
        return self.stage(key).draft(key, size)

    def inventory(self) -> Iterator[HeldChunk]:
        """Return no chunks: an engine does not report which chunks it holds."""
        return iter(())

    def close(self) -> None:
        """Close all staging directories and remove this run's files from them."""
        for stage in self._stages.values():
            stage.close()


class EngineLoader:
    """Worker of one node in a run that fills the memory of engine workers. Thread-safe.

    Args:
        warmer: Stages chunks in `tier`.
        tier: Tier of the engine workers' memory.

    Attributes:
        chunk_timeout_secs: Maximum seconds to stage a chunk, and to load its batch.
    """

    def __init__(self, warmer: NodeWarmer, tier: StagedTier) -> None:
        self._warmer = warmer
        self._tier = tier
        self.chunk_timeout_secs = warmer.chunk_timeout_secs

    def copy(self, chunks: Sequence[ChunkRef]) -> list[Outcome]:
        """Load chunks and return their outcomes in order; a failure of a single chunk does not raise."""
        return self.fetch(chunks, keep=False)[0]

    def fetch(self, chunks: Sequence[ChunkRef], *, keep: bool) -> tuple[list[Outcome], list[Bytes]]:
        """Load chunks like `copy`, and also return the bytes of those that were loaded."""
        staged, kept = self._warmer.fetch(chunks, keep=keep)
        outcomes = self._loaded(chunks, staged)
        copied = [after for before, after in zip(staged, outcomes, strict=True) if isinstance(before, Copied)]
        return outcomes, [content for content, after in zip(kept, copied, strict=False) if isinstance(after, Copied)]

    def lacks(self, chunks: Sequence[ChunkRef]) -> bool:
        """Return whether any of some chunks is absent, as far as this is known."""
        return self._warmer.lacks(chunks)

    def reuse(self, chunks: Sequence[ChunkRef]) -> list[Outcome | None]:
        """Load chunks from the tiers that were filled before; the outcome is None for a chunk that they lack."""
        return self._loaded(chunks, self._warmer.reuse(chunks))

    def receive(self, chunks: Sequence[ChunkRef], contents: Sequence[Bytes]) -> list[Outcome | None]:
        """Load chunks that another node has fetched; the outcome is None for a chunk that did not arrive intact."""
        return self._loaded(chunks, self._warmer.receive(chunks, contents))

    def _loaded(self, chunks: Sequence[ChunkRef], staged: Sequence[_Ended]) -> list[_Ended | Failed]:
        """Load staged chunks and return their final outcomes, given the outcomes of staging."""
        by_stage: defaultdict[StagingDirectory, list[ChunkRef]] = defaultdict(list)
        for chunk, outcome in zip(chunks, staged, strict=True):
            if isinstance(outcome, Copied):
                by_stage[self._tier.stage(chunk.key)].append(chunk)
        errors: dict[str, HFBucketError] = {}
        for stage, own in by_stage.items():
            errors |= stage.load(own, self.chunk_timeout_secs)
        return [
            self._settled(chunk, outcome, errors.get(chunk.key)) for chunk, outcome in zip(chunks, staged, strict=True)
        ]

    def _settled(self, chunk: ChunkRef, outcome: _Ended, error: HFBucketError | None) -> _Ended | Failed:
        loaded = isinstance(outcome, Copied) and error is None
        with contextlib.suppress(HFBucketError):  # a chunk that no worker reads has no room to release
            self._tier.stage(chunk.key).settle(chunk.key, loaded=loaded)
        if error is None:
            return outcome
        asked = outcome.asked if isinstance(outcome, (Copied, Failed)) else None
        return Failed(chunk.key, chunk.size, error.kind, str(error), asked=asked)

    def stop(self) -> None:
        """Stop the work in progress immediately."""
        self._warmer.stop()

    def close(self) -> None:
        """Close the warmer and remove its temporary files."""
        self._warmer.close()


@dataclass(frozen=True, slots=True)
class LoadConfig:
    """Configuration of a node that fills the memory of its workers. It is sent to the nodes, so it never holds a token.

    Attributes:
        source: Configuration of the fetches.
        tier: Declaration of the memory tier.
        ranks: Workers of each node, found or configured, by node id.
        candidates: Workers for which there are chunks; a node that joins later searches for these.
        wait_secs: Maximum seconds that a node that joins later waits for its engine.
    """

    source: NodeConfig
    tier: LocalCPUDeclaration
    ranks: Mapping[str, frozenset[int]]
    candidates: frozenset[int]
    wait_secs: float

    def open(self, place: NodeInfo) -> EngineLoader:
        """Open the loader of a node; runs on that node.

        Raises:
            EngineError: None of the node's workers answers.
            ConfigError: The node has no value for a placeholder, or lacks the token.
            AccessDeniedError: The node's token may not read the bucket.
            BucketMissingError: The bucket does not exist, or the token may not see it.
            TierError: A staging directory cannot be written.
        """
        known = self.ranks.get(place.node_id)
        ends = Deadline.after(self.wait_secs if known is None else 0.0)
        wanted = self.candidates if known is None else known
        found = find_workers(
            lambda worker: self.tier.address(place, worker), wanted, ends, all_of_them=known is not None
        )
        absent = {
            worker: EngineError(f"worker {worker} does not answer at {self.tier.address(place, worker)}")
            for worker in (known or frozenset()) - found.keys()
        }
        stages: dict[int, StagingDirectory] = {}
        tier = StagedTier(self.tier.name, self.tier.staging, stages, absent)
        try:
            for number, worker in found.items():
                staging, address = self.tier.staging_of(place, number), self.tier.address(place, number)
                stages[number] = StagingDirectory(staging, worker, address, keep=self.tier.keep_staging)
            return EngineLoader(open_node(self.source, place, tier), tier)
        except BaseException:
            tier.close()
            raise


@dataclass(frozen=True, slots=True)
class WorkerSearch:
    """Task that finds the engine workers of a node and waits for them. It is sent to the nodes.

    Attributes:
        tier: Declaration of the memory tier.
        wanted: Numbers of the workers.
        all_of_them: Whether all these workers are configured to be on this node.
        wait_secs: Maximum seconds to wait.
    """

    tier: LocalCPUDeclaration
    wanted: frozenset[int]
    all_of_them: bool
    wait_secs: float

    def begin(self, place: NodeInfo) -> tuple[frozenset[int], None]:
        """Return the workers that the node has, including workers of the same engine that did not answer in time.

        Raises:
            EngineError: No worker answers in time.
            ConfigError: The node has no value for a placeholder.
        """
        ends = Deadline.after(self.wait_secs)
        found = find_workers(
            lambda worker: self.tier.address(place, worker), self.wanted, ends, all_of_them=self.all_of_them
        )
        beside = frozenset[int]().union(*(worker.beside for worker in found.values()))
        return frozenset(found) | (self.wanted if self.all_of_them else beside & self.wanted), None


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except HFBucketError:
        raise
    except OSError as error:
        raise TierError(f"staging directory {str(path)!r}: {error.strerror}") from None
