"""Batches of objects, and their outcomes."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Container, Sequence

    from hfbucket_plugin.core.deadline import Deadline

TRIES: Final = 4
"""Maximum number of tries per failing object; waiting for the Hub's quota does not count as one."""


class WorkItem(Protocol):
    """Object that a batch processes."""

    @property
    def path(self) -> str:
        """Path of the object."""

    @property
    def key(self) -> str:
        """Key of the object, or its name if it is not a chunk."""

    @property
    def size(self) -> int:
        """Size in bytes."""

    @property
    def reason(self) -> str:
        """Reason for which the object is in the plan."""


T = TypeVar("T", bound=WorkItem)


@dataclass(frozen=True, slots=True)
class ItemOutcome(Generic[T]):
    """Outcome of one object.

    Attributes:
        item: The object.
        outcome: The outcome.
        message: Why the object failed, if it did.
    """

    item: T
    outcome: StrEnum
    message: str = ""


@dataclass(frozen=True, slots=True)
class ItemBatch(Generic[T]):
    """Objects to delete or to copy together.

    Attributes:
        items: The objects, at most 1000.
        tries: Number of tries so far.
        asked: Paths for which a delete or naming request was sent whose answer was lost.
        losses: Number of processes that died during a try; these do not count as tries.
    """

    items: tuple[T, ...]
    tries: int = 0
    asked: frozenset[str] = frozenset()
    losses: int = 0


@dataclass(frozen=True, slots=True)
class Result(Generic[T]):
    """Result of a try.

    Attributes:
        ended: Objects with an outcome.
        left: Objects to try again; None if there are none.
        wait_secs: Seconds for which the Hub requested a pause.
    """

    ended: tuple[ItemOutcome[T], ...]
    left: ItemBatch[T] | None = None
    wait_secs: float = 0.0


FRESH_SECS: Final = 3.0
"""Maximum age in seconds of a look-up, from its request, when the delete or naming request based on it is sent."""


SEND_SECS: Final = 10.0
"""Timeout in seconds of such a request: the longer it is in progress, the older the look-up it is based on."""


class Outcome(StrEnum):
    """Outcome of an object. The values appear in reports."""

    DELETED = "deleted"
    GONE = "gone"  # before this job reached it
    USED = "used"  # was to be deleted as unused, but was read since it was planned: it stays
    CHANGED = "changed"  # rewritten since it was planned, or at a mirror's source again: it stays
    TOO_YOUNG = "too-young"  # occurs only in an edited plan
    FAILED = "failed"


class ReferenceEndpoint(Protocol):
    """Endpoint that must not hold an object for that object to be deleted: the source of a mirror."""

    def look_up(self, keys: Sequence[str], deadline: Deadline) -> Container[str]:
        """Return those of the keys that the endpoint holds, and possibly others.

        Raises:
            HFBucketError: If the endpoint does not answer.
        """

    def expect_chunks(self) -> None:
        """Refuse an endpoint without any chunk: everything would be deleted.

        Raises:
            RefusedError: If the endpoint has no chunk.
            HFBucketError: If the endpoint does not answer, or does not exist.
        """
