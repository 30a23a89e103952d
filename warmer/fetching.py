"""One chunk on its way from the Hub into a tier, try after try. Plain Python."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from hfbucket_plugin.content import Content
from hfbucket_plugin.errors import (
    HFBucketError,
    IntegrityError,
    LocalFileError,
    ObjectMissingError,
    ThrottledError,
    TransportError,
)
from hfbucket_plugin.file_reads import FileRead
from hfbucket_plugin.transfer import Read
from warmer.errors import TierError, TierFullError
from warmer.tiers.file_lease import FULL

if TYPE_CHECKING:
    from warmer.plan import PlannedChunk
    from warmer.receive import Bytes
    from warmer.tiers import Draft

_HASH_TRIES: Final = 2


@dataclass(slots=True)
class Job:
    """One chunk that is to be fetched, and its bytes where they are to be kept for other nodes.

    Attributes:
        asked: Bytes that the store was asked for so far, each try counted.
        reserve: Whether its blocks are to be reserved in the next try: the disk turned out to be full without.
    """

    chunk: PlannedChunk
    keep: bool = False
    kept: Bytes | None = None
    error: HFBucketError | None = None
    done: bool = False
    wrong_hashes: int = 0
    asked: int = 0
    reserve: bool = False
    since: float = field(default_factory=time.monotonic)
    seconds: float = 0.0
    repaired: tuple[str, ...] = ()
    left: tuple[str, ...] = ()

    @property
    def again(self) -> bool:
        """Whether another try may help."""
        if self.wrong_hashes >= _HASH_TRIES:
            return False
        if isinstance(self.error, TierFullError):
            return self.reserve
        # Integrity: wrong bytes, but also a stream that ended early without an error, as they do when the store fails. Missing: what
        # the store does not hold at the moment; whether the bucket still lists it is asked in the end.
        return isinstance(self.error, (TransportError, ThrottledError, IntegrityError, ObjectMissingError))


class Fetch:
    """One try at one chunk: hf_xet makes the draft's file where there is room, else it is filled by ranges.

    Args:
        job: Whose.
        draft: Where to.

    Raises:
        TierError: The draft takes nothing.
    """

    def __init__(self, job: Job, draft: Draft) -> None:
        self.job = job
        self.draft = draft
        key, content = job.chunk.key, Content(job.chunk.xet_hash, job.chunk.size)
        by_ranges, job.reserve = job.reserve or not draft.roomy, False
        self.read = Read(key, content, draft.lease) if by_ranges else FileRead(key, content, draft.path)

    def tell(self) -> None:
        """Tell the job why it did not arrive."""
        error = self.read.error
        if not isinstance(error, LocalFileError):
            self.job.error = error or TransportError(f"{self.read.name}: not read")
        elif error.number in FULL:
            self.job.error, self.job.reserve = TierFullError(str(error)), True
        else:
            self.job.error = TierError(str(error))
