"""Contents that could not be served: for how long they are not offered, and what proves them bad."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plugin_support import Clock, in_threads, untimed

from hfbucket_plugin import quarantine
from hfbucket_plugin.quarantine import Quarantine

ONE, OTHER = "1" * 64, "2" * 64


def made():
    clock = Clock()
    return clock, Quarantine(clock)


def held_for(clock, kept, limit=10_000):
    """Seconds until it is offered again."""
    start = clock.now
    while kept.holds(ONE):
        clock.now += 0.5
        assert clock.now - start < limit
    return clock.now - start


def test_what_failed_is_not_offered_for_a_while_and_longer_each_time():
    clock, kept = made()
    assert not kept.holds(ONE)

    waits = []
    for _ in range(11):
        kept.add(ONE, wrong_hash=False)
        waits.append(held_for(clock, kept))

    assert waits == [15, 30, 60, 120, 240, 480, 960, 1920, 3600, 3600, 3600]
    assert not kept.holds(OTHER)


def test_what_was_served_after_all_starts_anew():
    clock, kept = made()
    for _ in range(4):
        kept.add(ONE, wrong_hash=False)
    kept.clear(ONE)

    assert not kept.holds(ONE)
    assert not kept.knows(ONE)
    kept.add(ONE, wrong_hash=False)
    assert held_for(clock, kept) == 15


def test_what_is_offered_again_is_still_known_for_what_it_was():
    clock, kept = made()
    kept.add(ONE, wrong_hash=False)
    clock.now += 1000

    assert not kept.holds(ONE)
    assert kept.knows(ONE)
    assert not kept.knows(OTHER)
    assert len(kept) == 1
    kept.clear(OTHER)
    assert len(kept) == 1


def test_the_second_wrong_hash_is_the_proof_and_told_once():
    _, kept = made()

    assert not kept.add(ONE, wrong_hash=False)
    assert not kept.add(ONE, wrong_hash=True)
    assert not kept.add(OTHER, wrong_hash=True)
    assert not kept.add(ONE, wrong_hash=False), "an outage after one wrong hash is no proof"
    assert kept.add(ONE, wrong_hash=True)
    assert not kept.add(ONE, wrong_hash=False)
    assert not kept.add(ONE, wrong_hash=True)
    kept.clear(ONE)
    assert not kept.add(ONE, wrong_hash=True)
    assert kept.add(ONE, wrong_hash=True)


@untimed
@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans(), st.floats(0, 100)), max_size=40))
def test_it_holds_what_failed_and_was_not_served_since(steps):
    clock, kept = made()
    strikes, until = {}, {}
    for name, served, seconds in steps:
        if served:
            kept.clear(name)
            strikes.pop(name, None)
            until.pop(name, None)
        else:
            kept.add(name, wrong_hash=False)
            until[name] = clock.now + min(3600.0, 15.0 * 2 ** strikes.get(name, 0))
            strikes[name] = strikes.get(name, 0) + 1
        clock.now += seconds
        for one in "abc":
            assert kept.holds(one) == (clock.now < until.get(one, 0.0))
            assert kept.knows(one) == (one in strikes)


def test_it_is_bounded_and_forgets_what_was_looked_at_least(monkeypatch):
    monkeypatch.setattr(quarantine, "_ENTRIES", 3)
    _, kept = made()
    for name in "abcd":
        kept.add(name, wrong_hash=False)

    assert len(kept) == 3
    assert not kept.holds("a")
    kept.holds("b")
    kept.add("e", wrong_hash=False)
    assert kept.holds("b")
    assert not kept.holds("c")


@pytest.mark.parametrize("threads", [8])
def test_of_many_threads_one_is_told_of_the_proof(threads):
    _, kept = made()

    assert sum(in_threads(threads, lambda _number: kept.add(ONE, wrong_hash=True))) == 1
