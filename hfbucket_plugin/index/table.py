"""Table of a key index: the keys of an instance with size, hash and time, immutable and sorted by digest.

A row has 60 packed bytes (`ROW`). A `Table` also keeps the first digest words contiguously, 8 bytes per key, for binary
search: 1,000,000 keys take 68 MB. A batch of lookups is one `numpy.searchsorted`; there is no Python object per key.

Keys are identified by a 128-bit digest of the whole object name (`digests_of`). Looking up 10^15 missing names among
10,000,000 keys yields a false hit with a probability of about 1 in 3 * 10^16. A deliberate collision takes 2^64
attempts for any two names and 2^128 for a given one; LMCache's own 64-bit chunk hashes in the classic engine are far
weaker. Reads are checked by size and, with `verify: hash`, by the index's hash, as for any other answer.
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
"""Structured array of `ROW` or `CHANGE`, possibly with more columns."""

DIGEST_BYTES: Final = 16
HASH_BYTES: Final = 32
_PERSON: Final = b"hfbucket-index"

_KEY: Final = [("digest_hi", "<u8"), ("digest_lo", "<u8")]
_WHAT: Final = [("size", "<u8"), ("xet_hash", "u1", (HASH_BYTES,))]

ROW: Final = np.dtype([*_KEY, *_WHAT, ("uploaded_at", "<u4")])
"""One key: the digest of its object name as two words, size in bytes, Xet hash, and upload time in Unix seconds (0:
unknown). Later versions may add columns; older readers ignore them."""

CHANGE: Final = np.dtype([*_KEY, *_WHAT, ("at", "<f8"), ("kind", "u1")])
"""Change of one key: `PUT` or `DELETED`, and its time in Unix seconds by the Hub's clock (see
`hfbucket_plugin.index.store`)."""

PUT: Final = 1
DELETED: Final = 2
READ: Final = 3
"""In journals only: hits of a key, which do not change it (`stats`)."""

LOST: Final = 4
"""In journals of hits only: hits whose keys are lost (`stats`)."""


def digests_of(names: Iterable[str]) -> NDArray[np.uint64]:
    """Return the digests of object names below an instance's prefix.

    The prefix is not included, so that an instance that is copied or renamed as a whole keeps its index.

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
    """Return the 32 bytes of a Xet hash of 64 hexadecimal digits, in order.

    Raises:
        ValueError: It is not a Xet hash.
    """
    raw = bytes.fromhex(xet_hash)
    if len(raw) != HASH_BYTES or len(xet_hash) != 2 * HASH_BYTES:
        raise ValueError(f"{xet_hash!r} is not a Xet hash of {2 * HASH_BYTES} hexadecimal digits")
    return np.frombuffer(raw, np.uint8)


def rows_of(entries: Sequence[tuple[str, ContentId, float]]) -> Rows:
    """Return the rows of listed objects.

    Args:
        entries: Name below the prefix, content, and upload time in Unix seconds (0: unknown), of each object.

    Raises:
        ValueError: A hash is invalid.
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
    """Return the content of a row."""
    return ContentId(row["xet_hash"].tobytes().hex(), int(row["size"]))


class Table:
    """Rows sorted by digest, each digest once; immutable, so lookups are thread-safe.

    Args:
        rows: Sorted rows with at least the columns of `ROW` or `CHANGE`.

    Raises:
        ValueError: The rows are not sorted, or a digest occurs twice.
    """

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self._hi: NDArray[np.uint64] = np.ascontiguousarray(rows["digest_hi"])
        steps = self._hi[1:] > self._hi[:-1]
        if not steps.all():  # rarely, the first words are equal and the second word decides
            ties = np.flatnonzero(~steps)
            before, after = rows[ties], rows[ties + 1]
            alike = before["digest_hi"] == after["digest_hi"]
            if not (alike & (before["digest_lo"] < after["digest_lo"])).all():
                raise ValueError("the rows are not in the order of their digests, each once")

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def first_words(self) -> NDArray[np.uint64]:
        """First digest words of the rows, contiguous."""
        return self._hi

    @property
    def nbytes(self) -> int:
        """Memory use in bytes."""
        return int(self.rows.nbytes + self._hi.nbytes)

    def find(self, digests: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Return the positions of digests among the rows; see `find`."""
        return find(self._hi, self.rows, digests)


def find(first_words: NDArray[np.uint64], rows: Rows, digests: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return the positions of digests among sorted rows; -1 for missing ones.

    Args:
        first_words: First digest words of the rows, contiguous.
        rows: Sorted rows; they may be on disk.
        digests: Shape (n, 2), as returned by `digests_of`.
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
        at[open_] += 1  # equal first words


NO_CHANGES: Final = Table(np.zeros(0, CHANGE))


_BLOCK_ROWS: Final = 16_384
"""Rows processed in one step of some milliseconds, because NumPy holds the GIL in some calls, and an engine must not
wait."""


def gathered(rows: Rows, order: NDArray[np.int64]) -> Rows:
    """Return rows in a given order, copied in blocks."""
    out = np.empty(len(order), rows.dtype)
    for start in range(0, len(order), _BLOCK_ROWS):
        some = slice(start, start + _BLOCK_ROWS)
        out[some] = rows.take(order[some])
    return out


def in_order(rows: Rows) -> Rows:
    """Return rows sorted by digest; rows with the same digest keep their order."""
    ordered = gathered(rows, np.argsort(np.ascontiguousarray(rows["digest_hi"]), kind="stable"))
    tied = _tied(ordered["digest_hi"])
    if len(tied):  # equal first words: duplicate keys, and hardly any others
        some = ordered.take(tied)
        ordered[tied] = some.take(np.lexsort((some["digest_lo"], some["digest_hi"])))
    return ordered


def _tied(words: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return the positions of sorted words that equal a neighbour."""
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
    """Return the last row of each digest from sorted rows."""
    lasts = [_last_in(rows, start) for start in range(0, len(rows), _BLOCK_ROWS)]
    if sum(map(len, lasts)) == len(rows):
        return rows
    return gathered(rows, np.concatenate(lasts))


def _last_in(rows: Rows, start: int) -> NDArray[np.int64]:
    """Return the positions of the last row of each digest in a block."""
    block = rows[start : start + _BLOCK_ROWS + 1]
    last = np.ones(len(block), bool)
    last[:-1] = (block["digest_hi"][1:] != block["digest_hi"][:-1]) | (
        block["digest_lo"][1:] != block["digest_lo"][:-1]
    )
    return np.flatnonzero(last[:_BLOCK_ROWS]) + start


def newest(*changes: Rows) -> Rows:
    """Merge changes of several sources: the newest of each digest, sorted by digest.

    The order of the sources and repetitions make no difference. Of changes at the same time a put wins, because a wrong
    put costs one miss at a read, while a wrong delete hides a chunk for longer; between puts the larger hash decides.
    """
    rows = in_order(np.concatenate(changes)) if changes else np.zeros(0, CHANGE)
    tied = _tied(rows["digest_hi"])
    if not len(tied):
        return rows
    rows[tied] = _oldest_first(rows.take(tied))
    return last_of_each(rows)


def _oldest_first(rows: Rows) -> Rows:
    """Return changes sorted by digest, with the newest of each last."""
    # bytes of the hash, last key first: any order that is the same everywhere
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
    """Merge two tables of changes, keeping the newest of each digest, in blocks and without a full sort."""
    if not len(one) or not len(other):
        return one if len(one) else other
    large, small = (one, other) if len(one) >= len(other) else (other, one)
    out = np.empty(len(large) + len(small), large.rows.dtype)
    filled = at = taken = 0
    while at < len(large) or taken < len(small):
        end = min(len(large), at + _BLOCK_ROWS)
        upto = len(small)
        if end < len(large):  # rows with equal first words stay together
            bound = large.first_words[end]
            end = int(np.searchsorted(large.first_words, bound))
            upto = int(np.searchsorted(small.first_words, bound))
            if end <= at:  # a whole block has the same word
                end = int(np.searchsorted(large.first_words, bound, side="right"))
                upto = int(np.searchsorted(small.first_words, bound, side="right"))
        some = newest(large.rows[at:end], small.rows[taken:upto])
        out[filled : filled + len(some)] = some
        filled, at, taken = filled + len(some), end, upto
    return Table(out[:filled])


def beats(change: Any, other: Any) -> bool:
    """Return whether a change of a key is newer than another one, in the order of `newest`."""
    if change["at"] != other["at"]:
        return bool(change["at"] > other["at"])
    pair = np.stack([other, change])
    return bool(_oldest_first(pair)[-1] == change)


def applied(rows: Rows, changes: Rows) -> Rows:
    """Apply changes to rows: put objects have their new content, deleted ones are removed.

    Args:
        rows: Sorted rows of `ROW`, possibly with more columns.
        changes: Rows of `CHANGE`, at most one per digest (`newest`).

    Returns:
        Sorted rows of the type of `rows`; columns unknown to a put are 0 unless the key existed before.
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
    """Reason for which a view has no content for a key."""

    UNKNOWN = "unknown"
    """The key is neither in the snapshot nor in later changes."""

    DELETED = "deleted"
    """The key was deleted after the snapshot."""


_RATIO: Final = 4
"""Minimum size ratio of a tier of changes to the next, so that each change is merged only a few times."""


@dataclass(frozen=True, slots=True)
class View:
    """Snapshot and later changes.

    Attributes:
        base: Snapshot.
        covers: `Pointer.covers`: journals uploaded before are included.
        listed: `Pointer.listed`: changes made before are included.
        changes: Rows of `CHANGE`: the newest of each key, except for those in the tiers.
        tiers: Recently added changes, likewise; each tier is smaller than the one before. A key may be in several.
    """

    base: Table
    covers: float
    listed: float
    changes: Table = NO_CHANGES
    tiers: tuple[Table, ...] = ()

    def look_up(self, digests: NDArray[np.uint64]) -> Sequence[ContentId | Absent]:
        """Return what is known of keys, by the newest information.

        Args:
            digests: Shape (n, 2), as returned by `digests_of`.
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
        """Return the newest change of each key, a row of `CHANGE`; None without one.

        Args:
            digests: Shape (n, 2), as returned by `digests_of`.
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
        """Return the view after more changes, in any order and with repetitions.

        Only new changes are sorted; they are merged with the tiers that are not much larger.
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
        """Number of keys in the snapshot, without later changes."""
        return len(self.base)

    @property
    def nbytes(self) -> int:
        """Memory use in bytes."""
        return self.base.nbytes + self.changes.nbytes + sum(tier.nbytes for tier in self.tiers)
