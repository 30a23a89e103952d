"""How often the Hub is called: the own cap in every window of 60 s, and the pauses that the Hub asks for."""

import httpx2
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from plugin_support import Clock, any_text, in_threads, untimed

from hfbucket_plugin.errors import BudgetError, ThrottledError
from hfbucket_plugin.pacing import Pacing, retry_after


class Until:
    """A deadline on a test's clock."""

    def __init__(self, clock, seconds):
        self._clock, self._at = clock, clock.now + seconds

    def remaining(self):
        return max(0.0, self._at - self._clock.now)


class Paced:
    """A pacing whose time passes when somebody sleeps, or when the test says so."""

    def __init__(self, cap=None):
        self.clock = Clock()
        self.slept = []
        self.pacing = Pacing("hfbucket.eu", cap, self.clock, self._sleep)

    def _sleep(self, seconds):
        assert seconds > 0
        self.slept.append(seconds)
        self.clock.now += seconds

    def admit(self, *, patient=False, seconds=1000.0):
        self.pacing.admit("lookup", Until(self.clock, seconds), patient=patient)


# --- the own cap -----------------------------------------------------------------------------------------------------------

moments = st.floats(0, 130, allow_nan=False)
calls = st.lists(st.tuples(moments, st.booleans(), moments), max_size=60)


@untimed
@given(cap=st.integers(1, 7), wanted=calls)
def test_in_no_60_seconds_are_there_more_calls_than_the_cap_and_none_is_refused_below_it(cap, wanted):
    paced = Paced(cap)
    made = []

    for pause, patient, seconds in wanted:
        paced.clock.now += pause
        asked_at = paced.clock.now
        error = _refusal(paced, patient=patient, seconds=seconds)
        if error is not None:
            of_late = [at for at in made if at > asked_at - 60]
            assert len(of_late) == cap, "refused only when the cap is used up"
            assert error.retry_after == pytest.approx(of_late[0] + 60 - asked_at)
            assert not patient or error.retry_after >= seconds - 1e-6, "the patient wait as long as they can"
            assert paced.clock.now == asked_at, "who is refused has not waited"
        else:
            assert paced.clock.now == asked_at or patient
            assert paced.clock.now - asked_at <= seconds
            made.append(paced.clock.now)

    for at in made:
        assert sum(at - 60 < other <= at for other in made) <= cap


def test_without_a_cap_nothing_is_refused_or_remembered():
    paced = Paced()
    for _ in range(10_000):
        paced.admit()

    assert not paced.pacing._calls


def test_the_cap_holds_among_threads():
    paced = Paced(10)

    results = in_threads(16, lambda _number: [_refusal(paced) for _ in range(5)])

    assert sum(one is None for many in results for one in many) == 10


def _refusal(paced, **options):
    try:
        paced.admit(**options)
    except BudgetError as error:
        return error
    return None


def test_a_refusal_names_the_instance_the_setting_and_the_time():
    paced = Paced(1)
    paced.admit()
    paced.clock.now += 20

    with pytest.raises(
        BudgetError, match=r"lookup: not asked, since instance 'hfbucket\.eu' made 1 calls.*within a minute"
    ) as told:
        paced.admit()

    assert "max_hub_calls_per_minute" in str(told.value)
    assert "free in 40.0 s" in str(told.value)
    assert told.value.retry_after == 40
    assert told.value.kind == "budget"


# --- pauses ----------------------------------------------------------------------------------------------------------------


def test_a_pause_that_the_hub_asked_for_refuses_the_impatient_until_it_is_over():
    paced = Paced()
    paced.pacing.heed(429, {"retry-after": "30"})
    paced.clock.now += 10

    with pytest.raises(ThrottledError, match=r"the Hub told this token to wait 20\.0 s more") as told:
        paced.admit()
    assert not isinstance(told.value, BudgetError)
    assert told.value.retry_after == 20
    assert paced.pacing.paused_secs == 20

    paced.clock.now += 20
    assert paced.pacing.paused_secs == 0
    paced.admit()
    assert paced.slept == []


def test_the_patient_wait_for_a_pause_that_ends_in_time_and_for_no_other():
    paced = Paced()
    paced.pacing.heed(429, {"retry-after": "30"})

    with pytest.raises(ThrottledError):
        paced.admit(patient=True, seconds=30)
    assert paced.slept == []
    paced.admit(patient=True, seconds=31)
    assert paced.slept == [30]


def test_the_patient_wait_for_the_pause_and_the_budget_one_after_the_other():
    paced = Paced(1)
    paced.admit()
    paced.pacing.heed(429, {"retry-after": "10"})

    paced.admit(patient=True)

    assert paced.slept == [10, 50]


def test_who_waits_looks_again_since_the_pause_may_have_grown():
    paced = Paced()
    paced.pacing.heed(429, {"retry-after": "10"})
    real = paced._sleep

    def sleep(seconds):
        real(seconds)
        if len(paced.slept) == 1:
            paced.pacing.heed(429, {"retry-after": "5"})

    paced.pacing._sleep = sleep
    paced.admit(patient=True)

    assert paced.slept == [10, 5]


def test_a_429_without_a_time_pauses_twice_as_long_each_time_up_to_a_bound():
    paced = Paced()
    pauses = []
    for _ in range(8):
        paced.pacing.heed(429, {})
        pauses.append(paced.pacing.paused_secs)
        paced.clock.now += pauses[-1]

    assert pauses == [1, 2, 4, 8, 16, 30, 30, 30]
    paced.pacing.heed(200, {})
    paced.pacing.heed(429, {})
    assert paced.pacing.paused_secs == 1, "an answer ends the row"


def test_a_shorter_pause_does_not_cut_a_longer_one_short():
    paced = Paced()
    paced.pacing.heed(429, {"retry-after": "100"})
    paced.pacing.heed(429, {"retry-after": "1"})
    paced.pacing.heed(429, {})
    paced.pacing.heed(200, {"ratelimit": '"api";r=0;t=3'})

    assert paced.pacing.paused_secs == 100


def test_whatever_is_asked_a_pause_is_no_longer_than_a_window_of_the_hubs():
    paced = Paced()
    paced.pacing.heed(429, {"retry-after": "99999999"})

    assert paced.pacing.paused_secs == 300


@pytest.mark.parametrize("status", [200, 404, 500])
def test_an_answer_that_says_that_the_quota_is_used_up_pauses_before_the_429_comes(status):
    paced = Paced()
    paced.pacing.heed(status, {"ratelimit": '"api";r=1;t=55'})
    assert paced.pacing.paused_secs == 0

    paced.pacing.heed(status, {"ratelimit": '"api";r=0;t=55'})
    assert paced.pacing.paused_secs == 55


@pytest.mark.parametrize("status", [200, 503])
def test_what_other_answers_ask_to_wait_is_no_pause_of_the_quotas(status):
    paced = Paced()
    paced.pacing.heed(status, {"retry-after": "120"})

    assert paced.pacing.paused_secs == 0


# --- the forms that answers have --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7),
        ({"retry-after": " 7 "}, 7),
        ({"retry-after": "0"}, 0),
        ({"retry-after": ""}, None),
        ({"retry-after": "-7"}, None),
        ({"retry-after": "1.5"}, None),
        ({"retry-after": "Wed, 21 Oct 2099 07:28:00 GMT"}, None),
        ({"retry-after": "\u0667"}, None),
        ({"retry-after": "²"}, None),
        ({"ratelimit": '"api";r=0;t=55'}, 55),
        ({"ratelimit": '"api";r=0;t=55', "retry-after": "7"}, 55),
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
    paced = Paced()
    paced.pacing.heed(status, headers)

    assert 0 <= paced.pacing.paused_secs <= 300
    wait = retry_after(headers)
    assert wait is None or wait >= 0
