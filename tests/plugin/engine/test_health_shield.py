"""Keeping LMCache's health monitor from disabling an engine: both rules."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lmcache.v1.health_monitor import constants

from hfbucket_plugin.engine import health_monitor
from hfbucket_plugin.engine.health_monitor import LIFTED, HealthShield, lift_threshold
from tests.support.models import untimed
from tests.support.waiting import Clock

THRESHOLD, INTERVAL = "get_blocking_failed_threshold", "ping_interval"


def test_the_names_and_defaults_are_lmcaches_own():
    assert constants.GET_BLOCKING_FAILED_THRESHOLD_CONFIG_KEY == health_monitor._THRESHOLD_KEY == THRESHOLD
    assert constants.PING_INTERVAL_CONFIG_KEY == health_monitor._INTERVAL_KEY == INTERVAL
    assert constants.DEFAULT_GET_BLOCKING_FAILED_THRESHOLD == health_monitor._DEFAULT_THRESHOLD
    assert constants.DEFAULT_PING_INTERVAL == health_monitor._DEFAULT_INTERVAL_SECS


def made(**extra):
    clock = Clock()
    return clock, HealthShield(extra, clock)


def fail(shield, times=1):
    for _ in range(times):
        shield.got(everything=False)


def test_it_is_raised_while_half_as_many_gets_as_lmcache_allows_have_failed_recently():
    clock, shield = made()
    fail(shield, 4)
    for _ in range(100):
        shield.got(everything=True)
    assert not shield.raised

    fail(shield)
    assert shield.raised
    clock.now += 29.9
    assert shield.raised
    clock.now += 0.1
    assert not shield.raised


@pytest.mark.parametrize(
    ("extra", "failures"),
    [
        ({}, 5),
        ({THRESHOLD: 4}, 2),
        ({THRESHOLD: 5}, 2),
        ({THRESHOLD: 1}, 1),
        ({THRESHOLD: 2.0}, 1),
        ({THRESHOLD: 0}, 5),
        ({THRESHOLD: -3}, 5),
        ({THRESHOLD: "4"}, 5),
        ({THRESHOLD: True}, 5),
        ({THRESHOLD: None}, 5),
    ],
    ids=str,
)
def test_half_of_the_threshold_that_there_is(extra, failures):
    _, shield = made(**extra)
    fail(shield, failures - 1)
    assert not shield.raised
    fail(shield)
    assert shield.raised


def test_the_window_is_the_interval_of_lmcaches_checks():
    clock, shield = made(**{INTERVAL: 2})
    fail(shield, 5)
    clock.now += 1.9
    assert shield.raised
    clock.now += 0.1
    assert not shield.raised


@untimed
@given(
    threshold=st.integers(2, 12),
    steps=st.lists(st.tuples(st.floats(0, 20, allow_nan=False), st.booleans()), max_size=120),
)
def test_who_heeds_it_never_has_as_many_failures_in_an_interval_as_disable_the_engine(threshold, steps):
    clock, shield = made(**{THRESHOLD: threshold})
    failed = []
    for seconds, well in steps:
        clock.now += seconds
        if shield.raised:  # nothing is found, and so nothing is got
            continue
        shield.got(everything=well)
        if not well:
            failed.append(clock.now)

    for at in failed:
        assert sum(at - 30 < other <= at for other in failed) < threshold


# --- lifting the threshold --------------------------------------------------------------------------------------------------


def config(plugins=("hfbucket",), url=None, **extra):
    return SimpleNamespace(remote_storage_plugins=list(plugins), remote_url=url, extra_config=dict(extra))


def ours(name):
    return name.startswith("hfbucket")


def test_the_threshold_is_lifted_where_all_stores_are_ours(caplog):
    caplog.set_level("INFO")
    engine = config(["hfbucket.us", "hfbucket.eu"], other=1)

    lift_threshold(engine, ours)
    lift_threshold(engine, ours)

    assert engine.extra_config == {"other": 1, THRESHOLD: LIFTED}
    assert caplog.text.count(f"extra_config.{THRESHOLD} is lifted") == 1


@pytest.mark.parametrize(
    "engine",
    [
        config(get_blocking_failed_threshold=3),
        config(get_blocking_failed_threshold=None),
        config(["hfbucket", "redis"]),
        config(url="redis://somewhere"),
        SimpleNamespace(remote_storage_plugins=["hfbucket"], remote_url=None, extra_config=None),
    ],
    ids=["an operator set it", "an operator set it to nothing", "somebody else's store", "a URL", "no extra_config"],
)
def test_the_threshold_is_left_alone_otherwise(engine):
    before = dict(engine.extra_config) if engine.extra_config is not None else None

    lift_threshold(engine, ours)

    assert engine.extra_config == before


def test_plugins_may_be_left_out():
    engine = SimpleNamespace(remote_storage_plugins=None, remote_url=None, extra_config={})
    lift_threshold(engine, ours)
    assert engine.extra_config == {THRESHOLD: LIFTED}
