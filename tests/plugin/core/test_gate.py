import threading

import pytest

from hfbucket_plugin.core.concurrency import ByteSemaphore
from hfbucket_plugin.core.deadline import Deadline
from hfbucket_plugin.errors import DeadlineError, UnsentError
from tests.support.waiting import eventually, in_threads


def soon(seconds=30.0):
    return Deadline.after(seconds)


def test_what_is_held_at_one_time_stays_within_the_limit():
    semaphore, lock = ByteSemaphore(100), threading.Lock()
    held, most = 0, 0

    def use(number):
        nonlocal held, most
        for amount in (10 * (number % 10) + 1, 100, 3):
            with semaphore.hold(amount, soon(), "x"):
                with lock:
                    held += amount
                    most = max(most, held)
                with lock:
                    held -= amount

    assert in_threads(20, use) == [None] * 20
    assert 0 < most <= 100


def test_several_are_let_in_as_long_as_there_is_room():
    semaphore = ByteSemaphore(100)

    def one_more():
        with semaphore.hold(1, soon(0.05), "k"):
            pass

    with semaphore.hold(60, soon(), "x"), semaphore.hold(40, soon(), "x"), semaphore.hold(0, soon(), "x"):
        assert semaphore._held == 100
        with pytest.raises(DeadlineError, match=r"k: no room within 0\.05 s"):
            one_more()
    with semaphore.hold(100, soon(0), "x"):
        pass


def test_one_that_wants_more_than_all_is_let_in_alone():
    semaphore, inside = ByteSemaphore(100), threading.Event()
    release = threading.Event()

    def hold():
        with semaphore.hold(1000, soon(), "x"):
            inside.set()
            release.wait(30)

    with semaphore.hold(1, soon(), "x"):
        holder = threading.Thread(target=hold)
        holder.start()
        assert not inside.wait(0.05)
    assert inside.wait(30)
    with pytest.raises(DeadlineError), semaphore.hold(1, soon(0.05), "x"):
        pass
    release.set()
    holder.join()
    with semaphore.hold(100, soon(), "x"):
        pass


def test_an_error_inside_gives_the_room_back():
    semaphore = ByteSemaphore(100)

    for _ in range(5):
        with pytest.raises(KeyError), semaphore.hold(80, soon(1), "x"):
            raise KeyError


def test_those_who_wait_come_in_when_there_is_room():
    semaphore, came = ByteSemaphore(100), []

    def wait(number):
        with semaphore.hold(50, soon(), "x"):
            came.append(number)

    with semaphore.hold(100, soon(), "x"):
        threads = [threading.Thread(target=wait, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        assert came == []
    eventually(lambda: sorted(came) == [0, 1, 2, 3])
    for thread in threads:
        thread.join()


def test_one_that_wants_all_of_it_is_not_passed_by_small_ones_for_ever():
    semaphore, came = ByteSemaphore(100), []

    def wait(amount):
        with semaphore.hold(amount, soon(), "x"):
            came.append(amount)

    with semaphore.hold(1, soon(), "x"):
        threads = []
        for amount in (100, 2, 3):
            threads.append(threading.Thread(target=wait, args=(amount,)))
            threads[-1].start()
            eventually(lambda: len(semaphore._queue) == len(threads))
        assert came == [], "there is room for the small ones, but one came before them"
    for thread in threads:
        thread.join(30)

    assert came[0] == 100
    assert sorted(came) == [2, 3, 100]


def test_one_that_gives_up_lets_those_behind_it_in():
    semaphore, came = ByteSemaphore(100), threading.Event()

    def wait_in_vain():
        with pytest.raises(UnsentError), semaphore.hold(100, soon(0.3), "x"):
            pass

    def wait():
        with semaphore.hold(5, soon(), "x"):
            came.set()

    with semaphore.hold(50, soon(), "x"):
        first = threading.Thread(target=wait_in_vain)
        first.start()
        eventually(lambda: semaphore._queue)
        second = threading.Thread(target=wait)
        second.start()
        assert came.wait(30)
        first.join(30)
    second.join(30)
