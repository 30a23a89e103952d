"""Ray actor of the warmer on a node. It owns the objects with the chunks that it fetched for other nodes."""

from __future__ import annotations

import ctypes
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

import ray
import ray.exceptions

from hfbucket_plugin.errors import HFBucketError
from hfbucket_plugin.hub import xet_home
from warmer.report.outcomes import Copied, Present

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hfbucket_plugin.tools.selection import ChunkRef
    from warmer.node.receive import Bytes
    from warmer.report.outcomes import Outcome
    from warmer.tiers import NodeInfo


_MIB: Final = 1024 * 1024
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
"""Parameters of `mallopt` in glibc's `malloc.h`."""

_LARGEST: Final = 32 * _MIB
"""Largest size in bytes that glibc allocates from an arena instead of a mapping of its own; hf_xet's buffers have 16 MiB."""

_KEPT: Final = 256 * _MIB
"""Free bytes kept at the end of an arena: twice what hf_xet may have in flight, so the limit is never reached."""

_ARENAS: Final = 4
"""Maximum number of arenas; the default is up to eight a core, each of which keeps its peak size."""


def keep_freed_memory() -> bool:
    """Configure malloc to keep freed memory, for processes that only move bytes through large buffers.

    By default, each buffer of 16 MiB is a new mapping, whose 4,096 pages are created, cleared and returned for each piece:
    260,000 page faults for 2 GiB, instead of 40,000 to 120,000 (docs/decisions/0019).

    Returns:
        Whether the C library supports and accepted the settings.
    """
    try:
        tell = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not glibc
        return False
    wanted = ((_M_MMAP_THRESHOLD, _LARGEST), (_M_TRIM_THRESHOLD, _KEPT), (_M_ARENA_MAX, _ARENAS))
    reported = [tell(name, value) for name, value in wanted]  # set all, even if the first fails
    return all(reported)


class NodeWorker(Protocol):
    """Work of a single node: a `NodeChecker`, or a `NodeWarmer`."""

    def copy(self, chunks: Sequence[ChunkRef]) -> list[Outcome]:
        """Process chunks and return their outcomes in order; a failure of a single chunk does not raise."""

    def stop(self) -> None:
        """Stop the work in progress immediately."""

    def close(self) -> None:
        """Release all resources and remove temporary files."""


class Sharer(NodeWorker, Protocol):
    """Worker that also shares chunks with other nodes, such as a `NodeWarmer`; schedules that are not direct need one."""

    chunk_timeout_secs: float

    def fetch(self, chunks: Sequence[ChunkRef], *, keep: bool) -> tuple[list[Outcome], list[Bytes]]:
        """Process chunks like `copy`, and also return the bytes of those that were copied."""

    def lacks(self, chunks: Sequence[ChunkRef]) -> bool:
        """Return whether any of some chunks is absent."""

    def reuse(self, chunks: Sequence[ChunkRef]) -> list[Outcome | None]:
        """Copy chunks from elsewhere on this node; the outcome is None for a chunk that is not there."""

    def receive(self, chunks: Sequence[ChunkRef], contents: Sequence[Bytes]) -> list[Outcome | None]:
        """Write chunks that another node has fetched; the outcome is None for a chunk that did not arrive intact."""


class Config(Protocol):
    """Configuration of a node, which is sent to the node."""

    def open(self, place: NodeInfo) -> NodeWorker:
        """Open the worker of a node; runs on that node.

        Raises:
            HFBucketError: This node cannot take part.
        """


class NodeActor:
    """Ray actor of a node. `start` opens the worker, so that its errors are returned unchanged."""

    def __init__(self) -> None:
        self._worker: NodeWorker | None = None
        xet_home.claim()
        keep_freed_memory()

    def start(self, config: Config, place: NodeInfo) -> tuple[HFBucketError | None, float]:
        """Open the worker of this node.

        Returns:
            The error if this node cannot take part, and the seconds it took, without the start of the process.
        """
        since, failed = time.monotonic(), None
        try:
            self._worker = config.open(place)
        except HFBucketError as error:
            failed = error
        return failed, time.monotonic() - since

    def fetch(self, chunks: Sequence[ChunkRef], *, share: bool) -> tuple[list[Outcome], list[Any]]:
        """Fetch chunks from the Hub, or process them as this worker does.

        Returns:
            The outcome of each chunk, and a list with the object that holds the bytes of the copied chunks, in order. The
            object lives as long as this actor and a reference to the object.
        """
        if not share:
            return self._ready.copy(chunks), []
        outcomes, kept = self._sharing.fetch(chunks, keep=True)
        if not kept:
            return outcomes, []
        try:
            return outcomes, [ray.put(kept)]
        except ray.exceptions.RayError:  # no room in the store: the other nodes fetch by themselves
            return outcomes, []

    def receive(self, chunks: Sequence[ChunkRef], objects: list[Any]) -> tuple[list[Outcome | None], bool]:
        """Receive chunks from the object store.

        Returns:
            The outcome of each chunk, None if the chunk did not arrive, and whether that is because the object is lost.
        """
        sharer = self._sharing
        if not sharer.lacks(chunks):  # all chunks are present, so their bytes need not be transferred
            return [Present(chunk.key, chunk.size) for chunk in chunks], False
        outcomes = sharer.reuse(chunks)
        lacking = [index for index, outcome in enumerate(outcomes) if outcome is None]
        if not lacking:
            return outcomes, False
        since = time.monotonic()
        try:
            contents = ray.get(objects[0], timeout=sharer.chunk_timeout_secs)
        except ray.exceptions.GetTimeoutError:
            return outcomes, False
        except ray.exceptions.RayError as error:
            return outcomes, isinstance(error, ray.exceptions.ObjectLostError)
        # These are views of the object store, which keeps the object while a view exists.
        waited = time.monotonic() - since
        received = sharer.receive([chunks[index] for index in lacking], [contents[index] for index in lacking])
        for index, one in zip(lacking, received, strict=True):
            outcomes[index] = replace(one, seconds=one.seconds + waited) if isinstance(one, Copied) else one
        return outcomes, False

    @property
    def _ready(self) -> NodeWorker:
        if self._worker is None:
            raise RuntimeError("this node was not started")
        return self._worker

    @property
    def _sharing(self) -> Sharer:
        return cast("Sharer", self._ready)

    def stop(self) -> None:
        """Stop the work in progress immediately."""
        if self._worker is not None:
            self._worker.stop()

    def close(self) -> None:
        """Close the worker."""
        if self._worker is not None:
            self._worker.close()
