"""What runs on a node: the warmer's Ray actor. Chunks that it fetched for others lie in the object store, owned by it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ray
import ray.exceptions

from hfbucket_plugin.errors import HFBucketError
from warmer.node import open_node
from warmer.outcomes import Present

if TYPE_CHECKING:
    from collections.abc import Sequence

    from warmer.node import NodeConfig, NodeWarmer
    from warmer.outcomes import Outcome
    from warmer.plan import PlannedChunk
    from warmer.tiers import Place


class NodeActor:
    """A `NodeWarmer`, made in its own method so that its errors come back as they are."""

    def __init__(self) -> None:
        self._warmer: NodeWarmer | None = None
        self._wait_secs = 0.0

    def start(self, config: NodeConfig, place: Place) -> HFBucketError | None:
        """Take part; returns why it cannot."""
        try:
            self._warmer = open_node(config, place)
        except HFBucketError as error:
            return error
        self._wait_secs = config.chunk_timeout_secs
        return None

    def fetch(self, chunks: Sequence[PlannedChunk], *, share: bool) -> tuple[list[Outcome], list[Any]]:
        """Fetch chunks from the Hub.

        Returns:
            How each ended; and, in a list, the object that holds the bytes of those that were copied, in their order.
            It lives as long as this actor does and somebody knows it.
        """
        outcomes, kept = self._ready.fetch(chunks, keep=share)
        if not kept:
            return outcomes, []
        try:
            return outcomes, [ray.put(kept)]
        except ray.exceptions.RayError:  # no room in the store: others fetch for themselves
            return outcomes, []

    def receive(self, chunks: Sequence[PlannedChunk], objects: list[Any]) -> tuple[list[Outcome | None], bool]:
        """Take chunks from the object store.

        Returns:
            How each ended, None for those that did not arrive; and whether that is so because the object is lost.
        """
        warmer = self._ready
        if not warmer.lacks(chunks):  # then their bytes need not come here at all
            return [Present(chunk.key, chunk.size) for chunk in chunks], False
        nothing: list[Outcome | None] = [None] * len(chunks)
        try:
            contents = ray.get(objects[0], timeout=self._wait_secs)
        except ray.exceptions.GetTimeoutError:
            return nothing, False
        except ray.exceptions.RayError as error:
            return nothing, isinstance(error, ray.exceptions.ObjectLostError)
        # Views of the store, which keep the object there until they are gone.
        return warmer.receive(chunks, contents), False

    @property
    def _ready(self) -> NodeWarmer:
        if self._warmer is None:
            raise RuntimeError("this node was not started")
        return self._warmer

    def stop(self) -> None:
        """End what is under way at once."""
        if self._warmer is not None:
            self._warmer.stop()

    def close(self) -> None:
        """Leave nothing behind."""
        if self._warmer is not None:
            self._warmer.close()
