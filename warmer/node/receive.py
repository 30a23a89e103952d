"""Writes chunks that another node has fetched into a node's tier, and verifies what enters a tier. Plain Python."""

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
"""Bytes of a chunk written at a time; a stop is noticed between two pieces."""


class Receiver:
    """Writes chunks from the object store or an earlier tier into one node's tier. Thread-safe.

    Args:
        tier: Tier that is filled.
        verify: What is checked before a chunk is published: its length only, or also its Xet hash.
        stopped: Set when the run must stop.
        holdings: Content of the tier; None to rely on the length of its files.
    """

    def __init__(self, tier: Tier, verify: Verify, stopped: threading.Event, holdings: Holdings | None = None) -> None:
        self._holdings = Holdings(tier) if holdings is None else holdings
        self._tier = tier
        self._verify = verify
        self._stopped = stopped

    def receive(self, chunks: Sequence[ChunkRef], contents: Sequence[Bytes]) -> list[Outcome | None]:
        """Write chunks that another node has fetched; a chunk is published only if its bytes are right.

        Returns:
            The outcome of each chunk, in order; None for a chunk whose bytes were wrong.
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
        """Write chunks that an earlier tier of this node holds.

        They are always hashed, whatever `verify` is, because nothing has compared the earlier tier's content yet.

        Args:
            chunks: Chunks to write.
            tier: Earlier tier to read from.
            ends: Deadline, after which the earlier tier is not read any more.
            kept: Receives the bytes of the copied chunks, by key; None to keep none.

        Returns:
            The outcome of each chunk, in order; None for a chunk that the earlier tier lacks or holds with wrong content.
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
        """Write available chunks into the tier.

        Args:
            chunks: Chunks to write.
            has: Whether the chunk at an index is available; room in the tier is reserved for available chunks only.
            fill: Writes the chunk at an index into a draft; returns False if not all its bytes are available.
            verify: What is checked before a chunk is published.
            received: Source of the chunks; see `Copied`.
            reused: Earlier tier of the same node that holds the chunks; None if they come from elsewhere.
            kept: Receives the bytes of the copied chunks, by key.
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
        lease = draft.lease  # creates the file, for an empty chunk too
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
        """Publish a verified chunk, and repair other tiers of this node in which wrong content was found in its place.

        Args:
            chunk: Verified chunk.
            draft: Draft with the chunk's bytes.
            kept: Receives the bytes, by key; None to keep none.

        Raises:
            HFBucketError: The tier did not accept the chunk.
        """
        content = None if kept is None else bytes_of(draft)
        repaired, left = self._holdings.repair(chunk, draft.path)
        draft.publish()
        if kept is not None and content is not None:
            kept[chunk.key] = content
        own = self._holdings.settled(chunk, tier_name(self._tier))
        return Copied(chunk.key, chunk.size, repaired=(*own, *repaired), left=left)


def hashes_of(drafts: Sequence[ChunkDraft], expected: Sequence[str], verify: Verify) -> Sequence[str | HFBucketError]:
    """Return the hashes of drafts, computed in one call of the hasher; the expected hashes if only lengths are verified."""
    if not drafts or verify == "length":
        return expected
    try:
        return xet_hashes(draft.path for draft in drafts)
    except (OSError, RuntimeError) as error:
        return [TierError(f"{draft.path}: its hash cannot be computed: {error}") for draft in drafts]


def tier_name(tier: Tier) -> str:
    """Return the name of a directory tier, for messages."""
    return tier.declaration.name if isinstance(tier, DirectoryTier) else ""


def given_up(chunk: ChunkRef) -> Failed:
    """Return the outcome of a chunk that was interrupted by a stop of the run."""
    return Failed(chunk.key, chunk.size, INTERRUPTED, f"{chunk.key}: the run was told to stop")


def bytes_of(draft: ChunkDraft) -> Bytes:
    """Return the content of a draft, usually from the page cache.

    Raises:
        TierError: The draft cannot be read.
    """
    import numpy as np  # noqa: PLC0415 - takes a tenth of a second, and a node that shares nothing does not need it

    try:
        return np.fromfile(draft.path, dtype=np.uint8)
    except OSError as error:
        raise TierError(f"{draft.path}: cannot be read back: {error}") from None
