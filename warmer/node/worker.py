"""The work of one node: fetch chunks from the bucket into its tiers."""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

import tenacity

from hfbucket_plugin.core import telemetry
from hfbucket_plugin.core.deadline import Deadline
from hfbucket_plugin.core.keys import ContentId
from hfbucket_plugin.errors import (
    ConfigError,
    HFBucketError,
    IntegrityError,
    LocalFileError,
    ObjectMissingError,
    ThrottledError,
    TransportError,
)
from hfbucket_plugin.hub.connect import open_bucket
from hfbucket_plugin.hub.transfer import DownloadToBuffer, DownloadToFile
from warmer.node.holdings import Holdings
from warmer.node.receive import Receiver, given_up, hashes_of
from warmer.node.reuse import EarlierTier
from warmer.report.outcomes import Copied, Failed, Present, TierError, TierFullError
from warmer.tiers import open_tier
from warmer.tiers.directory import FULL

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hfbucket_plugin.config.settings import InstanceSettings
    from hfbucket_plugin.hub.bucket import Bucket
    from hfbucket_plugin.tools.selection import ChunkRef
    from warmer.node.receive import Bytes, Verify
    from warmer.report.outcomes import Outcome
    from warmer.tiers import ChunkDraft, Declaration, NodeInfo, Tier


_HASH_TRIES: Final = 2


@dataclass(slots=True)
class FetchItem:
    """One chunk that is to be fetched.

    Attributes:
        chunk: Which.
        kept: Is given its bytes, by key, when it was copied; None for not to keep them.
        copied: How it ended, when it is in the tier.
        error: Why it is not there yet.
        wrong_hashes: How often its bytes were wrong.
        asked: Bytes that the store was asked for so far, each try counted.
        reserve: Whether its blocks are to be reserved in the next try: the disk turned out to be full without.
        since: When its node turned to it.
    """

    chunk: ChunkRef
    kept: dict[str, Bytes] | None = None
    copied: Copied | None = None
    error: HFBucketError | None = None
    wrong_hashes: int = 0
    asked: int = 0
    reserve: bool = False
    since: float = field(default_factory=time.monotonic)

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


class ChunkFetch:
    """One try at one chunk: hf_xet makes the draft's file where there is room, else it is filled by ranges.

    Args:
        job: Whose.
        draft: Where to.

    Raises:
        TierError: The draft takes nothing.
    """

    def __init__(self, job: FetchItem, draft: ChunkDraft) -> None:
        self.job = job
        self.draft = draft
        key, content = job.chunk.key, ContentId(job.chunk.xet_hash, job.chunk.size)
        by_ranges, job.reserve = job.reserve or not draft.roomy, False
        self.read = (
            DownloadToBuffer(key, content, draft.lease) if by_ranges else DownloadToFile(key, content, draft.path)
        )

    def tell(self) -> None:
        """Tell the job why it did not arrive."""
        error = self.read.error
        if not isinstance(error, LocalFileError):
            self.job.error = error or TransportError(f"{self.read.name}: not read")
        elif error.number in FULL:
            self.job.error, self.job.reserve = TierFullError(str(error)), True
        else:
            self.job.error = TierError(str(error))


CHUNK_TIMEOUT_SECS: Final = 300.0
"""A batch has a third of it for each try: enough for a node that gets 3 MiB a second, with four of 64 MiB in progress."""

_FIRST_SECS: Final = 10.0
_TRIES: Final = 3
_LOOKUP_SECS: Final = 15.0


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """What a node needs to know. It crosses to the nodes, so it never holds a token.

    Attributes:
        instance: Name of the bucket's instance.
        settings: The instance's, without an inline token.
        tier: Which tier to fill.
        token_expected: Whether the driver has a token: a node without one is told apart from a public bucket.
        chunk_timeout_secs: Most seconds that a chunk may take, retries and the rest of its batch included.
        verify: What is checked before a chunk appears that was moved: its length, or its Xet hash too.
        earlier: Tiers of directories that the run filled before; what they hold need not come from the Hub once more.
        capped: Whether there is a cap on bandwidth: every byte that is asked for is then counted, so hf_xet repeats no request
            by itself.
        verify_present: Whether what the tier holds already is hashed, and replaced where it is something else.
    """

    instance: str
    settings: InstanceSettings
    tier: Declaration
    token_expected: bool
    chunk_timeout_secs: float = CHUNK_TIMEOUT_SECS
    verify: Verify = "hash"
    earlier: tuple[Declaration, ...] = ()
    capped: bool = False
    verify_present: bool = False

    def __post_init__(self) -> None:
        if self.settings.token is not None:
            raise ValueError("settings with an inline token must not leave the driver")

    def open(self, place: NodeInfo) -> NodeWarmer:
        """See `open_node`."""
        return open_node(self, place)


class NodeWarmer:
    """One node's part of a run. Its methods may be called from several threads.

    Args:
        bucket: Where chunks come from.
        tier: Where they go.
        chunk_timeout_secs: See `NodeConfig`.
        verify: See `NodeConfig`.
        earlier: See `NodeConfig`, without placeholders.
        verify_present: See `NodeConfig`.

    Attributes:
        chunk_timeout_secs: See `NodeConfig`.
    """

    def __init__(
        self,
        bucket: Bucket,
        tier: Tier,
        chunk_timeout_secs: float = CHUNK_TIMEOUT_SECS,
        verify: Verify = "hash",
        earlier: Sequence[Declaration] = (),
        *,
        verify_present: bool = False,
    ) -> None:
        self._bucket = bucket
        self._verify = verify
        self._tier = tier
        self.chunk_timeout_secs = chunk_timeout_secs
        self._stopped = threading.Event()
        self._earlier = [EarlierTier(one) for one in earlier]
        self._holdings = Holdings(tier, verify=verify_present)
        self._receiver = Receiver(tier, verify, self._stopped, self._holdings)
        self._lock = threading.Lock()
        self._reading: dict[int, list[DownloadToBuffer | DownloadToFile]] = {}

    def copy(self, chunks: Sequence[ChunkRef]) -> list[Outcome]:
        """See to it that the tier holds some chunks.

        Nothing raises for a single chunk, and none appears in the tier unless its length and hash are right.

        Returns:
            How each ended, in their order.
        """
        return self.fetch(chunks, keep=False)[0]

    def fetch(self, chunks: Sequence[ChunkRef], *, keep: bool) -> tuple[list[Outcome], list[Bytes]]:
        """As `copy`, and keeps what it copied in memory.

        Args:
            chunks: Which.
            keep: Whether to keep their bytes.

        Returns:
            How each ended, in their order; and the bytes of those that were copied, in their order, or nothing.
        """
        outcomes: dict[int, Outcome] = {}
        jobs: dict[int, FetchItem] = {}
        kept: dict[str, Bytes] = {}
        into = kept if keep else None
        for (index, chunk), there in zip(enumerate(chunks), self._holdings.look(chunks), strict=True):
            if there is not None:
                outcomes[index] = there
                continue
            jobs[index] = FetchItem(chunk, into)
            if chunk.gone:
                jobs[index].error = _deleted(chunk)
        wanted = {index: job.chunk for index, job in jobs.items() if job.error is None}
        for index, outcome in zip(wanted, self.reuse([*wanted.values()], into), strict=True):
            if outcome is not None:
                outcomes[index] = outcome
                del jobs[index]
        self._fetch_all([job for job in jobs.values() if job.error is None])
        self._look_into([job for job in jobs.values() if job.copied is None])
        outcomes |= {index: self._outcome(job) for index, job in jobs.items()}
        return [outcomes[index] for index in range(len(chunks))], [
            kept[chunk.key] for chunk in chunks if chunk.key in kept
        ]

    def reuse(self, chunks: Sequence[ChunkRef], kept: dict[str, Bytes] | None = None) -> list[Outcome | None]:
        """Take from the earlier tiers of this node what they have of some chunks, verified by hash.

        Args:
            chunks: Which.
            kept: Is given the bytes of those that were copied, by key; None for not to keep them.

        Returns:
            How each ended, in their order; None for one that no earlier tier has, or none rightly.
        """
        outcomes: list[Outcome | None] = [None] * len(chunks)
        ends = Deadline.after(self.chunk_timeout_secs / _TRIES)
        for tier in self._earlier:
            lacking = [index for index, outcome in enumerate(outcomes) if outcome is None]
            found = self._receiver.reuse([chunks[index] for index in lacking], tier, ends, kept)
            for index, outcome in zip(lacking, found, strict=True):
                outcomes[index] = outcome
        return outcomes

    def lacks(self, chunks: Sequence[ChunkRef]) -> bool:
        """Whether the tier lacks any of some chunks, as far as it can tell."""
        return not all(isinstance(there, Present) for there in self._holdings.look(chunks))

    def receive(self, chunks: Sequence[ChunkRef], contents: Sequence[Bytes]) -> list[Outcome | None]:
        """Put chunks into the tier that another node has fetched; see `Receiver.receive`."""
        return self._receiver.receive(chunks, contents)

    def _look_into(self, jobs: list[FetchItem]) -> None:
        """Tell chunks that were deleted meanwhile from those that failed: the store answers for both alike."""
        unclear = (TransportError, IntegrityError, ObjectMissingError)
        failed = [job for job in jobs if not job.chunk.gone and isinstance(job.error, unclear)]
        if not failed or self._stopped.is_set():
            return
        try:
            found = self._bucket.stat([job.chunk.path for job in failed], Deadline.after(_LOOKUP_SECS))
        except HFBucketError:
            return  # then the first error says more
        for job in failed:
            if job.chunk.path not in found:
                job.error = _deleted(job.chunk)
            elif isinstance(job.error, ObjectMissingError):
                job.error = IntegrityError(f"{job.error}; the bucket lists it all the same")

    def _outcome(self, job: FetchItem) -> Outcome:
        chunk = job.chunk
        if job.copied is not None:
            return replace(job.copied, asked=job.asked)
        if self._stopped.is_set():
            return replace(given_up(chunk), asked=job.asked)
        error = job.error or TransportError(f"{chunk.key}: not fetched")
        wrong = self._holdings.wrong_about(chunk.key)
        return Failed(chunk.key, chunk.size, error.kind, f"{error}; {wrong}" if wrong else str(error), asked=job.asked)

    def _fetch_all(self, jobs: list[FetchItem]) -> None:
        """Try until all are done, or nothing that failed is worth another try."""
        deadline = Deadline.after(self.chunk_timeout_secs)
        retrying = tenacity.Retrying(
            stop=tenacity.stop_any(
                tenacity.stop_after_attempt(_TRIES), tenacity.stop_after_delay(self.chunk_timeout_secs)
            ),
            wait=tenacity.wait_random_exponential(multiplier=0.2, max=5),
            retry=tenacity.retry_if_result(bool),
            retry_error_callback=lambda _: None,
            sleep=tenacity.sleep_using_event(self._stopped),
        )
        retrying(self._try, jobs, deadline)

    def _try(self, jobs: list[FetchItem], deadline: Deadline) -> list[FetchItem]:
        """Try those that are not done, once; returns those worth another try."""
        pending = [job for job in jobs if job.copied is None and (job.error is None or job.again)]
        if self._stopped.is_set() or not pending:
            return []
        try:
            # One request that fails tells as much as one for each chunk. Costs none when there is a session.
            self._bucket.transfer.warm_up(deadline.within(self.chunk_timeout_secs / _TRIES))
        except HFBucketError as error:
            for job in pending:
                job.error = error
            return [job for job in pending if job.again]
        fetches: list[ChunkFetch] = []
        try:
            for job in pending:
                self._begin(job, fetches)
            try:
                self._read([fetch.read for fetch in fetches], deadline.within(self.chunk_timeout_secs / _TRIES))
            finally:
                for fetch in fetches:
                    fetch.job.asked += fetch.read.asked
            self._end(fetches)
        finally:
            for fetch in fetches:
                fetch.draft.discard()
        return [job for job in pending if job.copied is None and job.again]

    def _begin(self, job: FetchItem, fetches: list[ChunkFetch]) -> None:
        job.error = None
        try:
            draft = self._tier.draft(job.chunk.key, job.chunk.size)
        except HFBucketError as error:
            job.error, job.reserve = error, False
            return
        try:
            fetches.append(ChunkFetch(job, draft))
        except HFBucketError as error:
            job.error = error
            draft.discard()

    def _read(self, reads: list[DownloadToBuffer | DownloadToFile], deadline: Deadline) -> None:
        with self._lock:
            if self._stopped.is_set():
                return
            self._reading[id(reads)] = reads
        try:
            self._bucket.transfer.read(reads, deadline)
        finally:
            with self._lock:
                del self._reading[id(reads)]

    def _end(self, fetches: list[ChunkFetch]) -> None:
        """Verify what arrived, all in one call of the hasher, and let what is right appear."""
        arrived = []
        for fetch in fetches:
            if fetch.read.done:
                arrived.append(fetch)
            else:
                fetch.tell()
        drafts, expected = [fetch.draft for fetch in arrived], [fetch.job.chunk.xet_hash for fetch in arrived]
        hashes = hashes_of(drafts, expected, self._verify)
        for fetch, actual in zip(arrived, hashes, strict=True):
            self._appear(fetch, actual)

    def _appear(self, fetch: ChunkFetch, actual: str | HFBucketError) -> None:
        job, expected = fetch.job, fetch.job.chunk.xet_hash
        if isinstance(actual, HFBucketError):
            job.error = actual
        elif actual != expected:
            job.wrong_hashes += 1
            job.error = IntegrityError(
                f"{job.chunk.key}: what arrived has the hash {actual}, the listing says {expected}"
            )
        elif not self._stopped.is_set():
            try:
                copied = self._receiver.publish(job.chunk, fetch.draft, job.kept)
                job.copied = replace(copied, seconds=time.monotonic() - job.since)
            except HFBucketError as error:
                job.error = error

    def check_access(self) -> None:
        """Ask for access to the bucket's content, as the first chunk would.

        Raises:
            AccessDeniedError: The token of this node may not read it.
            BucketMissingError: There is no such bucket, or the token may not see it.
        """
        try:
            # A node that waits here for a pause of the Hub would be taken for one that does not answer.
            self._bucket.transfer.warm_up(Deadline.after(min(_FIRST_SECS, self.chunk_timeout_secs / _TRIES)))
        except (TransportError, ThrottledError):
            return  # may pass; each chunk tries again

    def stop(self) -> None:
        """End what is in progress at once; what has not appeared by now does not appear."""
        with self._lock:
            self._stopped.set()
            # Those that wait for a stream would else ask for a session each, one after the other.
            for reads in self._reading.values():
                for read in reads:
                    read.give_up()
        self._bucket.close()

    def close(self) -> None:
        """Stop, and leave no temporary file behind."""
        self.stop()
        for tier in self._earlier:
            tier.close()
        self._tier.close()


def _deleted(chunk: ChunkRef) -> ObjectMissingError:
    return ObjectMissingError(f"{chunk.key}: it was deleted from the bucket meanwhile")


def open_node(config: NodeConfig, place: NodeInfo, tier: Tier | None = None) -> NodeWarmer:
    """Make the warmer of this node.

    Args:
        config: What it is told.
        place: Which node this is.
        tier: What to fill; None for the tier of the configuration, which is opened.

    Raises:
        ConfigError: The token that the driver has is not in this node's environment; the message names the variable.
            Or the node has no value for a placeholder in the tier's path.
        AccessDeniedError: The token of this node may not read the bucket.
        BucketMissingError: There is no such bucket, or the token may not see it.
        TierError: The tier cannot be written.
    """
    settings = config.settings
    if config.token_expected and settings.resolve_token() is None:
        raise ConfigError(
            f"instance {config.instance!r}: the environment variable {settings.token_env} (token_env) is not set on "
            "this node, but where the command runs it is; set it in the cluster's environment"
        )
    earlier = _on(place, config.earlier)
    bucket = open_bucket(
        settings,
        config.instance,
        telemetry.MemorySink(),
        config.chunk_timeout_secs / _TRIES,
        bulk=True,
        counted=config.capped,
    )
    tier = open_tier(config.tier, place) if tier is None else tier
    warmer = NodeWarmer(
        bucket, tier, config.chunk_timeout_secs, config.verify, earlier, verify_present=config.verify_present
    )
    try:
        warmer.check_access()
    except HFBucketError:
        warmer.close()
        raise
    return warmer


def _on(place: NodeInfo, declarations: Sequence[Declaration]) -> list[Declaration]:
    """Earlier tiers as they are on a node; one that it has no value for, and so does not have, matters no more."""
    found = []
    for one in declarations:
        with contextlib.suppress(ConfigError):
            found.append(one.at(place))
    return found
