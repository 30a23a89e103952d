"""Contents that could not be served: for how long they are held back, and what proves them bad."""

from hypothesis import given
from hypothesis import strategies as st

from hfbucket_plugin.store.quarantine import Quarantine
from tests.support.models import untimed
from tests.support.waiting import Clock, in_threads


def test_a_content_is_held_back_for_twice_as_long_each_time_up_to_an_hour():
    clock = Clock()
    quarantine = Quarantine(clock)
    for seconds in (15, 30, 60, 120, 240, 480, 960, 1920, 3600, 3600):
        quarantine.add("a", wrong_hash=False)
        clock.now += seconds - 0.1
        assert quarantine.holds("a")
        assert not quarantine.holds("b")
        clock.now += 0.2
        assert not quarantine.holds("a")
        assert quarantine.knows("a")


def test_what_was_served_after_all_start_over():
    clock = Clock()
    quarantine = Quarantine(clock)
    quarantine.add("a", wrong_hash=True)
    quarantine.clear("a")
    assert not quarantine.holds("a")
    assert not quarantine.knows("a")

    assert not quarantine.add("a", wrong_hash=True), "one fetch since it was served proves nothing"
    clock.now += 15.1
    assert not quarantine.holds("a")


def test_two_wrong_hashes_are_proof_and_told_once():
    clock = Clock()
    quarantine = Quarantine(clock)
    reported = []
    for wrong in (False, True, False, True, True, True):
        reported.append(quarantine.add("a", wrong_hash=wrong))
        clock.now += 3601

    assert reported == [False, False, False, True, False, False]


def test_one_failure_that_several_saw_is_one():
    clock = Clock()
    quarantine = Quarantine(clock)
    assert [quarantine.add("a", wrong_hash=True) for _ in range(8)] == [False] * 8
    clock.now += 15.1

    assert not quarantine.holds("a")


def test_it_is_bounded():
    quarantine = Quarantine(Clock())
    for number in range(10_050):
        quarantine.add(str(number), wrong_hash=False)

    assert len(quarantine) == 10_000
    assert not quarantine.holds("0")
    assert quarantine.holds("10049")


def test_it_forgets_what_was_looked_at_least(monkeypatch):
    monkeypatch.setattr("hfbucket_plugin.store.quarantine._ENTRIES", 3)
    quarantine = Quarantine(Clock())
    for name in "abc":
        quarantine.add(name, wrong_hash=False)
    assert quarantine.holds("a")

    quarantine.add("d", wrong_hash=False)

    assert [quarantine.holds(name) for name in "abcd"] == [True, False, True, True]


def test_what_is_offered_again_is_still_known_for_what_it_was():
    clock = Clock()
    quarantine = Quarantine(clock)
    quarantine.add("a", wrong_hash=False)
    clock.now += 1000

    assert not quarantine.holds("a")
    quarantine.clear("b")
    assert quarantine.knows("a")
    assert not quarantine.knows("b")
    assert len(quarantine) == 1


@untimed
@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans(), st.booleans(), st.floats(0, 100)), max_size=40))
def test_as_a_plain_model(steps):
    clock = Clock()
    quarantine = Quarantine(clock)
    strikes, wrong, until = {}, {}, {}
    for name, served, wrong_hash, seconds in steps:
        if served:
            quarantine.clear(name)
            for record in (strikes, wrong, until):
                record.pop(name, None)
        else:
            proven = quarantine.add(name, wrong_hash=wrong_hash)
            seen_already = clock.now < until.get(name, 0.0)
            if not seen_already:
                until[name] = clock.now + min(3600.0, 15.0 * 2 ** strikes.get(name, 0))
                strikes[name] = strikes.get(name, 0) + 1
                wrong[name] = wrong.get(name, 0) + wrong_hash
            assert proven == (not seen_already and wrong_hash and wrong[name] == 2)
        clock.now += seconds
        for one in "abc":
            assert quarantine.holds(one) == (clock.now < until.get(one, 0.0))
            assert quarantine.knows(one) == (one in strikes)


def test_of_many_threads_one_is_told_of_the_proof():
    clock = Clock()
    quarantine = Quarantine(clock)
    quarantine.add("a", wrong_hash=True)
    clock.now += 16

    assert sum(in_threads(8, lambda _number: quarantine.add("a", wrong_hash=True))) == 1
