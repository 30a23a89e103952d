"""Whole engines, from the configurations of the seed to tensors."""

import itertools
import time

import pytest
import torch
import yaml
from lmcache.v1.storage_backend.connector.hfbucket_connector import HFBucketConnector as BuiltIn

from hfbucket_plugin.engine.classic import HFBucketConnector
from localhub.faults import Fault
from tests.support.buckets import paths
from tests.support.lmcache_classic import OURS, SEED_MINIMAL, SEED_SEVERAL, served_by_us
from tests.support.lmcache_engine import CpuEngine, prompt
from tests.support.waiting import eventually

pytestmark = pytest.mark.engine

BUCKET = "my-org/lmcache-kv"
CHUNK = 256
_numbers = itertools.count(1)


@pytest.fixture(autouse=True)
def at_the_local_hub(hub, monkeypatch):
    """The Hub of the tests in the place of the public one, with the bucket that the seed names."""
    from huggingface_hub import HfApi, constants

    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    for name in ("HF_TOKEN", "HF_US_TOKEN", "HF_EU_TOKEN"):
        monkeypatch.setenv(name, f"hf_loopback_{name}")
    HfApi(endpoint=hub.endpoint, token=False).create_bucket(BUCKET, exist_ok=True)


@pytest.fixture
def engines(tmp_path):
    """Starts engines, and ends them with the test."""
    started = []

    def start(text, **options):
        path = tmp_path / f"lmcache-{next(_numbers)}.yaml"
        path.write_text(text)
        options = {"layers": 2, "hidden": 16, "model": f"org/model-{tmp_path.name}"} | options
        started.append(CpuEngine(f"plugin-{tmp_path.name}-{len(started)}", path, **options))
        return started[-1]

    yield start
    for engine in started:
        engine.close()


def configured(text, *instances, **changes):
    document = yaml.safe_load(served_by_us(text, *instances))
    extra = {name: changes.pop(name) for name in list(changes) if "." in name}
    document["extra_config"] |= extra
    return yaml.safe_dump({"max_local_cpu_size": 0.1} | document | changes)


def served(engine):
    return [type(remote.connection._connector) for remote in engine.remotes]


def test_the_minimal_configuration_of_the_seed_serves_an_engine_and_the_next_one(engines):
    config = configured(SEED_MINIMAL, "hfbucket")
    tokens, other = prompt(1, 4 * CHUNK), prompt(2, 2 * CHUNK)
    first = engines(config)
    kv = first.random_kv(len(tokens), 1)
    assert served(first) == [HFBucketConnector]
    assert first.lookup(tokens) == 0

    first.store(tokens, kv)
    first.wait_written(tokens)
    first.forget_local()

    for engine in (first, engines(config)):
        assert engine.lookup(tokens) == len(tokens)
        hit, found = engine.retrieve(tokens)
        assert hit == len(tokens)
        assert torch.equal(found, kv)
        assert engine.lookup(other) == 0
        assert engine.retrieve(other)[0] == 0


def test_the_several_instances_of_the_seed_each_hold_the_chunks(engines, hub):
    tokens = prompt(3, 2 * CHUNK)
    engine = engines(configured(SEED_SEVERAL, "hfbucket.us", "hfbucket.eu", local_cpu=False, save_unfull_chunk=False))
    kv = engine.random_kv(len(tokens), 3)
    assert served(engine) == [HFBucketConnector, HFBucketConnector]

    engine.store(tokens, kv)
    engine.wait_written(tokens)

    own = [path for path in paths(hub.endpoint, BUCKET) if engine.metadata.model_name.replace("/", "%2F") in path]
    assert sorted(path.split("/")[0] for path in own) == ["eu", "eu", "us", "us"]
    us = engine.remotes[0]
    for key in engine.keys(tokens):
        assert us.remove(key)
    engine.forget_local()
    hit, found = engine.retrieve(tokens)
    assert hit == len(tokens), "what one instance lacks comes from the other"
    assert torch.equal(found, kv)


def test_ours_and_the_built_in_serve_one_engine_side_by_side(engines):
    engine = engines(configured(SEED_SEVERAL, "hfbucket.us", local_cpu=False, save_unfull_chunk=False))

    assert served(engine) == [HFBucketConnector, BuiltIn]


def test_only_full_chunks_are_stored_and_a_gap_ends_the_hit(engines):
    tokens = prompt(4, 3 * CHUNK + 100)
    engine = engines(configured(SEED_MINIMAL, "hfbucket"))
    kv = engine.random_kv(len(tokens), 4)

    engine.store(tokens, kv)
    engine.wait_written(tokens[: 3 * CHUNK])
    engine.forget_local()

    assert engine.lookup(tokens) == 3 * CHUNK
    hit, found = engine.retrieve(tokens)
    assert hit == 3 * CHUNK
    assert torch.equal(found[:, :, :hit], kv[:, :, :hit])

    assert engine.remotes[0].remove(engine.keys(tokens[: 2 * CHUNK])[1])
    engine.forget_local()
    assert engine.lookup(tokens) == CHUNK
    assert engine.retrieve(tokens)[0] == CHUNK


def test_workers_and_models_do_not_share_chunks(engines):
    config = configured(SEED_MINIMAL, "hfbucket")
    tokens = prompt(5, CHUNK)
    first = engines(config, world_size=2, worker_id=0)
    first.store(tokens, first.random_kv(CHUNK, 5))
    first.wait_written(tokens)

    second = engines(config, world_size=2, worker_id=1)
    assert second.retrieve(tokens)[0] == 0


def test_an_engine_outlives_a_hub_that_hangs_fails_and_comes_back(engines, hub):
    tokens = prompt(6, 3 * CHUNK)
    config = configured(
        SEED_MINIMAL,
        "hfbucket",
        blocking_timeout_secs=1,
        **{
            "remote_storage_plugin.hfbucket.metadata_cache_ttl_secs": 0,
            "remote_storage_plugin.hfbucket.lookup_timeout_secs": 0.5,
        },
    )
    engine = engines(config)
    kv = engine.random_kv(len(tokens), 6)
    engine.store(tokens, kv)
    engine.wait_written(tokens)
    engine.forget_local()

    for fault in (
        {"route": "xorb-data", "hang": True},
        {"route": "paths-info", "hang": True},
        {"route": "paths-info", "status": 500},
        {"route": "reconstruction", "status": 500},
        {"route": "xorb-data", "truncate_at": 10},
        {"route": "*", "reset": True},
        {"route": "*", "status": 403},
    ):
        hub.control.add_fault(Fault(**fault))
        started = time.monotonic()
        engine.lookup(tokens)
        hit, found = engine.retrieve(tokens)
        assert time.monotonic() - started < 10, fault
        assert torch.equal(found[:, :, :hit], kv[:, :, :hit]), fault
        assert hit < len(tokens), fault
        hub.control.clear_faults()

    assert eventually(lambda: engine.lookup(tokens)) == len(tokens)
    hit, found = eventually(lambda: (result := engine.retrieve(tokens))[0] == len(tokens) and result)
    assert torch.equal(found, kv)


def test_flipped_bytes_never_reach_a_tensor_when_hashes_are_verified(engines, hub, monkeypatch):
    monkeypatch.setattr("hfbucket_plugin.store.quarantine._FIRST_SECS", 0.01)
    tokens = prompt(7, 2 * CHUNK)
    engine = engines(configured(SEED_MINIMAL, "hfbucket", **{"remote_storage_plugin.hfbucket.verify": "hash"}))
    kv = engine.random_kv(len(tokens), 7)
    engine.store(tokens, kv)
    engine.wait_written(tokens)
    engine.forget_local()

    hub.control.add_fault(Fault(route="xorb-data", flip_every=1000))
    assert engine.retrieve(tokens)[0] == 0
    hub.control.clear_faults()

    _hit, found = eventually(lambda: (result := engine.retrieve(tokens))[0] == len(tokens) and result)
    assert torch.equal(found, kv)


def test_the_keys_that_make_an_instance_ours_are_those_of_the_documents():
    assert OURS == {"module_path": "hfbucket_plugin.adapter", "class_name": "HFBucketConnectorAdapter"}
