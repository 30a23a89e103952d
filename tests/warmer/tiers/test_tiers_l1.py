"""The memory of a real `lmcache server`, loaded for a prompt."""

import json
import shutil
import socket

import pytest
import torch

from hfbucket_plugin.core.deadline import Deadline
from hfbucket_plugin.errors import ConfigError
from tests.support.buckets import command
from tests.support.lmcache_engine import prompt
from tests.support.lmcache_server import MPClient, MPServer
from tests.support.waiting import eventually
from warmer.report.outcomes import EngineError
from warmer.tiers.l1 import L1Server

pytestmark = pytest.mark.engine

CHUNK = 32
CHUNKS = 60
ROOM = 51
"""Chunks of 128 KiB in 80 % of 8 MiB, and none more."""

TOKENS = prompt(5, CHUNKS * CHUNK + 7)
SHAPE = {"layers": 4, "hidden": 256, "tokens": len(TOKENS)}


def prefetch(http, tokens, *, model="org/model", salt="", wait_secs=600.0, **more):
    with L1Server(http, **more) as server:
        ends = Deadline.after(wait_secs)
        if len(tokens) >= server.layout(ends).chunk_size:
            server.wait([model], 1, ends)
        return server.load(model, 1, tokens, salt)


class Node:
    """A server, what its only tier holds, and a copy of that."""

    def __init__(self, server, tier, copy):
        self.server, self.tier, self.copy = server, tier, copy

    def client(self, model="org/model", salt=""):
        return MPClient(self.server.address, model=model, salt=salt, **SHAPE)

    def prefetch(self, tokens, **more):
        return prefetch(self.server.http, tokens, **more)

    def used(self):
        return self.server.status()["storage_manager"]["l1_usage"][0]

    def hits(self, model):
        return [
            self.server.count(f"lmcache_mp_lookup_hit_{tier}_tokens_total", model_name=model) for tier in ("l1", "l2")
        ]


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A node on which an engine has stored a prompt."""
    tier, copy = tmp_path_factory.mktemp("tier"), tmp_path_factory.mktemp("copy")
    with MPServer([{"type": "fs", "base_path": str(tier)}], chunk_size=CHUNK, l1_mib=8) as server:
        node = Node(server, tier, copy)
        with node.client() as client:
            assert client.chunk_bytes * (ROOM + 1) > 0.8 * 8 * 2**20 > client.chunk_bytes * ROOM
            client.store(TOKENS, client.random_kv(len(TOKENS), seed=5))
            eventually(lambda: len(list(tier.glob("*.data"))) == CHUNKS, 60, "every chunk in the tier")
            for file in tier.iterdir():
                shutil.copy(file, copy)
            yield node


@pytest.fixture
def node(stored):
    """The same with nothing in L1."""
    for file in stored.copy.iterdir():
        shutil.copy(file, stored.tier)
    stored.server.clear_l1()
    return stored


def test_a_prompt_is_hit_in_l1_when_its_tiers_are_gone(node):
    tokens = TOKENS[: 20 * CHUNK + 3]

    warmed = node.prefetch(tokens)

    assert (warmed.chunks, warmed.warmed, warmed.ended) == (20, 20, "complete")
    assert warmed.used_bytes == 20 * 131072
    assert warmed.total_bytes == 8 * 2**20
    for file in node.tier.glob("*.data"):
        file.unlink()
    before = node.hits("org/model")
    with node.client() as client:
        hit, kv = client.retrieve(tokens)
        expected = client.random_kv(len(TOKENS), seed=5)[:, :, :hit]
        assert hit == 20 * CHUNK
        assert torch.equal(kv[:, :, :hit], expected)
    eventually(lambda: node.hits("org/model") == [before[0] + hit, before[1]], 60, "hits in L1 and nowhere else")
    # Again, with nothing to load from: it is all there.
    again = node.prefetch(tokens)
    assert (again.warmed, again.ended, again.used_bytes) == (20, "complete", warmed.used_bytes)


def test_loading_ends_below_the_watermark_at_which_the_server_evicts(node):
    warmed = node.prefetch(TOKENS)

    assert (warmed.chunks, warmed.warmed, warmed.ended) == (CHUNKS, ROOM, "no_room")
    assert node.used() == ROOM * 131072
    with node.client() as client:
        assert client.lookup(TOKENS) == CHUNKS * CHUNK  # the rest from the tier below
    # A full L1 does not tell what it holds, and asking must not make it evict.
    again = node.prefetch(TOKENS)
    assert (again.ended, again.used_bytes) == ("no_room", ROOM * 131072)
    assert again.warmed <= ROOM
    # With other chunks in L1 there is room for fewer.
    node.server.clear_l1()
    node.prefetch(TOKENS[: 30 * CHUNK])
    other = [token + 1 for token in TOKENS]
    with node.client() as client:
        client.store(other[: 10 * CHUNK], client.random_kv(10 * CHUNK, seed=6))
    eventually(lambda: node.used() == 40 * 131072, 30, "all of them in L1")
    warmed = node.prefetch(TOKENS)
    assert (warmed.warmed, warmed.ended) == (ROOM - 10, "no_room")


def test_another_prompt_does_not_drive_out_what_was_loaded(node):
    other = [token + 2 for token in TOKENS[: 3 * CHUNK]]
    before = len(list(node.tier.glob("*.data")))
    with node.client() as client:
        client.store(other, client.random_kv(len(other), seed=7))
    eventually(lambda: len(list(node.tier.glob("*.data"))) == before + 3, 60, "its chunks in the tier")
    node.server.clear_l1()
    assert node.prefetch(TOKENS).warmed == ROOM

    warmed = node.prefetch(other)

    assert (warmed.chunks, warmed.warmed, warmed.ended) == (3, 0, "no_room")
    assert node.used() == ROOM * 131072


def test_what_follows_a_chunk_that_is_missing_is_not_loaded_for_long(node):
    file_of(node, 6).unlink()

    warmed = node.prefetch(TOKENS[: 30 * CHUNK])

    assert (warmed.chunks, warmed.warmed, warmed.ended) == (30, 6, "missing")
    assert warmed.used_bytes < 20 * 131072


def test_a_run_tells_what_was_not_loaded_and_why(node, cluster, tmp_path):
    """The bucket is never asked: the server loads from its own tiers."""
    adapter = {"type": "plugin", "module_path": "hfbucket_plugin.l2_adapter"}
    adapter["adapter_params"] = {"bucket_handle": "hf://buckets/no/where", "endpoint": "http://127.0.0.1:9"}
    asked, page = tmp_path / "prompts.jsonl", tmp_path / "run.html"
    records = [{"token_ids": TOKENS, "model": "org/model"}, {"token_ids": TOKENS[: 2 * CHUNK], "model": "org/other"}]
    asked.write_text("\n".join(json.dumps(record) for record in records))

    def run(*models, chunk_size=CHUNK):
        return command(
            *("run", "--l2-adapter", json.dumps(adapter), "--prompts", str(asked), "--chunk-size", str(chunk_size)),
            *("--tier", json.dumps({"type": "l1", "http": node.server.http})),
            *("--world-size", "1", "--wait-engine", "1s"),
            *("--address", cluster.address, "--node-selector", "pool=batch", "--report-html", str(page)),
            *(word for model in models for word in ("--model", model)),
        )

    full = run()
    assert full.code == 3, full.stderr
    assert (full.summary["copied"], full.summary["failed_by_kind"]) == (ROOM, {"no_room": CHUNKS - ROOM, "engine": 2})
    assert full.summary["nodes"][0]["selected"] == CHUNKS + 2
    assert full.summary["bytes"] == node.used() == ROOM * 131072
    assert "Nothing was copied" not in page.read_text()

    other = run("org/other")
    assert (other.code, other.summary["failed_by_kind"]) == (3, {"engine": 2})
    assert "no layout registered for model_name='org/other'" in other.summary["nodes"][0]["error"]

    cut = run("org/model", chunk_size=64)
    assert (cut.code, cut.summary["failed_by_kind"]) == (3, {"config": CHUNKS // 2})
    assert "has --chunk-size 32, and the prompts were read by 64" in cut.stderr


def file_of(node, chunk):
    """The file of one of the prompt's chunks."""
    from lmcache.v1.multiprocess.token_hasher import TokenHasher

    hashes = TokenHasher(CHUNK, "blake3").compute_chunk_hashes(TOKENS)
    (file,) = node.tier.glob(f"*@{hashes[chunk].hex()}.data")
    return file


def test_it_waits_until_an_engine_with_the_model_is_there(node):
    clients = []

    def pause(_):
        if not clients:
            clients.append(node.client(model="late"))

    warmed = node.prefetch(TOKENS, model="late", pause=pause)

    assert (warmed.warmed, warmed.ended) == (0, "missing")
    clients[0].close()
    with pytest.raises(EngineError, match=r"waited in vain: .*no layout registered for model_name='never'"):
        node.prefetch(TOKENS, model="never", wait_secs=0)


def test_a_prompt_without_a_full_chunk_needs_nothing(node):
    warmed = node.prefetch(TOKENS[: CHUNK - 1])
    assert (warmed.chunks, warmed.warmed, warmed.ended, warmed.used_bytes) == (0, 0, "complete", 0)


def test_prompts_of_another_salt_are_others(node):
    assert node.prefetch(TOKENS, salt="tenant").warmed == 0
    with pytest.raises(ConfigError, match="cache_salt must not contain"):
        node.prefetch(TOKENS, salt="a@b")


def test_a_server_that_is_not_there_is_an_error():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(EngineError, match="no answer"):
        prefetch(f"http://127.0.0.1:{port}", TOKENS, model="m", wait_secs=0)
    for address in ("127.0.0.1:80", "ftp://x"):
        with pytest.raises(ConfigError, match="engine address"):
            prefetch(address, TOKENS, model="m")
