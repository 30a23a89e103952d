"""The client of `lmcache server`: what is stored comes back, byte for byte, from L1 and from an adapter."""

import pytest
import torch

from tests.support.lmcache_engine import prompt
from tests.support.lmcache_server import MPClient, MPServer
from tests.support.waiting import eventually

pytestmark = pytest.mark.engine

CHUNK = 32


@pytest.fixture(scope="module")
def tier(tmp_path_factory):
    return tmp_path_factory.mktemp("tier")


@pytest.fixture(scope="module")
def server(tier):
    with MPServer([{"type": "fs", "base_path": str(tier)}], chunk_size=CHUNK) as server:
        yield server


def test_full_chunks_are_hit_and_come_back_identical(server):
    tokens = prompt(1, 7 * CHUNK + 5)
    with MPClient(server.address) as client:
        kv = client.random_kv(len(tokens), seed=1)
        assert client.chunk_size == CHUNK
        assert client.chunk_bytes == 2 * 2 * CHUNK * 64 * 2
        assert not client.shares_memory
        assert client.lookup(tokens) == 0
        assert client.retrieve(tokens)[0] == 0

        client.store(tokens, kv)

        assert client.lookup(tokens) == 7 * CHUNK
        hit, got = client.retrieve(tokens)
        assert hit == 7 * CHUNK
        assert torch.equal(got[:, :, :hit], kv[:, :, :hit])
        assert not got[:, :, hit:].any()
        # A prompt that only begins like it, and one that is shorter than a chunk.
        assert client.lookup(tokens[: 3 * CHUNK] + prompt(2, CHUNK)) == 3 * CHUNK
        assert client.lookup(tokens[: CHUNK - 1]) == 0


def test_models_and_salts_share_nothing(server):
    tokens = prompt(3, 2 * CHUNK)
    with (
        MPClient(server.address, salt="tenant") as tenant,
        MPClient(server.address) as other,
        MPClient(server.address, model="demo/another") as model,
    ):
        tenant.store(tokens, tenant.random_kv(len(tokens), seed=3))

        assert tenant.lookup(tokens) == len(tokens)
        assert other.lookup(tokens) == 0
        assert model.lookup(tokens) == 0


def test_what_does_not_fit_is_refused(server):
    with pytest.raises(ValueError, match="multiple of blocks of 24"):
        MPClient(server.address, block=24)
    with (
        MPClient(server.address, tokens=CHUNK) as client,
        pytest.raises(ValueError, match="33 tokens, and room for 32"),
    ):
        client.store(prompt(4, CHUNK + 1))


def test_what_l1_has_forgotten_comes_from_the_adapter(server, tier):
    tokens = prompt(4, 3 * CHUNK)
    # Chunks of no multiple of the memory's pages, and blocks that are as long as a chunk.
    with MPClient(server.address, layers=3, hidden=65, block=CHUNK, model="demo/odd", tokens=len(tokens)) as client:
        kv = client.random_kv(len(tokens), seed=4)
        client.store(tokens, kv)
        eventually(lambda: len(list(tier.glob("*odd*.data"))) == 3, 60, "three files in the tier")
        l1, l2 = (f"lmcache_mp_lookup_hit_{level}_tokens_total" for level in ("l1", "l2"))

        assert client.retrieve(tokens)[0] == len(tokens)
        eventually(lambda: server.count(l1, model_name="demo/odd") == len(tokens), 60, "hits in L1")
        server.clear_l1()
        hit, got = client.retrieve(tokens)

    assert hit == len(tokens)
    assert torch.equal(got, kv)
    assert {file.stat().st_size for file in tier.glob("*odd*.data")} == {client.chunk_bytes}
    assert client.chunk_bytes % 4096
    eventually(lambda: server.count(l2, model_name="demo/odd") == len(tokens), 60, "hits of the adapter")
    assert server.count(l1, model_name="demo/odd") == len(tokens)


def test_shared_memory_carries_the_same_bytes_until_the_server_is_gone():
    tokens = prompt(5, 4 * CHUNK)
    server = MPServer(shared_memory=True)
    with MPClient(server.address, timeout_s=60) as client:
        kv = client.random_kv(len(tokens), seed=5)
        client.store(tokens, kv)
        hit, got = client.retrieve(tokens)

        assert client.shares_memory
        assert hit == len(tokens)
        assert torch.equal(got, kv)
        server.kill()
    with pytest.raises(TimeoutError):
        MPClient(server.address, timeout_s=1)
