from pathlib import Path

from hubs import HubFactory


def test_a_hub_starts_serves_and_ends_cleanly(hub_factory: HubFactory, tmp_path: Path):
    running = hub_factory(tmp_path / "root")
    endpoint = running.endpoint
    assert running.control.counters().total.requests == 0
    running.restart()
    assert running.endpoint == endpoint
    assert running.stop() == 0
    assert running.stop() is None


def test_the_session_hub_has_a_bucket(hub, bucket):
    from huggingface_hub import HfApi

    assert HfApi(endpoint=hub.endpoint).bucket_info(bucket).total_files == 0
