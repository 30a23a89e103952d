"""Prompts to hashes, compared with what LMCache makes of the same tokens."""

import json
import tracemalloc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hfbucket_plugin.core.keys import ClassicKey, MPKey, parse_key
from hfbucket_plugin.errors import ConfigError
from hfbucket_plugin.tools.prompts import Prompt, PromptOrder, classic_hasher, mp_hasher, read_prompts
from tests.support.buckets import MODEL
from warmer.node.prompts import PromptFile

TOKENS = [n * 7919 % 32000 for n in range(1000)]


def written(tmp_path, *records):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(one if isinstance(one, str) else json.dumps(one) for one in records) + "\n")
    return path


def test_prompts_are_read(tmp_path):
    path = written(tmp_path, {"token_ids": [1, 2]}, "", {"token_ids": [], "model": "m", "cache_salt": "s"})
    assert list(read_prompts(path)) == [Prompt([1, 2]), Prompt([], "m", "s")]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("[1, 2]", "a prompt reads"),
        ('{"tokens": [1]}', "1 unknown fields; known are"),
        ("{}", "token_ids must be"),
        ('{"token_ids": "secret words"}', "token_ids must be"),
        ('{"token_ids": [1, -1]}', "token_ids must be"),
        ('{"token_ids": [true]}', "token_ids must be"),
        ('{"token_ids": [4294967296]}', "token_ids must be"),
        ('{"token_ids": [1], "model": 3}', "model must be"),
    ],
)
def test_what_is_no_prompt_is_named_by_its_line(tmp_path, line, said):
    with pytest.raises(ConfigError, match=f"line 2: .*{said}") as raised:
        list(read_prompts(written(tmp_path, {"token_ids": [1]}, line)))
    assert "secret" not in str(raised.value)


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"token_ids": [1]}\r\n\xef\xbb\xbf\n{"token_ids": [2]}\n')

    assert list(read_prompts(path)) == [Prompt([1]), Prompt([2])]
    file = PromptFile(path, ["m"], 1)
    assert [list(one.token_ids) for one in file.batch(0)] == [[1], [2]]


def test_prompts_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        list(read_prompts(tmp_path / "none"))


@pytest.mark.parametrize("unfull", [False, True])
def test_classic_hashes_are_those_of_lmcaches_keys(tmp_path, unfull):
    from lmcache.v1.config import LMCacheEngineConfig
    from lmcache.v1.metadata import LMCacheMetadata
    from lmcache.v1.token_database import ChunkedTokenDatabase

    path = tmp_path / "lmcache.yaml"
    path.write_text(f"chunk_size: 64\nsave_unfull_chunk: {unfull}\n")
    metadata = LMCacheMetadata(
        model_name=MODEL, world_size=2, local_world_size=2, worker_id=1, local_worker_id=1, kv_dtype=torch.bfloat16,
        kv_shape=(1, 2, 64, 1, 8),
    )  # fmt: skip
    database = ChunkedTokenDatabase(LMCacheEngineConfig.from_file(str(path)), metadata)
    keys = [parse_key(key.to_string()) for _, _, key in database.process_tokens(tokens=torch.tensor(TOKENS))]
    assert len(keys) == (16 if unfull else 15)
    assert any(key.chunk_hash.startswith("-") for key in keys)
    assert classic_hasher(path)(TOKENS) == [key.chunk_hash for key in keys]


def test_mp_hashes_are_those_of_lmcaches_keys():
    from lmcache.v1.multiprocess.cache_control.key_resolver import resolve_object_keys
    from lmcache.v1.multiprocess.token_hasher import TokenHasher

    keys, chunks = resolve_object_keys(TokenHasher(64, "blake3"), MODEL, 1, TOKENS, "")
    assert chunks == 15
    assert mp_hasher(64, "blake3")(TOKENS) == [key.chunk_hash.hex() for key in keys]


def test_hashes_that_only_vllm_knows_are_refused_without_it(tmp_path):
    path = tmp_path / "lmcache.yaml"
    path.write_text("pre_caching_hash_algorithm: sha256_cbor\n")
    with pytest.raises(ConfigError, match="comes with vLLM"):
        classic_hasher(path)
    with pytest.raises(ConfigError, match="comes with vLLM"):
        mp_hasher(256, "sha256_cbor")


def test_blending_and_unreadable_files_are_refused(tmp_path):
    path = tmp_path / "lmcache.yaml"
    path.write_text("enable_blending: true\n")
    with pytest.raises(ConfigError, match="enable_blending"):
        classic_hasher(path)
    with pytest.raises(ConfigError, match="cannot hash"):
        classic_hasher(tmp_path / "none.yaml")


def plain(token_ids):
    """A hasher of chunks of two tokens, each hash of the whole prefix."""
    return [str(token_ids[: end + 2]).encode().hex() for end in range(0, len(token_ids) - 1, 2)]


prompts = st.lists(st.lists(st.integers(0, 3), max_size=9), max_size=6)


@given(prompts)
def test_prompt_by_prompt_and_each_from_its_start(token_lists):
    order = PromptOrder(map(Prompt, token_lists), plain)
    wanted = list(dict.fromkeys(value for tokens in token_lists for value in plain(tokens)))
    assert (order.prompts, order.chunks) == (len(token_lists), len(wanted))
    for place, value in enumerate(wanted):
        assert order.place(ClassicKey("m", 1, 0, value, "half")) == place
        assert order.place(MPKey("m", 1 << 24, 0, value, "anyone's")) == place
    assert order.place(ClassicKey("m", 1, 0, "ff", "half")) is None
    for tokens in token_lists:  # any first part of the plan holds first parts of prompts
        places = [order.place(ClassicKey("m", 1, 0, value, "half")) for value in plain(tokens)]
        assert places == sorted(places)


def test_prompts_that_share_their_start_take_its_memory_once(monkeypatch):
    monkeypatch.setattr("hfbucket_plugin.tools.prompts._PENDING", 50)
    shared = [f"{number:064x}" for number in range(2**70, 2**70 + 100)]
    tracemalloc.start()
    try:
        order = PromptOrder((Prompt([number]) for number in range(300)), lambda tokens: [*shared, f"{tokens[0]:x}"])
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (order.prompts, order.chunks) == (300, 400)
    assert held < 20 * 400 + 4096
    found = [order.place(MPKey("m", 0, 0, value)) for value in (shared[0], shared[99], "0", "12b", "12c")]
    assert found == [0, 99, 100, 399, None]
    # Python's own hashes may be negative.
    negative = PromptOrder([Prompt([1])], lambda _: ["-1f", "1f"])
    assert [negative.place(ClassicKey("m", 1, 0, value, "half")) for value in ("-1f", "1f", "f")] == [0, 1, None]


def test_models_and_salts_tell_prompts_apart():
    order = PromptOrder([Prompt([1, 2], "a", ""), Prompt([1, 2], "b")], plain)
    (value,) = plain([1, 2])
    assert order.models == {"a", "b"}
    assert order.place(MPKey("a", 0, 0, value)) == 0
    assert order.place(MPKey("a", 0, 0, value, "salt")) is None
    assert order.place(MPKey("b", 0, 0, value, "salt")) == 1
    assert order.place(MPKey("c", 0, 0, value)) is None
    assert PromptOrder([Prompt([1], "a"), Prompt([1])], plain).models is None
