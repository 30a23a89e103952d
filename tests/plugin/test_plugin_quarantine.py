"""Contents that could not be served, and the engine's health monitor: what is held back, and for how long."""

from types import SimpleNamespace

import pytest
from plugin_support import Clock

from hfbucket_plugin.health_shield import LIFTED, HealthShield, lift_threshold
from hfbucket_plugin.quarantine import Quarantine


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


def test_what_was_served_after_all_begins_anew():
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
    told = []
    for wrong in (False, True, False, True, True, True):
        told.append(quarantine.add("a", wrong_hash=wrong))
        clock.now += 3601

    assert told == [False, False, False, True, False, False]


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


# --- the health monitor's counter ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extra", "limit", "window"), [({}, 5, 30), ({"get_blocking_failed_threshold": 4, "ping_interval": 2}, 2, 2)]
)
def test_nothing_is_found_while_half_as_many_gets_have_failed_as_disable_the_engine(extra, limit, window):
    clock = Clock()
    shield = HealthShield(extra, clock)
    for _ in range(limit):
        assert not shield.raised
        shield.got(everything=True)
        shield.got(everything=False)
        clock.now += 0.1
    assert shield.raised

    clock.now += window
    assert not shield.raised


def test_where_the_threshold_is_lifted_there_is_nothing_to_shield():
    shield = HealthShield({"get_blocking_failed_threshold": LIFTED})
    for _ in range(100):
        shield.got(everything=False)

    assert not shield.raised


def config(plugins=("hfbucket",), url=None, **extra):
    return SimpleNamespace(extra_config=extra, remote_storage_plugins=list(plugins), remote_url=url)


@pytest.mark.parametrize(
    ("own", "lifted"),
    [
        (config(), True),
        (config(("hfbucket.us", "hfbucket.eu")), True),
        (config(get_blocking_failed_threshold=10), False),
        (config(("hfbucket", "fs.warm")), False),
        (config(url="lm://somewhere:1"), False),
    ],
)
def test_the_threshold_is_lifted_only_where_nobody_else_needs_it(own, lifted):
    before = dict(own.extra_config)

    lift_threshold(own, lambda name: name.startswith("hfbucket"))

    assert own.extra_config == (before | {"get_blocking_failed_threshold": LIFTED} if lifted else before)
