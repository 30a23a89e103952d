"""How often the Hub is called: our own cap, and the pauses that it asks for."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plugin_support import Clock, untimed

from hfbucket_plugin.deadlines import Deadline
from hfbucket_plugin.errors import BudgetError, ThrottledError
from hfbucket_plugin.pacing import Pacing, retry_after

USED_UP = {"ratelimit": '"api";r=0;t=40'}


class Lane:
    """Calls on a clock that sleeping moves."""

    def __init__(self, cap=None):
        self.clock = Clock()
        self.pacing = Pacing("hfbucket", cap, self.clock, self.sleep)
        self.slept = []
        self.made = []

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.clock.now += seconds

    def call(self, *, patient=False, seconds=1000.0):
        """Whether a call is made now, or why not."""
        try:
            self.pacing.admit("paths-info", Deadline.after(seconds), patient=patient)
        except ThrottledError as error:
            return error
        self.made.append(self.clock.now)
        return None


@untimed
@given(st.integers(1, 5), st.lists(st.tuples(st.floats(0, 30), st.booleans()), max_size=60))
def test_never_more_than_the_cap_in_any_minute(cap, events):
    lane = Lane(cap)
    for passes, patient in events:
        lane.clock.now += passes
        refused = lane.call(patient=patient)
        assert not (patient and refused)
        within = [at for at in lane.made if at > lane.clock.now - 60]
        assert len(within) <= cap
        assert isinstance(refused, BudgetError) <= (len(within) == cap)


def test_a_refusal_says_when_the_next_call_is_free():
    lane = Lane(2)
    lane.call()
    lane.clock.now += 10
    lane.call()

    refused = lane.call()

    assert refused.kind == "budget"
    assert refused.retry_after == pytest.approx(50)
    assert "max_hub_calls_per_minute" in str(refused)


def test_the_patient_wait_if_it_fits_their_deadline():
    lane = Lane(1)
    lane.call()

    assert isinstance(lane.call(patient=True, seconds=5), BudgetError)
    assert lane.slept == []
    assert lane.call(patient=True, seconds=100) is None
    assert sum(lane.slept) == pytest.approx(60)


@pytest.mark.parametrize(
    ("status", "headers", "pause"),
    [
        (429, {"retry-after": "7"}, 7),
        (429, {"ratelimit": '"api";r=0;t=9', "retry-after": "7"}, 9),
        (429, {"retry-after": "soon"}, 1),
        (429, {}, 1),
        (200, USED_UP, 40),
        (200, {"ratelimit": '"api";r=3;t=40'}, 0),
        (200, {}, 0),
        (429, {"retry-after": "999999"}, 300),
    ],
)
def test_pauses_that_the_hub_asks_for(status, headers, pause):
    lane = Lane()
    lane.pacing.heed(status, headers)

    assert lane.pacing.paused_secs == pytest.approx(pause)
    assert (lane.call() is None) == (pause == 0)
    lane.clock.now += pause + 0.01
    assert lane.call() is None


def test_a_429_without_a_word_is_waited_for_longer_each_time_until_something_else_is_answered():
    lane = Lane()
    pauses = []
    for _ in range(7):
        lane.pacing.heed(429, {})
        pauses.append(lane.pacing.paused_secs)
        lane.clock.now += pauses[-1] + 1
    assert pauses == pytest.approx([1, 2, 4, 8, 16, 30, 30])

    lane.pacing.heed(200, {})
    lane.pacing.heed(429, {})
    assert lane.pacing.paused_secs == pytest.approx(1)


def test_a_long_pause_is_scouted_and_ends_when_the_scout_is_answered():
    lane = Lane()
    lane.pacing.heed(429, {"retry-after": "300"})
    lane.pacing.heed(200, {})  # the answer to a call from before the pause
    assert isinstance(lane.call(), ThrottledError)

    lane.clock.now += 15
    assert lane.call() is None, "the scout"
    assert isinstance(lane.call(), ThrottledError), "and no other"
    lane.pacing.heed(429, {"retry-after": "300"})
    assert isinstance(lane.call(), ThrottledError)

    lane.clock.now += 15
    assert lane.call() is None
    lane.pacing.heed(200, {})
    assert lane.call() is None
    assert lane.pacing.paused_secs == 0


def test_who_waits_through_a_pause_may_become_the_scout():
    lane = Lane()
    lane.pacing.heed(429, {"retry-after": "100"})

    assert lane.call(patient=True) is None
    assert sum(lane.slept) == pytest.approx(15)


@given(st.dictionaries(st.sampled_from(["ratelimit", "retry-after", "x"]), st.text(max_size=30)))
def test_no_header_makes_it_raise(headers):
    value = retry_after(headers)

    assert value is None or value >= 0
