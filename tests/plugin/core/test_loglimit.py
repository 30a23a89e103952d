import logging

import pytest

from hfbucket_plugin.core.telemetry import RateLimitedLogger
from tests.support.waiting import Clock, in_threads


@pytest.fixture
def lines():
    heard = []
    log = logging.Logger("limited")  # noqa: LOG001 - one of its own, so that no other handler hears it
    handler = logging.Handler()
    handler.emit = lambda record: heard.append((record.levelname, record.getMessage()))
    log.addHandler(handler)
    return log, heard


def test_one_line_a_kind_and_interval_and_how_many_were_left_out(lines):
    log, heard = lines
    clock = Clock()
    limited = RateLimitedLogger(log, 30, clock)

    assert limited.warning("get denied", "first")
    assert [limited.warning("get denied", f"repeated {n}") for n in range(5)] == [False] * 5
    assert limited.warning("get transport", "another kind")
    clock.now += 29.9
    assert not limited.warning("get denied", "too soon")
    clock.now += 0.2
    assert limited.warning("get denied", "again")
    clock.now += 31
    assert limited.warning("get denied", "after silence")

    assert heard == [
        ("WARNING", "first"),
        ("WARNING", "another kind"),
        ("WARNING", "again (6 more like this since the last one)"),
        ("WARNING", "after silence"),
    ]


def test_a_message_is_no_format(lines):
    log, heard = lines

    RateLimitedLogger(log).warning("k", "100 %s of %d %")

    assert heard == [("WARNING", "100 %s of %d %")]


def test_threads_do_not_get_around_it(lines):
    log, heard = lines
    limited = RateLimitedLogger(log, 30, Clock())

    logged = in_threads(16, lambda number: [limited.warning("k", f"{number}") for _ in range(50)])

    assert sum(sum(one) for one in logged) == len(heard) == 1
