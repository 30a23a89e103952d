"""What a reader knows of an instance at one moment: a snapshot, and the changes since. Pure and immutable."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from hfbucket_plugin.index_table import NO_CHANGES, PUT, Table, content_of, newest

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


@dataclass(frozen=True, slots=True)
class View:
    """A snapshot, and what happened since.

    Attributes:
        base: The snapshot.
        covers: See `Pointer`: journals that the Hub took earlier are in it.
        listed: See there: what happened earlier is in it.
        changes: Rows of `CHANGE`: what was folded in, the newest of each key.
    """

    base: Table
    covers: float
    listed: float
    changes: Table = NO_CHANGES

    def look_up(self, digests: NDArray[np.uint64]) -> Sequence[Content | Absent]:
        """What is known of keys, each by the newest that was told of it.

        Args:
            digests: Shape (n, 2), see `digests_of`.
        """
        found: list[Content | Absent] = []
        in_base = self.base.find(digests)
        in_changes = self.changes.find(digests)
        for base, change in zip(in_base.tolist(), in_changes.tolist(), strict=True):
            if change >= 0:
                row: Any = self.changes.rows[change]
                found.append(content_of(row) if row["kind"] == PUT else Absent.DELETED)
            elif base >= 0:
                found.append(content_of(self.base.rows[base]))
            else:
                found.append(Absent.UNKNOWN)
        return found

    def folded(self, *changes: Rows) -> View:
        """The view after more changes, in whatever order and however often they are told."""
        late = [rows[rows["at"] >= self.listed] for rows in changes]
        if not any(len(rows) for rows in late):
            return self
        return View(self.base, self.covers, self.listed, Table(newest(self.changes.rows, *late)))

    @property
    def keys(self) -> int:
        """How many keys the snapshot has; what was put and deleted since is not counted off against each other."""
        return len(self.base)

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in memory."""
        return self.base.nbytes + self.changes.nbytes
