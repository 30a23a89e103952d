"""Sizes of millions of objects by path, in arrays: at most 32 bytes an object, where a dict takes about 200."""

from __future__ import annotations

import hashlib
from array import array
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

_SHARD_BITS: Final = 10
_SHARD_SHIFT: Final = 64 - _SHARD_BITS
"""1,024 tables, so that one grows in milliseconds: at 10,000,000 objects each holds about 10,000."""

_FEWEST_SLOTS: Final = 8
_SIZE_BITS: Final = 40
_SIZE_MASK: Final = (1 << _SIZE_BITS) - 1
_OWNER_BITS: Final = 23
_OWNER_MASK: Final = (1 << _OWNER_BITS) - 1
_MARK: Final = 1 << 63

LARGEST_SIZE: Final = _SIZE_MASK
LARGEST_OWNER: Final = _OWNER_MASK


def digest_of(path: str) -> int:
    """The key of a path: 63 bits of its BLAKE2b hash.

    Among 10,000,000 paths the chance that any two share a digest is about 1 in 200,000; the account is off by one object then.
    """
    return int.from_bytes(hashlib.blake2b(path.encode(errors="surrogatepass"), digest_size=8).digest(), "big") | 1


class SizeTable:
    """Digest → size, owner and a mark; not thread-safe.

    Open addressing with linear probing. An entry of size 0 is a deleted one, whose slot is used again when its table grows.
    """

    def __init__(self) -> None:
        self._shards: list[_Shard | None] = [None] * (1 << _SHARD_BITS)
        self._generation = 0
        self.objects = 0

    def get(self, digest: int) -> tuple[int, int]:
        """The size and the owner of an entry; the size is 0 where there is none."""
        shard = self._shards[digest >> _SHARD_SHIFT]
        value = shard.get(digest) if shard is not None else 0
        return value & _SIZE_MASK, value >> _SIZE_BITS & _OWNER_MASK

    def set(self, digest: int, size: int, owner: int) -> None:
        """Add or replace an entry, and mark it; size 0 deletes it."""
        number = digest >> _SHARD_SHIFT
        shard = self._shards[number]
        if shard is None:
            if not size:
                return
            shard = self._shards[number] = _Shard()
        old = shard.put(digest, (size | owner << _SIZE_BITS | self._generation) if size else 0)
        self.objects += bool(size) - bool(old & _SIZE_MASK)

    def unmark_all(self) -> None:
        """Take the marks of all entries, at once: each has the mark of this generation or is set later."""
        self._generation ^= _MARK

    def mark_all(self) -> None:
        """Mark every entry."""
        for shard in self._shards:
            if shard is not None:
                values = shard.as_numpy()
                live = (values & np.uint64(_SIZE_MASK)) != 0
                values[live] = (values[live] & np.uint64(_MARK - 1)) | np.uint64(self._generation)

    def drop_unmarked(self) -> Iterator[tuple[int, int]]:
        """Delete the entries without a mark.

        Yields:
            The owner, and the bytes that it loses; one pair for each table and owner.
        """
        for shard in self._shards:
            if shard is None:
                continue
            values = shard.as_numpy()
            sizes = values & np.uint64(_SIZE_MASK)
            gone = (sizes != 0) & ((values & np.uint64(_MARK)) != np.uint64(self._generation))
            if not gone.any():
                continue
            owners = (values[gone] >> np.uint64(_SIZE_BITS)) & np.uint64(_OWNER_MASK)
            lost = sizes[gone]
            values[gone] = 0
            self.objects -= len(lost)
            for owner in np.unique(owners):
                yield int(owner), int(lost[owners == owner].sum())

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(shard.nbytes for shard in self._shards if shard is not None)


class _Shard:
    """One hash table."""

    __slots__ = ("_keys", "_taken", "_values")

    def __init__(self) -> None:
        self._keys = array("Q", bytes(8 * _FEWEST_SLOTS))
        self._values = array("Q", bytes(8 * _FEWEST_SLOTS))
        self._taken = 0

    def get(self, digest: int) -> int:
        return self._values[self._slot(digest)]

    def put(self, digest: int, value: int) -> int:
        slot = self._slot(digest)
        old = self._values[slot]
        if self._keys[slot] != digest:
            if not value:
                return 0
            if (self._taken + 1) * 4 > len(self._keys) * 3:
                self._grow()
                slot = self._slot(digest)
            self._keys[slot] = digest
            self._taken += 1
        self._values[slot] = value
        return old

    def _slot(self, digest: int) -> int:
        """Where a digest is, or would be put. A free slot has the value 0."""
        keys = self._keys
        slots = len(keys)
        at = (digest >> 1) % slots
        while (key := keys[at]) and key != digest:
            at += 1
            if at == slots:
                at = 0
        return at

    def _grow(self) -> None:
        """Make room for half as many again as there are, and leave out what was deleted."""
        live = [(key, value) for key, value in zip(self._keys, self._values, strict=True) if value & _SIZE_MASK]
        slots = max(_FEWEST_SLOTS, len(live) * 2)
        self._keys = array("Q", bytes(8 * slots))
        self._values = array("Q", bytes(8 * slots))
        self._taken = len(live)
        for key, value in live:
            at = self._slot(key)
            self._keys[at], self._values[at] = key, value

    def as_numpy(self) -> npt.NDArray[np.uint64]:
        return np.frombuffer(self._values, dtype=np.uint64)

    @property
    def nbytes(self) -> int:
        return 16 * len(self._keys)
