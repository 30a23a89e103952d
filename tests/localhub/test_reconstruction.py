import io
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localhub.formats.hashing import to_hex
from localhub.formats.reconstruction import MissingXorbError, describe, describe_v2, pieces
from localhub.formats.shards import _TERM
from localhub.formats.xorbs import ChunkTable, iter_chunks, read_xorb
from tests.support.hubs import make_xorb


@st.composite
def files(draw):
    """Some xorbs; what holds a range of a file made of runs of their chunks; the file, and the range."""
    xorbs = []
    for number in range(draw(st.integers(1, 3))):
        sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=8))
        xorbs.append([bytes([number * 50 + at]) * size for at, size in enumerate(sizes)])
    runs = []
    for _ in range(draw(st.integers(1, 5))):
        number = draw(st.integers(0, len(xorbs) - 1))
        first = draw(st.integers(0, len(xorbs[number]) - 1))
        runs.append((number, first, draw(st.integers(first + 1, len(xorbs[number])))))
    parts = [b"".join(xorbs[number][first:end]) for number, first, end in runs]
    content = b"".join(parts)
    start = draw(st.integers(0, len(content) - 1))
    stop = draw(st.integers(start + 1, len(content)))
    packed = [make_xorb(chunks) for chunks in xorbs]
    tables = {digest: read_xorb(io.BytesIO(body)).table for body, digest in packed}
    terms = b"".join(
        _TERM.pack(packed[number][1], 0, len(part), first, end)
        for (number, first, end), part in zip(runs, parts, strict=True)
    )
    return packed, list(pieces(terms, start, stop, tables.get)), content, start, stop


@given(files())
def test_a_client_that_follows_the_answer_gets_the_bytes_and_no_chunk_too_many(drawn):
    packed, found, content, start, stop = drawn
    answer = describe(found, to_hex)

    fetched: dict[tuple[str, int], bytes] = {}
    for body, digest in packed:
        for fetch in answer["fetch_info"].get(to_hex(digest), []):
            part = body[fetch["url_range"]["start"] : fetch["url_range"]["end"] + 1]
            for at, (chunk, _) in enumerate(iter_chunks(io.BytesIO(part)), fetch["range"]["start"]):
                fetched[fetch["url"], at] = bytes(chunk)
            assert at + 1 == fetch["range"]["end"]
    data = b""
    for term in answer["terms"]:
        run = b"".join(fetched[term["hash"], at] for at in range(term["range"]["start"], term["range"]["end"]))
        assert len(run) == term["unpacked_length"]
        data += run
    offset = answer["offset_into_first_range"]
    assert data[offset : offset + stop - start] == content[start:stop]
    # Whole chunks only at the two ends.
    assert offset < 40
    assert len(data) - offset - (stop - start) < 40


@given(files())
def test_both_versions_hold_the_same(drawn):
    found = drawn[1]
    one, two = describe(found, to_hex), describe_v2(found, to_hex)
    translated = {
        xorb: [
            {"range": part["chunks"], "url": fetch["url"], "url_range": part["bytes"]}
            for fetch in fetches
            for part in fetch["ranges"]
        ]
        for xorb, fetches in two.pop("xorbs").items()
    }
    assert {**two, "fetch_info": translated} == one


def test_no_bytes_need_no_chunks():
    assert describe([], to_hex) == {"offset_into_first_range": 0, "terms": [], "fetch_info": {}}


def test_adjacent_runs_of_one_xorb_are_fetched_once():
    table = ChunkTable(array("I", [10, 20, 30, 40, 50]), array("I", [1, 2, 3, 4, 5]))
    xorb = bytes(32)
    terms = b"".join(_TERM.pack(xorb, 0, end - first, first, end) for first, end in [(0, 2), (1, 3), (4, 5)])
    answer = describe(list(pieces(terms, 0, 5, {xorb: table}.get)), to_hex)
    ranges = [
        (one["range"]["start"], one["range"]["end"], one["url_range"]) for one in answer["fetch_info"][to_hex(xorb)]
    ]
    assert ranges == [(0, 3, {"start": 0, "end": 29}), (4, 5, {"start": 40, "end": 49})]


def test_a_missing_xorb_is_noticed():
    with pytest.raises(MissingXorbError):
        list(pieces(_TERM.pack(bytes(32), 0, 1, 0, 1), 0, 1, lambda _digest: None))
