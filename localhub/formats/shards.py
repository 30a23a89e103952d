"""The shard format, which lists the chunks that make each file (https://huggingface.co/docs/xet/shard), and its validation.

All numbers are little-endian, all entries 48 bytes long. A header (tag[32], u64 version, u64 footer bytes) precedes the file
blocks and the xorb blocks; a block whose hash is all ones ends each list. The footer repeats what the blocks say.
"""

import functools
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from localhub.formats.hashing import HASH_BYTES, Node, file_hash, to_hex
from localhub.formats.xorbs import ChunkTable, hash_at

_TAG = b"HFRepoMetaData\0"
_BLOCK = struct.Struct("<32sIIQ")  # hash, flags, number of entries that follow, unused
_TERM = struct.Struct("<32sIIII")  # xorb, flags, unpacked bytes, first chunk, end chunk
_CHUNK = struct.Struct("<32sIIQ")  # hash, start among the unpacked bytes, unpacked bytes, unused
_HEADER_BYTES = 48
_ENTRY_BYTES = 48
_END = b"\xff" * HASH_BYTES
_VERIFICATION_FLAG = 1 << 31  # a file block has one more entry per term
_METADATA_FLAG = 1 << 30  # a file block has one more entry

FindXorb = Callable[[bytes], tuple[ChunkTable, bytes] | None]
"""Returns a stored xorb's chunk table and chunk hashes, or None."""


class ShardError(ValueError):
    """This shard is malformed or contradicts the stored xorbs."""


@dataclass(frozen=True)
class Term:
    """A run of chunks of one xorb.

    Attributes:
        xorb: the xorb's hash.
        unpacked_bytes: length of the run in bytes of the file.
        first: the first chunk.
        end: the chunk after the last.
    """

    xorb: bytes
    unpacked_bytes: int
    first: int
    end: int


@dataclass(frozen=True)
class FileRecord:
    """One file of a shard.

    Attributes:
        digest: the file's hash.
        terms: its terms in the format of the shard, 48 bytes each.
    """

    digest: bytes
    terms: bytes

    @property
    def size(self) -> int:
        """Size of the file in bytes, which is the sum of its terms."""
        return sum(term.unpacked_bytes for term in iter_terms(self.terms))


@dataclass(frozen=True)
class XorbRecord:
    """One xorb of a shard.

    Attributes:
        digest: the xorb's hash.
        chunks: hash and unpacked bytes of each chunk.
    """

    digest: bytes
    chunks: list[Node]


def iter_terms(terms: bytes) -> Iterator[Term]:
    """Yield the terms of a file from their serialized form."""
    for xorb, _flags, unpacked_bytes, first, end in _TERM.iter_unpack(terms):
        yield Term(xorb, unpacked_bytes, first, end)


def parse_shard(data: bytes) -> tuple[list[FileRecord], list[XorbRecord]]:
    """Return the files and the xorbs of a shard.

    Raises:
        ShardError: the shard is malformed.
    """
    if not data.startswith(_TAG):
        raise ShardError("the body is not a shard: the tag is missing")
    files: list[FileRecord] = []
    xorbs: list[XorbRecord] = []
    position = _HEADER_BYTES
    while (block := _block(data, position)) is not None:
        digest, flags, count = block
        terms = _take(data, position + _ENTRY_BYTES, count)
        files.append(FileRecord(digest, terms))
        entries = 1 + count + (count if flags & _VERIFICATION_FLAG else 0) + (1 if flags & _METADATA_FLAG else 0)
        position += entries * _ENTRY_BYTES
    position += _ENTRY_BYTES
    while (block := _block(data, position)) is not None:
        digest, _flags, count = block
        chunks = _take(data, position + _ENTRY_BYTES, count)
        xorbs.append(XorbRecord(digest, [(entry[0], entry[2]) for entry in _CHUNK.iter_unpack(chunks)]))
        position += (1 + count) * _ENTRY_BYTES
    return files, xorbs


def check_shard(files: list[FileRecord], xorbs: list[XorbRecord], find: FindXorb) -> None:
    """Refuse a shard that contradicts the stored xorbs.

    Every xorb that the shard names must be stored, its terms must lie in the xorbs and be as long as their chunks, and
    every file's hash must be the one of its chunks. So every stored file is complete, even if a client confuses this Hub
    with an earlier one at the same address.

    Raises:
        ShardError: the shard contradicts the stored xorbs; the message says where.
    """

    @functools.cache
    def stored(digest: bytes) -> tuple[ChunkTable, bytes]:
        found = find(digest)
        if found is None:
            raise ShardError(f"the shard names the xorb {to_hex(digest)}, which is not stored on this Hub")
        return found

    for xorb in xorbs:
        _check_xorb(xorb, *stored(xorb.digest))
    for file in files:
        nodes: list[Node] = []
        for term in iter_terms(file.terms):
            nodes += _chunks_of(term, *stored(term.xorb))
        if file_hash(nodes) != file.digest:
            raise ShardError(f"the chunks of the file {to_hex(file.digest)} have the hash {to_hex(file_hash(nodes))}")


def _check_xorb(xorb: XorbRecord, table: ChunkTable, hashes: bytes) -> None:
    sizes = [table.unpacked_bytes(index, index + 1) for index in range(len(table))]
    if [size for _, size in xorb.chunks] != sizes or b"".join(digest for digest, _ in xorb.chunks) != hashes:
        raise ShardError(f"the shard's chunks of the xorb {to_hex(xorb.digest)} differ from the stored ones")


def _chunks_of(term: Term, table: ChunkTable, hashes: bytes) -> Iterator[Node]:
    if not term.first < term.end <= len(table):
        raise ShardError(
            f"a term names chunks {term.first} to {term.end} of the xorb {to_hex(term.xorb)}, which has {len(table)}"
        )
    if term.unpacked_bytes != table.unpacked_bytes(term.first, term.end):
        raise ShardError(
            f"a term has {term.unpacked_bytes} bytes for chunks {term.first} to {term.end} of the xorb"
            f" {to_hex(term.xorb)}, which have {table.unpacked_bytes(term.first, term.end)}"
        )
    for index in range(term.first, term.end):
        yield hash_at(hashes, index), table.unpacked_bytes(index, index + 1)


def _block(data: bytes, position: int) -> tuple[bytes, int, int] | None:
    """Return hash, flags and count of the block at `position`, or None where the list ends."""
    if position + _ENTRY_BYTES > len(data):
        raise ShardError("the shard ends before its lists end")
    digest, flags, count, _ = _BLOCK.unpack_from(data, position)
    return None if digest == _END else (digest, flags, count)


def _take(data: bytes, position: int, count: int) -> bytes:
    end = position + count * _ENTRY_BYTES
    if end > len(data):
        raise ShardError("the shard ends inside a block")
    return data[position:end]
