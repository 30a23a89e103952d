"""Reads go before puts."""

import threading
import time

import pytest

from hfbucket_plugin.core.concurrency import ReadPriority
from hfbucket_plugin.core.deadline import Deadline
from tests.support.waiting import eventually, in_threads


def soon():
    return Deadline.after(600)


def test_without_reads_nobody_waits():
    read_priority = ReadPriority()
    started = time.monotonic()

    read_priority.let_reads_pass(soon())

    assert time.monotonic() - started < 5
    assert read_priority.reads == 0


def test_a_writer_waits_until_the_last_read_has_ended():
    read_priority, events = ReadPriority(), []
    first, second = read_priority.reading(), read_priority.reading()
    first.__enter__()
    second.__enter__()
    writer = threading.Thread(
        target=lambda: (read_priority.let_reads_pass(soon()), events.append("passed")), daemon=True
    )
    writer.start()
    assert read_priority.reads == 2

    first.__exit__(None, None, None)
    assert read_priority.reads == 1
    writer.join(0.05)
    assert events == []
    second.__exit__(None, None, None)

    writer.join(30)
    assert events == ["passed"]


def test_a_writer_does_not_wait_longer_than_its_deadline():
    read_priority = ReadPriority()
    with read_priority.reading():
        started = time.monotonic()
        read_priority.let_reads_pass(Deadline.after(0.05))
        assert 0.04 < time.monotonic() - started < 5
        read_priority.let_reads_pass(Deadline.after(0))


def test_a_read_that_raises_has_ended_too():
    read_priority = ReadPriority()
    with pytest.raises(ValueError), read_priority.reading():
        raise ValueError

    assert read_priority.reads == 0
    read_priority.let_reads_pass(soon())


def test_all_writers_go_on_together():
    read_priority, passed = ReadPriority(), []
    reading = read_priority.reading()
    reading.__enter__()
    threads = [
        threading.Thread(target=lambda: (read_priority.let_reads_pass(soon()), passed.append(1)), daemon=True)
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    eventually(lambda: len(read_priority._quiet._waiters) == 4)

    reading.__exit__(None, None, None)
    for thread in threads:
        thread.join(30)

    assert len(passed) == 4


def test_the_count_is_right_among_threads():
    read_priority = ReadPriority()

    def read(_number):
        for _ in range(200):
            with read_priority.reading():
                assert read_priority.reads >= 1

    assert in_threads(8, read) == [None] * 8
    assert read_priority.reads == 0
