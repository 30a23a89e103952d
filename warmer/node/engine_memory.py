"""Moves planned chunks into the memory of the classic engine's workers on one node. Plain Python.

A worker loads what lies in a directory. So chunks are staged as into any directory tier, each in the directory of the
worker that reads it, and each batch is loaded at once, from a directory that holds nothing else: staging never takes more
room than the batches in progress, and whether a chunk is in memory is known when its batch has ended.
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
    """Chunks that are loaded together: the directory that holds nothing else, its descriptor, the names of its files."""

    path: Path
    descriptor: int
    files: list[str]


class StagingDirectory:
    """The staging directory of one worker, and what is known of its memory. May be used by several threads.

    Args:
        declaration: Of the directory, without placeholders. It is made when missing.
        worker: Whose it is.
        address: Of the worker's internal API.
        keep: Whether files stay when they are loaded.

    Attributes:
        worker: Whose it is.

    Raises:
        TierError: The directory cannot be made or written.
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
        self._failures = 0  # loads in a row that failed for the worker
        options = replace(declaration.options, max_bytes=None, evict=False)
        with _named(self._home):
            self._run = RunFiles(self._home, Ownership(declaration.name, options).open(self._home))
        try:
            # A directory of this run alone: others never look into it, and it goes with the run.
            here = self._run.directory()
            self._declaration = replace(declaration, base_paths=(here,), options=options)
            self.tier = DirectoryTier(self._declaration)
        except HFBucketError:
            self._run.close()
            raise

    def draft(self, key: str, size: int) -> DirectoryDraft:
        """Begin a chunk, with room for it taken in the worker's memory.

        Raises:
            TierFullError: There is no room, in memory or in the directory.
            EngineError: The worker did not answer any more.
            TierError: The directory cannot be written.
        """
        with self._lock:
            if self._broken is not None:
                raise EngineError(f"{key}: {self._broken}")
            if key not in self._taken:  # else it is another try
                if size > self._free:
                    raise TierFullError(
                        f"{key}: worker {self.worker.id} has no room for it: {self.worker.room} bytes of its memory are for what "
                        "is loaded (80 % of max_local_cpu_size, or --tier-max-bytes)"
                    )
                self._free -= size
                self._taken[key] = size
        return self.tier.draft(key, size)

    def settle(self, key: str, *, loaded: bool) -> None:
        """A chunk has ended; without being loaded it takes no room."""
        with self._lock:
            size = self._taken.pop(key, 0)
            if not loaded:
                self._free += size

    def load(self, chunks: Sequence[ChunkRef], secs: float) -> dict[str, HFBucketError]:
        """Have the worker load chunks that were staged.

        Args:
            chunks: Which.
            secs: Most seconds that it may take.

        Returns:
            Why some are not in its memory, by key.
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
        if done.files != len(chunks) or done.chunks + len(failed) < len(chunks):  # nobody knows which
            failed = {chunk.key for chunk in chunks}
            words = (
                f"the engine at {self._address} found {done.files} files in {str(directory)!r} and loaded {done.chunks}, where "
                f"{len(chunks)} were staged; does it see the same directory?"
            )
        return {chunk.key: EngineError(f"{chunk.key}: {words}") for chunk in chunks if chunk.key in failed}

    def _missed(self, error: EngineError) -> None:
        """The worker did not do it. After several times in a row it is asked no more."""
        with self._lock:
            self._failures += 1
            if self._failures >= FAILURES:
                self._broken = EngineError(f"{self._failures} loads failed one after the other, the last one: {error}")

    def _gather(self, chunks: Sequence[ChunkRef]) -> _Batch:
        """Move chunks into a directory of their own. By descriptors: the engine's user may rename what lies in its directory."""
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
        """Keep the files, or remove them."""
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
        """Leave nothing of this run's behind but files that are to be kept."""
        self.tier.close()
        self._run.close()


class StagedTier:
    """The memory of a node's workers, as the warmer fills tiers: what is published is staged, not loaded yet.

    Args:
        name: For people.
        declaration: Of the staging directories; tells which keys there may be.
        stages: By number of the worker.
        absent: Why other workers of this node are not there.
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
        """Of the worker that reads a chunk.

        Raises:
            KeyFormatError: The tier can hold no chunk of that key.
            EngineError: The worker is not there.
            TierError: No worker here reads it.
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

    def holds(self, key: str, size: int) -> bool:  # noqa: ARG002 - the protocol's; an engine does not tell
        """Whether the chunk is there: an engine does not tell, so it is loaded.

        Raises:
            KeyFormatError: The tier can hold no chunk of that key.
        """
        unambiguous(key, self._declaration.takes)
        return False

    def draft(self, key: str, size: int) -> DirectoryDraft:
        """Begin a chunk; see `StagingDirectory.draft` and `stage`."""
        return self.stage(key).draft(key, size)

    def inventory(self) -> Iterator[HeldChunk]:
        """Nothing: an engine does not tell what its memory holds."""
        return iter(())

    def close(self) -> None:
        """Leave nothing behind."""
        for stage in self._stages.values():
            stage.close()


class EngineLoader:
    """One node's part of a run that fills the memory of its workers. Its methods may be called from several threads.

    Args:
        warmer: Stages chunks.
        tier: What it fills.

    Attributes:
        chunk_timeout_secs: Most seconds that a chunk may take to be staged, and its batch to be loaded.
    """

    def __init__(self, warmer: NodeWarmer, tier: StagedTier) -> None:
        self._warmer = warmer
        self._tier = tier
        self.chunk_timeout_secs = warmer.chunk_timeout_secs

    def copy(self, chunks: Sequence[ChunkRef]) -> list[Outcome]:
        """Load chunks; none raises by itself."""
        return self.fetch(chunks, keep=False)[0]

    def fetch(self, chunks: Sequence[ChunkRef], *, keep: bool) -> tuple[list[Outcome], list[Bytes]]:
        """As `copy`; returns the bytes of those that were loaded, too."""
        staged, kept = self._warmer.fetch(chunks, keep=keep)
        outcomes = self._loaded(chunks, staged)
        copied = [after for before, after in zip(staged, outcomes, strict=True) if isinstance(before, Copied)]
        return outcomes, [content for content, after in zip(kept, copied, strict=False) if isinstance(after, Copied)]

    def lacks(self, chunks: Sequence[ChunkRef]) -> bool:
        """Whether any of some chunks is not there, as far as it can be told."""
        return self._warmer.lacks(chunks)

    def reuse(self, chunks: Sequence[ChunkRef]) -> list[Outcome | None]:
        """Load chunks from the tiers that were filled before; None stands for what they have not."""
        return self._loaded(chunks, self._warmer.reuse(chunks))

    def receive(self, chunks: Sequence[ChunkRef], contents: Sequence[Bytes]) -> list[Outcome | None]:
        """Load chunks that another node has fetched; None stands for one that did not arrive rightly."""
        return self._loaded(chunks, self._warmer.receive(chunks, contents))

    def _loaded(self, chunks: Sequence[ChunkRef], staged: Sequence[_Ended]) -> list[_Ended | Failed]:
        """How chunks end, by how they were staged."""
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
        with contextlib.suppress(HFBucketError):  # nobody's chunk takes nobody's room
            self._tier.stage(chunk.key).settle(chunk.key, loaded=loaded)
        if error is None:
            return outcome
        asked = outcome.asked if isinstance(outcome, (Copied, Failed)) else None
        return Failed(chunk.key, chunk.size, error.kind, str(error), asked=asked)

    def stop(self) -> None:
        """End what is in progress at once."""
        self._warmer.stop()

    def close(self) -> None:
        """Leave nothing behind."""
        self._warmer.close()


@dataclass(frozen=True, slots=True)
class LoadConfig:
    """What a node needs to know to fill the memory of its workers. It crosses to the nodes, so it never holds a token.

    Attributes:
        source: Where chunks come from, and how.
        tier: Which memory.
        ranks: The workers of each node, by its id, which were found there or are said to be.
        candidates: The workers whose chunks there are; a node that joined later looks which of them it has.
        wait_secs: How long such a node waits for its engine.
    """

    source: NodeConfig
    tier: LocalCPUDeclaration
    ranks: Mapping[str, frozenset[int]]
    candidates: frozenset[int]
    wait_secs: float

    def open(self, place: NodeInfo) -> EngineLoader:
        """Begin, on the node.

        Raises:
            EngineError: None of its workers is there.
            ConfigError: The node has no value for a placeholder, or lacks the token.
            AccessDeniedError: Its token may not read the bucket.
            BucketMissingError: There is no such bucket, or the token may not see it.
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
    """Looks which workers of the engine a node has, and waits for them. It crosses to the nodes.

    Attributes:
        tier: Whose memory is to be filled.
        wanted: Numbers of workers.
        all_of_them: Whether all of them are said to be on this node.
        wait_secs: How long to wait.
    """

    tier: LocalCPUDeclaration
    wanted: frozenset[int]
    all_of_them: bool
    wait_secs: float

    def begin(self, place: NodeInfo) -> tuple[frozenset[int], None]:
        """Look, on the node; returns those that it has, also those of the same engine that did not come in time.

        Raises:
            EngineError: None is there in time.
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
