import io
import os

import lz4.frame
import pytest
from hypothesis import given
from hypothesis import strategies as st

from localhub.formats.xorbs import MAX_CHUNK_BYTES, MAX_XORB_BYTES, XorbError, hash_at, iter_chunks, read_xorb
from tests.support.hubs import make_xorb, packed


def header(packed_bytes: int, scheme: int, unpacked_bytes: int, version: int = 0) -> bytes:
    return (
        bytes([version]) + packed_bytes.to_bytes(3, "little") + bytes([scheme]) + unpacked_bytes.to_bytes(3, "little")
    )


@given(st.lists(st.binary(min_size=1, max_size=300), min_size=1, max_size=12), st.sampled_from([0, 1, 2]))
def test_chunks_come_out_as_they_went_in(chunks, scheme):
    body, digest = make_xorb(chunks, scheme)
    assert [bytes(chunk) for chunk, _ in iter_chunks(io.BytesIO(body))] == chunks
    xorb = read_xorb(io.BytesIO(body))
    assert (xorb.digest, xorb.size, len(xorb.table)) == (digest, len(body), len(chunks))
    for index, chunk in enumerate(chunks):
        assert xorb.table.unpacked_bytes(index, index + 1) == len(chunk)
        serialized = body[xorb.table.start(index) : xorb.table.ends[index]]
        assert serialized == packed(chunk, scheme)
        assert read_xorb(io.BytesIO(serialized)).digest == hash_at(xorb.hashes, index)


def test_a_footer_is_ignored():
    body, digest = make_xorb([b"one", b"two"])
    xorb = read_xorb(io.BytesIO(body + b"XETBLOB\1" + os.urandom(100)))
    assert (xorb.digest, xorb.size) == (digest, len(body))


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        (b"", "no chunk"),
        (b"XETBLOB\1", "no chunk"),
        (b"\0\0\0", "ends inside a chunk header"),
        (header(5, 0, 5) + b"abc", "ends inside the chunk"),
        (header(1, 0, 1, version=1) + b"a", "unknown version 1"),
        (header(1, 9, 1) + b"a", "unknown compression scheme 9"),
        (header(2, 0, 1) + b"ab", "unpacks to 2 bytes, its header says 1"),
        (header(0, 0, 0), "exceeds the limits"),
        (header(1, 0, MAX_CHUNK_BYTES + 1) + b"a", "exceeds the limits"),
        (header(20, 1, 20) + b"no frame of any kind", "not an LZ4 frame"),
        (
            packed(b"abc" * 100, 1)[:4] + b"\1" + (299).to_bytes(3, "little") + packed(b"abc" * 100, 1)[8:],
            "its header says 299",
        ),
    ],
)
def test_invalid_xorbs_are_refused(body, complaint):
    with pytest.raises(XorbError, match=complaint):
        read_xorb(io.BytesIO(body))


def test_a_bomb_is_not_unpacked():
    bomb = lz4.frame.compress(bytes(20_000_000))
    with pytest.raises(XorbError, match="unpacks to 1001 bytes"):
        read_xorb(io.BytesIO(header(len(bomb), 1, 1000) + bomb))


def test_a_xorb_holds_at_most_64_mib():
    chunk = bytes(MAX_CHUNK_BYTES)
    body = packed(chunk, 1) * (MAX_XORB_BYTES // MAX_CHUNK_BYTES)
    assert read_xorb(io.BytesIO(body)).table.unpacked_ends[-1] == MAX_XORB_BYTES
    with pytest.raises(XorbError, match="the limit is"):
        read_xorb(io.BytesIO(body + packed(b"x")))
