"""Tasks that are submitted, signalled and fetched once, and the locks of their keys, in any order that LMCache may choose."""

import os
import select
import threading
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from lmcache.v1.platform import consume_fd

from hfbucket_plugin.core.buffers import RevocableBuffer
from hfbucket_plugin.engine.mp_tasks import FORGOTTEN_SECS, TaskTable
from tests.support.models import untimed
from tests.support.waiting import Clock, in_threads

LOAD, DROP, SHORTEN, GIVE_UP = "load", "drop", "shorten", "give up"


@pytest.fixture
def table():
    table = TaskTable()
    yield table
    table.close()


def signalled(table):
    return bool(select.select([table.fd("store")], [], [], 0)[0])


def test_a_task_is_signalled_when_it_ends_and_its_result_is_given_once(table):
    task = table.begin("store")
    assert table.running("store") == 1
    assert not signalled(table)
    assert table.take("store", task.id) is None

    table.finish(task, "done")

    assert signalled(table)
    assert table.running("store") == 0
    consume_fd(table.fd("store"))
    assert not signalled(table)
    assert table.take("store", task.id) == "done"
    assert table.take("store", task.id) is None
    assert table.take_all("store") == {}


def test_results_that_nobody_fetched_stay_and_come_all_at_once(table):
    tasks = [table.begin("store") for _ in range(3)]
    for task in tasks:
        table.finish(task, task.id * 10)
    assert table.take("store", tasks[1].id) == tasks[1].id * 10

    assert table.take_all("store") == {tasks[0].id: tasks[0].id * 10, tasks[2].id: tasks[2].id * 10}
    assert table.take_all("store") == {}


def test_a_result_that_is_false_is_a_result(table):
    task = table.begin("store")
    table.finish(task, 0)

    assert table.take_all("store") == {task.id: 0}


def test_a_table_that_is_closed_signals_nothing_and_keeps_nothing(table):
    ended, late = table.begin("store"), table.begin("store")
    table.finish(ended, "done")
    fd = table.fd("store")
    table.close()
    table.close()

    reused = os.eventfd(0, os.EFD_NONBLOCK)  # the system gives out the lowest number that is free
    try:
        table.finish(late, "late")
        assert table.take("store", ended.id) is None
        assert table.take("store", late.id) is None
        assert table.take_all("store") == {}
        assert table.running("store") == 0
        table.finish(table.begin("store"), "later still")
        assert select.select([reused], [], [], 0)[0] == [], "a descriptor that is another's now"
        assert isinstance(fd, int)
    finally:
        os.close(reused)


def test_numbers_are_unique_and_no_result_is_lost_or_given_twice_among_threads(table):
    fetched, stop = [], threading.Event()

    def fetch():
        while not stop.is_set() or table.running("store") or signalled(table):
            if select.select([table.fd("store")], [], [], 0.01)[0]:
                consume_fd(table.fd("store"))
                fetched.extend(table.take_all("store").items())

    fetchers = [threading.Thread(target=fetch) for _ in range(2)]
    for one in fetchers:
        one.start()

    def work(_number):
        tasks = [table.begin("store") for _ in range(200)]
        for task in tasks:
            table.finish(task, task.id)
        return [task.id for task in tasks]

    tasks = [task for many in in_threads(8, work) for task in many]
    stop.set()
    for one in fetchers:
        one.join(30)
    fetched += table.take_all("store").items()

    assert len(set(tasks)) == 1600
    assert sorted(fetched) == sorted((task, task) for task in tasks)


@untimed
@given(st.lists(st.tuples(st.sampled_from(["begin", "finish", "take", "all"]), st.integers(0, 9)), max_size=50))
def test_as_a_plain_model(steps):
    table = TaskTable()
    open_, results, begun = [], {}, []
    try:
        for step, which in steps:
            if step == "begin":
                open_.append(table.begin("store"))
                begun.append(open_[-1])
            elif step == "finish" and open_:
                task = open_.pop(which % len(open_))
                table.finish(task, (task, which))
                results[task.id] = (task, which)
                assert signalled(table)
            elif step == "take" and begun:
                task = begun[which % len(begun)]
                assert table.take("store", task.id) == results.pop(task.id, None)
            elif step == "all":
                assert table.take_all("store") == results
                results = {}
            assert table.running("store") == len(open_)
        assert len(set(begun)) == len(begun)
    finally:
        table.close()


class Buffer:
    """Memory of the server's, which it frees when it is done with it."""

    def __init__(self):
        self.memory = SimpleNamespace(valid=True)
        self.lease = RevocableBuffer(memoryview(bytearray(4)), self.memory)


class Request:
    """Looks keys up; loads all, some or none of them; and either fetches and untable, or is given up at any point.

    As LMCache does: what it drops it untable before it loads the rest, and what it gives up it untable before it frees the memory.
    """

    def __init__(self, table, keys):
        self.table, self.keys = table, keys
        self.lookup = table.begin("lookup")
        self.load, self.buffers = None, []
        self.state = "looking"

    def step(self, choice):
        """The next thing that happens to it; whether there was one."""
        act = getattr(self, f"_{self.state}", None)
        if act is None:
            return False
        self.state = act(choice)
        return True

    def end(self, *, closed):
        """All that is left to happen to it: where the adapter is closed, its threads end by themselves."""
        while self.step(LOAD) if not closed else self.state in ("looking", "loading", "late") and self.step(LOAD):
            pass

    def _looking(self, _choice):
        self.table.lock(self.keys, self.lookup)
        self.table.finish(self.lookup, "found")
        return "found"

    def _found(self, _choice):
        assert self.table.take("lookup", self.lookup.id) == "found"
        return "answered"

    def _answered(self, choice):
        if choice in (DROP, GIVE_UP):  # LMCache has it in L1 meanwhile, or has no memory; or it aborts the request
            self.table.unlock(self.keys)
            return "over"
        if choice == SHORTEN and len(self.keys) > 1:
            self.table.unlock(self.keys[1:])
            self.keys = self.keys[:1]
        self.buffers = [Buffer() for _ in self.keys]
        self.load = self.table.begin("load", self.keys, self.buffers)
        return "loading"

    def _loading(self, choice):
        if choice == GIVE_UP:
            self._give_up()
            return "late"
        self.table.finish(self.load, "loaded")
        return "ended"

    def _ended(self, choice):
        if choice == GIVE_UP:
            self._give_up()
        else:
            assert self.table.take("load", self.load.id) == "loaded"
            self.table.unlock(self.keys)
        return "over"

    def _late(self, _choice):
        self.table.finish(self.load, "loaded")
        return "over"

    def _give_up(self):
        self.table.unlock(self.keys)
        for buffer in self.buffers:
            buffer.memory.valid = False

    @property
    def live(self):
        return all(buffer.lease.live for buffer in self.buffers)


keys = st.lists(st.integers(0, 3), min_size=1, max_size=3, unique=True).map(tuple)
wanted = st.lists(keys, min_size=1, max_size=6)
steps = st.lists(st.tuples(st.integers(0, 5), st.sampled_from([LOAD, DROP, SHORTEN, GIVE_UP])), max_size=80)


def made(table, wanted):
    return [Request(table, one) for one in wanted]


def leftovers(table):
    """What a table remembers of requests that are over."""
    return len(table), table.locked, +table._unclaimed, table._given_up


NOTHING = (0, 0, {}, [])


@given(wanted=wanted, steps=steps)
def test_what_is_given_up_writes_no_more_what_is_not_goes_on_and_all_locks_are_returned(wanted, steps):
    clock = Clock()
    table = TaskTable(clock)
    requests = made(table, wanted)

    for number, choice in steps:
        requests[number % len(requests)].step(choice)
        for request in requests:
            assert request.state != "late" or not request.live
            assert request.state != "loading" or request.live, "another request was given up, or did not load"

    for request in requests:
        while request.step(LOAD):
            pass
    assert table.locked == 0
    assert not +table._unclaimed
    assert not [task for task in table._tasks["load"].values() if task.state == "fetched"], (
        "given up, and not known yet"
    )

    clock.now += FORGOTTEN_SECS
    table.forget()
    assert leftovers(table) == NOTHING
    table.close()


@given(wanted=wanted, steps=steps)
def test_where_nothing_is_given_up_nothing_is_revoked_and_nothing_is_kept(wanted, steps):
    table = TaskTable(Clock())
    requests = made(table, wanted)

    for number, choice in [*steps, *[(number, LOAD) for number in range(len(requests)) for _ in range(5)]]:
        requests[number % len(requests)].step(DROP if choice == GIVE_UP and requests[0].state == "answered" else LOAD)
        assert all(request.live for request in requests)

    assert leftovers(table) == NOTHING
    table.close()


class Server(RuleBasedStateMachine):
    """Requests, stores and deletes of one server, in any order; at the end nothing is left reserved or locked."""

    def __init__(self):
        super().__init__()
        self.clock = Clock()
        self.table = TaskTable(self.clock)
        self.requests, self.stores = [], []
        self.closed = False

    @rule(keys=keys)
    def look_up(self, keys):
        if not self.closed:
            self.requests.append(Request(self.table, keys))

    @precondition(lambda self: self.requests and not self.closed)
    @rule(which=st.integers(0, 9), choice=st.sampled_from([LOAD, DROP, SHORTEN, GIVE_UP]))
    def go_on(self, which, choice):
        request = self.requests[which % len(self.requests)]
        request.step(choice)
        assert request.state != "loading" or set(self.table.free(request.keys)).isdisjoint(request.keys)

    @rule()
    def store(self):
        self.stores.append(self.table.begin("store"))

    @precondition(lambda self: self.stores)
    @rule(which=st.integers(0, 9))
    def stored(self, which):
        self.table.finish(self.stores.pop(which % len(self.stores)), "stored")

    @rule()
    def fetch(self):
        assert set(self.table.take_all("store").values()) <= {"stored"}

    @rule(secs=st.floats(0, FORGOTTEN_SECS / 100))
    def wait(self, secs):
        self.clock.now += secs

    @rule()
    def close(self):
        self.table.close()
        self.closed = True

    @invariant()
    def what_runs_is_counted_once(self):
        states = [request.state for request in self.requests]
        assert self.table.running("store") == len(self.stores)
        assert self.table.running("lookup") == states.count("looking")
        assert self.table.running("load") == states.count("loading") + states.count("late")

    def teardown(self):
        for task in self.stores:
            self.table.finish(task, "stored")
        for request in self.requests:
            request.end(closed=self.closed)
        assert self.closed or self.table.locked == 0
        self.clock.now += FORGOTTEN_SECS + 1
        self.table.forget()
        assert len(self.table) == 0
        assert self.table._given_up == []
        assert self.closed or not +self.table._unclaimed
        self.table.close()


Server.TestCase.settings = settings(untimed, max_examples=60, stateful_step_count=40)
TestServer = Server.TestCase


def loading(table, count, keys=("a",)):
    """Loads of the same keys, by as many lookups."""
    loads = []
    for _ in range(count):
        table.lock(keys)
        buffers = [Buffer() for _ in keys]
        loads.append((table.begin("load", keys, buffers), buffers))
    return loads


def found(table, *keys, fetched):
    """A lookup that found keys."""
    lookup = table.begin("lookup")
    table.lock(keys, lookup)
    table.finish(lookup, "found")
    if fetched:
        table.take("lookup", lookup.id)


def alive(loads):
    return [all(buffer.lease.live for buffer in buffers) for _, buffers in loads]


def test_an_unlock_of_what_was_looked_up_and_not_loaded_revokes_no_load_of_the_same_keys(table):
    loads = loading(table, 2)
    found(table, "a", fetched=True)

    table.unlock(["a"])

    assert alive(loads) == [True, True]


def test_a_load_is_revoked_as_soon_as_it_is_the_only_one_that_can_have_been_given_up(table):
    loads = loading(table, 3)

    table.unlock(["a"])
    assert alive(loads) == [True] * 3, "nobody knows which"
    for load, _ in (loads[0], loads[2]):
        table.finish(load, "loaded")
        table.take("load", load.id)
        table.unlock(["a"])

    assert not alive(loads)[1]
    assert table.locked == 0


def test_a_result_that_was_not_fetched_is_no_lookup_whose_keys_may_be_unlocked(table):
    loads = loading(table, 1)
    found(table, "a", fetched=False)

    table.unlock(["a"])

    assert alive(loads) == [False]


def test_the_locks_of_a_request_that_was_aborted_before_its_result_was_fetched_are_returned_after_a_while():
    clock = Clock()
    table = TaskTable(clock)
    found(table, "a", "b", fetched=False)
    clock.now += FORGOTTEN_SECS / 2
    found(table, "b", fetched=True)

    clock.now += FORGOTTEN_SECS / 2
    assert table.free(["a", "b"]) == ["a"]
    table.unlock(["b"])
    assert table.free(["a", "b"]) == ["a", "b"]
    table.close()


def test_a_load_whose_result_is_never_fetched_is_forgotten_after_a_while():
    clock = Clock()
    table = TaskTable(clock)
    loads = loading(table, 2)
    load, _ = loads[0]
    table.unlock(["a"])
    table.finish(load, "loaded")

    clock.now += FORGOTTEN_SECS
    table.forget()

    assert load.id not in table._tasks["load"]
    assert not table._given_up
    assert alive(loads[1:]) == [True], "the other one is not the one that was given up"
    table.close()


@pytest.mark.parametrize("count", [2, 3])
def test_loads_of_equal_keys_that_were_all_given_up_are_forgotten_after_a_while(count):
    clock = Clock()
    table = TaskTable(clock)
    loads = loading(table, count)
    for load, _ in loads:
        table.unlock(["a"])
        table.finish(load, "loaded")

    clock.now += FORGOTTEN_SECS
    table.forget()

    assert leftovers(table) == NOTHING
    assert table.free(["a"]) == ["a"]
    table.close()


@pytest.mark.parametrize("count", [1, 3])
def test_results_that_nobody_fetches_are_dropped_after_a_while(count):
    clock = Clock()
    table = TaskTable(clock)
    tasks = [table.begin("store") for _ in range(count)]
    for task in tasks:
        table.finish(task, "aborted")
    clock.now += FORGOTTEN_SECS / 2
    late = table.begin("store")
    table.finish(late, "awaited")

    clock.now += FORGOTTEN_SECS / 2
    table.begin("store")

    assert [table.take("store", task.id) for task in tasks] == [None] * count
    assert table.take("store", late.id) == "awaited"
    table.close()


def test_what_is_locked_is_not_free(table):
    table.lock(["a", "b", "a"])
    table.unlock(["a", "b"])

    assert table.free(["a", "b", "c"]) == ["b", "c"]
    assert table.locked == 1
