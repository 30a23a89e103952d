"""The xorb format: chunks back to back, each with a header of 8 bytes, and an optional footer.

After the public Xet protocol specification (https://huggingface.co/docs/xet/xorb). A chunk's header is `u8 version
= 0, u24 packed length, u8 scheme, u24 unpacked length`, little-endian. Schemes: 0 none, 1 LZ4 frame, 2 the bytes
regrouped by their position modulo four, then LZ4 frame.
"""

import itertools
import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import lz4.frame  # type: ignore[import-untyped] # it ships no types

from localhub.formats.hashing import HASH_BYTES, Node, chunk_hash, xorb_hash

MAX_CHUNK_BYTES = 128 * 1024
"""Largest unpacked chunk (public Xet chunking specification)."""

MAX_XORB_BYTES = 64 * 1024 * 1024
"""Largest sum of a xorb's chunks (public Xet xorb specification)."""

_HEADER = struct.Struct("<II")
_FOOTER_MAGIC = b"XETBLOB"
_GROUPS = 4


class XorbError(ValueError):
    """These bytes are not a xorb, or not the one that they are said to be."""


class Reader(Protocol):
    """What a xorb is read from."""

    def read(self, size: int, /) -> bytes:
        """Return the next `size` bytes, fewer only at the end."""
        ...


@dataclass(frozen=True)
class ChunkTable:
    """Where each chunk of a xorb lies.

    Attributes:
        ends: for each chunk, where its serialized bytes end, in bytes from the xorb's start.
        unpacked_ends: for each chunk, the unpacked bytes of the xorb up to its end.
    """

    ends: "array[int]"
    unpacked_ends: "array[int]"

    def __len__(self) -> int:
        return len(self.ends)

    def start(self, index: int) -> int:
        """Return where chunk `index` starts among the serialized bytes."""
        return self.ends[index - 1] if index else 0

    def unpacked_start(self, index: int) -> int:
        """Return how many unpacked bytes come before chunk `index`."""
        return self.unpacked_ends[index - 1] if index else 0

    def unpacked_bytes(self, first: int, end: int) -> int:
        """Return the unpacked bytes of chunks `first` to `end`, the latter not included."""
        return self.unpacked_start(end) - self.unpacked_start(first)


@dataclass(frozen=True)
class Xorb:
    """A xorb that was read whole and whose every chunk was unpacked and hashed.

    Attributes:
        table: where its chunks lie.
        hashes: the chunks' hashes, 32 bytes each, back to back.
        digest: its own hash.
    """

    table: ChunkTable
    hashes: bytes
    digest: bytes

    @property
    def size(self) -> int:
        """Bytes of its chunks as serialized, without a footer."""
        return self.table.ends[-1]


def read_xorb(source: Reader) -> Xorb:
    """Read a xorb, unpack and hash every chunk, and compute its hash.

    A footer is skipped: the table is made from the chunks themselves, which a footer could contradict.

    Raises:
        XorbError: a chunk is malformed, too large or does not unpack; there is none; or the sum is over 64 MiB.
    """
    nodes: list[Node] = []
    ends = array("I")
    for chunk, end in iter_chunks(source):
        nodes.append((chunk_hash(chunk), len(chunk)))
        ends.append(end)
    if not nodes:
        raise XorbError("the xorb holds no chunk")
    unpacked_ends = array("I", itertools.accumulate(size for _, size in nodes))
    if unpacked_ends[-1] > MAX_XORB_BYTES:
        raise XorbError(f"the xorb unpacks to {unpacked_ends[-1]} bytes, the limit is {MAX_XORB_BYTES}")
    return Xorb(ChunkTable(ends, unpacked_ends), b"".join(digest for digest, _ in nodes), xorb_hash(nodes))


def iter_chunks(source: Reader) -> Iterator[tuple[bytes | bytearray, int]]:
    """Yield each chunk unpacked, with the place where its serialized bytes end.

    Raises:
        XorbError: a chunk is malformed, too large or does not unpack.
    """
    end = 0
    while header := source.read(_HEADER.size):
        if header.startswith(_FOOTER_MAGIC):
            return
        if len(header) < _HEADER.size:
            raise XorbError(f"the xorb ends inside a chunk header, at byte {end + len(header)}")
        low, high = _HEADER.unpack(header)
        version, packed_bytes = low & 0xFF, low >> 8
        scheme, unpacked_bytes = high & 0xFF, high >> 8
        if version != 0:
            raise XorbError(f"chunk header of unknown version {version} at byte {end}")
        if not 0 < unpacked_bytes <= MAX_CHUNK_BYTES or packed_bytes > 2 * MAX_CHUNK_BYTES:
            raise XorbError(f"chunk of {packed_bytes} bytes for {unpacked_bytes} at byte {end}: over the limits")
        packed = source.read(packed_bytes)
        if len(packed) < packed_bytes:
            raise XorbError(f"the xorb ends inside the chunk at byte {end}")
        yield _unpack(packed, scheme, unpacked_bytes, end), (end := end + _HEADER.size + packed_bytes)


def _unpack(packed: bytes, scheme: int, unpacked_bytes: int, where: int) -> bytes | bytearray:
    match scheme:
        case 0:
            data: bytes | bytearray = packed
        case 1:
            data = _lz4(packed, unpacked_bytes, where)
        case 2:
            data = _ungroup(_lz4(packed, unpacked_bytes, where))
        case _:
            raise XorbError(f"unknown compression scheme {scheme} in the chunk at byte {where}")
    if len(data) != unpacked_bytes:
        raise XorbError(f"the chunk at byte {where} unpacks to {len(data)} bytes, its header says {unpacked_bytes}")
    return data


def _lz4(packed: bytes, unpacked_bytes: int, where: int) -> bytes:
    try:
        # One byte more than promised is enough to see that there is more: a bomb is never unpacked.
        data = lz4.frame.LZ4FrameDecompressor().decompress(packed, max_length=unpacked_bytes + 1)
    except (RuntimeError, EOFError) as error:
        raise XorbError(f"the chunk at byte {where} is not an LZ4 frame: {error}") from error
    return bytes(data)


def _ungroup(grouped: bytes) -> bytearray:
    data = bytearray(len(grouped))
    start = 0
    for group in range(_GROUPS):
        length = (len(grouped) - group + _GROUPS - 1) // _GROUPS
        data[group::_GROUPS] = grouped[start : start + length]
        start += length
    return data


def hash_at(hashes: bytes, index: int) -> bytes:
    """Return the hash of chunk `index` from hashes that lie back to back."""
    return hashes[index * HASH_BYTES : (index + 1) * HASH_BYTES]
