"""State of an instance's `.hfbucket/index/`, from one listing and the pointer, for the builder and `status`."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from hfbucket_plugin.core.deadline import Deadline
from hfbucket_plugin.core.units import age, count
from hfbucket_plugin.errors import HFBucketError, MissingError
from hfbucket_plugin.index.format import FormatError
from hfbucket_plugin.index.store import DIRECTORY, JOURNALS, MAX_JOURNALS, IndexListing, IndexStore

if TYPE_CHECKING:
    from collections.abc import Callable

    from hfbucket_plugin.hub.bucket import Bucket
    from hfbucket_plugin.index.format import Pointer

_NAMED_STRANGE: Final = 100


@dataclass(slots=True)
class IndexState:
    """State of a key index.

    Attributes:
        listing: The objects, except those that are only counted.
        pointer: Pointer to the current snapshot; None if there is none, or it cannot be read.
        unknown: Why an existing pointer cannot be read: a newer version, or invalid content.
        more_journals: Number of journals beyond the first `MAX_JOURNALS` of the listing.
        strange: Number of objects that do not belong to an index; the first ones are in the listing.
    """

    listing: IndexListing = field(default_factory=IndexListing)
    pointer: Pointer | None = None
    unknown: str = ""
    more_journals: int = 0
    strange: int = 0

    @property
    def journals(self) -> int:
        """Number of journals."""
        return len(self.listing.journals) + self.more_journals

    @property
    def waiting(self) -> int:
        """Number of known journals that the current snapshot does not cover."""
        covers = 0.0 if self.pointer is None else self.pointer.covers
        return self.more_journals + sum(journal.at >= covers for journal in self.listing.journals)

    def line(self, now: datetime) -> str:
        """Return the state as a line for the terminal.

        Args:
            now: Time of the Hub.
        """
        pointer = self.pointer
        if pointer is None:
            return f"key index: no snapshot that can be read{': ' if self.unknown else ''}{self.unknown}"
        if ahead := pointer.ahead_of(now.timestamp()):
            return f"key index: {ahead}: neither engines nor cleanups go by it until it was rebuilt"
        made, listed = (datetime.fromtimestamp(at, UTC) for at in (pointer.covers, pointer.full))
        return (
            f"key index: {count(pointer.keys, 'key')}, brought up to date {age(made, now)} ago from a listing "
            f"{age(listed, now)} old; {count(self.waiting, 'journal')} since, {self.journals:,} in all, "
            f"{count(len(self.listing.snapshots), 'snapshot')}"
        )

    def record(self, now: float) -> dict[str, Any]:
        """Return the fields for JSON.

        Args:
            now: Time of the Hub, in seconds since 1970.
        """
        pointer, listing = self.pointer, self.listing
        reason = self.unknown or (pointer.ahead_of(now) if pointer is not None else "")
        return {
            "snapshot": None if pointer is None else pointer.snapshot,
            "keys": None if pointer is None else pointer.keys,
            "bytes": None if pointer is None else pointer.size,
            "age_seconds": None if pointer is None else round(now - pointer.covers, 1),
            "listed_seconds_ago": None if pointer is None else round(now - pointer.full, 1),
            "snapshots": len(listing.snapshots),
            "journals": self.journals,
            "journals_waiting": self.waiting,
            "strange": self.strange,
            "reason": reason,
            "trouble": reason,  # its name in release 0.1
        }


def look(
    bucket: Bucket, store: IndexStore, page_secs: float, request_secs: float, each_page: Callable[[], None]
) -> IndexState:
    """List an index, and read its pointer. Memory is bounded for any number of objects.

    Args:
        bucket: Client of the instance's bucket.
        store: Its index.
        page_secs: Timeout of a listing page, in seconds.
        request_secs: Timeout of the pointer's read, in seconds.
        each_page: Called before each page; what it raises ends the listing.

    Raises:
        HFBucketError: If a page or the pointer cannot be read.
    """
    handle, found = bucket.handle, IndexState()
    journals = handle.join(f"{JOURNALS}/")
    for info in bucket.list_objects(handle.join(f"{DIRECTORY}/"), page_secs, each_page):
        if len(found.listing.journals) >= MAX_JOURNALS and info.path.startswith(journals):
            found.more_journals += 1
            continue
        before = len(found.listing.strange)
        found.listing.see(info, handle)
        found.strange += len(found.listing.strange) - before
        del found.listing.strange[_NAMED_STRANGE:]
    if found.listing.pointer is not None:
        try:
            found.pointer = store.read_pointer(found.listing.pointer, Deadline.patient(request_secs))
        except FormatError as error:
            found.unknown = str(error)
        except MissingError:  # another builder has published, or the store has lost the content
            return found
    return found


def state(bucket: Bucket, page_secs: float, request_secs: float) -> IndexState | str:
    """Return the state of an index, for display only.

    Returns:
        The state, or the reason why it is unknown.
    """
    store = IndexStore(bucket, "status")
    try:
        return look(bucket, store, page_secs, request_secs, lambda: None)
    except HFBucketError as error:
        return str(error)
    finally:
        store.close()
