import pytest


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch, tmp_path):
    """No Ray cluster is configured, and plans that nobody wants are the test's own."""
    for name in ("RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("hfbucket_plugin.tools.plan_file.default_plan_dir", lambda: tmp_path / "plans")


@pytest.fixture
def depot(hub, bucket, tmp_path):
    """An empty bucket, and an engine's YAML."""
    from tests.support.buckets import Depot

    return Depot(hub, bucket, tmp_path)


@pytest.fixture
def stocked(depot):
    """A bucket with old chunks in it, and new ones."""
    from tests.support.buckets import DAY, NEW, OLD

    depot.put(OLD, age=20 * DAY)
    depot.put(NEW, age=1 * DAY)
    return depot
