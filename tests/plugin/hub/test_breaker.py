"""When to stop trying, and when to begin again."""

import logging
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfbucket_plugin.core import telemetry
from hfbucket_plugin.core.telemetry import MemorySink
from hfbucket_plugin.errors import (
    AccessDeniedError,
    BreakerOpenError,
    BucketMissingError,
    BudgetError,
    DeadlineError,
    ObjectMissingError,
    ThrottledError,
    TransportError,
)
from hfbucket_plugin.hub.circuit_breaker import PARTS, CircuitBreaker, CircuitBreakers
from tests.support.buckets import instance_settings
from tests.support.models import untimed
from tests.support.waiting import Clock, eventually


def opened(clock, failures=3, first=1.0, longest=8.0):
    breaker = CircuitBreaker(failures, first, longest, clock)
    for _ in range(failures):
        breaker.failed()
    assert breaker.is_open
    return breaker


@untimed
@given(st.integers(1, 6), st.lists(st.sampled_from(["failed", "succeeded"]), max_size=40))
def test_it_opens_on_so_many_failures_in_a_row_and_stays_open(limit, events):
    breaker = CircuitBreaker(limit, 1.0, 8.0, Clock())
    row, was_open = 0, False
    for event in events:
        opens = getattr(breaker, event)()
        row = row + 1 if event == "failed" else 0
        assert bool(opens) == (not was_open and row >= limit), "it says once that it opened"
        was_open = was_open or row >= limit
        assert breaker.is_open == was_open, "what was begun before it opened does not close it"


def test_probes_are_put_off_for_twice_as_long_each_time_up_to_a_bound():
    clock = Clock()
    breaker = opened(clock)
    for expected in (1.0, 2.0, 4.0, 8.0, 8.0):
        assert 0.8 * expected <= breaker.probe_in <= expected
        clock.now += expected
        assert breaker.probe_in == 0
        breaker.probed(well=False)
    assert breaker.is_open


def test_a_probe_that_succeeds_closes_it_and_the_count_start_over():
    breaker = opened(Clock())
    breaker.probed(well=True)

    assert not breaker.is_open
    assert not breaker.failed()
    assert not breaker.is_open


@pytest.mark.parametrize(("steady", "expected"), [(1.0, 4.0), (100.0, 1.0)])
def test_one_that_opens_again_soon_goes_on_with_its_backoff(steady, expected):
    clock = Clock()
    breaker = opened(clock)
    clock.now += 1
    breaker.probed(well=False)  # the next one is due in 2 s, the one after it in 4
    clock.now += 2
    breaker.probed(well=True)
    clock.now += steady
    for _ in range(3):
        breaker.failed()

    assert 0.8 * expected <= breaker.probe_in <= expected


def test_after_two_bad_probes_one_request_is_tried_and_again_later():
    breaker = opened(Clock())
    assert not breaker.try_anyway()
    tried = []
    for probe in range(1, 13):
        breaker.probed(well=False)
        if breaker.try_anyway():
            tried.append(probe)
        assert not breaker.try_anyway(), "one"
        assert not breaker.failed()
        assert not breaker.succeeded(), "the one that was tried has failed"
        assert breaker.is_open

    assert tried == [2, 3, 4, 5, 8, 11]


def test_a_request_that_is_tried_and_succeeds_closes_it():
    breaker = opened(Clock())
    for _ in range(2):
        breaker.probed(well=False)
        assert not breaker.succeeded(), "begun before it opened"
    assert breaker.try_anyway()

    assert breaker.succeeded()

    assert not breaker.is_open
    assert not breaker.try_anyway()
    for _ in range(3):
        breaker.failed()
    assert breaker.is_open
    assert not breaker.succeeded(), "the trial was of another time"


# --- the three of an instance ----------------------------------------------------------------------------------------


@pytest.fixture
def tally():
    return MemorySink()


@pytest.fixture
def all_breakers(tally):
    made = []

    def make(probe, **values):
        values = {"breaker_probe_secs": 0.01, "breaker_max_probe_secs": 0.02} | values
        settings = instance_settings("http://127.0.0.1:1", "a/b", **values)
        made.append(CircuitBreakers(settings, "hfbucket", tally, dict.fromkeys(PARTS, probe)))
        return made[-1]

    yield make
    for breakers in made:
        breakers.close()


def fail(breakers, part="read", times=3):
    for _ in range(times):
        breakers.ended(part, TransportError("no answer"))


def test_a_part_that_fails_is_given_up_probed_told_and_taken_up_again(all_breakers, tally, caplog):
    caplog.set_level(logging.WARNING)
    well, probes = threading.Event(), []

    def probe():
        probes.append(1)
        if not well.is_set():
            raise DeadlineError("still no answer")

    breakers = all_breakers(probe)
    fail(breakers)

    assert breakers.is_open("read")
    assert not breakers.is_open("lookup")
    assert tally.get(telemetry.BREAKER_OPEN, part="read") == 1
    assert breakers.status().keys() == {"read"}
    with pytest.raises(BreakerOpenError, match="no answer"):
        breakers.check("read")
    breakers.check("write")
    eventually(lambda: len(probes) >= 3)
    assert "still no answer" in breakers.reason("read")

    well.set()
    eventually(lambda: not breakers.is_open("read"))
    breakers.check("read")
    eventually(lambda: tally.get(telemetry.BREAKER_OPEN, part="read") == 0)
    assert tally.get(telemetry.BREAKER_CHANGES, part="read", to="open") == 1
    eventually(lambda: tally.get(telemetry.BREAKER_CHANGES, part="read", to="closed") == 1)
    assert "read is given up for now" in caplog.text
    assert "read works again" in caplog.text


@pytest.mark.parametrize("error", [AccessDeniedError("no", 401), ThrottledError("later"), None], ids=str)
def test_an_answer_is_an_answer_though_it_refuses(all_breakers, error):
    breakers = all_breakers(lambda: None)
    fail(breakers, times=2)
    breakers.ended("read", error)
    fail(breakers, times=2)

    assert not breakers.is_open("read")


@pytest.mark.parametrize("error", [BudgetError("used up"), BreakerOpenError("open")], ids=str)
def test_what_was_never_asked_says_nothing(all_breakers, error):
    breakers = all_breakers(lambda: None, breaker_probe_secs=60, breaker_max_probe_secs=60)
    fail(breakers, times=2)
    breakers.ended("read", error)
    fail(breakers, times=1)

    assert breakers.is_open("read")


@pytest.mark.parametrize(
    ("part", "error", "closes"),
    [
        ("lookup", AccessDeniedError("no", 403), True),
        ("read", AccessDeniedError("no", 403), False),
        ("write", AccessDeniedError("no", 403), True),
        ("lookup", BucketMissingError("none"), True),
        ("read", ObjectMissingError("none"), True),
        ("lookup", ThrottledError("later"), False),
        ("read", BudgetError("used up"), False),
        ("read", ValueError(), False),
    ],
)
def test_what_a_probe_says(all_breakers, part, error, closes):
    probed = threading.Event()

    def probe():
        probed.set()
        raise error

    breakers = all_breakers(probe, breaker_max_probe_secs=60)
    fail(breakers, part)

    assert probed.wait(30)
    if closes:
        eventually(lambda: not breakers.is_open(part))
    else:
        eventually(lambda: "no answer" not in breakers.reason(part))
        assert breakers.is_open(part)


def test_an_open_breaker_whose_prober_could_not_start_is_probed_when_somebody_asks(all_breakers, monkeypatch):
    breakers = all_breakers(lambda: None)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", lambda _self: (_ for _ in ()).throw(RuntimeError("no thread left")))
        fail(breakers)
    assert breakers.is_open("read")

    def works():
        try:
            breakers.check("read")
        except BreakerOpenError:
            return False
        return True

    assert eventually(works)


def test_a_closed_guard_probes_no_more(all_breakers):
    probes = []
    breakers = all_breakers(lambda: probes.append(1), breaker_probe_secs=60, breaker_max_probe_secs=60)
    fail(breakers)

    breakers.close()

    eventually(lambda: not [one for one in threading.enumerate() if one.name == "hfbucket-probe-hfbucket"])
    assert probes == []
    fail(breakers, "lookup")
    assert not breakers.is_open("lookup")
