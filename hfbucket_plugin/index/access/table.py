"""Heat from the key index of an instance, for jobs and warm-ups, looked up on disk for any number of keys.

Jobs delete by heat, so missing heat (no index, or no recorder) is distinguished from an index that is unreadable or no
longer updated (`AccessUnknownError`).
"""

from __future__ import annotations

import contextlib
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from hfbucket_plugin.core.deadline import Deadline
from hfbucket_plugin.errors import HFBucketError, MissingError, RefusedError
from hfbucket_plugin.index.access.stats import GAP_SECS, buckets, has_access_columns
from hfbucket_plugin.index.build import fetch_snapshot
from hfbucket_plugin.index.format import AHEAD_SECS, FormatError, read_header
from hfbucket_plugin.index.store import IndexStore
from hfbucket_plugin.index.table import digests_of, find

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from hfbucket_plugin.hub.bucket import Bucket
    from hfbucket_plugin.index.format import Pointer
    from hfbucket_plugin.index.table import Rows

STALE_SECS: Final = GAP_SECS
"""Age in seconds from which a snapshot says nothing about recent reads; its builder should run hourly."""

_BLOCK_ROWS: Final = 100_000
_TRIES: Final = 3
"""Maximum number of attempts, because a builder may replace the snapshot before it is read."""


class AccessUnknownError(RefusedError):
    """The instance has an index, but its heat is not reliable."""


@dataclass(frozen=True, slots=True)
class ChunkUse:
    """Known reads of one key.

    Attributes:
        last: Time of the last read; None if no read is known.
        bucket: Heat bucket, see `stats.buckets`.
    """

    last: datetime | None = None
    bucket: int = 0


UNREAD: Final = ChunkUse()


class AccessTable:
    """Heat of a snapshot in a file; created by `open_access_table`.

    Args:
        rows: Rows of the snapshot, mapped from the file.
        first_words: Their first digest words, mapped and contiguous for binary search.
        pointer: Pointer to the snapshot.
        now: Time for which buckets are computed, in Unix seconds.
    """

    def __init__(self, rows: Rows, first_words: NDArray[np.uint64], pointer: Pointer, now: float) -> None:
        self._rows = rows
        self._first = first_words
        self.pointer = pointer
        self._now = now

    @property
    def since(self) -> datetime:
        """Time since which all hits are known: start of recording, or the last dropped hit."""
        return datetime.fromtimestamp(max(self.pointer.heat_since, self.pointer.heat_lost_at), UTC)

    @property
    def lost(self) -> int:
        """Number of hits that recorders dropped."""
        return self.pointer.heat_lost

    @property
    def lost_at(self) -> datetime | None:
        """Time of the last dropped hit; None without one."""
        at = self.pointer.heat_lost_at
        return datetime.fromtimestamp(at, UTC) if at else None

    def look_up(self, names: Sequence[str]) -> list[ChunkUse]:
        """Return what is known of a page of objects, by their names below the instance's prefix."""
        found = [UNREAD] * len(names)
        where = find(self._first, self._rows, digests_of(names))
        known = np.flatnonzero(where >= 0)
        rows = self._rows[where[known]]
        levels = buckets(rows["heat"], self._now)
        for index, last, level in zip(known.tolist(), rows["last_hit"].tolist(), levels.tolist(), strict=True):
            if last or level:
                found[index] = ChunkUse(datetime.fromtimestamp(last, UTC) if last else None, level)
        return found


@contextlib.contextmanager
def open_access_table(
    bucket: Bucket, now: datetime, request_secs: float, temp_dir: Path | None = None
) -> Iterator[AccessTable | None]:
    """Provide the heat of an instance for the duration of a block; None without an index or a recorder.

    Args:
        bucket: Bucket of the instance.
        now: Time of the Hub.
        request_secs: Maximum time of a request in seconds; ten times as much for the snapshot.
        temp_dir: Directory of the snapshot meanwhile, 76 bytes per key; None for the system's temporary directory.

    Raises:
        AccessUnknownError: The index is unreadable, or too old to know recent reads.
        AccessDeniedError: And other errors of the first request that the index does not cause.
    """
    with contextlib.ExitStack() as stack:
        store = IndexStore(bucket, "heat")
        stack.callback(store.close)
        if store.find_pointer(Deadline.patient(request_secs)) is None:
            yield None
            return
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="heat-", dir=temp_dir)))
        try:
            found = _fetched(bucket, store, directory, request_secs, now)
        except (HFBucketError, OSError) as error:
            raise AccessUnknownError(
                f"what was read when is not known, since the key index cannot be read: {error}"
            ) from None
        if found is None:
            yield None
            return
        pointer, rows, first = found
        expect_fresh(pointer, now)
        yield AccessTable(rows, first, pointer, now.timestamp())


def expect_fresh(pointer: Pointer, now: datetime) -> None:
    """Check that an index knows recent reads.

    Raises:
        AccessUnknownError: It is outdated, has had no reports for long, or its times are ahead of the Hub's clock.
    """
    if ahead := pointer.ahead_of(now.timestamp()):
        raise AccessUnknownError(
            f"the times of reads are not known: the pointer to the key index is not valid: {ahead}. "
            "Run `python -m jobs index --full`, and find out which process wrote it"
        )
    for at, what in (
        (pointer.covers, "the key index was last brought up to date"),
        (pointer.heat_told, "hits, or their absence, were last reported"),
    ):
        age = now.timestamp() - at
        if age > STALE_SECS:
            raise AccessUnknownError(
                f"what was read recently is not known: {what} {age / 3600:.0f} h ago. Does `python -m jobs index` run on a "
                "schedule, and is heat on in the engines?"
            )


def _fetched(
    bucket: Bucket, store: IndexStore, directory: Path, request_secs: float, now: datetime
) -> tuple[Pointer, Rows, NDArray[np.uint64]] | None:
    for number in range(_TRIES):
        info = store.find_pointer(Deadline.patient(request_secs))
        if info is None:
            return None
        try:
            pointer = store.read_pointer(info, Deadline.patient(request_secs))
            if not pointer.heat.known:
                return None
            file = directory / f"{number}.npy"
            fetch_snapshot(bucket, store, pointer, file, Deadline.patient(10 * request_secs))
        except MissingError:
            if number == _TRIES - 1:
                raise
        else:
            return pointer, *_mapped(file, directory / f"{number}.first", now.timestamp() + AHEAD_SECS)
    return None


def _mapped(path: Path, first: Path, latest: float) -> tuple[Rows, NDArray[np.uint64]]:
    """Map the rows of a snapshot and their first words from disk.

    Raises:
        FormatError: The snapshot has no heat, or a hit in it is later than `latest`.
    """
    with path.open("rb") as file:
        header = read_header(file, str(path))
    if not has_access_columns(header.dtype):
        raise FormatError(f"{path}: its pointer says that it knows heat, and it has no columns for it")
    if not header.rows:
        return np.zeros(0, header.dtype), np.zeros(0, "<u8")
    rows: Rows = np.memmap(path, header.dtype, "r", header.offset, (header.rows,))
    words: NDArray[np.uint64] = np.memmap(first, np.dtype("<u8"), "w+", 0, (header.rows,))
    for start in range(0, header.rows, _BLOCK_ROWS):
        block = rows[start : start + _BLOCK_ROWS]
        words[start : start + len(block)] = block["digest_hi"]
        if (last := int(block["last_hit"].max())) > latest:
            raise FormatError(
                f"a key's last_hit ({last}) is {(last - latest + AHEAD_SECS) / 3600:,.1f} h ahead of the Hub's clock. "
                "Run `python -m jobs index --full`, and find out which process wrote the snapshot"
            )
    return rows, words
