import datetime as dt
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from warming import classic_key, mp_key

from hfbucket_plugin.catalog import ChunkEntry
from hfbucket_plugin.content import Content
from hfbucket_plugin.errors import ConfigError
from hfbucket_plugin.handle import BucketHandle
from hfbucket_plugin.keys import ClassicKey, MPKey, parse_key
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
    worker=st.none() | st.integers(0, 255),
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
        '{"key": "k", "path": "p", "xet_hash": "h", "size": 1, "worker": "0"}',
        '{"key": "k", "path": "p", "xet_hash": "h", "size": 1, "worker": -1}',
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


headers = st.dictionaries(st.text(max_size=5).filter(lambda name: name != "warmer_plan"), st.text() | st.integers())


@given(headers, st.lists(chunks, max_size=5))
def test_a_plan_reads_back_with_its_header(tmp_path_factory, header, planned):
    path = tmp_path_factory.getbasetemp() / "plan.jsonl"
    written = PlanFile.write(path, planned, lambda plan: {**header, "chunks": plan.chunks})
    read = PlanFile.open(path)
    assert read.header == written.header == {**header, "chunks": len(planned)}
    assert (read.chunks, read.bytes, read.shares) == (written.chunks, written.bytes, written.shares)
    assert [chunk for index in range(read.segments) for chunk in read.segment(index)] == planned
    first = json.loads(path.read_text().splitlines()[0])
    assert first["warmer_plan"] == 1  # a line of JSON like the others, for other tools


def test_a_plan_of_a_newer_warmer_is_refused(tmp_path):
    path = tmp_path / "plan.jsonl"
    for header, said in (
        ('{"warmer_plan": 2}', "newer"),
        ('{"warmer_plan": "x"}', "no header"),
        ('{"warmer_plan":', "1:"),
    ):
        path.write_text(f"{header}\n{numbered(1)[0].to_line()}")
        with pytest.raises(ConfigError, match=said):
            PlanFile.open(path)


def test_a_header_that_grows_too_much_is_an_error_and_no_plan(tmp_path):
    with pytest.raises(ValueError, match="grew"):
        PlanFile.write(tmp_path / "plan", numbered(3), lambda plan: {"x": "y" * 1000 * plan.chunks})


@given(st.lists(chunks, max_size=20), st.none() | st.frozensets(st.integers(0, 4)))
def test_a_share_is_what_workers_are_to_hold(tmp_path_factory, planned, ranks):
    planned = [replace(chunk, worker=chunk.worker if chunk.worker is None else chunk.worker % 6) for chunk in planned]
    plan = PlanFile.write(tmp_path_factory.getbasetemp() / "plan.jsonl", planned)
    own = [chunk for chunk in planned if ranks is None or chunk.worker is None or chunk.worker in ranks]
    assert plan.share(ranks) == (len(own), sum(chunk.size for chunk in own))


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
