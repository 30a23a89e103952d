import io

import pytest

from localhub.formats.shards import ShardError, check_shard, parse_shard
from localhub.formats.xorbs import read_xorb
from tests.support.hubs import END, TAG, make_shard, make_xorb

CHUNKS = [b"one", b"two!", b"three"]
BODY, XORB = make_xorb(CHUNKS)


def check(shard: bytes) -> None:
    stored = read_xorb(io.BytesIO(BODY))
    check_shard(*parse_shard(shard), {XORB: (stored.table, stored.hashes)}.get)


def test_the_records_of_a_shard():
    shard, digest = make_shard(XORB, CHUNKS)
    files, xorbs = parse_shard(shard)
    assert [(file.digest, file.size) for file in files] == [(digest, 12)]
    assert [(xorb.digest, [size for _, size in xorb.chunks]) for xorb in xorbs] == [(XORB, [3, 4, 5])]
    check(shard)


def test_an_empty_shard_is_valid():
    assert parse_shard(TAG + bytes(16) + (END + bytes(16)) * 2) == ([], [])


def test_verification_and_metadata_entries_are_skipped():
    shard, digest = make_shard(XORB, CHUNKS)
    flagged = shard[:80] + (3 << 30).to_bytes(4, "little") + shard[84:144] + bytes(96) + shard[144:]
    files, xorbs = parse_shard(flagged)
    assert ([file.digest for file in files], len(xorbs)) == ([digest], 1)


@pytest.mark.parametrize(
    ("shard", "complaint"),
    [
        (b"", "the tag is missing"),
        (b"not a shard at all, whatever it is", "the tag is missing"),
        (TAG + bytes(16), "ends before its lists end"),
        (TAG + bytes(16) + END + bytes(16), "ends before its lists end"),
        (make_shard(XORB, CHUNKS)[0][:140], "ends inside a block"),
        (make_shard(bytes(32), CHUNKS)[0], "0000000000000000, which is not stored on this Hub"),
        (make_shard(bytes(32), CHUNKS, with_xorb=False)[0], "which is not stored on this Hub"),
        (make_shard(XORB, CHUNKS, terms=[(12, 0, 4)])[0], "names chunks 0 to 4 of the xorb"),
        (make_shard(XORB, CHUNKS, terms=[(0, 1, 1)])[0], "names chunks 1 to 1 of the xorb"),
        (make_shard(XORB, CHUNKS, terms=[(13, 0, 3)])[0], "has 13 bytes for chunks 0 to 3"),
        (make_shard(XORB, CHUNKS, digest=b"x" * 32)[0], "the chunks of the file"),
        (make_shard(XORB, CHUNKS[::-1], digest=make_shard(XORB, CHUNKS)[1])[0], "differ from the stored ones"),
    ],
)
def test_invalid_shards_are_refused(shard, complaint):
    with pytest.raises(ShardError, match=complaint):
        check(shard)
