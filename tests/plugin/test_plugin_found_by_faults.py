"""What the fault matrix and the soak found wrong, a test each."""

from hfbucket_plugin.health_shield import LIFTED, HealthShield


def test_where_the_monitor_cannot_disable_the_engine_gets_that_fail_keep_nothing_from_being_looked_up():
    shield = HealthShield({"get_blocking_failed_threshold": LIFTED})

    for _ in range(100):
        shield.got(everything=False)

    assert not shield.raised
    assert not shield._failed, "and nothing is kept"
