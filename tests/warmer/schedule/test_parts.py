"""Nodes that take different chunks: each part of a plan is fetched once, and goes on at the pace of its own nodes."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfbucket_plugin.tools.selection import ChunkRef
from tests.support.simulated_fleet import MIB, begin, carry_out, keys, part, plan, play
from warmer.cluster.placement import Assignment, parts_of
from warmer.cluster.ray import Node
from warmer.plan.plan_file import SEGMENT_CHUNKS, PlanPart, WarmPlanFile
from warmer.plan.refresh import RefreshedPlan
from warmer.schedule.cohort import PlanSection
from warmer.schedule.tasks import FetchTask, ReceiveTask, TaskLimits


def had(tasks, name):
    return keys(tasks, FetchTask, name) + keys(tasks, ReceiveTask, name)


def test_only_those_that_are_to_have_a_chunk_take_part_in_it():
    chunks = plan([10] * 9)
    parts = [part(chunks[:4], "ab"), part(chunks[4:7], "c"), part(chunks[7:])]
    schedule = begin("abc", parts)
    tasks, _ = carry_out(schedule)
    assert schedule.done
    expected = {"a": chunks[:4] + chunks[7:], "b": chunks[:4] + chunks[7:], "c": chunks[4:]}
    for name, own in expected.items():
        assert had(tasks, name) == Counter(chunk.key for chunk in own)
    assert schedule.counts.fetched == 9
    assert not any(task.chunks[0] in chunks[4:7] for task in tasks if isinstance(task, ReceiveTask) or task.share)


def test_all_begin_at_once_though_their_chunks_come_one_after_the_other():
    chunks = plan([MIB] * 4000)
    parts = [part(chunks[:2000], "ab"), part(chunks[2000:], "cd")]
    schedule = begin("abcd", parts)
    assert {task.node for task in schedule.tasks(0.0)} == set("abcd")


def test_a_slow_node_holds_up_none_that_take_other_chunks():
    chunks = plan([MIB] * 800)
    secs = {"a": 0.1, "b": 0.1, "c": 5.0, "d": 0.1, "e": 5.0}
    parts = [part(chunks[:300], "ab"), part(chunks[300:600], "cd"), part(chunks[600:], "e")]
    schedule = begin(dict.fromkeys(secs, 64 * MIB), parts, window=TaskLimits(batch_chunks=4, fetches=2))
    last = play(schedule, secs, 2000)
    assert max(last["a"], last["b"]) < 10
    assert last["d"] < 80  # until it was clear who is slow
    assert min(last["c"], last["e"]) > 100
    assert schedule.counts.fetched <= 300 + 2 * 300 + 200


def test_who_takes_part_in_several_moves_on_in_all_of_them():
    chunks = plan([MIB] * 1000)
    parts = [part(chunks[:500], "ab"), part(chunks[500:], "bc")]
    schedule = begin("abc", parts, window=TaskLimits(batch_chunks=4))
    tasks, _ = carry_out(schedule, most=40)
    assert not schedule.done
    of_b = had(tasks, "b")
    first = sum(count for key, count in of_b.items() if int(key[4:]) < 500)
    assert 0.3 < first / sum(of_b.values()) < 0.7
    tasks, _ = carry_out(schedule, 1.0)
    assert schedule.done
    assert schedule.counts.fetched == 1000


def test_a_small_store_bounds_only_what_is_for_its_node():
    chunks = plan([MIB] * 64 + [10] * 8)
    parts = [part(chunks[:64], "ab"), part(chunks[64:], "bc")]
    schedule = begin({"a": 1024 * MIB, "b": 1024 * MIB, "c": 0}, parts)
    tasks, _ = carry_out(schedule)
    assert schedule.done
    assert schedule.counts.fetched == 64 + 2 * 8
    assert max(len(task.chunks) for task in tasks if isinstance(task, FetchTask) and task.share) == 64


def test_one_that_joins_takes_all_the_parts_of_the_lost_one():
    chunks = plan([MIB] * 90)
    parts = [part(chunks[:30], "ab"), part(chunks[30:60], "cd"), part(chunks[60:])]
    schedule = begin("abcd", parts, window=TaskLimits(batch_chunks=4))
    _, now = carry_out(schedule, most=3)
    assert list(schedule.lost("b", keep_place=True)) == []
    _, now = carry_out(schedule, now)
    assert not schedule.done
    schedule.replace("b", "new", 10**9)
    schedule.started("new")
    tasks, _ = carry_out(schedule, now)
    assert schedule.done
    assert had(tasks, "new") == Counter(chunk.key for chunk in chunks[:30] + chunks[60:])


def test_what_a_lost_node_was_to_have_is_told_without_a_lookup():
    chunks = plan([MIB] * 300)
    looked_up = part(chunks).plan
    parts = [PlanSection(lambda _: pytest.fail("of nobody that is there"), frozenset("x"))]
    parts += [PlanSection(looked_up, frozenset("ab"), rest=lambda start: iter(plan([MIB] * 300)[start:]))]
    schedule = begin("ab", parts)
    tasks = schedule.tasks(0.0)
    assert Counter(chunk.key for chunk in schedule.lost("a")) == Counter(chunk.key for chunk in chunks)
    assert tasks


# Parts of plans on disk.


def written(path, workers):
    return WarmPlanFile.write(path, (ChunkRef(f"k{n}", "p", "ab" * 32, 1, worker=of) for n, of in enumerate(workers)))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A plan of a few segments whose workers come in runs, and then one after the other."""
    chance = random.Random(3)
    workers = [0] * 1500 + [1] * 1700 + [chance.choice([None, 0, 1, 2]) for _ in range(1900)]
    return written(tmp_path_factory.mktemp("parts") / "plan.jsonl", workers)


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_a_part_is_the_plan_less_the_others_chunks(mixed, data):
    workers = data.draw(st.sets(st.sampled_from([None, 0, 1, 2, 7])))
    own = [chunk for chunk in mixed.chunks_from(0) if chunk.worker in workers]
    some = PlanPart(mixed, workers)
    assert some.chunks == len(own)
    start = data.draw(st.integers(0, len(own) + 1))
    assert list(some.chunks_from(start)) == own[start:]
    assert [len(some.segment(index)) for index in range(some.segments)][:-1] == [SEGMENT_CHUNKS] * (some.segments - 1)


def test_a_part_reads_no_segment_that_holds_nothing_of_it(mixed, monkeypatch):
    read = []
    segment = WarmPlanFile.segment
    monkeypatch.setattr(WarmPlanFile, "segment", lambda plan, index: read.append(index) or segment(plan, index))
    list(PlanPart(mixed, {2}).chunks_from(0))
    assert read == [3, 4, 5]


def test_each_chunk_is_looked_up_once_for_all_parts(mixed):
    asked = []
    for workers in ({0}, {1, None}, {2}):
        list(RefreshedPlan(PlanPart(mixed, workers), lambda chunks: asked.extend(chunks) or chunks).chunks())
    assert Counter(asked) == Counter(mixed.chunks_from(0))


A, B, C, D = (Node(f"id-{name}", name) for name in "abcd")


def test_nodes_with_the_same_workers_share_a_part(tmp_path):
    made = written(tmp_path / "plan", [0, 1, 2, None, 9])
    low, high = frozenset({0, 1}), frozenset({2, 3})
    parts = parts_of([Assignment(A, low), Assignment(B, low), Assignment(C, high)], made)
    assert {names: [chunk.worker for chunk in one.chunks_from(0)] for names, one in parts.items()} == {
        frozenset({"id-a", "id-b"}): [0, 1], frozenset({"id-c"}): [2], frozenset({"id-a", "id-b", "id-c"}): [None],
    }  # fmt: skip
    parts = parts_of([Assignment(A, low), Assignment(D)], made)
    assert {names: one.chunks for names, one in parts.items()} == {
        frozenset({"id-a", "id-d"}): 3, frozenset({"id-d"}): 2,
    }  # fmt: skip
    assert [one.chunks for one in parts_of([Assignment(A), Assignment(D)], made).values()] == [5]
