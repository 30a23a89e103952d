"""What a reader knows of an instance at one moment: a snapshot, and the changes since. Pure and immutable."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Final

from hfbucket_plugin.index_table import NO_CHANGES, PUT, Table, beats, content_of, merged, newest

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from hfbucket_plugin.content import Content
    from hfbucket_plugin.index_table import Rows


class Absent(Enum):
    """Why a view gives no content for a key."""

    UNKNOWN = "unknown"
    """It is neither in the snapshot nor in what was told since."""

    DELETED = "deleted"
    """It was deleted since the snapshot."""


_RATIO: Final = 4
"""By how much a tier of changes is larger than the next one at least: so a change is merged a few times, however many there are."""


@dataclass(frozen=True, slots=True)
class View:
    """A snapshot, and what happened since.

    Attributes:
        base: The snapshot.
        covers: See `Pointer`: journals that the Hub took earlier are in it.
        listed: See there: what happened earlier is in it.
        changes: Rows of `CHANGE`: what was folded in, the newest of each key, but for what the tiers have.
        tiers: The same, of what was folded in of late; each is smaller than the one before. A key may be in several.
    """

    base: Table
    covers: float
    listed: float
    changes: Table = NO_CHANGES
    tiers: tuple[Table, ...] = ()

    def look_up(self, digests: NDArray[np.uint64]) -> Sequence[Content | Absent]:
        """What is known of keys, each by the newest that was told of it.

        Args:
            digests: Shape (n, 2), see `digests_of`.
        """
        found: list[Content | Absent] = []
        in_base = self.base.find(digests)
        for base, row in zip(in_base.tolist(), self.changed(digests), strict=True):
            if row is not None:
                found.append(content_of(row) if row["kind"] == PUT else Absent.DELETED)
            elif base >= 0:
                found.append(content_of(self.base.rows[base]))
            else:
                found.append(Absent.UNKNOWN)
        return found

    def changed(self, digests: NDArray[np.uint64]) -> list[Any]:
        """The newest change of each key, a row of `CHANGE`; None where there is none.

        Args:
            digests: Shape (n, 2), see `digests_of`.
        """
        found: list[Any] = [None] * len(digests)
        for table in (self.changes, *self.tiers):
            if not len(table):
                continue
            for index, at in enumerate(table.find(digests).tolist()):
                if at >= 0:
                    row, known = table.rows[at], found[index]
                    found[index] = row if known is None or beats(row, known) else known
        return found

    def folded(self, *changes: Rows) -> View:
        """The view after more changes, in whatever order and however often they are told.

        Only what is new is sorted. It is merged with as much of what there is as it is not much smaller than.
        """
        late = [rows[rows["at"] >= self.listed] for rows in changes]
        if not any(len(rows) for rows in late):
            return self
        tiers = [self.changes, *self.tiers, Table(newest(*late))]
        while len(tiers) > 1 and len(tiers[-2]) < _RATIO * len(tiers[-1]):
            small = tiers.pop()
            tiers[-1] = merged(tiers[-1], small)
        return View(self.base, self.covers, self.listed, tiers[0], tuple(tiers[1:]))

    @property
    def keys(self) -> int:
        """How many keys the snapshot has; what was put and deleted since is not counted off against each other."""
        return len(self.base)

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in memory."""
        return self.base.nbytes + self.changes.nbytes + sum(tier.nbytes for tier in self.tiers)
