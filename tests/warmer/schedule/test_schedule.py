"""The schedule against a simulated fleet: nodes that work at any pace, fail, lag, and are lost at any moment."""

import random
from collections import Counter

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hfbucket_plugin.tools.selection import ChunkRef
from tests.support.models import examples
from tests.support.simulated_fleet import MIB, Fleet, begin, carry_out, keys, part, plan, play, well
from warmer.report.outcomes import Copied, Failed, Present
from warmer.schedule.cohort import MAX_RANGES, Backlog, PlanSection
from warmer.schedule.rate import Caps
from warmer.schedule.scheduler import Scheduler
from warmer.schedule.tasks import FetchTask, ReceiveTask, TaskLimits, total_bytes

sizes = st.lists(st.integers(0, 100), max_size=30)


@example(4892634)  # a slow fetch ends whose batch has no chunk left
@settings(max_examples=examples(600), deadline=None)
@given(st.integers(0, 2**32))
def test_any_fleet(seed):
    Fleet(seed).play()


def expect_derived(schedule):
    """Whatever is counted follows from the table of tasks in flight and from the batches."""
    tasks, batches = list(schedule._tasks), list(schedule._batches.values())
    assert schedule._tasks.fetching_bytes == sum(total_bytes(one.task.chunks) for one in tasks if one.fetches)
    for node in schedule.nodes:
        own, mine = schedule._tasks.of(node), [one for one in tasks if one.task.node == node]
        assert list(own.tasks.values()) == mine
        fetches = sum(one.fetches for one in mine)
        assert (own.fetches, own.receives, own.bytes) == (fetches, len(mine) - fetches, sum(one.size for one in mine))
    used = dict.fromkeys(schedule.nodes, 0)
    for batch in batches:
        assert batch.size == total_bytes(batch.chunks)
        receivers = {one.task.node for one in tasks if one.batch is batch and isinstance(one.task, ReceiveTask)}
        assert batch.receiving == receivers
        assert batch.fetching == any(one.batch is batch and one.fetches for one in tasks)
        for node in batch.reserved & used.keys():
            used[node] += batch.size
    for one in tasks:
        used[one.task.node] += one.hold
    assert schedule.store_bytes == used
    for cohort in schedule._cohorts:
        assert cohort.batches == sum(batch.cohort is cohort for batch in batches)


# Those of the second cohort have not come as far as one more that falls behind and is to join them.
@example(12092641, {}, [0] * 24 + [5, 7, 5, 4, 0, 0, 0, 0, 5, 5, 0, 0, 0, 0, 4] + [0] * 21)
@settings(max_examples=examples(150), deadline=None)
@given(
    st.integers(0, 2**32),
    st.dictionaries(st.integers(0, 60), st.tuples(st.integers(0, 19), st.booleans()), max_size=8),
    st.lists(st.integers(0, 9), min_size=60, max_size=60),
)
def test_nothing_stays_reserved_whichever_nodes_die_at_whichever_step(seed, deaths, steps):
    fleet = Fleet(seed)
    for at, step in enumerate(steps):
        if at in deaths and (alive := fleet.alive()):
            which, keep = deaths[at]
            fleet.lose(alive[which % len(alive)], keep=keep)
        elif step < 5 and fleet.in_flight:
            number = list(fleet.in_flight)[step % len(fleet.in_flight)]
            fleet.finish(fleet.in_flight.pop(number), well=step < 4)
        elif step == 9 and fleet.vacant:
            fleet.chance.choice([fleet.abandon, fleet.replace, fleet.resume])()
        else:
            fleet.start()
            fleet.decide(fleet.pauses[step % len(fleet.pauses)])
        expect_derived(fleet.schedule)
    fleet.complete()
    expect_derived(fleet.schedule)
    assert (list(fleet.schedule._tasks), fleet.schedule._batches, fleet.schedule.in_progress) == ([], {}, {})
    assert not any(fleet.schedule.store_bytes.values())


def test_each_chunk_is_fetched_once_and_the_work_is_shared_out():
    chunks = plan([MIB] * 1000)
    names = [f"n{n}" for n in range(8)]
    schedule = begin(names, chunks, window=TaskLimits(batch_chunks=4))
    tasks, _ = carry_out(schedule)
    assert schedule.done
    assert keys(tasks, FetchTask) == Counter(chunk.key for chunk in chunks)
    for name in names:
        assert keys(tasks, FetchTask, name) + keys(tasks, ReceiveTask, name) == Counter(chunk.key for chunk in chunks)
        assert 80 <= sum(keys(tasks, FetchTask, name).values()) <= 170
    assert schedule.counts.fetched == 1000


def test_directly_every_node_fetches_for_itself():
    schedule = begin(["a", "b", "c"], plan([MIB] * 200), direct=True)
    tasks, _ = carry_out(schedule)
    assert schedule.done
    assert schedule.counts.fetched == 600
    assert keys(tasks, ReceiveTask) == Counter()
    assert not any(task.share for task in tasks)


def test_what_nodes_are_busy_with():
    schedule = begin(["a", "b"], plan([MIB] * 40), window=TaskLimits(batch_chunks=4, fetches=1), direct=True)
    assert schedule.in_progress == {}
    tasks = schedule.tasks(0.0)
    assert schedule.in_progress == {"a": (4, 4 * MIB), "b": (4, 4 * MIB)}
    first = next(task for task in tasks if task.node == "a")
    schedule.fetched(first.number, [Copied(chunk.key, chunk.size) for chunk in first.chunks], shared=False, now=1.0)
    assert schedule.in_progress == {"b": (4, 4 * MIB)}
    schedule.lost("b")
    assert schedule.in_progress == {}


def test_one_node_leaves_nothing_in_the_store():
    schedule = begin({"a": 0}, plan([MIB] * 200))
    tasks, _ = carry_out(schedule)
    assert schedule.done
    assert not any(task.share for task in tasks)


def test_a_node_that_answers_nothing_is_left_behind_and_catches_up():
    chunks = plan([MIB] * 400)
    schedule = begin(dict.fromkeys(["a", "b", "c", "slow"], 16 * MIB), chunks, window=TaskLimits(batch_chunks=4))
    held, seen, now = [], Counter(), 0.0
    while sum(seen.values()) < 3 * 400:
        for task in schedule.tasks(now):
            if task.node == "slow":
                held.append(task)
                continue
            seen.update(chunk.key for chunk in task.chunks)
            well(schedule, task, now)
        now += 0.1
        assert now < 300
    assert schedule.counts.lags == 1
    for task in held:
        well(schedule, task, now)
    tasks, _ = carry_out(schedule, now)
    assert schedule.done
    slow = keys(held + tasks, FetchTask, "slow") + keys(held, ReceiveTask, "slow")
    assert slow == Counter(chunk.key for chunk in chunks)
    assert schedule.counts.fetched <= 2 * 400


def test_slow_nodes_go_on_together_and_the_others_do_not_wait():
    chunks = plan([MIB] * 1600)
    names = [f"n{n}" for n in range(12)]
    secs = {name: 2.0 if name in ("n3", "n7", "n8") else 0.1 for name in names}
    schedule = begin(dict.fromkeys(names, 64 * MIB), chunks, window=TaskLimits(batch_chunks=4))
    last = play(schedule, secs, 2000)
    slow = {name: at for name, at in last.items() if secs[name] == 2.0}
    assert schedule.counts.lags == 3
    # 400 orders each, two at a time: 20 s, and the time until it was clear who is slow.
    assert max(at for name, at in last.items() if name not in slow) < 60
    assert min(slow.values()) > 200
    assert schedule.counts.fetched <= 2 * 1600


def test_nodes_of_much_the_same_pace_stay_together():
    chance = random.Random(5)
    names = [f"n{n}" for n in range(8)]
    secs = {name: chance.uniform(0.8, 1.1) for name in names}
    schedule = begin(dict.fromkeys(names, 64 * MIB), plan([MIB] * 1600), window=TaskLimits(batch_chunks=4))
    play(schedule, secs, 2000)
    assert schedule.counts.lags == 0
    assert schedule.counts.fetched == 1600


def test_when_all_are_slow_none_is_left_behind():
    schedule = begin(dict.fromkeys(["a", "b", "c", "d"], 8 * MIB), plan([MIB] * 100))
    for task in schedule.tasks(0.0):
        results = [Copied(chunk.key, chunk.size) for chunk in task.chunks]
        schedule.fetched(task.number, results, shared=True, now=1.0)
    for second in range(2, 200):
        schedule.tasks(float(second))
    assert schedule.counts.lags == 0


def test_a_fetch_that_takes_much_longer_than_others_is_given_to_another_node():
    chunks = plan([MIB] * 64)
    schedule = begin(["a", "b"], chunks, window=TaskLimits(batch_chunks=4, fetches=1))
    first = schedule.tasks(0.0)
    slow = next(task for task in first if task.node == "a")
    tasks, now = carry_out(schedule, holds={"a"}, most=1)
    for task in first:
        if task.node == "b":
            results = [Copied(chunk.key, chunk.size) for chunk in task.chunks]
            schedule.fetched(task.number, results, shared=task.share, now=0.1)
    tasks, now = carry_out(schedule, now, holds={"a"}, step=1.0, most=30)
    assert schedule.counts.slow_fetches == 1
    assert keys(tasks, FetchTask, "b")[slow.chunks[0].key] == 1
    results = [Copied(chunk.key, chunk.size) for chunk in slow.chunks]
    assert schedule.fetched(slow.number, results, shared=True, now=now) == [("a", result) for result in results]
    assert slow.number in schedule.released()


@pytest.mark.parametrize(("kind", "fetches"), [("transport", 2), ("missing", 1)])
def test_what_cannot_be_fetched_is_tried_on_another_node_once(kind, fetches):
    schedule = begin(["a", "b", "c"], plan([10]))
    ended, nodes = [], []
    for now in range(5):
        for task in schedule.tasks(float(now)):
            nodes.append(task.node)
            results = [Failed(chunk.key, chunk.size, kind, "no") for chunk in task.chunks]
            ended += schedule.fetched(task.number, results, shared=False, now=float(now))
    assert schedule.done
    assert len(nodes) == len(set(nodes)) == fetches
    assert sorted(node for node, _ in ended) == ["a", "b", "c"]


def test_a_second_node_helps_the_one_that_could_not_fetch():
    schedule = begin(["a", "b"], plan([10]))
    (task,) = schedule.tasks(0.0)
    failed = [Failed(chunk.key, chunk.size, "transport", "no") for chunk in task.chunks]
    assert schedule.fetched(task.number, failed, shared=False, now=0.0) == []
    tasks, _ = carry_out(schedule)
    assert [(type(each).__name__, each.node == task.node) for each in tasks] == [
        ("FetchTask", False),
        ("ReceiveTask", True),
    ]
    assert schedule.done


def test_a_full_disk_is_one_nodes_matter():
    schedule = begin(["a", "b"], plan([10]))
    (task,) = schedule.tasks(0.0)
    ended = schedule.fetched(task.number, [Failed("key-0", 10, "no_room", "no")], shared=False, now=0.0)
    assert [node for node, _ in ended] == [task.node]
    tasks, _ = carry_out(schedule)
    assert [each.node == task.node for each in tasks] == [False]
    assert schedule.done


def test_what_a_lost_node_had_left_in_the_store_is_fetched_again_by_another():
    schedule = begin(["a", "b", "c"], plan([10]))
    (task,) = schedule.tasks(0.0)
    schedule.fetched(task.number, [Copied("key-0", 10)], shared=True, now=0.0)
    receives = schedule.tasks(0.0)
    assert {type(each) for each in receives} == {ReceiveTask}
    assert list(schedule.lost(task.node)) == []  # its own had ended
    assert schedule.released() == [task.number]
    for each in receives:
        assert schedule.received(each.number, [None], now=1.0, holder_lost=True) == []
    tasks, _ = carry_out(schedule, 1.0)
    assert sorted(type(each).__name__ for each in tasks) == ["FetchTask", "ReceiveTask"]
    assert schedule.done
    assert schedule.counts.fetched == 2


def test_a_node_that_joins_in_place_of_a_lost_one_is_given_everything():
    chunks = plan([MIB] * 100)
    schedule = begin(["a", "b"], chunks, window=TaskLimits(batch_chunks=4))
    tasks, now = carry_out(schedule, most=4)
    assert list(schedule.lost("b", keep_place=True)) == []
    tasks, now = carry_out(schedule, now)
    assert not schedule.done
    schedule.replace("b", "new", 10**9)
    schedule.started("new")
    tasks, _ = carry_out(schedule, now)
    assert schedule.done
    assert keys(tasks, FetchTask, "new") + keys(tasks, ReceiveTask, "new") == Counter(chunk.key for chunk in chunks)


def test_caps_bound_what_is_ordered_in_any_time():
    schedule = begin(["a", "b"], plan([MIB] * 400), caps=Caps(run=10 * MIB, node=8 * MIB))
    ordered, now = [], 0.0
    while not schedule.done:
        for task in schedule.tasks(now):
            ordered.append((now, task))
            well(schedule, task, now)
        now += 0.1
    # 400 MiB reach each node, at 8 MiB a second: no faster, and hardly slower.
    assert 48 <= now <= 60
    for at, _ in ordered:
        second = [task for then, task in ordered if at <= then < at + 1]
        assert sum(total_bytes(task.chunks) for task in second if isinstance(task, FetchTask)) <= 30 * MIB
        for name in ("a", "b"):
            assert sum(total_bytes(task.chunks) for task in second if task.node == name) <= 24 * MIB


@pytest.mark.parametrize("caps", [Caps(run=10 * MIB), Caps(node=10 * MIB)])
@pytest.mark.parametrize("tries", [1, 3, 6])
@pytest.mark.parametrize("secs", [0.0, 2.0])
def test_tries_are_paid_for_as_what_arrives_is(caps, tries, secs):
    """Bodies break off: each chunk is asked for several times, in the end in vain, over some seconds."""
    schedule, now, asked, in_flight = begin(["a"], plan([MIB] * 200), caps=caps), 0.0, [], []
    while not schedule.done:
        in_flight += [(now + secs, task) for task in schedule.tasks(now)]
        for end, task in [one for one in in_flight if one[0] <= now]:
            in_flight.remove((end, task))
            asked.append((now, tries * total_bytes(task.chunks)))
            results = [
                Failed(chunk.key, chunk.size, "integrity", "no", asked=tries * chunk.size) for chunk in task.chunks
            ]
            schedule.fetched(task.number, results, shared=False, now=now)
        now += 0.05
        assert now < 1000
    whole = sum(size for _, size in asked)
    assert whole == tries * 200 * MIB
    # One second's worth at the beginning, and what was in progress before the first one told.
    assert whole <= 10 * MIB * now + 10 * MIB + tries * 4 * 10 * MIB
    assert now <= 1.3 * whole / (10 * MIB) + 10


def test_what_was_asked_for_before_a_chunk_arrived_or_was_found_missing_is_paid_for():
    for outcome in (
        lambda chunk: Copied(chunk.key, chunk.size, asked=5 * chunk.size),
        lambda chunk: Failed(chunk.key, chunk.size, "missing", "no", asked=5 * chunk.size),
    ):
        schedule, now = begin(["a"], plan([MIB] * 40), caps=Caps(run=10 * MIB)), 0.0
        while not schedule.done:
            for task in schedule.tasks(now):
                schedule.fetched(task.number, [outcome(chunk) for chunk in task.chunks], shared=False, now=now)
            now += 0.05
        assert 10 <= now <= 25


def test_a_chunk_that_no_store_takes_is_fetched_by_each_for_itself():
    chunks = plan([10, 10**12, 10])
    schedule = begin(["a", "b"], chunks, window=TaskLimits())
    tasks, _ = carry_out(schedule)
    assert schedule.done
    for name in ("a", "b"):
        assert sum(keys(tasks, FetchTask, name).values()) + sum(keys(tasks, ReceiveTask, name).values()) == 3
    assert not any(task.share for task in tasks if any(chunk.size > 10**9 for chunk in task.chunks))


@given(sizes)
def test_a_schedule_reads_no_further_than_its_windows(chunk_sizes):
    read = 0

    def chunks(start):
        nonlocal read
        for chunk in plan(chunk_sizes)[start:]:
            read += 1
            yield chunk

    schedule = Scheduler(
        {"a": 1000, "b": 1000}, [PlanSection(chunks)], TaskLimits(batch_chunks=2, batch_bytes=100, batches=2)
    )
    schedule.started("a")
    schedule.started("b")
    schedule.tasks(0.0)
    assert read <= 5  # four in progress, and one looked at


def test_no_nodes_and_no_chunks_are_done_at_once():
    assert begin([], plan([1])).done
    assert begin(["node"], []).done


def test_a_window_without_room_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        TaskLimits(batches=0)
    with pytest.raises(ValueError, match="at least one"):
        TaskLimits(run_bytes=0)


def test_no_more_orders_are_in_progress_than_an_actor_has_slots_for():
    from warmer.cluster.driver import TASKS_AT_ONCE  # which imports Ray

    assert TaskLimits().fetches + TaskLimits().receives == TASKS_AT_ONCE


def test_a_chunk_larger_than_the_window_goes_alone():
    schedule = begin(["a"], plan([10, 300, 10]), window=TaskLimits(bytes=100, batch_bytes=100))
    tasks, _ = carry_out(schedule)
    assert [len(task.chunks) for task in tasks] == [1, 1, 1]
    assert schedule.done


@pytest.mark.parametrize("names", ["ab", "abc"])
def test_a_hung_node_is_left_behind_also_where_nobody_has_received_yet(names):
    schedule = begin(dict.fromkeys(names, 16 * MIB), plan([MIB] * 200), window=TaskLimits(batch_chunks=4))
    others = [name for name in names if name != "b"]
    ended, now = Counter(), 0.0
    while any(ended[name] < 200 for name in others):
        for task in schedule.tasks(now):
            if task.node != "b":
                ended.update(node for node, _ in well(schedule, task, now))
        now += 0.25
        assert now < 200
    assert schedule.counts.lags == 1


@pytest.mark.parametrize("caps", [Caps(run=10 * MIB), Caps(node=10 * MIB), Caps(run=10 * MIB, node=10 * MIB)])
@pytest.mark.parametrize(
    ("ending", "free"),
    [
        (lambda chunk: Present(chunk.key, chunk.size), True),
        (lambda chunk: Failed(chunk.key, chunk.size, "no_room", "no"), True),
        (lambda chunk: Failed(chunk.key, chunk.size, "missing", "no"), True),
        (lambda chunk: Failed(chunk.key, chunk.size, "integrity", "its bytes came"), False),
    ],
)
def test_what_did_not_move_costs_no_bandwidth(caps, ending, free):
    schedule, now = begin("ab", plan([MIB] * 100), caps=caps), 0.0
    while not schedule.done:
        for task in schedule.tasks(now):
            results = [ending(chunk) for chunk in task.chunks]
            if isinstance(task, FetchTask):
                schedule.fetched(task.number, results, shared=False, now=now)
            else:
                schedule.received(task.number, results, now=now)
        now += 0.05
    assert now < 3 if free else now > 8


def slow_fetch(schedule):
    """Begins a run of which node a fetches something so slowly that b is asked; returns its order, and the time."""
    slow, now = None, 0.0
    while not schedule.counts.slow_fetches:
        for task in schedule.tasks(now):
            if task.node == "a" and isinstance(task, FetchTask) and slow is None:
                slow = task
            else:
                well(schedule, task, now + 0.01)
        now += 0.5
        assert now < 60
    return slow, now


@pytest.mark.parametrize("stored", [False, True])
def test_a_slow_fetch_that_fails_at_last_is_made_up_for_by_another_node(stored):
    schedule = begin("abc", plan([MIB] * 8), window=TaskLimits(batch_chunks=4, fetches=1))
    slow, now = slow_fetch(schedule)
    receives = []
    while stored and not receives:  # the others have begun to take it
        for task in schedule.tasks(now):
            receives.append(task) if isinstance(task, ReceiveTask) else well(schedule, task, now)
    failed = [Failed(chunk.key, chunk.size, "transport", "no") for chunk in slow.chunks]
    assert schedule.fetched(slow.number, failed, shared=False, now=now) == []
    for task in receives:
        well(schedule, task, now)
    tasks, _ = carry_out(schedule, now)
    assert schedule.done
    assert keys(tasks, ReceiveTask, "a") == Counter(chunk.key for chunk in slow.chunks)
    assert keys(tasks, FetchTask, "a") == Counter()


def test_a_slow_fetch_that_fails_after_its_batch_is_gone_is_tried_once_more():
    schedule = begin("ab", plan([MIB] * 8), window=TaskLimits(batch_chunks=4, fetches=1))
    slow, now = slow_fetch(schedule)
    _, now = carry_out(schedule, now)
    kinds = ["transport", "missing", "tier"]
    results = [Failed(chunk.key, chunk.size, kind, "no") for chunk, kind in zip(slow.chunks, kinds, strict=False)]
    results.append(Copied(slow.chunks[3].key, MIB))
    ended = schedule.fetched(slow.number, results, shared=True, now=now)
    assert [outcome for _, outcome in ended] == results[1:]
    (again,) = schedule.tasks(now)
    assert (again.node, again.chunks) == ("a", slow.chunks[:1])
    assert schedule.fetched(again.number, results[:1], shared=False, now=now) == [("a", results[0])]
    assert schedule.done


def test_one_chunk_that_a_store_has_no_room_for_changes_nothing_for_the_rest():
    chunks = plan([64 * MIB, *[MIB] * 300, 64 * MIB, *[MIB] * 300])
    schedule = begin({**dict.fromkeys("abcdefg", 10**10), "head": 60 * MIB}, chunks)
    tasks, _ = carry_out(schedule)
    assert schedule.done
    fetched = keys(tasks, FetchTask)
    assert {fetched[chunk.key] for chunk in chunks if chunk.size > MIB} == {8}
    assert {fetched[chunk.key] for chunk in chunks if chunk.size == MIB} == {1}
    assert schedule.counts.own == 16


def test_a_node_that_lags_far_behind_with_such_chunks_goes_on_by_itself():
    chunks = plan([MIB, 10] * 4000)
    schedule = begin({"a": 1000, "slow": 1000}, chunks)
    carry_out(schedule, holds={"slow"}, most=20_000)
    assert len(schedule._states["slow"].backlog._ranges) <= MAX_RANGES + 1
    assert sum(1 for _ in schedule.lost("slow")) == 8000


def test_chunks_one_after_the_other_that_no_store_has_room_for_are_one_range():
    schedule = begin({"a": 5, "slow": 5}, plan([10] * 5000))
    carry_out(schedule, holds={"slow"}, most=300)
    assert len(schedule._states["slow"].backlog._ranges) == 1
    assert sum(1 for _ in schedule.lost("slow")) == 5000


def fetch_slowly(schedule, secs_of, until=20_000):
    """Carry it out; `secs_of` says how long an order takes, None for ever. Returns the fetches of each chunk."""
    in_flight, fetches, now = [], Counter(), 0.0
    while not schedule.done and now < until:
        for task in schedule.tasks(now):
            if isinstance(task, FetchTask):
                fetches.update(chunk.key for chunk in task.chunks)
            if (secs := secs_of(task, now)) is not None:
                in_flight.append((now + secs, task))
        now += 0.25
        ended = [entry for entry in in_flight if entry[0] <= now]
        in_flight = [entry for entry in in_flight if entry[0] > now]
        for _, task in ended:
            well(schedule, task, now)
    return fetches


def test_a_node_that_falls_behind_after_another_still_gets_a_chunk_larger_than_any_store():
    chunks = plan([1, 1, 1, 1, 100] * 6)
    schedule = Scheduler(dict.fromkeys("abc", 4), [part(chunks)], TaskLimits(batch_chunks=1))
    schedule.started("a")
    schedule.started("c")
    tasks, now = until_lags(schedule, 1)  # b is the second cohort, which stays where it is: b has not started
    schedule.lost("c", keep_place=True)
    schedule.replace("c", "d", 4)
    more, now = until_lags(schedule, 2, now)  # d joins it, just after a chunk that each fetches for itself
    schedule.started("b")
    schedule.started("d")
    tasks += more + carry_out(schedule, now)[0]
    assert schedule.done
    for name in "abd":
        assert keys(tasks, FetchTask, name) + keys(tasks, ReceiveTask, name) == Counter(chunk.key for chunk in chunks)


def until_lags(schedule, lags, now=0.0):
    """Carry it out, a second a step, until so many nodes have fallen behind; returns what was ordered, and the time."""
    seen = []
    while schedule.counts.lags < lags:
        tasks = schedule.tasks(now)
        seen += tasks
        now += 1.0
        for task in tasks:
            well(schedule, task, now)
        assert now < 100
    return seen, now


ranges = st.tuples(st.sampled_from("ab"), st.integers(0, 3), st.sampled_from([0, 1, 2, 3, None]))


@example([("a", 1, 3), ("a", 3, 2)])
@given(st.lists(ranges | st.integers(1, 4), max_size=12))
def test_all_ranges_of_a_backlog_are_cut_from_it_or_left(steps):
    plans = {name: [ChunkRef(f"{name}{n}", "p", "00" * 32, 1) for n in range(3)] for name in "ab"}
    parts = {name: part(chunks) for name, chunks in plans.items()}
    backlog, added, taken = Backlog(), [], []
    for step in steps:
        if isinstance(step, int):
            taken += backlog.cut(step, step, lambda _: True)
        else:
            name, start, end = step
            backlog.add_range(parts[name], start, end)
            added += plans[name][start:end] if end is None or start < end else []
    assert [*taken, *backlog.rest()] == added


@pytest.mark.parametrize("secs", [8.0, 30.0, 90.0])
@pytest.mark.parametrize("nodes", [2, 8])
def test_a_hub_that_is_slow_for_all_is_not_asked_more(nodes, secs):
    schedule = begin([f"n{n}" for n in range(nodes)], plan([MIB] * 1000 * nodes))
    fetches = fetch_slowly(
        schedule, lambda task, now: 0.2 if isinstance(task, ReceiveTask) else 1.0 if now < 2 else secs
    )
    assert schedule.done
    assert schedule.counts.slow_fetches == 0
    assert set(fetches.values()) == {1}


def test_hung_nodes_hold_up_none_even_when_nothing_but_their_fetches_is_left():
    schedule = begin(dict.fromkeys("abcdefgh", 256 * MIB), plan([MIB] * 1000))
    fetch_slowly(schedule, lambda task, _: None if task.node in "ab" else 0.5, until=400)
    assert schedule.counts.slow_fetches > 0
    for name in "ab":
        list(schedule.lost(name))
    assert not schedule._batches
    assert schedule.counts.fetched <= 1100


def test_a_batch_is_handed_over_once():
    schedule = begin("abcd", plan([MIB] * 1000), window=TaskLimits(batch_chunks=4))
    slow = {chunk.key for chunk in plan([MIB] * 4)}
    fetches = fetch_slowly(schedule, lambda task, _: None if task.chunks[0].key in slow else 0.2, until=600)
    assert {fetches[key] for key in slow} == {2}
    assert {times for key, times in fetches.items() if key not in slow} == {1}
