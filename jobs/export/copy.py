"""One try at one batch of copies: by the Hub, from bucket to bucket, or as bytes through this process.

Either way the destination is looked at just before anything gets a name there, and once more afterwards: what counts as
copied is there, under its key, with its hash.
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
"""Bytes on their way are there once as chunks, and about twice more in hf_xet, which keeps a commit until it is sent."""

SMALL_BYTES: Final = 64 * 1024 * 1024
"""A chunk of so many bytes goes, alone, however small the window is: that much is there beside it anyway."""

_NO_MEMORY: Final = "there is not enough memory for it: give a smaller --window, or fewer --parallel"

_PAUSE_SECS: Final = 1.0
"""After a 429 that does not say how long to wait."""


_AGAIN_SECS: Final = 0.25
"""Before the second try at the first object that the Hub is asked to copy; twice as long before each further one."""

_LOOK_AGAIN_SECS: Final = 15.0
"""In a long pause the Hub is asked this often whether it is over, as `hfbucket_plugin.hub.rate_limit` lets one through."""


class CopyMethod(StrEnum):
    """How bytes come to the destination. The values stand in reports."""

    COPY = "copy"  # by the Hub, which knows them by their hash
    COPY_OR_STREAM = "copy-or-stream"  # the same, and as bytes where it refuses single objects
    STREAM = "stream"  # through this process


class CopyOutcome(StrEnum):
    """How a copy ended. The values stand in reports."""

    COPIED = "copied"  # by the Hub
    STREAMED = "streamed"
    SAME = "same"  # it was there when we came to it
    CHANGED = "changed"  # the destination is not as it was planned: it stays as it is
    GONE = "gone"  # the source no longer has it
    FAILED = "failed"


@dataclass
class CopyAttempt:
    """What came of a try so far."""

    batch: ItemBatch[CopyItem]
    ended: list[ItemOutcome[CopyItem]] = field(default_factory=list)
    why: dict[str, str] = field(default_factory=dict)  # by the key at the destination
    asked: set[str] = field(default_factory=set)

    def end(self, copy_item: CopyItem, outcome: CopyOutcome, message: str = "") -> None:
        """Note how one has ended."""
        self.ended.append(ItemOutcome(copy_item, outcome, message))

    def result(self, *, wait_secs: float = 0.0, counts: bool = True) -> Result[CopyItem]:
        """The result: what did not end is tried again, or has failed for good."""
        done = {ended.item.to for ended in self.ended}
        left = tuple(copy_item for copy_item in self.batch.items if copy_item.to not in done)
        if not left:
            return Result(tuple(self.ended))
        # A try that ended some is none for the others: they may not have had their turn.
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
    """Copies between two endpoints.

    Args:
        source: Where chunks come from.
        destination: Where they go.
        how: How; copying by the Hub needs two instances.
        window_bytes: Most bytes that one try fetches at one time; a larger chunk goes alone.
        memory_bytes: Most memory that chunks on their way take, over all tries of this mover. A chunk that is larger fails by
            itself, unless it is small for any machine (`SMALL_BYTES`).
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
        """Try once.

        Args:
            batch: What is to be copied.
            seconds: How long this may take.

        Raises:
            HFBucketError: What will not pass by waiting: no rights, no such bucket.
            OSError: The disk of a directory is full.
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
        """Give contents their names at the destination where it is as planned, by the rule of deletes (`jobs.batch.model`).

        Between the look and the naming lies one request, which is sent once and not for long: a look that has become old
        is done again. A pause that the Hub asks for is waited out before the look, never between the two.

        Args:
            tried: Where it is noted how they end.
            copy_items: What is to get a name.
            deadline: When to give up.
            give: Gives the names until a deadline; returns why, by key, for those that have none.
            outcome: What they are then.

        Returns:
            What `give` returned; empty where nothing was to be named.

        Raises:
            ThrottledError: The pause is longer than the time that is left.
            HFBucketError: Nobody knows what became of any.
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
        """Give names, and note that the destination was asked to: what a lost answer leaves there is ours."""
        before = frozenset(tried.asked)
        tried.asked |= {copy_item.path for copy_item in copy_items}
        try:
            return give(copy_items, soon)
        except ThrottledError:  # nothing was named
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
        """Those that may be in memory; the others fail, whatever a manifest or a bucket says of their size."""
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
        """Give names to bytes that are there, if the destination still is as planned: fetching them took a while."""

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
        """Those for which the destination is as it was planned; the others end."""
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
                ours = copy_item.path in tried.batch.asked  # the Hub did it, and its answer was lost
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
        """End those that are there now; say of the others why not."""
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
        """End those that the source no longer has as planned."""
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
    """How bytes are moved, and why so.

    Attributes:
        how: How.
        why: In words; where the Hub decided, its own.
        moved: What was copied while that was found out.
        asked: Whether the Hub was asked at all: it is not where nothing was to be copied any more.
    """

    how: CopyMethod
    why: str
    moved: CopyItem | None = None
    asked: bool = True


def find_out(source: InstanceEnd, destination: InstanceEnd, copy_items: Iterable[CopyItem], seconds: float) -> Method:
    """Ask the Hub whether it copies from one bucket to the other, by the first copies that are to be made.

    Args:
        source: Where chunks come from.
        destination: Where they go.
        copy_items: What is to be copied, if it is still as planned.
        seconds: How long one try may take.

    Raises:
        TransportError: The Hub did not answer; nothing is known then.
        HFBucketError: The destination cannot be looked at.
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
    """Have the Hub copy one object, trying again what may pass: what became of it, and why it has no name.

    Raises:
        HFBucketError: It was refused, or nobody knows.
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
        except ThrottledError as error:  # no try: when the pause is over, the destination is looked at again
            deadline.wait_out(error)
        except TransportError:
            asked = frozenset(asked | tried.asked)
            tries += 1
            if tries == TRIES or deadline.passed:
                raise
            time.sleep(_AGAIN_SECS * 2 ** (tries - 1))
