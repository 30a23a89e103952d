"""The xorb format: concatenated chunks and an optional footer (https://huggingface.co/docs/xet/xorb).

The header of a chunk is `u8 version = 0, u24 packed length, u8 scheme, u24 unpacked length`, little-endian. Schemes: 0 none,
1 LZ4 frame, 2 the bytes regrouped by their position modulo four, then LZ4 frame.
"""

import itertools
import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

import lz4.frame  # type: ignore[import-untyped] # it ships no types

from localhub.formats.hashing import HASH_BYTES, Node, chunk_hash, xorb_hash

MAX_CHUNK_BYTES = 128 * 1024
"""Largest unpacked chunk (public Xet chunking specification)."""

MAX_XORB_BYTES = 64 * 1024 * 1024
"""Largest sum of a xorb's chunks (public Xet xorb specification)."""

_HEADER = struct.Struct("<II")
_FOOTER_MAGIC = b"XETBLOB"
_SCHEMES = (0, 1, 2)
_GROUPED = 2
_GROUPS = 4


class XorbError(ValueError):
    """These bytes are not a xorb, or not the expected one."""


@dataclass(frozen=True)
class ChunkTable:
    """Position of each chunk of a xorb.

    Attributes:
        ends: for each chunk, the end of its serialized bytes, from the start of the xorb.
        unpacked_ends: for each chunk, the end of its unpacked bytes, from the start of the unpacked xorb.
    """

    ends: "array[int]"
    unpacked_ends: "array[int]"

    def __len__(self) -> int:
        return len(self.ends)

    def start(self, index: int) -> int:
        """Return the start of chunk `index` in the serialized bytes."""
        return self.ends[index - 1] if index else 0

    def unpacked_start(self, index: int) -> int:
        """Return the start of chunk `index` in the unpacked bytes."""
        return self.unpacked_ends[index - 1] if index else 0

    def unpacked_bytes(self, first: int, end: int) -> int:
        """Return the number of unpacked bytes of chunks `first` to `end` (exclusive)."""
        return self.unpacked_start(end) - self.unpacked_start(first)


@dataclass(frozen=True)
class Xorb:
    """A verified xorb.

    Attributes:
        table: the positions of its chunks.
        hashes: the concatenated hashes of its chunks, 32 bytes each.
        digest: its own hash.
    """

    table: ChunkTable
    hashes: bytes
    digest: bytes

    @property
    def size(self) -> int:
        """Serialized bytes of the chunks, without a footer."""
        return self.table.ends[-1]


def read_xorb(source: IO[bytes]) -> Xorb:
    """Read a xorb, unpack and hash every chunk, and compute its hash.

    A footer is ignored: the table is computed from the chunks, which a footer could contradict.

    Raises:
        XorbError: a chunk is malformed or too large, there is none, or their sum exceeds 64 MiB.
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


def iter_chunks(source: IO[bytes]) -> Iterator[tuple[bytes | bytearray, int]]:
    """Yield each chunk unpacked, with the end of its serialized bytes.

    Raises:
        XorbError: a chunk is malformed or too large.
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
            raise XorbError(f"unknown version {version} in the chunk header at byte {end}")
        if not 0 < unpacked_bytes <= MAX_CHUNK_BYTES or packed_bytes > 2 * MAX_CHUNK_BYTES:
            raise XorbError(
                f"the chunk at byte {end} exceeds the limits: {packed_bytes} bytes packed, {unpacked_bytes} unpacked"
            )
        packed = source.read(packed_bytes)
        if len(packed) < packed_bytes:
            raise XorbError(f"the xorb ends inside the chunk at byte {end}")
        yield _unpack(packed, scheme, unpacked_bytes, end), (end := end + _HEADER.size + packed_bytes)


def _unpack(packed: bytes, scheme: int, unpacked_bytes: int, where: int) -> bytes | bytearray:
    if scheme not in _SCHEMES:
        raise XorbError(f"unknown compression scheme {scheme} in the chunk at byte {where}")
    data: bytes | bytearray = packed if scheme == 0 else _lz4(packed, unpacked_bytes, where)
    if scheme == _GROUPED:
        data = _ungroup(data)
    if len(data) != unpacked_bytes:
        raise XorbError(f"the chunk at byte {where} unpacks to {len(data)} bytes, its header says {unpacked_bytes}")
    return data


def _lz4(packed: bytes, unpacked_bytes: int, where: int) -> bytes:
    try:
        # One byte more than announced shows that there is more; a decompression bomb is never unpacked.
        data = lz4.frame.LZ4FrameDecompressor().decompress(packed, max_length=unpacked_bytes + 1)
    except (RuntimeError, EOFError) as error:
        raise XorbError(f"the chunk at byte {where} is not an LZ4 frame: {error}") from error
    return bytes(data)


def _ungroup(grouped: bytes | bytearray) -> bytearray:
    data = bytearray(len(grouped))
    start = 0
    for group in range(_GROUPS):
        length = (len(grouped) - group + _GROUPS - 1) // _GROUPS
        data[group::_GROUPS] = grouped[start : start + length]
        start += length
    return data


def hash_at(hashes: bytes, index: int) -> bytes:
    """Return the hash of chunk `index` from concatenated hashes."""
    return hashes[index * HASH_BYTES : (index + 1) * HASH_BYTES]
