"""How often the Hub is called: our own cap, and the pauses that it asks for."""

import contextlib

import httpx2
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hfbucket_plugin.core.deadline import Deadline, patience
from hfbucket_plugin.errors import BudgetError, ThrottledError
from hfbucket_plugin.hub.rate_limit import RateLimiter, retry_after
from tests.support.models import any_text, untimed
from tests.support.waiting import Clock, in_threads

USED_UP = {"ratelimit": '"api";r=0;t=40'}


class PacedCalls:
    """Calls on a clock that sleeping moves."""

    def __init__(self, cap=None, chance=0.0):
        self.clock = Clock()
        self.rate_limiter = RateLimiter("hfbucket", cap, self.clock, self.sleep, lambda: chance)
        self.slept = []
        self.made = []

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.clock.now += seconds

    def call(self, *, patient=False, seconds=1000.0):
        """Whether a call is made now, or why not."""
        try:
            self.rate_limiter.admit("paths-info", Deadline.after(seconds), patient=patient)
        except ThrottledError as error:
            return error
        self.made.append(self.clock.now)
        return None


@untimed
@given(st.integers(1, 5), st.lists(st.tuples(st.floats(0, 30), st.booleans()), max_size=60))
def test_never_more_than_the_cap_in_any_minute(cap, events):
    paced = PacedCalls(cap)
    for passes, patient in events:
        paced.clock.now += passes
        refused = paced.call(patient=patient)
        assert not (patient and refused)
        within = [at for at in paced.made if at > paced.clock.now - 60]
        assert len(within) <= cap
        assert isinstance(refused, BudgetError) <= (len(within) == cap)


class Until:
    """A deadline on a test's clock."""

    def __init__(self, clock, seconds):
        self._clock, self._at = clock, clock.now + seconds

    @property
    def for_a_pause(self):
        return max(0.0, self._at - self._clock.now)

    def pausing(self):
        return contextlib.nullcontext()


@untimed
@given(
    cap=st.integers(1, 5),
    wanted=st.lists(st.tuples(st.floats(0, 130), st.booleans(), st.floats(0, 130)), max_size=60),
)
def test_who_is_refused_is_told_the_exact_time_has_not_waited_and_could_not_have(cap, wanted):
    paced = PacedCalls(cap)
    for passes, patient, seconds in wanted:
        paced.clock.now += passes
        asked_at = paced.clock.now
        error = refusal(paced, Until(paced.clock, seconds), patient=patient)
        if error is None:
            waited = paced.clock.now - asked_at
            assert not waited or (patient and waited <= seconds + 0.002)
            paced.made.append(paced.clock.now)
        else:
            recent = [at for at in paced.made if at > asked_at - 60]
            assert len(recent) == cap, "refused only when the cap is used up"
            assert error.retry_after == pytest.approx(recent[0] + 60 - asked_at)
            assert not patient or error.retry_after >= seconds - 1e-6, "the patient wait as long as they can"
            assert paced.clock.now == asked_at


def refusal(paced, deadline, *, patient):
    try:
        paced.rate_limiter.admit("paths-info", deadline, patient=patient)
    except BudgetError as error:
        return error
    return None


def test_the_cap_holds_among_threads():
    paced = PacedCalls(10)

    results = in_threads(16, lambda _number: [paced.call() for _ in range(5)])

    assert sum(one is None for many in results for one in many) == 10


def test_without_a_cap_nothing_is_refused_or_remembered():
    paced = PacedCalls()

    assert [paced.call() for _ in range(1000)] == [None] * 1000
    assert not paced.rate_limiter._calls


def test_a_refusal_says_when_the_next_call_is_free():
    paced = PacedCalls(2)
    paced.call()
    paced.clock.now += 10
    paced.call()

    refused = paced.call()

    assert refused.kind == "budget"
    assert refused.retry_after == pytest.approx(50)
    assert "max_hub_calls_per_minute" in str(refused)


def test_the_patient_wait_if_it_fits_their_deadline():
    paced = PacedCalls(1)
    paced.call()

    assert isinstance(paced.call(patient=True, seconds=5), BudgetError)
    assert paced.slept == []
    assert paced.call(patient=True, seconds=100) is None
    assert sum(paced.slept) == pytest.approx(60)


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
        (404, USED_UP, 40),
        (500, USED_UP, 40),
        (200, {"retry-after": "120"}, 0),
        (503, {"retry-after": "120"}, 0),
    ],
)
def test_pauses_that_the_hub_asks_for(status, headers, pause):
    paced = PacedCalls()
    paced.rate_limiter.observe(status, headers)

    assert paced.rate_limiter.paused_secs == pytest.approx(pause)
    assert (paced.call() is None) == (pause == 0)
    paced.clock.now += pause + 0.01
    assert paced.call() is None


def test_a_429_without_a_word_is_waited_for_longer_each_time_until_something_else_is_answered():
    paced = PacedCalls()
    pauses = []
    for _ in range(7):
        paced.rate_limiter.observe(429, {})
        pauses.append(paced.rate_limiter.paused_secs)
        paced.clock.now += pauses[-1] + 1
    assert pauses == pytest.approx([1, 2, 4, 8, 16, 30, 30])

    paced.rate_limiter.observe(200, {})
    paced.rate_limiter.observe(429, {})
    assert paced.rate_limiter.paused_secs == pytest.approx(1)


def test_a_long_pause_is_scouted_and_ends_when_the_scout_is_answered():
    paced = PacedCalls()
    paced.rate_limiter.observe(429, {"retry-after": "300"})
    paced.rate_limiter.observe(200, {})  # the answer to a call from before the pause
    assert isinstance(paced.call(), ThrottledError)

    paced.clock.now += 15
    assert paced.call() is None, "the probe request"
    assert isinstance(paced.call(), ThrottledError), "and no other"
    paced.rate_limiter.observe(429, {"retry-after": "300"})
    assert isinstance(paced.call(), ThrottledError)

    paced.clock.now += 15
    assert isinstance(paced.call(), ThrottledError), "the next one goes later"
    paced.clock.now += 45
    assert paced.call() is None
    paced.rate_limiter.observe(200, {})
    assert paced.call() is None
    assert paced.rate_limiter.paused_secs == 0


@pytest.mark.parametrize("chance", [0.0, 0.5, 1.0])
def test_a_process_scouts_a_window_of_the_hubs_twice_at_most(chance):
    paced = PacedCalls(chance=chance)
    paced.rate_limiter.observe(429, {"retry-after": "300"})
    began = paced.clock.now
    while paced.clock.now < began + 300:
        if paced.call() is None:
            paced.rate_limiter.observe(429, {"retry-after": str(int(began + 300 - paced.clock.now))})
        paced.clock.now += 1

    assert 1 <= len(paced.made) <= 2
    assert paced.made[0] - began == pytest.approx(15 * (1 + chance), abs=1)


def test_pauses_of_many_processes_end_at_different_times():
    ends = []
    for chance in (0.0, 0.5, 1.0):
        paced = PacedCalls(chance=chance)
        paced.rate_limiter.observe(429, {"retry-after": "100"})
        paced.clock.now += 10
        paced.rate_limiter.observe(
            429, {"retry-after": "90"}
        )  # counts down, as the Hub's does: the share stays that of the pause
        ends.append(paced.rate_limiter.paused_secs)

    assert ends == pytest.approx([90, 95, 100])


def test_pauses_do_not_count_against_the_time_of_a_patient_call():
    paced = PacedCalls()
    paced.rate_limiter.observe(429, {"retry-after": "10"})
    with patience(Deadline.after(100)):
        call = Deadline.patient(1)
        assert call.for_a_pause == pytest.approx(100, abs=5)
        paced.rate_limiter.admit("tree", call, patient=True)
        assert not call.passed
    paced.rate_limiter.observe(429, {"retry-after": "10"})
    with patience(Deadline.after(5)), pytest.raises(ThrottledError):
        paced.rate_limiter.admit("tree", Deadline.patient(60), patient=True)
    with pytest.raises(ThrottledError):
        paced.rate_limiter.admit("tree", Deadline.patient(1), patient=True)


def test_who_waits_through_a_pause_may_become_the_scout():
    paced = PacedCalls()
    paced.rate_limiter.observe(429, {"retry-after": "100"})

    assert paced.call(patient=True) is None
    assert sum(paced.slept) == pytest.approx(15)


def test_the_patient_wait_for_a_pause_that_ends_in_time_and_for_no_other():
    paced = PacedCalls()
    paced.rate_limiter.observe(429, {"retry-after": "10"})

    with pytest.raises(ThrottledError):
        paced.rate_limiter.admit("paths-info", Until(paced.clock, 10), patient=True)
    assert paced.slept == []
    paced.rate_limiter.admit("paths-info", Until(paced.clock, 11), patient=True)
    assert paced.slept == [10]


def test_the_patient_wait_for_the_pause_and_the_budget_one_after_the_other():
    paced = PacedCalls(1)
    paced.call()
    paced.rate_limiter.observe(429, {"retry-after": "10"})

    assert paced.call(patient=True) is None

    assert sum(paced.slept) == pytest.approx(60)


def test_who_waits_looks_again_since_the_pause_may_have_grown():
    paced = PacedCalls()
    paced.rate_limiter.observe(429, {"retry-after": "10"})

    def sleep(seconds):
        paced.sleep(seconds)
        if len(paced.slept) == 1:
            paced.rate_limiter.observe(429, {"retry-after": "5"})

    paced.rate_limiter._sleep = sleep
    assert paced.call(patient=True) is None

    assert paced.slept == [10, 5]


def test_a_shorter_pause_does_not_cut_a_longer_one_short():
    paced = PacedCalls()
    paced.rate_limiter.observe(429, {"retry-after": "100"})
    paced.rate_limiter.observe(429, {"retry-after": "1"})
    paced.rate_limiter.observe(429, {})
    paced.rate_limiter.observe(200, {"ratelimit": '"api";r=0;t=3'})

    assert paced.rate_limiter.paused_secs == 100


# --- the forms that answers have --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": " 7 "}, 7),
        ({"retry-after": "0"}, 0),
        ({"retry-after": ""}, None),
        ({"retry-after": "-7"}, None),
        ({"retry-after": "1.5"}, None),
        ({"retry-after": "Wed, 21 Oct 2099 07:28:00 GMT"}, None),
        ({"retry-after": "Wed, 21 Oct 2099 07:28:00 GMT", "date": "Wed, 21 Oct 2099 07:27:30 GMT"}, 30),
        ({"retry-after": "Wed, 21 Oct 2099 07:28:00 GMT", "date": "Wed, 21 Oct 2099 07:29:00 GMT"}, 0),
        ({"retry-after": "Wed, 21 Oct 99999 07:28:00 +1400", "date": "Wed, 21 Oct 2099 07:29:00 GMT"}, None),
        ({"retry-after": "\u0667"}, None),
        ({"retry-after": "²"}, None),
        ({"ratelimit": '"api";r=3;t=55', "retry-after": "7"}, 7),
        ({"ratelimit": '"api";r=3;t=55'}, None),
        ({"ratelimit": "garbage", "retry-after": "7"}, 7),
        ({"ratelimit": '"api";r=-1;t=5'}, None),
        (httpx2.Headers({"Retry-After": "7"}), 7),
        (httpx2.Headers({"RateLimit": '"api";r=0;t=55'}), 55),
    ],
    ids=str,
)
def test_how_long_a_429_asks_to_wait(headers, seconds):
    assert retry_after(headers) == seconds


digits = st.integers(0, 10**30).map(str) | st.just("9" * 5000)


@untimed
@given(
    headers=st.dictionaries(
        st.sampled_from(["retry-after", "ratelimit", "ratelimit-policy"]),
        any_text
        | digits
        | st.builds('"api";r={};t={}'.format, digits, digits)
        | st.builds('"w";"a";q={};w={}'.format, digits, digits),
    ),
    status=st.sampled_from([200, 404, 429, 500]),
)
@example(headers={"ratelimit": f'"api";r=0;t={"9" * 5000}'}, status=200)
@example(headers={"retry-after": "9" * 5000}, status=429)
def test_no_header_of_anybodys_breaks_it_and_the_pause_stays_bounded(headers, status):
    paced = PacedCalls()
    paced.rate_limiter.observe(status, headers)

    assert 0 <= paced.rate_limiter.paused_secs <= 300
    wait = retry_after(headers)
    assert wait is None or wait >= 0


def test_work_in_the_background_leaves_three_quarters_of_the_cap_to_others():
    paced = PacedCalls(8)
    assert paced.rate_limiter.background_wait_secs == 0
    for _ in range(2):
        assert paced.call() is None
        paced.clock.now += 10

    assert paced.rate_limiter.background_wait_secs == 40
    paced.clock.now += 41
    assert paced.rate_limiter.background_wait_secs == 0
    assert PacedCalls(None).rate_limiter.background_wait_secs == 0


@pytest.mark.parametrize("cap", [None, 8])
def test_work_in_the_background_waits_for_the_end_of_a_pause_with_and_without_a_cap(cap):
    paced = PacedCalls(cap)
    paced.rate_limiter.observe(429, {"retry-after": "120"})

    paced.clock.now += 20
    assert paced.rate_limiter.background_wait_secs == 100, "a lookup may try now, the background may not"
    assert paced.call() is None
    paced.clock.now += 100
    assert paced.rate_limiter.background_wait_secs == 0
