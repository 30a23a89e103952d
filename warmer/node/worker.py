"""Work of one node: fetch chunks from the bucket into its tiers."""

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
    """State of one chunk to be fetched.

    Attributes:
        chunk: Chunk to be fetched.
        kept: Receives the chunk's bytes, by key, if the chunk is copied; None to keep none.
        copied: Outcome, once the chunk is in the tier.
        error: Error of the latest try.
        wrong_hashes: Number of tries that returned wrong bytes.
        asked: Bytes requested from the store so far, retries included.
        reserve: Whether the next try reserves the blocks of the file, because the disk was full without.
        since: Time at which the node started to work on the chunk.
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
        """Whether another try may succeed."""
        if self.wrong_hashes >= _HASH_TRIES:
            return False
        if isinstance(self.error, TierFullError):
            return self.reserve
        # Integrity errors include streams that ended early without an error, as happens when the store fails. A missing
        # object is one that the store lacks at the moment; after the last try, the bucket is asked whether it still lists it.
        return isinstance(self.error, (TransportError, ThrottledError, IntegrityError, ObjectMissingError))


class ChunkFetch:
    """One try to fetch a chunk: hf_xet creates the draft's file if there is room, otherwise ranges fill it.

    Args:
        job: State of the chunk.
        draft: Destination.

    Raises:
        TierError: The draft cannot be written.
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
        """Record in the chunk's state why the chunk did not arrive."""
        error = self.read.error
        if not isinstance(error, LocalFileError):
            self.job.error = error or TransportError(f"{self.read.name}: not read")
        elif error.number in FULL:
            self.job.error, self.job.reserve = TierFullError(str(error)), True
        else:
            self.job.error = TierError(str(error))


CHUNK_TIMEOUT_SECS: Final = 300.0
"""Maximum seconds of a chunk; each try gets a third: enough at 3 MiB/s with four chunks of 64 MiB in progress."""

_FIRST_SECS: Final = 10.0
_TRIES: Final = 3
_LOOKUP_SECS: Final = 15.0


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """Configuration of a node. It is sent to the nodes, so it never holds a token.

    Attributes:
        instance: Name of the bucket instance.
        settings: Settings of the instance, without an inline token.
        tier: Declaration of the tier to fill.
        token_expected: Whether the driver has a token, to distinguish a node that lacks it from a public bucket.
        chunk_timeout_secs: Maximum seconds of a chunk, retries and the rest of its batch included.
        verify: What is checked before a moved chunk is published: its length only, or also its Xet hash.
        earlier: Directory tiers that the run filled before; their chunks need not be fetched from the Hub again.
        capped: Whether bandwidth is capped: every requested byte must then be counted, so hf_xet does not retry by itself.
        verify_present: Whether to hash chunks that the tier already holds, and replace those with wrong content.
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
        """Open the warmer of a node; see `open_node`."""
        return open_node(self, place)


class NodeWarmer:
    """Work of one node in a run. Thread-safe.

    Args:
        bucket: Source of the chunks.
        tier: Tier to fill.
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
        """Fetch the chunks that the tier lacks.

        A failure of a single chunk does not raise, and a chunk is published only if its length and hash are right.

        Returns:
            The outcome of each chunk, in order.
        """
        return self.fetch(chunks, keep=False)[0]

    def fetch(self, chunks: Sequence[ChunkRef], *, keep: bool) -> tuple[list[Outcome], list[Bytes]]:
        """Fetch chunks like `copy`, and optionally keep the copied bytes in memory.

        Args:
            chunks: Chunks to fetch.
            keep: Whether to keep the bytes.

        Returns:
            The outcome of each chunk, in order, and the bytes of the copied chunks, in order; empty without `keep`.
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
        """Copy chunks from the earlier tiers of this node, verified by hash.

        Args:
            chunks: Chunks to copy.
            kept: Receives the bytes of the copied chunks, by key; None to keep none.

        Returns:
            The outcome of each chunk, in order; None for a chunk that no earlier tier holds with the right content.
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
        """Return whether the tier lacks any of some chunks, as far as this is known."""
        return not all(isinstance(there, Present) for there in self._holdings.look(chunks))

    def receive(self, chunks: Sequence[ChunkRef], contents: Sequence[Bytes]) -> list[Outcome | None]:
        """Write chunks that another node has fetched into the tier; see `Receiver.receive`."""
        return self._receiver.receive(chunks, contents)

    def _look_into(self, jobs: list[FetchItem]) -> None:
        """Mark failed chunks that the bucket no longer lists as deleted: the store's error is the same in both cases."""
        unclear = (TransportError, IntegrityError, ObjectMissingError)
        failed = [job for job in jobs if not job.chunk.gone and isinstance(job.error, unclear)]
        if not failed or self._stopped.is_set():
            return
        try:
            found = self._bucket.stat([job.chunk.path for job in failed], Deadline.after(_LOOKUP_SECS))
        except HFBucketError:
            return  # the first error says more
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
        """Retry until all chunks are done, or no failed chunk is worth another try."""
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
        """Try once to fetch the chunks that are not done; return those worth another try."""
        pending = [job for job in jobs if job.copied is None and (job.error is None or job.again)]
        if self._stopped.is_set() or not pending:
            return []
        try:
            # If the Hub fails, one failing request suffices in place of one a chunk. Free if a session exists.
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
        """Verify what arrived, in one call of the hasher, and publish the chunks that are right."""
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
        """Request access to the bucket's content, as the first chunk would.

        Raises:
            AccessDeniedError: The node's token may not read the bucket.
            BucketMissingError: The bucket does not exist, or the token may not see it.
        """
        try:
            # Bounded, because a node that waits here until the Hub recovers would be considered hung.
            self._bucket.transfer.warm_up(Deadline.after(min(_FIRST_SECS, self.chunk_timeout_secs / _TRIES)))
        except (TransportError, ThrottledError):
            return  # may be temporary; each chunk retries

    def stop(self) -> None:
        """Stop the work in progress immediately; chunks that are not published yet will not be."""
        with self._lock:
            self._stopped.set()
            # Otherwise readers that wait for a stream would each request a session, one after the other.
            for reads in self._reading.values():
                for read in reads:
                    read.give_up()
        self._bucket.close()

    def close(self) -> None:
        """Stop, and remove all temporary files."""
        self.stop()
        for tier in self._earlier:
            tier.close()
        self._tier.close()


def _deleted(chunk: ChunkRef) -> ObjectMissingError:
    return ObjectMissingError(f"{chunk.key}: it was deleted from the bucket meanwhile")


def open_node(config: NodeConfig, place: NodeInfo, tier: Tier | None = None) -> NodeWarmer:
    """Open the warmer of a node; runs on that node.

    Args:
        config: Configuration of the node.
        place: Identity of the node.
        tier: Tier to fill; None to open the tier of the configuration.

    Raises:
        ConfigError: The driver has a token, but the node's environment lacks it (the message names the variable); or the
            node has no value for a placeholder in the tier's path.
        AccessDeniedError: The node's token may not read the bucket.
        BucketMissingError: The bucket does not exist, or the token may not see it.
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
    """Return the earlier tiers of a node; one for which the node lacks a placeholder's value does not exist there."""
    found = []
    for one in declarations:
        with contextlib.suppress(ConfigError):
            found.append(one.at(place))
    return found
