import threading

import pytest

from hfbucket_plugin.core.concurrency import ByteGate
from hfbucket_plugin.core.deadline import Deadline
from hfbucket_plugin.errors import DeadlineError, UnsentError
from tests.support.plugin_support import eventually, in_threads


def soon(seconds=30.0):
    return Deadline.after(seconds)


def test_what_is_held_at_one_time_stays_within_the_limit():
    gate, lock = ByteGate(100), threading.Lock()
    held, most = 0, 0

    def use(number):
        nonlocal held, most
        for amount in (10 * (number % 10) + 1, 100, 3):
            with gate.hold(amount, soon(), "x"):
                with lock:
                    held += amount
                    most = max(most, held)
                with lock:
                    held -= amount

    assert in_threads(20, use) == [None] * 20
    assert 0 < most <= 100


def test_several_are_let_in_as_long_as_there_is_room():
    gate = ByteGate(100)

    def one_more():
        with gate.hold(1, soon(0.05), "k"):
            pass

    with gate.hold(60, soon(), "x"), gate.hold(40, soon(), "x"), gate.hold(0, soon(), "x"):
        assert gate._held == 100
        with pytest.raises(DeadlineError, match=r"k: no room within 0\.05 s"):
            one_more()
    with gate.hold(100, soon(0), "x"):
        pass


def test_one_that_wants_more_than_all_is_let_in_alone():
    gate, inside = ByteGate(100), threading.Event()
    release = threading.Event()

    def hold():
        with gate.hold(1000, soon(), "x"):
            inside.set()
            release.wait(30)

    with gate.hold(1, soon(), "x"):
        holder = threading.Thread(target=hold)
        holder.start()
        assert not inside.wait(0.05)
    assert inside.wait(30)
    with pytest.raises(DeadlineError), gate.hold(1, soon(0.05), "x"):
        pass
    release.set()
    holder.join()
    with gate.hold(100, soon(), "x"):
        pass


def test_an_error_inside_gives_the_room_back():
    gate = ByteGate(100)

    for _ in range(5):
        with pytest.raises(KeyError), gate.hold(80, soon(1), "x"):
            raise KeyError


def test_those_who_wait_come_in_when_there_is_room():
    gate, came = ByteGate(100), []

    def wait(number):
        with gate.hold(50, soon(), "x"):
            came.append(number)

    with gate.hold(100, soon(), "x"):
        threads = [threading.Thread(target=wait, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        assert came == []
    eventually(lambda: sorted(came) == [0, 1, 2, 3])
    for thread in threads:
        thread.join()


def test_one_that_wants_all_of_it_is_not_passed_by_small_ones_for_ever():
    gate, came = ByteGate(100), []

    def wait(amount):
        with gate.hold(amount, soon(), "x"):
            came.append(amount)

    with gate.hold(1, soon(), "x"):
        threads = []
        for amount in (100, 2, 3):
            threads.append(threading.Thread(target=wait, args=(amount,)))
            threads[-1].start()
            eventually(lambda: len(gate._queue) == len(threads))
        assert came == [], "there is room for the small ones, but one came before them"
    for thread in threads:
        thread.join(30)

    assert came[0] == 100
    assert sorted(came) == [2, 3, 100]


def test_one_that_gives_up_lets_those_behind_it_in():
    gate, came = ByteGate(100), threading.Event()

    def wait_in_vain():
        with pytest.raises(UnsentError), gate.hold(100, soon(0.3), "x"):
            pass

    def wait():
        with gate.hold(5, soon(), "x"):
            came.set()

    with gate.hold(50, soon(), "x"):
        first = threading.Thread(target=wait_in_vain)
        first.start()
        eventually(lambda: gate._queue)
        second = threading.Thread(target=wait)
        second.start()
        assert came.wait(30)
        first.join(30)
    second.join(30)
