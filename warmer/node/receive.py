"""Moves chunks that another node has fetched into one node's tier, and verifies what goes into a tier. Plain Python."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Final, Literal

from hfbucket_plugin.errors import HFBucketError
from hfbucket_plugin.hub.transfer import xet_hashes
from warmer.node.holdings import Holdings
from warmer.report.outcomes import INTERRUPTED, Copied, Failed, TierError
from warmer.tiers.directory import DirectoryTier

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Sequence

    import numpy as np
    import numpy.typing as npt

    from hfbucket_plugin.core.deadline import Deadline
    from hfbucket_plugin.tools.selection import ChunkRef
    from warmer.node.reuse import EarlierTier
    from warmer.report.outcomes import Outcome
    from warmer.tiers import ChunkDraft, Tier

    Bytes = npt.NDArray[np.uint8]

Verify = Literal["hash", "length"]

_PIECE_BYTES: Final = 4 * 1024 * 1024
"""Bytes of a chunk that are written at a time: an order to stop is noticed between two."""


class Receiver:
    """One node's way from the object store into its tier. May be used by several threads.

    Args:
        tier: Where chunks go.
        verify: What is checked before one appears: its length, or its Xet hash too.
        stopped: Set when the run is told to stop.
        holdings: What the tier holds; None to go by the length of its files.
    """

    def __init__(self, tier: Tier, verify: Verify, stopped: threading.Event, holdings: Holdings | None = None) -> None:
        self._holdings = Holdings(tier) if holdings is None else holdings
        self._tier = tier
        self._verify = verify
        self._stopped = stopped

    def receive(self, chunks: Sequence[ChunkRef], contents: Sequence[Bytes]) -> list[Outcome | None]:
        """Put chunks into the tier that another node has fetched. As with those fetched, none appears unless it is right.

        Returns:
            How each ended, in their order; None for one whose bytes were not right.
        """

        def has(index: int) -> bool:
            return len(contents[index]) == chunks[index].size

        def fill(index: int, draft: ChunkDraft) -> bool:
            self._fill(draft, contents[index])
            return True

        return self._take(chunks, has, fill, self._verify, received=True)

    def reuse(
        self, chunks: Sequence[ChunkRef], tier: EarlierTier, ends: Deadline, kept: dict[str, Bytes] | None
    ) -> list[Outcome | None]:
        """Put chunks into the tier that another tier of this node has.

        They are hashed, whatever is checked of others: nobody has compared what lies there with anything yet.

        Args:
            chunks: Which.
            tier: The other tier.
            ends: When to ask it no more.
            kept: Is given the bytes of those that were copied, by key; None for not to keep them.

        Returns:
            How each ended, in their order; None for one that it has not, or not rightly.
        """

        def has(index: int) -> bool:
            return tier.has(chunks[index])

        def fill(index: int, draft: ChunkDraft) -> bool:
            return tier.copy(chunks[index], draft, lambda: self._stopped.is_set() or ends.passed)

        return self._take(chunks, has, fill, "hash", reused=tier, kept=kept)

    def _take(
        self,
        chunks: Sequence[ChunkRef],
        has: Callable[[int], bool],
        fill: Callable[[int, ChunkDraft], bool],
        verify: Verify,
        *,
        received: bool = False,
        reused: EarlierTier | None = None,
        kept: dict[str, Bytes] | None = None,
    ) -> list[Outcome | None]:
        """Put chunks into the tier whose bytes somebody has.

        Args:
            chunks: Which.
            has: Whether there is one, by its place among them; room is made in the tier for no other.
            fill: Writes one of them, by its place among them, into a draft; false where it has not all of it.
            verify: What is checked before one appears.
            received: Where from, see `Copied`.
            reused: The tier of the same node that they come from; None where they do not.
            kept: Is given the bytes of those that were copied, by key.
        """
        since = time.monotonic()
        outcomes: dict[int, Outcome | None] = {}
        drafts: dict[int, ChunkDraft] = {}
        try:
            for (index, chunk), there in zip(enumerate(chunks), self._holdings.look(chunks), strict=True):
                if there is not None:
                    outcomes[index] = there
                    continue
                try:
                    if not has(index):
                        outcomes[index] = None
                        continue
                    drafts[index] = draft = self._tier.draft(chunk.key, chunk.size)
                    if not fill(index, draft):
                        outcomes[index] = given_up(chunk) if self._stopped.is_set() else None
                        draft.discard()
                except HFBucketError as error:
                    outcomes[index] = Failed(chunk.key, chunk.size, error.kind, str(error))
            filled = {index: draft for index, draft in drafts.items() if index not in outcomes}
            hashes = hashes_of(list(filled.values()), [chunks[index].xet_hash for index in filled], verify)
            for (index, draft), actual in zip(filled.items(), hashes, strict=True):
                if reused is not None and not isinstance(actual, HFBucketError) and actual != chunks[index].xet_hash:
                    self._holdings.wrong_in(chunks[index].key, reused)
                outcome = self._accept(chunks[index], draft, actual, kept)
                if isinstance(outcome, Copied):
                    outcome = replace(
                        outcome, received=received, reused=reused is not None, seconds=time.monotonic() - since
                    )
                outcomes[index] = outcome
        finally:
            for draft in drafts.values():
                draft.discard()
        return [outcomes[index] for index in range(len(chunks))]

    def _fill(self, draft: ChunkDraft, content: Bytes) -> None:
        lease = draft.lease  # which makes the file, of an empty chunk too
        for at in range(0, len(content), _PIECE_BYTES):
            if self._stopped.is_set():
                return
            lease.write(at, content[at : at + _PIECE_BYTES].tobytes())

    def _accept(
        self, chunk: ChunkRef, draft: ChunkDraft, actual: str | HFBucketError, kept: dict[str, Bytes] | None
    ) -> Outcome | None:
        if self._stopped.is_set():
            return given_up(chunk)
        if not isinstance(actual, HFBucketError):
            if actual != chunk.xet_hash:
                return None
            try:
                return self.publish(chunk, draft, kept)
            except HFBucketError as error:
                actual = error
        return Failed(chunk.key, chunk.size, actual.kind, str(actual))

    def publish(self, chunk: ChunkRef, draft: ChunkDraft, kept: dict[str, Bytes] | None) -> Copied:
        """Let a chunk appear that is right, here and wherever else on this node something else was found in its place.

        Args:
            chunk: Which.
            draft: Its bytes.
            kept: Is given them, by key; None for not to keep them.

        Raises:
            HFBucketError: The tier did not take it.
        """
        content = None if kept is None else bytes_of(draft)
        repaired, left = self._holdings.repair(chunk, draft.path)
        draft.publish()
        if kept is not None and content is not None:
            kept[chunk.key] = content
        own = self._holdings.settled(chunk, tier_name(self._tier))
        return Copied(chunk.key, chunk.size, repaired=(*own, *repaired), left=left)


def hashes_of(drafts: Sequence[ChunkDraft], expected: Sequence[str], verify: Verify) -> Sequence[str | HFBucketError]:
    """The hashes of what is in drafts, all by one call of the hasher; where only lengths count, those expected."""
    if not drafts or verify == "length":
        return expected
    try:
        return xet_hashes(draft.path for draft in drafts)
    except (OSError, RuntimeError) as error:
        return [TierError(f"{draft.path}: its hash cannot be computed: {error}") for draft in drafts]


def tier_name(tier: Tier) -> str:
    """The name of a tier of directories, for people."""
    return tier.declaration.name if isinstance(tier, DirectoryTier) else ""


def given_up(chunk: ChunkRef) -> Failed:
    """How a chunk ends that the run was told to stop with."""
    return Failed(chunk.key, chunk.size, INTERRUPTED, f"{chunk.key}: the run was told to stop")


def bytes_of(draft: ChunkDraft) -> Bytes:
    """What is in a draft, from the page cache as a rule.

    Raises:
        TierError: It cannot be read.
    """
    import numpy as np  # noqa: PLC0415 - a tenth of a second, which a node that hands nothing on need not wait for

    try:
        return np.fromfile(draft.path, dtype=np.uint8)
    except OSError as error:
        raise TierError(f"{draft.path}: cannot be read back: {error}") from None
