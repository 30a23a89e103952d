"""Tasks of nodes, limits on the tasks in flight, and counters of a schedule. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from hfbucket_plugin.tools.selection import ChunkRef

_MIB: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class TaskLimits:
    """Limits on the work in progress.

    Attributes:
        batch_chunks: Maximum chunks of a task. 64 share one call of the hasher, which is slow with few small files.
        batch_bytes: Maximum bytes of a task; a larger chunk goes alone. 64 MiB are a fraction of a second of work, so
            that little is lost with a node.
        fetches: Maximum fetches in progress on a node. With four, two or three transfer while another is hashed, so the
            streams that a finished fetch frees have work.
        receives: Maximum receives in progress on a node.
        bytes: Maximum bytes in progress on a node, the sum of the limits of its tasks; a larger chunk goes alone.
        batches: Maximum batches in progress in the whole run: being fetched, or waiting in the object store for nodes.
        run_bytes: Maximum bytes being fetched in the whole run; a larger chunk goes alone. None: only the limits of the
            nodes apply.
        fan_out: Maximum nodes that receive a batch at one time, for each node that already has it.
        patience_secs: Seconds for which a node may delay the others, or be slower than they are, before they continue
            without it.
    """

    batch_chunks: int = 64
    batch_bytes: int = 64 * _MIB
    fetches: int = 4
    receives: int = 2
    bytes: int = 384 * _MIB
    batches: int = 256
    run_bytes: int | None = None
    fan_out: int = 4
    patience_secs: float = 10.0

    def __post_init__(self) -> None:
        least = min(
            self.batch_chunks, self.batch_bytes, self.fetches, self.receives, self.bytes, self.batches, self.fan_out
        )
        if least < 1 or (self.run_bytes is not None and self.run_bytes < 1):
            raise ValueError("a window has room for at least one chunk and one byte")


@dataclass(frozen=True, slots=True)
class FetchTask:
    """Fetch of chunks from the Hub into the tier of a node.

    Attributes:
        number: Identifies the task, and its data in the object store, within the schedule.
        node: Name of the node.
        chunks: Chunks in the order of the plan; never empty.
        share: Whether to leave the chunks in the object store for other nodes.
    """

    number: int
    node: str
    chunks: tuple[ChunkRef, ...]
    share: bool


@dataclass(frozen=True, slots=True)
class ReceiveTask:
    """Receive of chunks from the object store into the tier of a node.

    Attributes:
        number: Identifies the task within the schedule.
        node: Name of the node.
        chunks: All chunks that the fetch `source` left in the store, in the order in which they are stored.
        source: Number of the `FetchTask` that stored the chunks.
    """

    number: int
    node: str
    chunks: tuple[ChunkRef, ...]
    source: int


Task = FetchTask | ReceiveTask


def total_bytes(chunks: tuple[ChunkRef, ...]) -> int:
    """Return the sum of the chunks' sizes, in bytes."""
    return sum(chunk.size for chunk in chunks)


@dataclass(slots=True)
class Counts:
    """Counters of a schedule.

    Attributes:
        fetched: Chunks fetched from the Hub, repeated fetches included.
        fetched_bytes: Bytes of these chunks.
        refetched: Chunks requested once more, because their holder was lost or slow, the first fetch failed, or nodes
            that fell behind continue without the others.
        own: Chunks that a node requested by itself, because it fell behind, joined later, or did not receive them.
        lags: How often a node fell behind.
        slow_fetches: Fetches that were so slow that another node was assigned.
    """

    fetched: int = 0
    fetched_bytes: int = 0
    refetched: int = 0
    own: int = 0
    lags: int = 0
    slow_fetches: int = 0
