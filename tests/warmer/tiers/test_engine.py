"""A real LMCache engine hits on what the warmer put into its tier, with the Hub gone."""

import json

import pytest

from tests.support.buckets import Warehouse
from tests.support.lmcache_engine import CpuEngine
from warmer.node.worker import NodeWarmer
from warmer.report.outcomes import Copied
from warmer.tiers import open_tier

pytestmark = pytest.mark.engine


def engine(name, directory, base_path, *, headers=False):
    config = directory / f"{name}.yaml"
    document = {
        "chunk_size": 64,
        "local_cpu": False,
        "max_local_cpu_size": 0.1,
        "save_unfull_chunk": False,
        "remote_storage_plugins": ["fs.warm"],
        "extra_config": {"save_chunk_meta": headers, "remote_storage_plugin.fs.warm.base_path": base_path},
    }
    config.write_text(json.dumps(document))
    return CpuEngine(f"{name}-{directory.name}", config, model="org/tiny model", world_size=2, worker_id=1)


@pytest.mark.parametrize("base_paths", [1, 3])
def test_an_engine_hits_on_every_warmed_chunk(hub, bucket, tmp_path, base_paths):
    import torch

    tokens = list(range(64 * 12))
    producer = engine("producer", tmp_path, str(tmp_path / "produced"))
    kv = producer.random_kv(len(tokens), seed=1)
    producer.store(tokens, kv)
    producer.wait_written(tokens)
    keys = [key.to_string() for key in producer.keys(tokens)]
    producer.close()

    warehouse = Warehouse(hub.endpoint, bucket, tmp_path)
    produced = warehouse.in_tier(tmp_path / "produced")
    assert set(produced) == set(keys)
    warehouse.put(produced)
    paths = ", ".join(str(tmp_path / f"tier-{number}") for number in range(base_paths))
    warehouse.extra = {"remote_storage_plugin.fs.warm.base_path": paths}
    warmer = NodeWarmer(warehouse.open(), open_tier(warehouse.declaration()))
    outcomes = warmer.copy(warehouse.plan("org/tiny model@2@1@"))
    warmer.close()
    assert {type(outcome) for outcome in outcomes} == {Copied}
    assert len(outcomes) == 12

    consumer = engine("consumer", tmp_path, paths)
    assert consumer.lookup(tokens) == len(tokens)
    hit, back = consumer.retrieve(tokens)
    consumer.close()
    assert hit == len(tokens)
    assert torch.equal(back, kv)


@pytest.mark.parametrize("base_paths", [1, 2])
def test_an_engine_with_headers_hits_on_every_warmed_chunk(hub, bucket, tmp_path, base_paths):
    import torch

    tokens = list(range(64 * 6))
    raw = engine("raw", tmp_path, str(tmp_path / "raw"))
    kv = raw.random_kv(len(tokens), seed=2)
    raw.store(tokens, kv)
    raw.wait_written(tokens)
    raw.close()
    warehouse = Warehouse(hub.endpoint, bucket, tmp_path)
    warehouse.put(warehouse.in_tier(tmp_path / "raw"))

    paths = [tmp_path / f"tier-{number}" for number in range(base_paths)]
    where = "remote_storage_plugin.fs.warm"
    listed = ", ".join(map(str, paths))
    shape = {"save_chunk_meta": True, f"{where}.kv_shape": "4, 2, 64, 1, 128"}
    warehouse.extra = {f"{where}.base_path": listed} | shape
    warmer = NodeWarmer(warehouse.open(), open_tier(warehouse.declaration()))
    outcomes = warmer.copy(warehouse.plan("org/tiny model@2@1@"))
    warmer.close()
    assert [type(outcome) for outcome in outcomes] == [Copied] * 6
    warmed = {file.name: file.read_bytes() for path in paths for file in path.iterdir()}

    consumer = engine("consumer", tmp_path, listed, headers=True)
    hit, back = consumer.retrieve(tokens)
    assert hit == len(tokens)
    assert torch.equal(back, kv)
    # What the engine writes itself is the same, byte for byte.
    for path in paths:
        for file in path.iterdir():
            file.unlink()
    consumer.forget_local()
    consumer.store(tokens, kv)
    consumer.wait_written(tokens)
    consumer.close()
    assert {file.name: file.read_bytes() for path in paths for file in path.iterdir()} == warmed
