"""Choices carried out on a bucket."""

from datetime import UTC, datetime, timedelta

import pytest

from hfbucket_plugin.core.keys import ClassicKey, MPKey
from hfbucket_plugin.tools.prompts import Prompt, PromptOrder
from hfbucket_plugin.tools.selection import Selection
from tests.support.buckets import MODEL, classic_key, content, mp_key
from warmer.plan.build import PlanBuilder

NOW = datetime.now(UTC) + timedelta(seconds=5)


@pytest.fixture
def stocked(warehouse):
    warehouse.put({classic_key(n): content(n, 100) for n in range(5)})
    warehouse.put({f"{MODEL}@2@{worker}@{worker:x}{n:x}@half": b"tp" for worker in range(2) for n in range(3)})
    warehouse.put({mp_key(n): b"mp" for n in range(2)})
    warehouse.put({classic_key(7, "org/other"): b"other", "test@1@0@0@bfloat16": b"probe"})
    return warehouse


@pytest.fixture
def choose(stocked, tmp_path):
    def run(takes=ClassicKey, prompts=None, **given):
        choosing = PlanBuilder(Selection(**given), takes, NOW, prompts)
        return [chunk.key for chunk in choosing.planned(stocked.open(), tmp_path / "scratch")], choosing

    return run


def test_everything_of_one_kind(stocked, choose):
    keys, choosing = choose(all=True)
    assert keys == sorted(key for key in stocked.chunks if key.count("@") > 3 and not key.startswith("test@"))
    assert choosing.skipped == {"other_kind": 2, "probe": 1}
    assert choose(takes=MPKey, all=True)[0] == [mp_key(0), mp_key(1)]


def test_readable_forms_are_asked_of_the_server(hub, choose):
    keys, choosing = choose(model=MODEL, world_size=2, workers="1")
    assert keys == [f"{MODEL}@2@1@1{n}@half" for n in range(3)]
    assert choosing.skipped == {}  # nothing else was listed
    assert choose(takes=MPKey, model=MODEL, world_size=1, workers="0")[0] == [mp_key(0), mp_key(1)]


def test_filters_count_what_they_pass_by(choose):
    keys, choosing = choose(all=True, include="*@half", exclude="*@2@0@*")
    assert keys == [f"{MODEL}@2@1@1{n}@half" for n in range(3)]
    assert choosing.skipped["not_chosen"] == 12


def test_the_newest(choose):
    newest, _ = choose(all=True, newest=3)
    assert len(newest) == 3
    assert newest[0] == classic_key(7, "org/other")  # the last that was put; those of the other kind cost no budget
    assert choose(all=True, max_bytes=5 + 2)[0] == newest[:2]
    assert choose(all=True, max_bytes=3)[0] == []


def test_keys_of_a_file_in_its_order(choose, tmp_path):
    wanted = [classic_key(4), mp_key(1), classic_key(99), classic_key(0)]
    (tmp_path / "keys").write_text("\n".join(wanted))
    keys, choosing = choose(keys_from=tmp_path / "keys")
    assert keys == [classic_key(4), classic_key(0)]
    assert choosing.skipped == {"other_kind": 1, "not_in_bucket": 1}
    assert choose(keys_from=tmp_path / "keys", prefix=classic_key(0))[0] == [classic_key(0)]


def test_chunks_of_prompts_in_their_order_and_within_a_budget(choose):
    hashes = [f"{n + 0x1000:x}" for n in (3, 1, 99, 4)]
    order = PromptOrder([Prompt([1], MODEL)], lambda _: hashes)
    keys, choosing = choose(prompts=order, all=True)
    assert keys == [classic_key(n) for n in (3, 1, 4)]
    assert choosing.listed(ClassicKey) == [f"{MODEL}@"]
    assert choose(prompts=order, all=True, max_bytes=250)[0] == [classic_key(n) for n in (3, 1)]


@pytest.mark.parametrize(
    ("takes", "given", "found"),
    [
        (MPKey, {"prefix": f"{MODEL}@1@"}, True),
        (MPKey, {"model": MODEL, "world_size": 2, "workers": "1"}, True),
        (MPKey, {"model": MODEL, "world_size": 2, "workers": "1", "exclude": "*"}, False),
        (ClassicKey, {"model": MODEL, "world_size": 1, "exclude": "*@bfloat16"}, True),
        (ClassicKey, {"model": "org/third"}, False),
    ],
)
def test_when_nothing_fits_the_other_kind_is_looked_for(choose, stocked, takes, given, found):
    keys, choosing = choose(takes=takes, **given)
    assert keys == []
    assert choosing.other_kind_found(stocked.open()) is found


def test_a_worker_of_one_is_read_by_all(stocked, tmp_path):
    def workers(**given):
        choosing = PlanBuilder(Selection(**given), ClassicKey, NOW)
        return {chunk.worker for chunk in choosing.planned(stocked.open(), tmp_path / "scratch")}

    assert workers(model=MODEL, world_size=1) == {None}
    assert workers(model=MODEL, world_size=2) == {0, 1}
