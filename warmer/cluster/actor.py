"""What runs on a node: the warmer's Ray actor. Chunks that it fetched for others lie in the object store, owned by it."""

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
"""Of glibc's `malloc.h`."""

_LARGEST: Final = 32 * _MIB
"""The most that glibc takes from its arenas in place of a mapping of its own; hf_xet's buffers have 16 MiB."""

_KEPT: Final = 256 * _MIB
"""What an arena may keep at its end, twice what hf_xet may have in flight: never reached, and never the reason to give back."""

_ARENAS: Final = 4
"""Else there are up to eight for each core, and each keeps what it once had."""


def keep_freed_memory() -> bool:
    """Have malloc keep what is freed. For processes that move bytes through large buffers and do nothing else.

    A buffer of 16 MiB is else a mapping of its own, whose 4,096 pages are made, cleared and given back for each piece: 260,000
    page faults for 2 GiB, in place of 40,000 to 120,000 (docs/decisions/0019).

    Returns:
        Whether this is a C library that can be told so.
    """
    try:
        tell = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not glibc
        return False
    wanted = ((_M_MMAP_THRESHOLD, _LARGEST), (_M_TRIM_THRESHOLD, _KEPT), (_M_ARENA_MAX, _ARENAS))
    reported = [tell(name, value) for name, value in wanted]  # all of them, whatever becomes of the first
    return all(reported)


class NodeWorker(Protocol):
    """What works on a node by itself: a `NodeChecker`, or a `NodeWarmer`."""

    def copy(self, chunks: Sequence[ChunkRef]) -> list[Outcome]:
        """Do what there is to do with some chunks; nothing raises for a single one."""

    def stop(self) -> None:
        """End what is in progress at once."""

    def close(self) -> None:
        """Leave nothing behind."""


class Sharer(NodeWorker, Protocol):
    """What shares chunks with other nodes too: a `NodeWarmer`. Schedules that are not direct need one."""

    chunk_timeout_secs: float

    def fetch(self, chunks: Sequence[ChunkRef], *, keep: bool) -> tuple[list[Outcome], list[Bytes]]:
        """As `copy`; returns the bytes of those that were copied, too."""

    def lacks(self, chunks: Sequence[ChunkRef]) -> bool:
        """Whether any of some chunks is not there."""

    def reuse(self, chunks: Sequence[ChunkRef]) -> list[Outcome | None]:
        """Take chunks from elsewhere on this node; None stands for one that is not there."""

    def receive(self, chunks: Sequence[ChunkRef], contents: Sequence[Bytes]) -> list[Outcome | None]:
        """Take chunks that another node has fetched; None stands for one that did not arrive rightly."""


class Config(Protocol):
    """What a node is told. It crosses to the nodes."""

    def open(self, place: NodeInfo) -> NodeWorker:
        """Begin, on the node.

        Raises:
            HFBucketError: This node cannot take part.
        """


class NodeActor:
    """A worker, made in its own method so that its errors come back as they are."""

    def __init__(self) -> None:
        self._worker: NodeWorker | None = None
        xet_home.claim()
        keep_freed_memory()

    def start(self, config: Config, place: NodeInfo) -> tuple[HFBucketError | None, float]:
        """Take part.

        Returns:
            Why it cannot; and how many seconds it took, the start of the process not counted.
        """
        since, failed = time.monotonic(), None
        try:
            self._worker = config.open(place)
        except HFBucketError as error:
            failed = error
        return failed, time.monotonic() - since

    def fetch(self, chunks: Sequence[ChunkRef], *, share: bool) -> tuple[list[Outcome], list[Any]]:
        """Fetch chunks from the Hub, or do whatever else this worker does with them.

        Returns:
            How each ended; and, in a list, the object that holds the bytes of those that were copied, in their order.
            It lives as long as this actor does and somebody knows it.
        """
        if not share:
            return self._ready.copy(chunks), []
        outcomes, kept = self._sharing.fetch(chunks, keep=True)
        if not kept:
            return outcomes, []
        try:
            return outcomes, [ray.put(kept)]
        except ray.exceptions.RayError:  # no room in the store: others fetch for themselves
            return outcomes, []

    def receive(self, chunks: Sequence[ChunkRef], objects: list[Any]) -> tuple[list[Outcome | None], bool]:
        """Take chunks from the object store.

        Returns:
            How each ended, None for those that did not arrive; and whether that is so because the object is lost.
        """
        sharer = self._sharing
        if not sharer.lacks(chunks):  # then their bytes need not come here at all
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
        # Views of the store, which keep the object there until they are gone.
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
        """End what is in progress at once."""
        if self._worker is not None:
            self._worker.stop()

    def close(self) -> None:
        """Leave nothing behind."""
        if self._worker is not None:
            self._worker.close()
