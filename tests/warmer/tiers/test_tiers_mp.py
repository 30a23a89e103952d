"""A real `lmcache server` hits on what the warmer put into its `fs` and `fs_native` directories, with the Hub gone."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi

from hfbucket_plugin.config.l2 import from_json
from hfbucket_plugin.core import telemetry
from hfbucket_plugin.hub.connect import open_bucket
from tests.support.buckets import select
from tests.support.lmcache_engine import prompt
from tests.support.lmcache_server import MPClient, MPServer
from tests.support.waiting import eventually
from warmer.node.worker import NodeWarmer
from warmer.report.outcomes import Copied
from warmer.tiers import NodeInfo, declared_tier, open_tier

pytestmark = pytest.mark.engine

MODEL = "org/tiny model"
CHUNK = 32
CHUNKS = 5
TOKENS = prompt(7, CHUNKS * CHUNK)
# Chunks of no multiple of a page, so that padding shows.
SHAPE = {"layers": 3, "hidden": 65, "tokens": len(TOKENS)}


@dataclass
class Stocked:
    """A bucket into which a server has stored a prompt."""

    adapter: str
    chunk_bytes: int
    directory: Path

    def plan(self, takes):
        settings = from_json(self.adapter)
        bucket = open_bucket(settings, settings.name, telemetry.MemorySink(), 60.0)
        plan, _ = select(bucket, [f"{MODEL}@"], takes, self.directory / "plan.jsonl")
        return bucket, [chunk for index in range(plan.segments) for chunk in plan.segment(index)]


@pytest.fixture(scope="module")
def stocked(session_hub, tmp_path_factory):
    api = HfApi(endpoint=session_hub.endpoint, token=False)
    api.create_bucket("tests/mp-tiers")
    adapter = {
        "type": "plugin",
        "module_path": "hfbucket_plugin.l2_adapter",
        "class_name": "HFBucketL2Adapter",
        "adapter_params": {"bucket_handle": "hf://buckets/tests/mp-tiers/kv", "endpoint": session_hub.endpoint},
    }
    with (
        MPServer([adapter], chunk_size=CHUNK) as server,
        MPClient(server.address, model=MODEL, **SHAPE) as client,
    ):
        client.store(TOKENS, client.random_kv(len(TOKENS), seed=7))
        chunk_bytes = client.chunk_bytes
        eventually(
            lambda: len([*api.list_bucket_tree("tests/mp-tiers", recursive=True)]) >= CHUNKS, 60, "chunks in the bucket"
        )
    return Stocked(json.dumps(adapter), chunk_bytes, tmp_path_factory.mktemp("mp-tiers"))


TIERS = {
    "fs": {"type": "fs", "relative_tmp_dir": "tmp", "read_ahead_size": 4096, "use_odirect": True},
    "fs_native": {"type": "fs_native", "num_workers": 2, "relative_tmp_dir": "tmp"},
    "fs_native direct": {"type": "fs_native", "use_odirect": True, "max_capacity_gb": 1},
}


def fill(stocked, spec):
    """Warm the tier from the bucket."""
    declaration = declared_tier(None, json.dumps(spec))
    bucket, plan = stocked.plan(declaration.takes)
    tier = open_tier(declaration, NodeInfo("this-node"))
    warmer = NodeWarmer(bucket, tier)
    try:
        outcomes = warmer.copy(plan)
        assert outcomes == [Copied(chunk.key, stocked.chunk_bytes) for chunk in plan]
        assert {held.key for held in tier.inventory()} == {chunk.key for chunk in plan}
        assert all(tier.holds(chunk.key, chunk.size) for chunk in plan)
    finally:
        warmer.close()
    return plan


def retrieved(server):
    """How much of the prompt is hit, and whether it comes back as it was stored."""
    with MPClient(server.address, model=MODEL, **SHAPE) as client:
        hit, kv = client.retrieve(TOKENS)
        return hit, torch.equal(kv, client.random_kv(len(TOKENS), seed=7))


@pytest.mark.parametrize("spec", TIERS.values(), ids=TIERS)
def test_a_server_hits_on_every_warmed_chunk_and_the_kv_is_identical(stocked, spec, tmp_path):
    spec = spec | {"base_path": str(tmp_path / "tier")}
    with MPServer([spec], chunk_size=CHUNK) as server:
        plan = fill(stocked, spec)  # while it runs: no restart is needed

        assert retrieved(server) == (len(TOKENS), True)

        eventually(
            lambda: server.count("lmcache_mp_lookup_hit_l2_tokens_total", model_name=MODEL) == len(TOKENS), 60, "hits"
        )
        # What the server itself writes of the same prompt has the same names and sizes.
        ours = {file.name: file.stat().st_size for file in (tmp_path / "tier").glob("*.data")}
        for file in (tmp_path / "tier").glob("*.data"):
            file.unlink()
        server.clear_l1()
        with MPClient(server.address, model=MODEL, **SHAPE) as client:
            client.store(TOKENS, client.random_kv(len(TOKENS), seed=7))
            eventually(lambda: len([*(tmp_path / "tier").glob("*.data")]) == CHUNKS, 60, "the server's own files")
    assert len(plan) == CHUNKS
    assert {file.name: file.stat().st_size for file in (tmp_path / "tier").glob("*.data")} == ours
