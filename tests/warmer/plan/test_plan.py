import datetime as dt
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfbucket_plugin.core.keys import BucketHandle, ClassicKey, ContentId, MPKey, encode_name, parse_key
from hfbucket_plugin.errors import ConfigError, RefusedError
from hfbucket_plugin.hub.listing import ChunkEntry
from hfbucket_plugin.tools.selection import ChunkRef
from tests.support.buckets import classic_key, mp_key
from warmer.plan.plan_file import SEGMENT_CHUNKS, Planner, WarmPlanFile

HANDLE = KV = BucketHandle.parse("hf://buckets/ns/bucket/kv")

keys = st.builds(
    lambda model, number: f"{model}@1@0@{number:x}@bfloat16",
    st.text(st.characters(blacklist_characters="@", blacklist_categories=("Cs",)), min_size=1),
    st.integers(1, 2**64 - 1),
)
texts = st.text(min_size=1)
lone = st.builds(
    ChunkRef,
    key=keys,
    path=st.just(""),
    xet_hash=st.text("0123456789abcdef", min_size=64, max_size=64),
    size=st.integers(0, 2**50),
    uploaded_at=st.none() | st.datetimes(timezones=st.just(dt.UTC)),
    gone=st.booleans(),
    worker=st.none() | st.integers(0, 255),
    heat=st.none() | st.integers(0, 2**40),
    last_hit=st.none() | st.datetimes(timezones=st.just(dt.UTC)),
)
chunks = lone.map(lambda chunk: replace(chunk, path=HANDLE.join(encode_name(chunk.key))))


@given(chunks)
def test_a_line_reads_back_as_the_chunk_that_it_was(chunk):
    line = chunk.to_line()
    assert line.endswith("\n")
    assert line.count("\n") == 1
    assert ChunkRef.from_line(line) == chunk


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
        *(
            json.dumps({"key": "k", "path": "p", "xet_hash": "ab" * 32, "size": 1} | wrong)
            for wrong in (
                {"xet_hash": "../etc/passwd"},
                {"xet_hash": "AB" * 32},
                {"size": 2**63},
                {"size": 1.0},
                {"uploaded_at": 1700000000},
                {"uploaded_at": ["2026-01-01T00:00:00+00:00"]},
                {"uploaded_at": "2026-01-01T00:00:00"},
                {"last_hit": []},
                {"last_hit": {"at": 1}},
                {"heat": "hot"},
                {"heat": -1},
                {"gone": 1},
                {"worker": 10**400},
            )
        ),
    ],
)
def test_what_is_no_planned_chunk_is_refused(line):
    with pytest.raises(ValueError):
        ChunkRef.from_line(line)


def numbered(count):
    keys = [classic_key(n, "org/é") for n in range(count)]
    return [ChunkRef(key, f"kv/{encode_name(key)}", f"{n:064x}", n) for n, key in enumerate(keys)]


def written(path, count=3, **header):
    return WarmPlanFile.write(
        path, numbered(count), lambda plan: {"bucket": str(KV), "selected": plan.chunks, **header}
    )


@pytest.mark.parametrize("count", [0, 1, SEGMENT_CHUNKS - 1, SEGMENT_CHUNKS, SEGMENT_CHUNKS + 1, 2 * SEGMENT_CHUNKS])
def test_a_plan_is_read_segment_by_segment(tmp_path, count):
    written = WarmPlanFile.write(tmp_path / "plan.jsonl", iter(numbered(count)))
    for plan in (written, WarmPlanFile.open(tmp_path / "plan.jsonl")):
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
        WarmPlanFile.open(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        WarmPlanFile.open(tmp_path / "none.jsonl")


headers = st.dictionaries(st.text(max_size=3), st.text() | st.integers())


@given(headers, st.lists(chunks, max_size=5))
def test_a_plan_reads_back_with_its_header(tmp_path_factory, header, planned):
    path = tmp_path_factory.getbasetemp() / "plan.jsonl"
    written = WarmPlanFile.write(path, planned, lambda plan: {**header, "chunks": plan.chunks})
    read = WarmPlanFile.open(path)
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
            WarmPlanFile.open(path)


@pytest.mark.parametrize("which", ["first", "second", "without a header"])
@pytest.mark.parametrize("home", ["kv", "kv/us", ""])
def test_a_line_that_names_another_object_than_that_of_its_key_is_refused(tmp_path, which, home):
    path = tmp_path / "plan.jsonl"
    chunks = numbered(3)
    for number in range(3):
        chunks[number] = replace(chunks[number], path=f"{home}/{encode_name(chunks[number].key)}".lstrip("/"))
    wrong = 0 if which == "first" else 1
    chunks[wrong] = replace(chunks[wrong], path=chunks[2].path)
    bucket = f"hf://buckets/ns/bucket/{home}"
    WarmPlanFile.write(path, chunks, None if which == "without a header" else lambda _: {"bucket": bucket})
    line = wrong + (1 if which == "without a header" else 2)
    with pytest.raises(RefusedError, match=f"line {line}: path .* is not that of the key"):
        WarmPlanFile.open(path)


def test_a_line_of_another_place_in_the_bucket_is_refused(tmp_path):
    path = tmp_path / "plan.jsonl"
    elsewhere = numbered(3)
    elsewhere[2] = replace(elsewhere[2], path=elsewhere[2].path.replace("kv/", "other/"))
    WarmPlanFile.write(path, elsewhere)
    with pytest.raises(RefusedError, match="line 3"):
        WarmPlanFile.open(path)


@pytest.mark.parametrize("key", ["not a key", "org/m@1@0@zz@bfloat16", "org/m\ud800@1@0@1001@bfloat16"])
def test_a_line_whose_key_is_not_one_is_an_error_with_its_line(tmp_path, key):
    path = tmp_path / "plan.jsonl"
    path.write_text(json.dumps({"key": key, "path": f"kv/{key}", "xet_hash": "ab" * 32, "size": 1}) + "\n")
    with pytest.raises(ConfigError, match="line 1") as refused:
        WarmPlanFile.open(path)
    str(refused.value).encode()


@pytest.mark.parametrize(
    "wrong",
    [
        {"takes": ["mp"]},
        {"tiers": "fs.warm"},
        {"tiers": [1]},
        {"bucket": 1},
        {"bucket": "nonsense"},
        {"warm_up": []},
        {"skipped": [1]},
        {"skipped": {"probe": "1"}},
        {"selected": "3"},
        {"prompts_file": {"path": 1}},
        {"instance": "\ud800"},
    ],
)
def test_a_header_with_a_wrong_type_is_an_error(tmp_path, wrong):
    path = tmp_path / "plan.jsonl"
    written(path, **{"takes": "classic", **wrong})
    with pytest.raises(ConfigError, match="line 1"):
        WarmPlanFile.open(path)


@pytest.mark.parametrize("name", ["report", "report_html"])
def test_a_header_that_names_files_to_write_is_refused(tmp_path, name):
    path = tmp_path / "plan.jsonl"
    written(path, warm_up={name: "/etc/passwd"})
    with pytest.raises(RefusedError, match=f"line 1: warm_up of the header has {name}"):
        WarmPlanFile.open(path)


def test_a_plan_that_others_may_have_written_is_refused_where_it_is_to_be_applied(tmp_path):
    path = tmp_path / "plan.jsonl"
    written(path)
    for mode in (0o600, 0o644):
        path.chmod(mode)
        assert WarmPlanFile.open(path, ours=True).chunks == 3
    for mode in (0o666, 0o620):
        path.chmod(mode)
        with pytest.raises(RefusedError, match="install -m 600"):
            WarmPlanFile.open(path, ours=True)
        assert WarmPlanFile.open(path).chunks == 3


def test_a_plan_is_read_as_it_was_whatever_takes_its_place(tmp_path):
    path, other = tmp_path / "plan.jsonl", tmp_path / "other"
    written(path, 2 * SEGMENT_CHUNKS)
    opened = WarmPlanFile.open(path)
    written(other, 5)
    other.replace(path)
    assert list(opened.chunks_from(0)) == numbered(2 * SEGMENT_CHUNKS)


@pytest.mark.parametrize("how", ["changed", "shorter", "emptied"])
@pytest.mark.parametrize("by", [WarmPlanFile.open, None])
def test_a_plan_that_is_changed_where_it_lies_is_not_read_on(tmp_path, how, by):
    path = tmp_path / "plan.jsonl"
    plan = written(path, 2 * SEGMENT_CHUNKS)
    if by is not None:
        plan = by(path)
    first = plan.segment(0)
    whole = path.read_bytes()
    if how == "changed":
        path.write_bytes(whole[:-200] + whole[-200:].replace(b"0", b"1"))
    else:
        path.write_bytes(whole[:-100] if how == "shorter" else b"")
    with pytest.raises(RefusedError, match="was changed after it was checked"):
        plan.segment(1)
    if how != "emptied":
        assert plan.segment(0) == first


def test_what_is_not_a_regular_file_is_not_opened(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path in (fifo, Path("/dev/zero"), tmp_path):
        with pytest.raises(ConfigError, match="cannot be read"):
            WarmPlanFile.open(path)


def test_a_line_without_an_end_is_not_read_to_its_end(tmp_path):
    path = tmp_path / "plan.jsonl"
    with path.open("wb") as file:
        file.write(numbered(1)[0].to_line().encode())
        file.truncate(1 << 40)
    with pytest.raises(ConfigError, match="line 1: the line after it is longer than"):
        WarmPlanFile.open(path)


def test_a_header_that_grows_too_much_is_an_error_and_no_plan(tmp_path):
    with pytest.raises(ValueError, match="grew"):
        WarmPlanFile.write(tmp_path / "plan", numbered(3), lambda plan: {"x": "y" * 1000 * plan.chunks})


@given(st.lists(chunks, max_size=20), st.none() | st.frozensets(st.integers(0, 4)))
def test_a_share_is_what_workers_are_to_hold(tmp_path_factory, planned, ranks):
    planned = [replace(chunk, worker=chunk.worker if chunk.worker is None else chunk.worker % 6) for chunk in planned]
    plan = WarmPlanFile.write(tmp_path_factory.getbasetemp() / "plan.jsonl", planned)
    own = [chunk for chunk in planned if ranks is None or chunk.worker is None or chunk.worker in ranks]
    assert plan.share(ranks) == (len(own), sum(chunk.size for chunk in own))


def entry(key):
    return ChunkEntry(key, parse_key(key), ContentId("ab" * 32, 10), None)


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
    assert replace(chunk, gone=True).gone


def test_planning_is_streamed():
    def listing():
        yield entry(classic_key(1))
        raise AssertionError("read ahead")

    assert next(Planner(HANDLE, ClassicKey).plan(listing())).key == classic_key(1)
