"""The table of a key index: which keys an instance holds, with size, hash and time. Pure, immutable, sorted by digest.

A row is 60 bytes (`ROW`), packed. Besides the rows, a `Table` keeps their first digest words apart, 8 bytes a key, since
a binary search wants them side by side: 1,000,000 keys take 68 MB. A batch of look-ups is one `numpy.searchsorted`, which
runs in C; nothing here holds a Python object per key.

Keys are known by a digest of 128 bits of the *whole* object name (`digests_of`), every field of the key included. Two names
share one with a probability of 2^-128 each: of 10,000,000 keys, looked up against 10^15 names that are not there, one
false hit is expected once in 3 * 10^16 such fleets' lives. An attacker who wants to *make* two names collide needs 2^64 tries for
any two, and 2^128 for a given one; LMCache's own chunk hashes, of 64 bits in the classic engine, give way long before. What
is read is checked by its size, and with `verify: hash` by the hash that the index tells, as with any other answer.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from hfbucket_plugin.core.keys import ContentId

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray


Rows = np.ndarray[Any, np.dtype[np.void]]
"""A structured array: of `ROW`, of `CHANGE`, or of one of them with more columns."""

DIGEST_BYTES: Final = 16
HASH_BYTES: Final = 32
_PERSON: Final = b"hfbucket-index"

_KEY: Final = [("digest_hi", "<u8"), ("digest_lo", "<u8")]
_WHAT: Final = [("size", "<u8"), ("xet_hash", "u1", (HASH_BYTES,))]

ROW: Final = np.dtype([*_KEY, *_WHAT, ("uploaded_at", "<u4")])
"""One key: the digest of its object's name as two words, bytes, Xet hash, and the second since 1970 at which the Hub took it
(0: unknown). More columns may follow in files of later versions; who does not know them leaves them out."""

CHANGE: Final = np.dtype([*_KEY, *_WHAT, ("at", "<f8"), ("kind", "u1")])
"""What became of one key: `PUT` or `DELETED`, and when, in seconds since 1970 by the Hub's clock (see `index_store`)."""

PUT: Final = 1
DELETED: Final = 2
READ: Final = 3
"""In journals only: hits of a key, which change nothing of it (`heat`)."""

LOST: Final = 4
"""In journals of hits only: hits of which nobody will know of which keys they were (`heat`)."""


def digests_of(names: Iterable[str]) -> NDArray[np.uint64]:
    """The digests of object names below an instance's prefix.

    The prefix is not part of them: an instance that was copied or renamed as a whole keeps its index.

    Returns:
        Shape (names, 2): the words `digest_hi` and `digest_lo`, little-endian, of BLAKE2b with 16 bytes and the person
        `hfbucket-index`.
    """
    whole = b"".join(
        hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=DIGEST_BYTES, person=_PERSON).digest()
        for name in names
    )
    return np.frombuffer(whole, "<u8").reshape(-1, 2)


def hash_bytes(xet_hash: str) -> NDArray[np.uint8]:
    """The 32 bytes of a Xet hash of 64 hexadecimal digits, in their order.

    Raises:
        ValueError: It is none.
    """
    raw = bytes.fromhex(xet_hash)
    if len(raw) != HASH_BYTES or len(xet_hash) != 2 * HASH_BYTES:
        raise ValueError(f"{xet_hash!r} is not a Xet hash of {2 * HASH_BYTES} hexadecimal digits")
    return np.frombuffer(raw, np.uint8)


def rows_of(entries: Sequence[tuple[str, ContentId, float]]) -> Rows:
    """Rows of listed objects.

    Args:
        entries: Name below the prefix, content, and seconds since 1970 at which the Hub took it (0: unknown).

    Raises:
        ValueError: A hash is none.
    """
    rows = np.zeros(len(entries), ROW)
    digests = digests_of(name for name, _, _ in entries)
    rows["digest_hi"], rows["digest_lo"] = digests[:, 0], digests[:, 1]
    for index, (_, content, uploaded_at) in enumerate(entries):
        rows["size"][index] = content.size
        rows["xet_hash"][index] = hash_bytes(content.xet_hash)
        rows["uploaded_at"][index] = min(max(0, int(uploaded_at)), 0xFFFFFFFF)
    return rows


def content_of(row: Any) -> ContentId:
    """What a row says of its object."""
    return ContentId(row["xet_hash"].tobytes().hex(), int(row["size"]))


class Table:
    """Rows in the order of their digests, each digest once; look-ups are thread-safe, since nothing ever changes.

    Args:
        rows: Sorted, with the columns of `ROW` or `CHANGE` at least.

    Raises:
        ValueError: They are not sorted, or a digest is there twice: no table of ours.
    """

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self._hi: NDArray[np.uint64] = np.ascontiguousarray(rows["digest_hi"])
        steps = self._hi[1:] > self._hi[:-1]
        if not steps.all():  # 64 bits alike: rare, and then the second word decides
            ties = np.flatnonzero(~steps)
            before, after = rows[ties], rows[ties + 1]
            alike = before["digest_hi"] == after["digest_hi"]
            if not (alike & (before["digest_lo"] < after["digest_lo"])).all():
                raise ValueError("the rows are not in the order of their digests, each once")

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def first_words(self) -> NDArray[np.uint64]:
        """The first digest words of the rows, side by side."""
        return self._hi

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in memory."""
        return int(self.rows.nbytes + self._hi.nbytes)

    def find(self, digests: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Where digests are among the rows; see `find`."""
        return find(self._hi, self.rows, digests)


def find(first_words: NDArray[np.uint64], rows: Rows, digests: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Where digests are among sorted rows; -1 for those that are not.

    Args:
        first_words: The first digest words of the rows, side by side.
        rows: The rows; they may be on disk.
        digests: Shape (n, 2), as `digests_of` gives them.
    """
    found: NDArray[np.int64] = np.full(len(digests), -1, np.int64)
    at = np.searchsorted(first_words, digests[:, 0]).astype(np.int64)
    open_ = np.arange(len(digests))
    while True:
        open_ = open_[at[open_] < len(first_words)]
        open_ = open_[first_words[at[open_]] == digests[open_, 0]]
        if not len(open_):
            return found
        same = rows["digest_lo"][at[open_]] == digests[open_, 1]
        found[open_[same]] = at[open_[same]]
        open_ = open_[~same]
        at[open_] += 1  # 64 bits alike


NO_CHANGES: Final = Table(np.zeros(0, CHANGE))


_BLOCK_ROWS: Final = 16_384
"""Rows of one step: NumPy holds Python's lock in some calls, and an engine must not wait for it. A step takes some milliseconds."""


def gathered(rows: Rows, order: NDArray[np.int64]) -> Rows:
    """Rows in some order, a block at a time."""
    out = np.empty(len(order), rows.dtype)
    for start in range(0, len(order), _BLOCK_ROWS):
        some = slice(start, start + _BLOCK_ROWS)
        out[some] = rows.take(order[some])
    return out


def in_order(rows: Rows) -> Rows:
    """Rows sorted by their digests; those of one digest stay in the order in which they came."""
    ordered = gathered(rows, np.argsort(np.ascontiguousarray(rows["digest_hi"]), kind="stable"))
    tied = _tied(ordered["digest_hi"])
    if len(tied):  # 64 bits alike: keys that are there twice, and hardly any others
        some = ordered.take(tied)
        ordered[tied] = some.take(np.lexsort((some["digest_lo"], some["digest_hi"])))
    return ordered


def _tied(words: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Where sorted words are like the one before or after."""
    found: list[NDArray[np.int64]] = []
    for start in range(0, len(words), _BLOCK_ROWS):
        begin, end = max(0, start - 1), min(len(words), start + _BLOCK_ROWS + 1)
        alike = words[begin + 1 : end] == words[begin : end - 1]
        tied = np.zeros(end - begin, bool)
        tied[1:] |= alike
        tied[:-1] |= alike
        found.append(np.flatnonzero(tied[start - begin : start - begin + _BLOCK_ROWS]) + start)
    return np.concatenate(found) if found else np.zeros(0, np.int64)


def last_of_each(rows: Rows) -> Rows:
    """Of sorted rows the last one of each digest."""
    lasts = [_last_in(rows, start) for start in range(0, len(rows), _BLOCK_ROWS)]
    if sum(map(len, lasts)) == len(rows):
        return rows
    return gathered(rows, np.concatenate(lasts))


def _last_in(rows: Rows, start: int) -> NDArray[np.int64]:
    """Where the last row of each digest is, in a block."""
    block = rows[start : start + _BLOCK_ROWS + 1]
    last = np.ones(len(block), bool)
    last[:-1] = (block["digest_hi"][1:] != block["digest_hi"][:-1]) | (
        block["digest_lo"][1:] != block["digest_lo"][:-1]
    )
    return np.flatnonzero(last[:_BLOCK_ROWS]) + start


def newest(*changes: Rows) -> Rows:
    """Changes of several sources as one: for each digest the newest, in the order of the digests.

    Which source comes first, and how often a change is told, makes no difference. Of changes at the very same moment a put
    wins: a put that is believed wrongly is one miss at a read, a delete that is believed wrongly hides a chunk for longer;
    between puts the larger hash decides.
    """
    rows = in_order(np.concatenate(changes)) if changes else np.zeros(0, CHANGE)
    tied = _tied(rows["digest_hi"])
    if not len(tied):
        return rows
    rows[tied] = _oldest_first(rows.take(tied))
    return last_of_each(rows)


def _oldest_first(rows: Rows) -> Rows:
    """Changes by digest, the newest of each last."""
    # bytes of the hash, last key first: any order will do, if it is the same for everyone
    words = np.ascontiguousarray(rows["xet_hash"]).view("<u8").reshape(-1, HASH_BYTES // 8)
    order = np.lexsort(
        (
            *(words[:, word] for word in range(words.shape[1])),
            rows["size"],
            -rows["kind"].astype(np.int16),
            rows["at"],
            rows["digest_lo"],
            rows["digest_hi"],
        )
    )
    return gathered(rows, order)


def merged(one: Table, other: Table) -> Table:
    """Changes of two tables as one, the newest of each digest; a block at a time, without sorting all of it again."""
    if not len(one) or not len(other):
        return one if len(one) else other
    large, small = (one, other) if len(one) >= len(other) else (other, one)
    out = np.empty(len(large) + len(small), large.rows.dtype)
    filled = at = taken = 0
    while at < len(large) or taken < len(small):
        end = min(len(large), at + _BLOCK_ROWS)
        upto = len(small)
        if end < len(large):  # rows whose first words are alike stay together
            bound = large.first_words[end]
            end = int(np.searchsorted(large.first_words, bound))
            upto = int(np.searchsorted(small.first_words, bound))
            if end <= at:  # a whole block of one word
                end = int(np.searchsorted(large.first_words, bound, side="right"))
                upto = int(np.searchsorted(small.first_words, bound, side="right"))
        some = newest(large.rows[at:end], small.rows[taken:upto])
        out[filled : filled + len(some)] = some
        filled, at, taken = filled + len(some), end, upto
    return Table(out[:filled])


def beats(change: Any, other: Any) -> bool:
    """Whether a change of a key is newer than another one of it, by the order of `newest`."""
    if change["at"] != other["at"]:
        return bool(change["at"] > other["at"])
    pair = np.stack([other, change])
    return bool(_oldest_first(pair)[-1] == change)


def applied(rows: Rows, changes: Rows) -> Rows:
    """Rows after changes: what was put is there with its new content, what was deleted is not.

    Args:
        rows: Of `ROW`, with more columns perhaps, sorted.
        changes: Of `CHANGE`, one a digest at most (`newest`).

    Returns:
        Sorted rows, of the type of `rows`; columns that a put knows nothing of are 0 in it, unless it was there before.
    """
    if not len(changes):
        return rows
    where = Table(rows).find(np.stack([changes["digest_hi"], changes["digest_lo"]], axis=1))
    puts = changes["kind"] == PUT
    added = np.zeros(int(puts.sum()), rows.dtype)
    known = where[puts]
    added[known >= 0] = rows[known[known >= 0]]
    for name in ("digest_hi", "digest_lo", "size", "xet_hash"):
        added[name] = changes[name][puts]
    added["uploaded_at"] = np.clip(changes["at"][puts], 0, 0xFFFFFFFF).astype(np.uint32)
    kept = np.ones(len(rows), bool)
    kept[where[where >= 0]] = False
    return in_order(np.concatenate([rows[kept], added]))


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
        tiers: The same, of what was folded in recently; each is smaller than the one before. A key may be in several.
    """

    base: Table
    covers: float
    listed: float
    changes: Table = NO_CHANGES
    tiers: tuple[Table, ...] = ()

    def look_up(self, digests: NDArray[np.uint64]) -> Sequence[ContentId | Absent]:
        """What is known of keys, each by the newest that was told of it.

        Args:
            digests: Shape (n, 2), see `digests_of`.
        """
        found: list[ContentId | Absent] = []
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
