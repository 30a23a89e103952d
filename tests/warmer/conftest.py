import pytest

from tests.support.buckets import Warehouse
from tests.support.ray_cluster import as_it_was, raylets

LABELS = (
    {"pool": "serving", "lmcache.workers": "0-1"},
    {"pool": "serving", "lmcache.workers": "2_3"},
    {"pool": "batch"},
)


@pytest.fixture
def warehouse(hub, bucket, tmp_path):
    """An empty bucket and an engine's YAML."""
    return Warehouse(hub.endpoint, bucket, tmp_path)


@pytest.fixture(scope="session")
def session_raylets():
    with raylets(LABELS) as one:
        yield one


@pytest.fixture
def cluster(session_raylets):
    """Three raylets with labels, which tests share: they start in seconds, each."""
    with as_it_was(session_raylets) as one:
        yield one
