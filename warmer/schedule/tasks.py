"""Tasks of nodes, and how many may be in flight. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from hfbucket_plugin.tools.selection import ChunkRef

_MIB: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class TaskLimits:
    """How much is in progress at a time.

    Attributes:
        batch_chunks: Most chunks of an order. 64 share one call of the hasher, which is slow with few small files.
        batch_bytes: Most bytes of an order; a larger chunk goes alone. 64 MiB are a fraction of a second of work, so
            that little is lost with a node.
        fetches: Most orders to fetch in progress on a node: four, so that two or three are fetched while another is hashed: where one
            comes to its end, the streams that it frees have something to do.
        receives: Most orders to receive in progress on a node.
        bytes: Most bytes in progress on a node: as many as all its orders have at most; a larger chunk goes when nothing else is.
        batches: Most batches in progress in the whole run: fetched, or waiting in the object store for those who lack them.
        run_bytes: Most bytes being fetched in the whole run; a larger chunk goes when nothing else is. None: no bound
            but those of the nodes.
        fan_out: Most nodes that receive a batch at one time for each node that has it already.
        patience_secs: How long a node may hold up the others, or be slower than they are, before they go on without.
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
    """A node is to fetch chunks from the Hub into its tier.

    Attributes:
        number: Names the order, and what it leaves in the object store, among all of a schedule.
        node: Whose it is.
        chunks: In the order of the plan; never empty.
        share: Whether to leave them in the object store for others.
    """

    number: int
    node: str
    chunks: tuple[ChunkRef, ...]
    share: bool


@dataclass(frozen=True, slots=True)
class ReceiveTask:
    """A node is to take chunks from the object store into its tier.

    Attributes:
        number: Names the order among all of a schedule.
        node: Whose it is.
        chunks: All that the `source` left in the store, in the order in which they lie there.
        source: The number of the `FetchTask` that left them there.
    """

    number: int
    node: str
    chunks: tuple[ChunkRef, ...]
    source: int


Task = FetchTask | ReceiveTask


def total_bytes(chunks: tuple[ChunkRef, ...]) -> int:
    """The sum of the chunks' sizes."""
    return sum(chunk.size for chunk in chunks)


@dataclass(slots=True)
class Counts:
    """What a schedule had to do.

    Attributes:
        fetched: Chunks that came from the Hub, again ones included.
        fetched_bytes: Their bytes.
        refetched: Chunks that were asked for once more: their holder was lost or slow, the first fetch failed, or those
            that fell behind go on without the others.
        own: Chunks that a node asked for by itself: it lagged behind the others, joined later, or did not receive them.
        lags: How often a node fell behind.
        slow_fetches: Orders whose node took so long that another one was asked.
    """

    fetched: int = 0
    fetched_bytes: int = 0
    refetched: int = 0
    own: int = 0
    lags: int = 0
    slow_fetches: int = 0
