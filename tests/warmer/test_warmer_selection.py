import logging

import pytest
from huggingface_hub import HfApi
from warming import PREFIX, Warehouse, classic_key, content, mp_key

from hfbucket_plugin.catalog import list_chunks
from hfbucket_plugin.errors import AccessDeniedError
from hfbucket_plugin.keys import ClassicKey
from localhub.faults import Fault
from warmer import selection
from warmer.plan import SEGMENT_CHUNKS, PlanFile, gone
from warmer.selection import FreshPlan, select


@pytest.fixture
def stocked(warehouse):
    warehouse.put({classic_key(n): content(n, 100) for n in range(5)})
    return warehouse


def test_a_selection_is_listed_into_a_plan_and_the_rest_counted(stocked, tmp_path):
    stocked.put({mp_key(1): b"mp"})
    plan, skipped = select(stocked.open(), ["org/"], ClassicKey, tmp_path / "plan.jsonl")
    assert [chunk.key for chunk in plan.segment(0)] == sorted(classic_key(n) for n in range(5))
    assert plan.bytes == 500
    assert skipped == {"other_kind": 1}
    assert all(chunk.uploaded_at is not None for chunk in plan.segment(0))


def test_a_listing_that_breaks_off_is_no_selection(hub_factory, tmp_path, monkeypatch):
    hub = hub_factory(page_size=2, faults=True)
    HfApi(endpoint=hub.endpoint, token=False).create_bucket("org/kv")
    stocked = Warehouse(hub.endpoint, "org/kv", tmp_path)
    stocked.put({classic_key(n): content(n, 100) for n in range(5)})

    def denied_after_the_first_page(*arguments):
        entries = list_chunks(*arguments)
        yield next(entries)
        hub.control.add_fault(Fault(route="tree", status=403))
        yield from entries

    monkeypatch.setattr(selection, "list_chunks", denied_after_the_first_page)
    with pytest.raises(AccessDeniedError):
        stocked.plan()


def test_deleted_and_rewritten_chunks_are_told_just_before_they_are_copied(stocked):
    bucket, before = stocked.open(), stocked.plan()
    stocked.delete(classic_key(0))
    stocked.put({classic_key(1): b"written anew"})
    after = selection.look_up(bucket, before)
    assert after[0] == gone(before[0])
    assert after[1].size == len(b"written anew")
    assert after[1].xet_hash != before[1].xet_hash
    assert after[2:] == before[2:]


def test_a_lookup_that_fails_changes_nothing_and_says_so(hub, stocked, caplog):
    bucket, before = stocked.open(), stocked.plan()
    hub.control.add_fault(Fault(route="paths-info", status=500))
    with caplog.at_level(logging.WARNING):
        assert selection.look_up(bucket, before) == before
    assert "copied as they were listed" in caplog.text


def test_nodes_that_keep_pace_share_one_lookup(stocked, tmp_path, monkeypatch):
    listed = stocked.plan(PREFIX)
    many = [listed[n % 5] for n in range(2 * SEGMENT_CHUNKS + 1)]
    plan = PlanFile.write(tmp_path / "plan.jsonl", many)
    lookups = []
    monkeypatch.setattr(selection, "look_up", lambda _bucket, chunks: lookups.append(len(chunks)) or chunks)
    fresh = FreshPlan(plan, stocked.open())
    assert [list(fresh.chunks()), list(fresh.chunks())] == [many, many]
    assert lookups == [SEGMENT_CHUNKS, SEGMENT_CHUNKS, 1]


def test_few_segments_are_kept(stocked, tmp_path, monkeypatch):
    plan = PlanFile.write(tmp_path / "plan.jsonl", stocked.plan() * 8000)
    monkeypatch.setattr(selection, "look_up", lambda _bucket, chunks: chunks)
    fresh = FreshPlan(plan, stocked.open())
    for _ in fresh.chunks():
        assert len(fresh._segments) <= 16
