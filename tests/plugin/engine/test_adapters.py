"""Every L2 adapter over a bucket: a server stores into it, and a fresh one hits all of it, byte for byte."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from huggingface_hub import HfApi

from tests.support.lmcache_engine import prompt
from tests.support.lmcache_mp import EVERY_ADAPTER, Place
from tests.support.lmcache_server import MPClient, MPServer
from tests.support.waiting import eventually

pytestmark = pytest.mark.engine

MODEL = "stored/by-another"
CHUNK = 32
CHUNKS = 6
TOKENS = CHUNKS * CHUNK + 9
PROMPTS = 3
HIT_L1, HIT_L2 = (f"lmcache_mp_lookup_hit_{tier}_tokens_total" for tier in ("l1", "l2"))
_numbers = itertools.count(1)


@dataclass
class Stored:
    """A server that has just started over a bucket in which another has stored some prompts."""

    server: MPServer
    place: Place
    api: HfApi

    def objects(self):
        return objects(self.api, self.place)

    def hits(self, model):
        return [self.server.count(name, model_name=model) for name in (HIT_L1, HIT_L2)]


def objects(api, place):
    """What is below the prefix but for our own records."""
    listed = api.list_bucket_tree(place.bucket_id, prefix=place.prefix, recursive=True)
    return {item.path: item.size for item in listed if item.type == "file" and "/.hfbucket/" not in item.path}


def retrieved(server, model, seed=1):
    """How many tokens of a stored prompt are hit, and whether they come back identical and nothing else does."""
    with MPClient(server.address, model=model) as client:
        hit, kv = client.retrieve(prompt(seed, TOKENS))
        same = torch.equal(kv[:, :, :hit], client.random_kv(TOKENS, seed)[:, :, :hit])
        return hit, same and not kv[:, :, hit:].any()


@pytest.fixture(scope="module", params=EVERY_ADAPTER)
def stored(request, session_hub):
    api = HfApi(endpoint=session_hub.endpoint, token=False)
    place = Place(session_hub.endpoint, f"tests/mp-{request.param.__name__}-{next(_numbers)}")
    api.create_bucket(place.bucket_id)
    adapters, env = [request.param(place)], {"HF_ENDPOINT": place.endpoint}
    with MPServer(adapters, chunk_size=CHUNK, env=env) as server:
        with MPClient(server.address, model=MODEL) as client:
            for seed in range(PROMPTS):
                client.store(prompt(seed, TOKENS), client.random_kv(TOKENS, seed))
        eventually(lambda: len(objects(api, place)) == PROMPTS * CHUNKS, 120, "every chunk in the bucket")
    with MPServer(adapters, chunk_size=CHUNK, env=env) as server:
        yield Stored(server, place, api)


def test_a_fresh_server_hits_every_full_chunk_and_the_bytes_are_identical(stored):
    with MPClient(stored.server.address, model=MODEL) as client:
        assert client.lookup(prompt(0, TOKENS)) == CHUNKS * CHUNK
        chunk_bytes = client.chunk_bytes
    with ThreadPoolExecutor(PROMPTS) as threads:
        got = list(threads.map(lambda seed: retrieved(stored.server, MODEL, seed), range(PROMPTS)))

    assert got == [(CHUNKS * CHUNK, True)] * PROMPTS
    assert set(stored.objects().values()) == {chunk_bytes}
    eventually(lambda: stored.hits(MODEL) == [0, (PROMPTS + 1) * CHUNKS * CHUNK], 60, "hits of the adapter alone")


def test_objects_are_named_by_their_keys_and_hold_the_chunks_bytes(stored, tmp_path):
    names = [path for path in stored.objects() if "stored%2Fby-another%4001000100%400%40" in path]
    assert len(names) == PROMPTS * CHUNKS
    targets = [(name, str(tmp_path / str(number))) for number, name in enumerate(names)]
    stored.api.download_bucket_files(stored.place.bucket_id, targets)

    with MPClient(stored.server.address) as client:
        kvs = [client.random_kv(TOKENS, seed) for seed in range(PROMPTS)]
    chunks = [kv[:, :, n * CHUNK : (n + 1) * CHUNK].contiguous() for kv in kvs for n in range(CHUNKS)]
    expected = {bytes(chunk.view(torch.uint8).numpy().data) for chunk in chunks}
    assert {(tmp_path / str(number)).read_bytes() for number in range(len(names))} == expected


def test_a_chunk_that_is_gone_from_the_bucket_ends_the_hit_before_it(stored):
    model = "stored/then-deleted"
    before = stored.objects()
    names = []
    with MPClient(stored.server.address, model=model) as client:
        client.kv(TOKENS).copy_(client.random_kv(TOKENS, seed=1))
        for chunks in range(1, CHUNKS + 1):
            client.store(prompt(1, TOKENS)[: chunks * CHUNK])
            eventually(lambda count=chunks: len(stored.objects()) == len(before) + count, 120, "one more chunk")
            names += stored.objects().keys() - before.keys() - set(names)
    stored.server.clear_l1()
    assert retrieved(stored.server, model) == (CHUNKS * CHUNK, True)

    stored.api.batch_bucket_files(stored.place.bucket_id, delete=[names[4]])

    assert retrieved(stored.server, model) == (4 * CHUNK, True)
    eventually(lambda: stored.hits(model) == [0, (CHUNKS + 4) * CHUNK], 60, "hits of the adapter alone")


def test_a_prompt_of_which_nothing_is_stored_misses(stored):
    assert retrieved(stored.server, "stored/never") == (0, True)
