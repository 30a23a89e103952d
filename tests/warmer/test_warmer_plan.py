import datetime as dt

import pytest
from hypothesis import given
from hypothesis import strategies as st
from warming import classic_key, mp_key

from hfbucket_plugin.catalog import ChunkEntry
from hfbucket_plugin.errors import ConfigError
from hfbucket_plugin.handle import BucketHandle
from hfbucket_plugin.keys import ClassicKey, MPKey, parse_key
from hfbucket_plugin.transfer import Content
from warmer.plan import SEGMENT_CHUNKS, PlanFile, PlannedChunk, Planner, gone

HANDLE = BucketHandle.parse("hf://buckets/ns/bucket/kv")

texts = st.text(min_size=1)
chunks = st.builds(
    PlannedChunk,
    key=texts,
    path=texts,
    xet_hash=st.text("0123456789abcdef", min_size=64, max_size=64),
    size=st.integers(0, 2**50),
    uploaded_at=st.none() | st.datetimes(timezones=st.just(dt.UTC)),
    gone=st.booleans(),
)


@given(chunks)
def test_a_line_reads_back_as_the_chunk_that_it_was(chunk):
    line = chunk.to_line()
    assert line.endswith("\n")
    assert line.count("\n") == 1
    assert PlannedChunk.from_line(line) == chunk


@pytest.mark.parametrize(
    "line",
    [
        "",
        "[]",
        "{}",
        '{"key": "k", "path": "p", "xet_hash": "h"}',
        '{"key": "k", "path": "p", "xet_hash": "h", "size": -1}',
        '{"key": "k", "path": "p", "xet_hash": "h", "size": true}',
        '{"key": 1, "path": "p", "xet_hash": "h", "size": 1}',
        '{"key": "k", "path": "p", "xet_hash": "h", "size": 1, "uploaded_at": "yesterday"}',
    ],
)
def test_what_is_no_planned_chunk_is_refused(line):
    with pytest.raises(ValueError):
        PlannedChunk.from_line(line)


def numbered(count):
    return [PlannedChunk(classic_key(n), f"kv/é{n}", f"{n:064x}", n) for n in range(count)]


@pytest.mark.parametrize("count", [0, 1, SEGMENT_CHUNKS - 1, SEGMENT_CHUNKS, SEGMENT_CHUNKS + 1, 2 * SEGMENT_CHUNKS])
def test_a_plan_is_read_segment_by_segment(tmp_path, count):
    written = PlanFile.write(tmp_path / "plan.jsonl", iter(numbered(count)))
    for plan in (written, PlanFile.open(tmp_path / "plan.jsonl")):
        assert plan.chunks == count
        assert plan.bytes == sum(range(count))
        segments = [plan.segment(index) for index in range(plan.segments)]
        assert all(0 < len(segment) <= SEGMENT_CHUNKS for segment in segments)
        assert [chunk for segment in segments for chunk in segment] == numbered(count)
        for start in (0, 1, SEGMENT_CHUNKS - 1, SEGMENT_CHUNKS, count):
            assert list(plan.chunks_from(start)) == numbered(count)[start:]


def test_a_plan_that_is_none_is_refused_with_its_line(tmp_path):
    path = tmp_path / "plan.jsonl"
    path.write_text(numbered(1)[0].to_line() + "{}\n")
    with pytest.raises(ConfigError, match="line 2"):
        PlanFile.open(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        PlanFile.open(tmp_path / "none.jsonl")


def entry(key):
    return ChunkEntry(key, parse_key(key), Content("ab" * 32, 10), None)


def test_only_keys_that_the_tier_takes_are_planned_and_the_others_counted():
    keys = [classic_key(1), mp_key(1), mp_key(2), classic_key(2), "test@1@0@0@bfloat16"]
    planner = Planner(HANDLE, ClassicKey)
    planned = list(planner.plan(map(entry, keys)))
    assert [chunk.key for chunk in planned] == [classic_key(1), classic_key(2)]
    assert planner.skipped == {"other_kind": 2, "probe": 1}
    assert [chunk.key for chunk in Planner(HANDLE, MPKey).plan(map(entry, keys))] == [mp_key(1), mp_key(2)]


def test_a_planned_chunk_knows_where_its_object_is():
    (chunk,) = Planner(HANDLE, ClassicKey).plan([entry(classic_key(1, "org/mo del"))])
    assert chunk.path == "kv/org%2Fmo%20del%401%400%401001%40bfloat16"
    assert (chunk.xet_hash, chunk.size, chunk.gone) == ("ab" * 32, 10, False)
    assert gone(chunk).gone


def test_planning_is_streamed():
    def listing():
        yield entry(classic_key(1))
        raise AssertionError("read ahead")

    assert next(Planner(HANDLE, ClassicKey).plan(listing())).key == classic_key(1)
