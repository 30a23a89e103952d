"""Locks and loads of many requests, in any order that LMCache may bring them in."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfbucket_plugin.core.buffers import RevocableBuffer
from hfbucket_plugin.engine.mp_tasks import FORGOTTEN_SECS, Locks, TaskTable
from tests.support.plugin_support import Clock

LOAD, DROP, SHORTEN, GIVE_UP = "load", "drop", "shorten", "give up"


class Buffer:
    """Memory of the server's, which it frees when it is done with it."""

    def __init__(self):
        self.memory = SimpleNamespace(valid=True)
        self.lease = RevocableBuffer(memoryview(bytearray(4)), self.memory)


class Request:
    """Looks keys up; loads all, some or none of them; and either fetches and unlocks, or is given up at any point.

    As LMCache does: what it drops it unlocks before it loads the rest, and what it gives up it unlocks before it frees the memory.
    """

    def __init__(self, locks, task, keys):
        self.locks, self.task, self.keys = locks, task, keys
        locks.add(keys, task)
        self.load, self.buffers = None, []
        self.state = "found"

    def step(self, choice):
        """The next thing that happens to it; whether there was one."""
        match self.state, choice:
            case "found", _:
                self.locks.answered(self.task)
                self.state = "answered"
            case (
                "answered",
                "drop" | "give up",
            ):  # LMCache has it in L1 meanwhile, or has no memory; or it aborts the request
                self.locks.unlock(self.keys)
                self.state = "over"
            case "answered", _:
                if choice == SHORTEN and len(self.keys) > 1:
                    self.locks.unlock(self.keys[1:])
                    self.keys = self.keys[:1]
                self.buffers = [Buffer() for _ in self.keys]
                self.load = self.locks.begin(self.keys, self.buffers)
                self.state = "loading"
            case "loading", "give up":
                self._give_up()
                self.state = "late"
            case "loading", _:
                self.locks.end(self.load)
                self.state = "ended"
            case "ended", "give up":
                self._give_up()
                self.state = "over"
            case "ended", _:
                self.locks.fetched(self.load)
                self.locks.unlock(self.keys)
                self.state = "over"
            case "late", _:
                self.locks.end(self.load)
                self.state = "over"
            case _:
                return False
        return True

    def _give_up(self):
        self.locks.unlock(self.keys)
        for buffer in self.buffers:
            buffer.memory.valid = False

    @property
    def live(self):
        return all(buffer.lease.live for buffer in self.buffers)


keys = st.lists(st.integers(0, 3), min_size=1, max_size=3, unique=True).map(tuple)
wanted = st.lists(keys, min_size=1, max_size=6)
steps = st.lists(st.tuples(st.integers(0, 5), st.sampled_from([LOAD, DROP, SHORTEN, GIVE_UP])), max_size=80)


def made(locks, wanted):
    return [Request(locks, task, one) for task, one in enumerate(wanted)]


@given(wanted=wanted, steps=steps)
def test_what_is_given_up_writes_no_more_what_is_not_goes_on_and_all_locks_are_returned(wanted, steps):
    clock = Clock()
    locks = Locks(clock)
    requests = made(locks, wanted)

    for number, choice in steps:
        requests[number % len(requests)].step(choice)
        for request in requests:
            assert request.state != "late" or not request.live
            assert request.state != "loading" or request.live, "another request was given up, or did not load"

    for request in requests:
        while request.step(LOAD):
            pass
    assert len(locks) == 0
    assert not +locks._found
    assert all(not load.fetched for load in locks._loads), "what is left was given up, and is not known yet"

    clock.now += FORGOTTEN_SECS
    locks.forget()
    assert (locks._loads, locks._given_up) == ([], [])


@given(wanted=wanted, steps=steps)
def test_where_nothing_is_given_up_nothing_is_revoked_and_nothing_is_kept(wanted, steps):
    locks = Locks(Clock())
    requests = made(locks, wanted)

    for number, choice in [*steps, *[(number, LOAD) for number in range(len(requests)) for _ in range(4)]]:
        requests[number % len(requests)].step(DROP if choice == GIVE_UP and requests[0].state == "answered" else LOAD)
        assert all(request.live for request in requests)

    assert (len(locks), locks._found, locks._loads, locks._given_up) == (0, {}, [], [])


def loading(locks, count, keys=("a",)):
    """Loads of the same keys, by as many lookups."""
    loads = []
    for _ in range(count):
        locks.add(keys)
        buffers = [Buffer() for _ in keys]
        loads.append((locks.begin(keys, buffers), buffers))
    return loads


def alive(loads):
    return [all(buffer.lease.live for buffer in buffers) for _, buffers in loads]


def test_an_unlock_of_what_was_looked_up_and_not_loaded_revokes_no_load_of_the_same_keys():
    locks = Locks()
    loads = loading(locks, 2)
    locks.add(["a"], task=7)
    locks.answered(7)

    locks.unlock(["a"])

    assert alive(loads) == [True, True]


def test_a_load_is_revoked_as_soon_as_it_is_the_only_one_that_can_have_been_given_up():
    locks = Locks()
    loads = loading(locks, 3)

    locks.unlock(["a"])
    assert alive(loads) == [True] * 3, "nobody knows which"
    for load, _ in (loads[0], loads[2]):
        locks.end(load)
        locks.fetched(load)
        locks.unlock(["a"])

    assert not alive(loads)[1]
    assert len(locks) == 0


def test_a_result_that_was_not_fetched_is_no_lookup_whose_keys_may_be_unlocked():
    locks = Locks()
    loads = loading(locks, 1)
    locks.add(["a"], task=7)

    locks.unlock(["a"])

    assert alive(loads) == [False]


def test_the_locks_of_a_request_that_was_aborted_before_its_result_was_fetched_are_returned_after_a_while():
    clock = Clock()
    locks = Locks(clock)
    locks.add(["a", "b"], task=1)
    clock.now += FORGOTTEN_SECS / 2
    locks.add(["b"], task=2)
    locks.answered(2)

    clock.now += FORGOTTEN_SECS / 2
    assert locks.free(["a", "b"]) == ["a"]
    locks.unlock(["b"])
    assert locks.free(["a", "b"]) == ["a", "b"]


def test_a_load_whose_result_is_never_fetched_is_forgotten_after_a_while():
    clock = Clock()
    locks = Locks(clock)
    loads = loading(locks, 2)
    load, _ = loads[0]
    locks.unlock(["a"])
    locks.end(load)

    clock.now += FORGOTTEN_SECS
    locks.forget()

    assert load not in locks._loads
    assert not locks._given_up
    assert alive(loads[1:]) == [True], "the other one is not the one that was given up"


@pytest.mark.parametrize("count", [2, 3])
def test_loads_of_equal_keys_that_were_all_given_up_are_forgotten_after_a_while(count):
    clock = Clock()
    locks = Locks(clock)
    loads = loading(locks, count)
    for load, _ in loads:
        locks.unlock(["a"])
        locks.end(load)

    clock.now += FORGOTTEN_SECS
    locks.forget()

    assert not locks._loads
    assert not locks._given_up
    assert locks.free(["a"]) == ["a"]


@pytest.mark.parametrize("count", [1, 3])
def test_results_that_nobody_fetches_are_dropped_after_a_while(count):
    clock = Clock()
    board = TaskTable(clock)
    tasks = [board.begin() for _ in range(count)]
    for task in tasks:
        board.finish(task, "aborted")
    clock.now += FORGOTTEN_SECS / 2
    late = board.begin()
    board.finish(late, "awaited")

    clock.now += FORGOTTEN_SECS / 2
    board.begin()

    assert [board.take(task) for task in tasks] == [None] * count
    assert board.take(late) == "awaited"
    board.close()


def test_what_is_locked_is_not_free():
    locks = Locks()
    locks.add(["a", "b", "a"])
    locks.unlock(["a", "b"])

    assert locks.free(["a", "b", "c"]) == ["b", "c"]
    assert len(locks) == 1
