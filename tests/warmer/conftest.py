import pytest
from warming import Warehouse


@pytest.fixture
def warehouse(hub, bucket, tmp_path):
    """An empty bucket and an engine's YAML."""
    return Warehouse(hub.endpoint, bucket, tmp_path)
