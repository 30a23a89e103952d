"""Reads go before puts."""

import threading
import time

import pytest

from hfbucket_plugin.core.concurrency import Traffic
from hfbucket_plugin.core.deadline import Deadline
from tests.support.plugin_support import eventually, in_threads


def soon():
    return Deadline.after(600)


def test_without_reads_nobody_waits():
    traffic = Traffic()
    started = time.monotonic()

    traffic.let_reads_pass(soon())

    assert time.monotonic() - started < 5
    assert traffic.reads == 0


def test_a_writer_waits_until_the_last_read_has_ended():
    traffic, events = Traffic(), []
    first, second = traffic.reading(), traffic.reading()
    first.__enter__()
    second.__enter__()
    writer = threading.Thread(target=lambda: (traffic.let_reads_pass(soon()), events.append("passed")), daemon=True)
    writer.start()
    assert traffic.reads == 2

    first.__exit__(None, None, None)
    assert traffic.reads == 1
    writer.join(0.05)
    assert events == []
    second.__exit__(None, None, None)

    writer.join(30)
    assert events == ["passed"]


def test_a_writer_does_not_wait_longer_than_its_deadline():
    traffic = Traffic()
    with traffic.reading():
        started = time.monotonic()
        traffic.let_reads_pass(Deadline.after(0.05))
        assert 0.04 < time.monotonic() - started < 5
        traffic.let_reads_pass(Deadline.after(0))


def test_a_read_that_raises_has_ended_too():
    traffic = Traffic()
    with pytest.raises(ValueError), traffic.reading():
        raise ValueError

    assert traffic.reads == 0
    traffic.let_reads_pass(soon())


def test_all_writers_go_on_together():
    traffic, passed = Traffic(), []
    reading = traffic.reading()
    reading.__enter__()
    threads = [
        threading.Thread(target=lambda: (traffic.let_reads_pass(soon()), passed.append(1)), daemon=True)
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    eventually(lambda: len(traffic._quiet._waiters) == 4)

    reading.__exit__(None, None, None)
    for thread in threads:
        thread.join(30)

    assert len(passed) == 4


def test_the_count_is_right_among_threads():
    traffic = Traffic()

    def read(_number):
        for _ in range(200):
            with traffic.reading():
                assert traffic.reads >= 1

    assert in_threads(8, read) == [None] * 8
    assert traffic.reads == 0
