"""What the fault matrix and the soak found wrong, a test each."""

import pytest

from hfbucket_plugin.core.telemetry import OPERATIONS, MemorySink
from hfbucket_plugin.engine.health_monitor import LIFTED, HealthShield
from hfbucket_plugin.engine.mp import HFBucketL2Adapter, HFBucketL2AdapterConfig
from hfbucket_plugin.errors import AccessDeniedError
from localhub.faults import Fault
from tests.support.lmcache_mp import MP
from tests.support.surface import Limits, content


def test_where_the_monitor_cannot_disable_the_engine_gets_that_fail_keep_nothing_from_being_looked_up():
    shield = HealthShield({"get_blocking_failed_threshold": LIFTED})

    for _ in range(100):
        shield.got(everything=False)

    assert not shield.raised
    assert not shield._failed, "and nothing is kept"


@pytest.fixture
def l2_adapter(hub, bucket):
    """An L2 adapter over the bucket of the test, and what it counts."""
    tally = MemorySink()
    params = {"bucket_handle": f"hf://buckets/{bucket}/mp", "endpoint": hub.endpoint, "usage_refresh_secs": 0}
    adapter = HFBucketL2Adapter(HFBucketL2AdapterConfig.from_dict(params), sink=tally)
    yield adapter, tally
    hub.control.clear_faults()
    adapter.close()


def test_a_listing_in_mp_mode_is_counted_by_how_it_ends(hub, l2_adapter):
    adapter, tally = l2_adapter
    adapter.list_l2_keys()
    assert tally.get(OPERATIONS, operation="list", outcome="ok") == 1

    hub.control.add_fault(Fault(route="tree", status=403))
    with pytest.raises(AccessDeniedError):
        adapter.list_l2_keys()
    assert tally.get(OPERATIONS, operation="list", outcome="denied") == 1


def test_a_bucket_that_cannot_be_seen_for_a_while_says_nothing_against_its_objects(hub, bucket, tmp_path):
    hub.control.add_fault(Fault(route="xet-read-token", status=404, headers={"X-Error-Code": "RepoNotFound"}))
    handle = f"hf://buckets/{bucket}/mp"
    surface = MP("hfbucket.unseen", tmp_path, handle=handle, endpoint=hub.endpoint, limits=Limits(5, 10, 30))
    try:
        assert surface.put([1, 2])
        assert surface.lookup([1, 2]) == [True, True]
        assert surface.get([1, 2]) == [None, None]

        hub.control.clear_faults()
        assert surface.lookup([1, 2]) == [True, True], "they are not in quarantine"
        assert surface.get([1, 2]) == [content(1), content(2)]
    finally:
        surface.close()
