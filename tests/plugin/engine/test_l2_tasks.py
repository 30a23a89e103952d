"""Tasks that are submitted, signalled, and whose results are fetched once."""

import os
import select
import threading

from hypothesis import given
from hypothesis import strategies as st
from lmcache.v1.platform import consume_fd

from hfbucket_plugin.engine.mp_tasks import TaskTable
from tests.support.plugin_support import in_threads, untimed


def signalled(board):
    return bool(select.select([board.fd], [], [], 0)[0])


def test_a_task_is_signalled_when_it_ends_and_its_result_is_given_once():
    board = TaskTable()
    task = board.begin()
    assert board.under_way == 1
    assert not signalled(board)
    assert board.take(task) is None

    board.finish(task, "done")

    assert signalled(board)
    assert board.under_way == 0
    consume_fd(board.fd)
    assert not signalled(board)
    assert board.take(task) == "done"
    assert board.take(task) is None
    assert board.take_all() == {}
    board.close()


def test_results_that_nobody_fetched_stay_and_come_all_at_once():
    board = TaskTable()
    tasks = [board.begin() for _ in range(3)]
    for task in tasks:
        board.finish(task, task * 10)
    assert board.take(tasks[1]) == tasks[1] * 10

    assert board.take_all() == {tasks[0]: tasks[0] * 10, tasks[2]: tasks[2] * 10}
    assert board.take_all() == {}
    board.close()


def test_a_result_that_is_false_is_a_result():
    board = TaskTable()
    task = board.begin()
    board.finish(task, 0)

    assert board.take_all() == {task: 0}
    board.close()


def test_a_board_that_is_closed_signals_nobody_and_keeps_nothing():
    board = TaskTable()
    ended, late = board.begin(), board.begin()
    board.finish(ended, "done")
    fd = board.fd
    board.close()
    board.close()

    reused = os.eventfd(0, os.EFD_NONBLOCK)  # the system gives out the lowest number that is free
    try:
        board.finish(late, "late")
        assert board.take(ended) is None
        assert board.take(late) is None
        assert board.take_all() == {}
        assert board.under_way == 0
        board.finish(board.begin(), "later still")
        assert select.select([reused], [], [], 0)[0] == [], "a descriptor that is another's now"
        assert isinstance(fd, int)
    finally:
        os.close(reused)


def test_numbers_are_unique_and_no_result_is_lost_or_given_twice_among_threads():
    board = TaskTable()
    fetched, stop = [], threading.Event()

    def fetch():
        while not stop.is_set() or board.under_way or signalled(board):
            if select.select([board.fd], [], [], 0.01)[0]:
                consume_fd(board.fd)
                fetched.extend(board.take_all().items())

    fetchers = [threading.Thread(target=fetch) for _ in range(2)]
    for one in fetchers:
        one.start()

    def work(_number):
        tasks = [board.begin() for _ in range(200)]
        for task in tasks:
            board.finish(task, task)
        return tasks

    tasks = [task for many in in_threads(8, work) for task in many]
    stop.set()
    for one in fetchers:
        one.join(30)
    fetched += board.take_all().items()

    assert len(set(tasks)) == 1600
    assert sorted(fetched) == sorted((task, task) for task in tasks)
    board.close()


@untimed
@given(st.lists(st.tuples(st.sampled_from(["begin", "finish", "take", "all"]), st.integers(0, 9)), max_size=50))
def test_as_a_plain_model(steps):
    board = TaskTable()
    open_, results, begun = [], {}, []
    try:
        for step, which in steps:
            if step == "begin":
                open_.append(board.begin())
                begun.append(open_[-1])
            elif step == "finish" and open_:
                task = open_.pop(which % len(open_))
                board.finish(task, (task, which))
                results[task] = (task, which)
                assert signalled(board)
            elif step == "take" and begun:
                task = begun[which % len(begun)]
                assert board.take(task) == results.pop(task, None)
            elif step == "all":
                assert board.take_all() == results
                results = {}
            assert board.under_way == len(open_)
        assert len(set(begun)) == len(begun)
    finally:
        board.close()
