r"""Xet hashes: their text form, and the Merkle trees of xorbs and files (https://huggingface.co/docs/xet/hashing).

Every hash is keyed BLAKE3 of 32 bytes. A chunk's hash covers its unpacked bytes; an inner node covers one line
`"{hash} : {size}\n"` per child. A xorb's hash is the root over its chunks; a file's hash is the root over its chunks,
hashed again with a key of zeros.
"""

import string
import struct
from collections.abc import Sequence

from blake3 import blake3

HASH_BYTES = 32
EMPTY_FILE_HASH = bytes(HASH_BYTES)
"""The hash that hf_xet gives a file of no bytes: without chunks there is no tree."""

_CHUNK_KEY = bytes.fromhex("6697f5775b9550de3135cbaca597181c9de421109beb2b58b4d0b04b93adf229")
_NODE_KEY = bytes.fromhex("017ec5c7a5472996fd946666b48a02e65ddd536f37c76dd2f86352e64a53713f")
_FILE_KEY = bytes(HASH_BYTES)

_MEAN_BRANCHING = 4
_MIN_BRANCHING = 2
_MAX_BRANCHING = 2 * _MEAN_BRANCHING + 1
_WORDS = struct.Struct("<4Q")
_HEX = frozenset(string.hexdigits)

Node = tuple[bytes, int]
"""A hash and the number of unpacked bytes beneath it."""


class HashError(ValueError):
    """This text is not a hash."""


def to_hex(digest: bytes) -> str:
    """Return the text form of a hash: four little-endian 64-bit words, each as 16 hexadecimal digits.

    Args:
        digest: 32 bytes.
    """
    return "{:016x}{:016x}{:016x}{:016x}".format(*_WORDS.unpack(digest))


def from_hex(text: str) -> bytes:
    """Return the 32 bytes of a hash from its text form.

    Raises:
        HashError: `text` is not 64 hexadecimal digits.
    """
    if len(text) != 2 * HASH_BYTES or not _HEX.issuperset(text):
        raise HashError(f"not a Xet hash (64 hexadecimal digits): {text[:80]!r}")
    return _WORDS.pack(*(int(text[i : i + 16], 16) for i in range(0, 64, 16)))


def chunk_hash(data: bytes | bytearray) -> bytes:
    """Return the hash of one chunk's unpacked bytes."""
    return blake3(data, key=_CHUNK_KEY).digest()


def xorb_hash(chunks: Sequence[Node]) -> bytes:
    """Return the hash of the xorb that holds these chunks, at least one, in this order."""
    while len(chunks) > 1:
        chunks = _level_above(chunks)
    return chunks[0][0]


def file_hash(chunks: Sequence[Node]) -> bytes:
    """Return the hash of the file made of these chunks in this order; zeros when there are none."""
    return blake3(xorb_hash(chunks), key=_FILE_KEY).digest() if chunks else EMPTY_FILE_HASH


def _level_above(nodes: Sequence[Node]) -> list[Node]:
    above: list[Node] = []
    start = 0
    while start < len(nodes):
        end = _cut(nodes, start)
        above.append(_parent(nodes[start:end]))
        start = end
    return above


def _cut(nodes: Sequence[Node], start: int) -> int:
    """Return where the children of the node that begins at `start` end; their hashes decide, so equal runs split alike."""
    if len(nodes) - start <= _MIN_BRANCHING:
        return len(nodes)
    limit = min(start + _MAX_BRANCHING, len(nodes))
    for index in range(start + _MIN_BRANCHING, limit):
        # The last of the four little-endian words decides; modulo four, its lowest byte is enough.
        if nodes[index][0][24] % _MEAN_BRANCHING == 0:
            return index + 1
    return limit


def _parent(children: Sequence[Node]) -> Node:
    lines = "".join(f"{to_hex(digest)} : {size}\n" for digest, size in children)
    return blake3(lines.encode(), key=_NODE_KEY).digest(), sum(size for _, size in children)
