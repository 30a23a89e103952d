"""A warm-up that begins with what engines read, and one that cannot know it."""

import json
import sys
import tempfile
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from hfbucket_plugin.core.deadline import Deadline
from hfbucket_plugin.core.keys import ClassicKey, encode_name
from hfbucket_plugin.errors import ConfigError
from hfbucket_plugin.index import build as index_build
from hfbucket_plugin.index.access.recorder import Hits
from hfbucket_plugin.index.journal import JournalWriter
from hfbucket_plugin.index.store import POINTER, IndexStore
from hfbucket_plugin.index.table import digests_of
from hfbucket_plugin.tools.selection import ChunkRef, Selection, hottest_first, in_order, newest_first
from tests.support.buckets import INSTANCE, classic_key, content
from warmer import run
from warmer.plan.build import PlanBuilder
from warmer.request.warm_file import validated

SECS = 30.0
NOW = datetime.now(UTC)
KEYS = [classic_key(number) for number in range(5)]


@pytest.fixture
def stocked(warehouse):
    for number, key in enumerate(KEYS):
        warehouse.put({key: content(number, 100)})
    return warehouse


def build(warehouse, **hits):
    """Have the index know hits: `k3=7` are seven of the chunk 3."""
    bucket = warehouse.open()
    store = IndexStore(bucket, "builder")
    if hits:
        journal = JournalWriter(100, 100, hits=True)
        named = [(encode_name(KEYS[int(name[1:])]), number) for name, number in hits.items()]
        journal.tell([Hits(digests_of([name]).tobytes(), n, time.monotonic()) for name, n in named], time.time() - 400)
        draft = journal.draft(time.monotonic())
        store.put_journal(draft.name.text, draft.data, None, Deadline.after(SECS))
    with tempfile.TemporaryDirectory() as directory:
        built = index_build.from_listing(bucket, Path(directory), SECS, store=store)
        pointer = index_build.publish(store, built, Deadline.after(SECS))
    return store, pointer


def chosen(warehouse, tmp_path, **given):
    choosing = PlanBuilder(Selection(all=True, **given), ClassicKey, NOW)
    return [chunk.key for chunk in choosing.planned(warehouse.open(), tmp_path / "scratch")], choosing


def test_the_hottest_come_first_and_a_budget_takes_them(stocked, tmp_path):
    build(stocked, k1=90, k3=2000, k0=1)

    keys, choosing = chosen(stocked, tmp_path, hottest=3)
    assert (keys, choosing.cold) == ([KEYS[3], KEYS[1], KEYS[0]], "")
    assert chosen(stocked, tmp_path, max_bytes=250)[0] == [KEYS[3], KEYS[1]]
    assert chosen(stocked, tmp_path, hottest=5)[0][3:] == [KEYS[4], KEYS[2]]  # never read: the newest
    newest, choosing = chosen(stocked, tmp_path, newest=2, max_bytes=250)
    assert (newest, choosing.cold) == ([KEYS[4], KEYS[3]], "")


@pytest.mark.parametrize("what", ["no index", "no hits", "garbage", "stale"])
def test_where_heat_is_not_known_the_newest_come_first_and_the_log_says_why(stocked, tmp_path, what, caplog):
    caplog.set_level("INFO", "warmer")
    if what != "no index":
        store, pointer = build(stocked, **({} if what == "no hits" else {"k0": 9}))
        if what == "stale":
            store.publish(replace(pointer, covers=time.time() - 2 * 86400), Deadline.after(SECS))
    if what == "garbage":
        from huggingface_hub import HfApi

        api = HfApi(endpoint=stocked.endpoint, token=False)
        api.batch_bucket_files(stocked.bucket_id, add=[(b"garbage", f"{stocked.prefix}/{POINTER}")])

    keys, choosing = chosen(stocked, tmp_path, hottest=2)

    assert keys == [KEYS[4], KEYS[3]]
    assert choosing.cold
    assert f"the newest chunks come first, not those that are read most: {choosing.cold[:60]}" in caplog.text


@pytest.mark.parametrize(
    ("given", "by"), [({"hottest": 2}, "newest"), ({"max_bytes": 250}, "newest"), ({"newest": 2}, None)]
)
def test_a_plan_says_by_what_it_goes(stocked, tmp_path, given, by):
    source = {"lmcache_config": str(stocked.config), "instance": INSTANCE}
    wanted = validated({"source": source, "choose": {"all": True} | given, "tiers": ["fs.warm"]}, None)
    header = run.plan(wanted, tmp_path / "plan")
    assert header.get("order", {}).get("by") == by
    assert json.loads((tmp_path / "plan").read_text().splitlines()[0]).get("order") == header.get("order")


@pytest.mark.parametrize("other", [{"newest": 1}, {"prompts": "p"}])
def test_two_orders_contradict_each_other(other):
    with pytest.raises(ConfigError, match="hottest"):
        validated({"choose": {"all": True, "hottest": 1} | other}, None)


def test_an_order_of_heat_use_and_age(tmp_path):
    def chunk(name, heat=None, hit=None, put=None):
        at = [None if hours is None else NOW - timedelta(hours=hours) for hours in (put, hit)]
        return ChunkRef(name, name, "ab" * 32, 1, at[0], heat=heat, last_hit=at[1])

    ordered = [
        chunk("hot", 5, 100, 300), chunk("later", 3, 1, 300), chunk("earlier", 3, 2, 300), chunk("put", 0, None, 3),
        chunk("read", 0, 4, 300), chunk("newer", None, None, 5), chunk("older", None, None, 6), chunk("unknown"),
    ]  # fmt: skip
    assert list(in_order(reversed(ordered), hottest_first, tmp_path / "it", page_rows=2)) == ordered
    cold = [one for one in ordered if one.heat is None]
    assert sorted(cold, key=hottest_first) == sorted(cold, key=newest_first)
    assert sys.getsizeof(hottest_first(ordered[0])) < 100
