import logging
import threading
from dataclasses import replace

import pytest
from huggingface_hub import HfApi

from hfbucket_plugin.errors import AccessDeniedError
from hfbucket_plugin.hub.listing import list_chunks
from hfbucket_plugin.tools.signals import ShutdownSignal
from localhub.faults import Fault
from tests.support import buckets
from tests.support.buckets import KEY_PREFIX, Warehouse, classic_key, content
from warmer.plan.plan_file import SEGMENT_CHUNKS, WarmPlanFile
from warmer.plan.refresh import RefreshedPlan, RefreshLookups


@pytest.fixture
def stocked(warehouse):
    warehouse.put({classic_key(n): content(n, 100) for n in range(5)})
    return warehouse


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

    monkeypatch.setattr(buckets, "list_chunks", denied_after_the_first_page)
    with pytest.raises(AccessDeniedError):
        stocked.plan()


def test_deleted_and_rewritten_chunks_are_told_just_before_they_are_copied(stocked):
    bucket, before = stocked.open(), stocked.plan()
    stocked.delete(classic_key(0))
    stocked.put({classic_key(1): b"rewritten"})
    after = RefreshLookups(bucket, ShutdownSignal()).look_up(before)
    assert after[0] == replace(before[0], gone=True)
    assert after[1].size == len(b"rewritten")
    assert after[1].xet_hash != before[1].xet_hash
    assert after[2:] == before[2:]


def test_a_lookup_that_fails_changes_nothing_and_says_so(hub, stocked, caplog):
    before, now = stocked.plan(), [0.0]
    lookups = RefreshLookups(stocked.open(), ShutdownSignal(), clock=lambda: now[0])
    number = hub.control.add_fault(Fault(route="paths-info", status=500))
    with caplog.at_level(logging.WARNING):
        assert lookups.look_up(before) == before
    assert "copied as they were listed" in caplog.text
    asked = hub.control.hits(number)
    now[0] = 29.0
    assert lookups.look_up(before) == before
    assert hub.control.hits(number) == asked  # it is left alone for half a minute
    now[0] = 31.0
    hub.control.clear_faults()
    stocked.delete(classic_key(0))
    assert lookups.look_up(before)[0] == replace(before[0], gone=True)


class Stopping:
    """Is told to stop after it has been asked some times."""

    def __init__(self, asked):
        self._left = asked

    @property
    def requested(self):
        self._left -= 1
        return self._left < 0


def test_told_to_stop_while_the_hub_hangs_nobody_waits_for_it(stocked, caplog):
    hangs = threading.Event()

    class Bucket:
        def stat(self, paths, deadline):
            asked.append(1)
            hangs.wait(60)

    asked, before = [], stocked.plan()
    lookups = RefreshLookups(Bucket(), Stopping(3), clock=lambda: 0.0)
    assert [lookups.look_up(before) for _ in range(8)] == [before] * 8
    assert asked == [1]
    assert caplog.text == ""
    hangs.set()


def test_a_lookup_that_never_ends_is_given_up(stocked, caplog):
    hangs, times = threading.Event(), iter(range(0, 1000, 10))

    class Bucket:
        def stat(self, paths, deadline):
            hangs.wait(60)

    before = stocked.plan()
    with caplog.at_level(logging.WARNING):
        assert RefreshLookups(Bucket(), ShutdownSignal(), clock=lambda: next(times)).look_up(before) == before
    assert "no answer" in caplog.text
    hangs.set()


def test_nodes_that_keep_pace_share_one_lookup(stocked, tmp_path):
    listed = stocked.plan(KEY_PREFIX)
    many = [listed[n % 5] for n in range(2 * SEGMENT_CHUNKS + 1)]
    plan = WarmPlanFile.write(tmp_path / "plan.jsonl", many)
    lookups = []
    fresh = RefreshedPlan(plan, lambda chunks: lookups.append(len(chunks)) or chunks)
    assert [list(fresh.chunks()), list(fresh.chunks())] == [many, many]
    assert lookups == [SEGMENT_CHUNKS, SEGMENT_CHUNKS, 1]


def test_few_segments_are_kept(stocked, tmp_path):
    plan = WarmPlanFile.write(tmp_path / "plan.jsonl", stocked.plan() * 8000)
    fresh = RefreshedPlan(plan, lambda chunks: chunks)
    for _ in fresh.chunks():
        assert len(fresh._segments) <= 16
