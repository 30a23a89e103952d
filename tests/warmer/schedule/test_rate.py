import pytest
from hypothesis import given
from hypothesis import strategies as st

from warmer.cluster.schedule_setup import TimeLimit
from warmer.schedule.rate import MovingAverage, TokenBucket

steps = st.lists(st.tuples(st.floats(0, 5), st.integers(0, 300)), max_size=60)


@given(st.floats(1, 200), steps)
def test_over_any_time_no_more_goes_than_the_rate_a_second_more_and_one_piece(rate, steps):
    bucket, now, gone = TokenBucket(rate), 0.0, []
    for secs, size in steps:
        now += secs
        if bucket.ready(now):
            bucket.spend(size)
            gone.append((now, size))
    largest = max((size for _, size in gone), default=0)
    for start, _ in gone:
        for end in (at for at, _ in gone if at >= start):
            amount = sum(size for at, size in gone if start <= at <= end)
            assert amount <= rate * (end - start) + rate + largest + 1e-6


@given(st.floats(1, 200), st.integers(1, 300))
def test_whatever_the_size_it_goes_at_last(rate, size):
    bucket = TokenBucket(rate)
    bucket.spend(size)
    assert bucket.ready(size / rate + 1.0)


def test_without_a_rate_everything_goes():
    bucket = TokenBucket(None)
    bucket.spend(10**15)
    assert bucket.ready(0.0)


def test_time_that_goes_backwards_gives_nothing():
    bucket = TokenBucket(10.0, now=100.0)
    bucket.spend(10)
    assert not bucket.ready(50.0)
    assert not bucket.ready(100.0)
    assert bucket.ready(101.0)


def test_a_rate_of_nothing_is_refused():
    with pytest.raises(ValueError, match="more than nothing"):
        TokenBucket(0)


def test_a_pace_follows_what_was_measured_last():
    pace = MovingAverage()
    assert pace.secs_per_byte is None
    pace.add(100, 1.0)
    assert pace.secs_per_byte == 0.01
    for _ in range(50):
        pace.add(100, 10.0)
    assert pace.secs_per_byte == pytest.approx(0.1, rel=0.01)


def test_a_time_limit_stops_a_run_that_nobody_stopped():
    class Stop:
        requested = False

    assert not TimeLimit(Stop(), None).requested
    assert not TimeLimit(Stop(), 1000.0).requested
    assert TimeLimit(Stop(), 0.0).requested
    Stop.requested = True
    assert TimeLimit(Stop(), None).requested


def test_what_is_given_back_is_no_more_than_one_burst():
    bucket = TokenBucket(100.0)
    bucket.spend(1000)
    bucket.give_back(300)
    assert not bucket.ready(5.9)
    assert bucket.ready(6.1)
    bucket.give_back(5000)
    bucket.spend(100)
    assert not bucket.ready(6.1)
    free = TokenBucket(None)
    free.give_back(10)
    assert free.ready(0.0)
