"""One try at one batch of copies: by the Hub from bucket to bucket, or as bytes through this process.

The destination is looked up just before any object is named there, and again afterwards: only an object that is present
under its key, with its hash, counts as copied.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

from hfbucket_plugin.core.concurrency import ByteSemaphore
from hfbucket_plugin.core.deadline import Deadline
from hfbucket_plugin.errors import (
    AccessDeniedError,
    BucketMissingError,
    HFBucketError,
    RefusedError,
    ThrottledError,
    TransportError,
)
from jobs.batch.model import SEND_SECS, TRIES, ItemBatch, ItemOutcome, Result
from jobs.export.bucket import InstanceEnd
from jobs.export.endpoint import Chunk, EndpointObject

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from jobs.export.endpoint import DestinationEndpoint, SourceEndpoint
    from jobs.export.plan import CopyItem

TIMES_IN_MEMORY: Final = 3
"""Memory per byte in transit: once as a chunk, and about twice in hf_xet, which keeps a commit until it is sent."""

SMALL_BYTES: Final = 64 * 1024 * 1024
"""A chunk up to this many bytes is copied alone even if it exceeds the window: any machine has that much memory."""

_NO_MEMORY: Final = "there is not enough memory for it: give a smaller --window, or fewer --parallel"

_PAUSE_SECS: Final = 1.0
"""Seconds to wait after a 429 without a retry time."""


_AGAIN_SECS: Final = 0.25
"""Seconds before the second try at the first object that the Hub is asked to copy; doubled for each further try."""

_LOOK_AGAIN_SECS: Final = 15.0
"""Seconds between checks whether a long pause is over; `hfbucket_plugin.hub.rate_limit` lets these requests through."""


class CopyMethod(StrEnum):
    """How bytes reach the destination. The values appear in reports."""

    COPY = "copy"  # by the Hub, by hash
    COPY_OR_STREAM = "copy-or-stream"  # by the Hub, and as bytes for single objects that it refuses
    STREAM = "stream"  # through this process


class CopyOutcome(StrEnum):
    """Outcome of a copy. The values appear in reports."""

    COPIED = "copied"  # by the Hub
    STREAMED = "streamed"
    SAME = "same"  # already present at the destination
    CHANGED = "changed"  # the destination differs from the plan, and is left as it is
    GONE = "gone"  # no longer at the source
    FAILED = "failed"


@dataclass
class CopyAttempt:
    """Outcomes of a try so far."""

    batch: ItemBatch[CopyItem]
    ended: list[ItemOutcome[CopyItem]] = field(default_factory=list)
    why: dict[str, str] = field(default_factory=dict)  # reasons, by key at the destination
    asked: set[str] = field(default_factory=set)

    def end(self, copy_item: CopyItem, outcome: CopyOutcome, message: str = "") -> None:
        """Record the outcome of a copy."""
        self.ended.append(ItemOutcome(copy_item, outcome, message))

    def result(self, *, wait_secs: float = 0.0, counts: bool = True) -> Result[CopyItem]:
        """Return the result: copies without an outcome are tried again, or have failed permanently."""
        done = {ended.item.to for ended in self.ended}
        left = tuple(copy_item for copy_item in self.batch.items if copy_item.to not in done)
        if not left:
            return Result(tuple(self.ended))
        # A try that ended some copies does not count for the others: they may not have had their turn.
        tries = self.batch.tries + (1 if counts and not self.ended else 0)
        if tries >= TRIES:
            failed = (
                ItemOutcome(copy_item, CopyOutcome.FAILED, self.why.get(copy_item.to, "no time was left for it"))
                for copy_item in left
            )
            return Result((*self.ended, *failed))
        asked = (self.batch.asked | self.asked) & {copy_item.path for copy_item in left}
        return Result(tuple(self.ended), ItemBatch(left, tries, frozenset(asked)), wait_secs)


class Copier:
    """Copies chunks from one endpoint to another.

    Args:
        source: Endpoint to copy from.
        destination: Endpoint to copy to.
        how: Copy method; copies by the Hub need two instances.
        window_bytes: Maximum bytes that one try fetches at a time; a larger chunk is copied alone.
        memory_bytes: Maximum memory of the chunks in transit, over all tries of this copier. A larger chunk fails,
            unless it is at most `SMALL_BYTES`.
    """

    def __init__(
        self,
        source: SourceEndpoint,
        destination: DestinationEndpoint,
        how: CopyMethod,
        window_bytes: int,
        memory_bytes: int | None = None,
    ) -> None:
        self._source = source
        self._destination = destination
        self.how = how
        self.window_bytes = window_bytes
        self.memory_bytes = window_bytes * TIMES_IN_MEMORY if memory_bytes is None else memory_bytes
        self._semaphore = ByteSemaphore(self.memory_bytes)

    def attempt(self, batch: ItemBatch[CopyItem], seconds: float) -> Result[CopyItem]:
        """Make one try at a batch.

        Args:
            batch: The copies to make.
            seconds: Maximum duration of the try.

        Raises:
            HFBucketError: If an error is permanent: no permission, no such bucket.
            OSError: If the disk of a directory is full.
        """
        deadline, tried = Deadline.after(seconds), CopyAttempt(batch)
        copying = self.how is CopyMethod.COPY or (self.how is CopyMethod.COPY_OR_STREAM and not batch.tries)
        try:
            if copying:
                self._copy(tried, deadline)
            else:
                self._stream(tried, deadline)
        except ThrottledError as error:
            return tried.result(wait_secs=error.retry_after or _PAUSE_SECS, counts=False)
        except TransportError as error:
            tried.why = {copy_item.to: str(error) for copy_item in batch.items} | tried.why
            return tried.result()
        return tried.result()

    def _copy(self, tried: CopyAttempt, deadline: Deadline) -> None:
        source, destination = _instances(self._source, self._destination)
        self.name(
            tried,
            tried.batch.items,
            deadline,
            lambda copy_items, soon: destination.copy(
                source, {copy_item.to: copy_item.content for copy_item in copy_items}, soon
            ),
            CopyOutcome.COPIED,
        )

    def name(
        self,
        tried: CopyAttempt,
        copy_items: Iterable[CopyItem],
        deadline: Deadline,
        give: Callable[[list[CopyItem], Deadline], dict[str, str]],
        outcome: CopyOutcome,
    ) -> dict[str, str]:
        """Name contents at the destination where it is still as planned, by the rule of deletes (`jobs.batch.model`).

        The naming request directly follows the look-up, is sent once, and has a short timeout; an outdated look-up is
        repeated. A pause that the Hub requests is waited out before the look-up, never between the two.

        Args:
            tried: Records the outcomes.
            copy_items: The copies to name.
            deadline: Deadline of the operation.
            give: Sends the naming request until a deadline; returns the reasons for failed names, by key.
            outcome: Outcome of the named copies.

        Returns:
            The result of `give`; empty if there was nothing to name.

        Raises:
            ThrottledError: If the requested pause is longer than the remaining time.
            HFBucketError: If the outcome of all copies is unknown.
        """
        todo = list(copy_items)
        while True:
            try:
                sent = time.monotonic()
                todo = self.as_planned(tried, todo, deadline, patient=False)
                if not todo:
                    return {}
                if time.monotonic() - sent > self._destination.fresh_secs:
                    deadline.check("naming what was copied")
                    continue
                failed = self._given(tried, todo, give, deadline.within(SEND_SECS))
                break
            except ThrottledError as error:
                pause = error.retry_after or _PAUSE_SECS
                if pause >= deadline.remaining():
                    raise
                time.sleep(min(pause, _LOOK_AGAIN_SECS))
        self.verify(tried, todo, failed, outcome, deadline)
        return failed

    @staticmethod
    def _given(
        tried: CopyAttempt,
        copy_items: list[CopyItem],
        give: Callable[[list[CopyItem], Deadline], dict[str, str]],
        soon: Deadline,
    ) -> dict[str, str]:
        """Name copies, and record the request: objects found there after a lost answer come from this job."""
        before = frozenset(tried.asked)
        tried.asked |= {copy_item.path for copy_item in copy_items}
        try:
            return give(copy_items, soon)
        except ThrottledError:  # the request named nothing
            tried.asked = set(before)
            raise

    def _stream(self, tried: CopyAttempt, deadline: Deadline) -> None:
        for copy_items in _windows(tried.batch.items, self.window_bytes):
            if deadline.passed:
                return
            todo = self._bearable(tried, self.as_planned(tried, copy_items, deadline))
            held = TIMES_IN_MEMORY * sum(copy_item.size for copy_item in todo)
            try:
                with self._semaphore.hold(held, deadline, "memory for chunks on their way (--window)"):
                    self._stream_window(tried, todo, deadline)
            except MemoryError:
                tried.why |= {copy_item.to: _NO_MEMORY for copy_item in todo}

    def _bearable(self, tried: CopyAttempt, copy_items: list[CopyItem]) -> list[CopyItem]:
        """Return the copies that fit into memory; the others fail, judged by the size in the manifest or bucket."""
        most = max(self.memory_bytes, SMALL_BYTES)
        for copy_item in copy_items:
            if copy_item.size > most:
                tried.end(
                    copy_item,
                    CopyOutcome.FAILED,
                    f"it has {copy_item.size:,} bytes, more than --window permits ({most:,}): raise --window if that is right",
                )
        return [copy_item for copy_item in copy_items if copy_item.size <= most]

    def _stream_window(self, tried: CopyAttempt, todo: list[CopyItem], deadline: Deadline) -> None:
        chunks = self._fetched(tried, todo, deadline)
        if not chunks:
            return
        staged = self._destination.put(chunks, deadline)
        wrong = {to: one for to, one in staged.items() if isinstance(one, HFBucketError)}
        tried.why |= {to: str(error) for to, error in wrong.items()}
        self._publish(
            tried,
            [copy_item for copy_item in todo if copy_item.to in staged and copy_item.to not in wrong],
            staged,
            deadline,
        )

    def _publish(self, tried: CopyAttempt, todo: list[CopyItem], staged: Mapping[str, Any], deadline: Deadline) -> None:
        """Name uploaded bytes, if the destination is still as planned: fetching them took time."""

        def give(copy_items: list[CopyItem], soon: Deadline) -> dict[str, str]:
            replacing = frozenset(copy_item.to for copy_item in copy_items if copy_item.replaces is not None)
            return self._destination.publish(
                {copy_item.to: staged[copy_item.to] for copy_item in copy_items}, replacing, soon
            )

        try:
            self.name(tried, todo, deadline, give, CopyOutcome.STREAMED)
        finally:
            self._destination.drop({copy_item.to: staged[copy_item.to] for copy_item in todo})

    def _fetched(self, tried: CopyAttempt, todo: list[CopyItem], deadline: Deadline) -> dict[str, Chunk]:
        by_key = {copy_item.key: copy_item for copy_item in todo}
        chunks: dict[str, Chunk] = {}
        lost: list[CopyItem] = []
        for key, data in self._source.fetch(
            {key: copy_item.content for key, copy_item in by_key.items()}, deadline
        ).items():
            copy_item = by_key[key]
            if isinstance(data, bytearray):
                chunks[copy_item.to] = Chunk(data, copy_item.content, copy_item.uploaded_at)
            elif isinstance(data, (ThrottledError, AccessDeniedError, BucketMissingError)):
                raise data
            else:
                tried.why[copy_item.to] = str(data)
                lost.append(copy_item)
        self._end_deleted(tried, lost, deadline)
        return chunks

    def as_planned(
        self, tried: CopyAttempt, copy_items: Iterable[CopyItem], deadline: Deadline, *, patient: bool = True
    ) -> list[CopyItem]:
        """Return the copies for which the destination is as planned; record outcomes for the others."""
        copy_items = list(copy_items)
        held = (
            self._destination.look_up([copy_item.to for copy_item in copy_items], deadline, patient=patient)
            if copy_items
            else {}
        )
        todo: list[CopyItem] = []
        for copy_item in copy_items:
            there = held.get(copy_item.to)
            if there is not None and there.content == copy_item.content:
                ours = copy_item.path in tried.batch.asked  # named by this job, but the answer was lost
                tried.end(copy_item, self._ours if ours else CopyOutcome.SAME)
            elif _state(there) != _state(copy_item.replaces):
                tried.end(copy_item, CopyOutcome.CHANGED)
            else:
                todo.append(copy_item)
        return todo

    @property
    def _ours(self) -> CopyOutcome:
        return CopyOutcome.STREAMED if self.how is CopyMethod.STREAM else CopyOutcome.COPIED

    def verify(
        self,
        tried: CopyAttempt,
        copy_items: list[CopyItem],
        failed: dict[str, str],
        outcome: CopyOutcome,
        deadline: Deadline,
    ) -> None:
        """Record the copies that are present at the destination as ended, and the reasons for the others."""
        held = self._destination.look_up(
            [copy_item.to for copy_item in copy_items if copy_item.to not in failed], deadline
        )
        for copy_item in copy_items:
            there = held.get(copy_item.to)
            if there is not None and there.content == copy_item.content:
                tried.end(copy_item, outcome)
            else:
                tried.why[copy_item.to] = failed.get(
                    copy_item.to, f"{self._destination.name} took it, and does not have it now"
                )
        self._end_deleted(tried, [copy_item for copy_item in copy_items if copy_item.to in failed], deadline)

    def _end_deleted(self, tried: CopyAttempt, copy_items: list[CopyItem], deadline: Deadline) -> None:
        """Record the copies whose source is no longer as planned as ended."""
        gone = (
            self._source.gone({copy_item.key: copy_item.content for copy_item in copy_items}, deadline)
            if copy_items
            else frozenset()
        )
        for copy_item in copy_items:
            if copy_item.key in gone:
                tried.end(copy_item, CopyOutcome.GONE)


def _state(held: EndpointObject | None) -> object:
    return None if held is None else (held.content, held.uploaded_at)


def _instances(source: SourceEndpoint, destination: DestinationEndpoint) -> tuple[InstanceEnd, InstanceEnd]:
    if not isinstance(source, InstanceEnd) or not isinstance(destination, InstanceEnd):
        raise RefusedError("the Hub copies between buckets only: give --mode stream, or auto")
    return source, destination


def _windows(copy_items: Iterable[CopyItem], most_bytes: int) -> Iterator[list[CopyItem]]:
    window: list[CopyItem] = []
    nbytes = 0
    for copy_item in copy_items:
        if window and nbytes + copy_item.size > most_bytes:
            yield window
            window, nbytes = [], 0
        window.append(copy_item)
        nbytes += copy_item.size
    if window:
        yield window


@dataclass(frozen=True, slots=True)
class Method:
    """Copy method, and the reason for it.

    Attributes:
        how: The method.
        why: The reason in words; the Hub's own words if it decided.
        moved: Objects copied while the method was determined.
        asked: Whether the Hub was asked; false if there was nothing left to copy.
    """

    how: CopyMethod
    why: str
    moved: CopyItem | None = None
    asked: bool = True


def find_out(source: InstanceEnd, destination: InstanceEnd, copy_items: Iterable[CopyItem], seconds: float) -> Method:
    """Determine whether the Hub copies from one bucket to the other, by making the first copies.

    Args:
        source: Endpoint to copy from.
        destination: Endpoint to copy to.
        copy_items: The planned copies.
        seconds: Maximum duration of one try.

    Raises:
        TransportError: If the Hub does not answer, so that the method is unknown.
        HFBucketError: If the destination cannot be looked up.
    """
    for copy_item in copy_items:
        try:
            tried, failed = _one_named(source, destination, copy_item, seconds)
        except (RefusedError, AccessDeniedError, BucketMissingError) as error:
            return Method(CopyMethod.STREAM, f"the Hub refused to copy: {error}")
        except (ThrottledError, TransportError) as error:
            raise TransportError(
                f"whether the Hub copies is not known: {error}. Run again, or give --mode stream"
            ) from None
        outcomes = {ended.outcome for ended in tried.ended}
        if outcomes & {CopyOutcome.SAME, CopyOutcome.CHANGED}:
            continue
        if not failed:
            moved = copy_item if CopyOutcome.COPIED in outcomes else None
            return Method(
                CopyMethod.COPY_OR_STREAM, "the Hub copied the first object from bucket to bucket, by its hash", moved
            )
        if CopyOutcome.GONE not in outcomes:
            return Method(CopyMethod.STREAM, f"the Hub refused to copy: {failed[copy_item.to]}")
    return Method(CopyMethod.STREAM, "there was nothing to ask the Hub with", asked=False)


def _one_named(
    source: InstanceEnd, destination: InstanceEnd, copy_item: CopyItem, seconds: float
) -> tuple[CopyAttempt, dict[str, str]]:
    """Have the Hub copy one object, retrying transient errors; return the outcome and the reason for a missing name.

    Raises:
        HFBucketError: If the copy is refused, or its outcome is unknown.
    """
    mover = Copier(source, destination, CopyMethod.COPY, 0)
    deadline, asked = Deadline.patient(seconds), frozenset[str]()
    tries = 0

    def give(copy_items: list[CopyItem], soon: Deadline) -> dict[str, str]:
        return destination.copy(source, {one.to: one.content for one in copy_items}, soon)

    while True:
        tried = CopyAttempt(ItemBatch((copy_item,), tries, asked))
        try:
            return tried, mover.name(tried, (copy_item,), deadline, give, CopyOutcome.COPIED)
        except ThrottledError as error:  # does not count as a try: after the pause, the destination is looked up again
            deadline.wait_out(error)
        except TransportError:
            asked = frozenset(asked | tried.asked)
            tries += 1
            if tries == TRIES or deadline.passed:
                raise
            time.sleep(_AGAIN_SECS * 2 ** (tries - 1))
