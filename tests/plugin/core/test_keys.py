"""Keys, names of objects, and handles of buckets."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from lmcache.utils import TORCH_DTYPE_TO_STR_DTYPE, CacheEngineKey, parse_cache_key
from lmcache.v1.distributed.api import ObjectKey
from lmcache.v1.distributed.l2_adapters.hfbucket_l2_adapter import _object_key_to_string
from lmcache.v1.storage_backend.connector.hfbucket_connector import (
    decode_hfbucket_object_name,
    encode_hfbucket_object_name,
    parse_hfbucket_handle,
)

from hfbucket_plugin.core.keys import (
    DTYPES,
    RESERVED,
    BucketHandle,
    ClassicKey,
    MPKey,
    decode_name,
    encode_name,
    is_probe,
    may_be_key,
    model_of,
    parse_key,
    same_endpoint,
)
from hfbucket_plugin.errors import ConfigError, KeyFormatError
from tests.support.models import any_text, field_text, untimed

tag_names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="@%"))
tag_values = st.one_of(st.integers(), st.text(st.characters(exclude_categories=["Cs"], exclude_characters="@")))
hashes = st.one_of(st.integers(-(2**63), 2**64 - 1), st.binary(min_size=32, max_size=32).map(int.from_bytes))

classic_keys = st.builds(
    lambda model, world, worker, chunk_hash, dtype, tags: CacheEngineKey(
        model, world, worker, chunk_hash, dtype, {f"lmcache.tag.{name}": value for name, value in tags.items()}
    ),
    field_text,
    st.integers(1, 9_999_999),
    st.integers(0, 9_999_999),
    hashes,
    st.sampled_from(sorted(TORCH_DTYPE_TO_STR_DTYPE, key=str)),
    st.dictionaries(tag_names, tag_values, max_size=3),
)
salts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="@/\\\x00"), max_size=128)
mp_keys = st.builds(
    lambda model, rank, group, chunk_hash, salt: ObjectKey(chunk_hash, model, rank, group, salt),
    field_text,
    st.integers(0, 2**40 - 1),
    st.integers(0, 2**16),
    st.binary(min_size=1, max_size=32),
    salts,
)


def test_dtypes_are_those_that_lmcache_writes():
    assert set(TORCH_DTYPE_TO_STR_DTYPE.values()) == DTYPES


@untimed
@given(classic_keys)
@example(CacheEngineKey("org/model", 8, 3, -0x520F, torch.float16, {}))
@example(CacheEngineKey("a model / ü 模型", 1, 0, 0, torch.bfloat16, {"lmcache.tag.user": "50%=x y%"}))
@example(CacheEngineKey("m", 1, 0, 1, torch.int8, {"lmcache.tag.7": 7}))
def test_classic_keys_of_lmcache_come_back(key):
    text = key.to_string()
    parsed = parse_key(text)

    assert isinstance(parsed, ClassicKey)
    assert str(parsed) == text
    assert (parsed.model, parsed.world_size, parsed.worker_id) == (key.model_name, key.world_size, key.worker_id)
    assert int(parsed.chunk_hash, 16) == key.chunk_hash
    assert parsed.dtype == TORCH_DTYPE_TO_STR_DTYPE[key.dtype]
    assert parsed.layer_id is None
    assert parsed.tags == tuple((name, str(value)) for name, value in key.tags or ())
    assert decode_name(encode_name(text)) == text


@untimed
@given(classic_keys, st.integers(1, 3))
def test_layer_keys_of_lmcache_come_back(key, layers):
    for layer, layer_key in enumerate(key.split_layers(layers)):
        text = layer_key.to_string()
        parsed = parse_key(text)

        assert isinstance(parsed, ClassicKey)
        assert str(parsed) == text
        assert parsed.layer_id == layer
        assert parsed.tags == tuple((name, str(value)) for name, value in key.tags or ())


@untimed
@given(mp_keys)
@example(ObjectKey(b"\0", "m", 0, 0, ""))
@example(ObjectKey(b"\xab", "m", 0x01000000, 0, "half"))
@example(ObjectKey(b"\xab\xcd", "a model/ü", 0x1_00000000, 10, "user%=ü"))
def test_mp_keys_of_lmcache_come_back_and_are_never_taken_for_classic_ones(key):
    text = _object_key_to_string(key)
    parsed = parse_key(text)

    assert isinstance(parsed, MPKey)
    assert str(parsed) == text
    assert (parsed.model, parsed.kv_rank, parsed.group, parsed.salt) == (
        key.model_name,
        key.kv_rank,
        key.object_group_id,
        key.cache_salt,
    )
    assert bytes.fromhex(parsed.chunk_hash) == key.chunk_hash
    assert decode_name(encode_name(text)) == text


pieces = st.sampled_from(["m", "llama", "v2", "1", "0", "8", "ab", "20241231", "half", "", "a/b", "ü", "%", "x%y"])
odd_models = st.lists(pieces, min_size=1, max_size=4).map("@".join).filter(lambda text: text.strip("@") != "")
odd_tags = st.dictionaries(
    st.sampled_from(["user", "a@b", "", "7x"]), st.lists(pieces, max_size=3).map("@".join), max_size=3
)


@untimed
@given(odd_models, st.tuples(st.integers(1, 64), st.integers(0, 63)), hashes, odd_tags, st.integers(0, 80))
@example("/models/llama@v2", (1, 0), 0xAB, {}, 3)
@example("m@1@0", (8, 3), 0xAB, {"user": "me@here@1@0@ab"}, 0)
@example("m", (8, 3), 0xAB, {"user": "x@1@0@ab@half"}, 0)
@example("m@20241231@ab", (8, 3), 0xABCD, {"a@b": ""}, 1)
def test_models_and_tags_may_hold_the_separator(model, ranks, chunk_hash, tags, layer):
    world, worker = ranks
    configs = {f"lmcache.tag.{name}": value for name, value in tags.items()}
    key = CacheEngineKey(model, world, worker, chunk_hash, torch.bfloat16, configs)
    for one in (key, key.split_layers(layer + 1)[layer]):
        text = one.to_string()
        if text.startswith("@"):  # no engine has a model without a name, and some text before its first @
            continue
        parsed = parse_key(text)

        assert isinstance(parsed, ClassicKey)
        assert str(parsed) == text
        assert (parsed.model, parsed.world_size, parsed.worker_id) == (model, world, worker)
        assert int(parsed.chunk_hash, 16) == chunk_hash
        assert model_of(text) == model
        assert may_be_key(text)
        assert "@".join(f"{name}%{value}" for name, value in parsed.tags) == "@".join(
            f"{name}%{value}" for name, value in tags.items()
        )


@untimed
@given(mp_keys)
def test_what_lmcache_names_in_mp_mode_may_be_a_key(key):
    assert may_be_key(_object_key_to_string(key))
    assert model_of(_object_key_to_string(key)) == key.model_name


@pytest.mark.parametrize(
    ("text", "may"),
    [
        ("m@1@0@ab@float128", True),  # a dtype of tomorrow
        ("m@1@0@ab@half@tag", True),
        ("m@1@0@AB@half", True),
        ("notes@home.txt", False),
        ("README.md", False),
        ("", False),
        ("a@b@c@d@e", False),
    ],
)
def test_what_another_version_might_have_written_is_told_from_what_nobody_did(text, may):
    assert may_be_key(text) is may


def test_an_mp_rank_tells_world_size_and_worker():
    key = parse_key(f"m@{8 << 24 | 3 << 16 | 8 << 8 | 3:08x}@0@ab")

    assert (key.world_size, key.worker_id) == (8, 3)


@untimed
@given(any_text)
def test_whatever_parses_comes_back_the_same(text):
    try:
        parsed = parse_key(text)
    except KeyFormatError:
        return
    assert str(parsed) == text
    assert may_be_key(text)


# Fields that are nearly right, put together at random: most are refused, none may come back changed.
nearly = st.sampled_from(
    [
        "m", "a/b", "", "0", "00", "01", "1", "+1", "-1", " 1", "1_0", "\u0661", "12345678", "0000000a", "ab", "AB",
        "-ab", "--ab", "0x1", "half", "float16", "bfloat16", "t%v", "%", "7", "x",
    ]
)  # fmt: skip


@untimed
@given(st.lists(nearly, max_size=8).map("@".join))
def test_nearly_right_keys_are_refused_or_come_back_the_same(text):
    try:
        parsed = parse_key(text)
    except KeyFormatError:
        return
    assert str(parsed) == text
    # LMCache's own reader knows no model and no tag that holds `@`, which its writer does not mind.
    if isinstance(parsed, ClassicKey) and parsed.layer_id is None and text.count("@") == 4 + len(parsed.tags):
        assert parse_cache_key(text).to_string().split("@")[:3] == text.split("@")[:3]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "m",
        "@1@0@ab@half",
        "m@1@0@ab",
        "m@1@0@@half",
        "m@1@0@AB@half",
        "m@1@0@0xab@half",
        "m@1@0@ab@float16",
        "m@1@0@ab@HALF",
        "m@01@0@ab@half",
        "m@1@-1@ab@half",
        "m@1@0@ab@half@",
        "m@1@0@ab@half@tag",
        "m@1@0@ab@half@3@4",
        "m@1@0@ab@half@03",
        "m@\u0661@0@ab@half",
        "m@1\n@0@ab@half",
        "m@1@0@ab@half\n",
        "m@0000001@0@ab",
        "m@00000001@0@abc",
        "m@00000001@0@AB",
        "m@00000001@00@ab",
        "m@00000001@0@",
        "m@000000001@0@ab",
        "m@00000001@0@ab@",
        "m@00000001@0@ab@a/b",
        "m@00000001@0@ab@" + "s" * 129,
        "m@00000001@0@ab@s@t",
        ".hfbucket",
    ],
)
def test_what_lmcache_does_not_write_is_no_key(text):
    with pytest.raises(KeyFormatError, match="not a valid LMCache"):
        parse_key(text)


@untimed
@given(any_text)
def test_names_are_encoded_as_lmcache_encodes_them_and_come_back(text):
    assert encode_name(text) == encode_hfbucket_object_name(text)
    assert decode_name(encode_name(text)) == decode_hfbucket_object_name(encode_name(text)) == text
    assert "/" not in encode_name(text)


@untimed
@given(any_text, any_text)
def test_the_start_of_a_key_is_the_start_of_its_name_and_the_reverse(start, more):
    whole = start + more
    for cut in range(len(whole) + 1):
        assert encode_name(whole).startswith(encode_name(whole[:cut]))
    assert encode_name(more).startswith(encode_name(start)) == more.startswith(start)


@pytest.mark.parametrize(
    "name",
    ["a%2fb", "a%2Fb%", "a%2", "a%zz", "a%4", "a b", "a@b", "a/b", "%C3", "%ED%A0%80", "%FF", "ü", "a%41", "a%7Eb"],
)
def test_names_that_nobody_encoded_are_foreign(name):
    with pytest.raises(KeyFormatError):
        decode_name(name)


@untimed
@given(any_text)
def test_a_name_that_decodes_is_the_only_name_of_its_key(name):
    try:
        key = decode_name(name)
    except KeyFormatError:
        return
    assert encode_name(key) == name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_probe_of_lmcache_is_known(dtype):
    assert is_probe(CacheEngineKey("test", 1, 0, 0, dtype).to_string())
    assert not is_probe(CacheEngineKey("test", 1, 0, 1, dtype).to_string())
    assert not is_probe(CacheEngineKey("test2", 1, 0, 0, dtype).to_string())
    assert not is_probe(CacheEngineKey("test", 1, 1, 0, dtype).to_string())


VALID = {
    "hf://buckets/my-org/lmcache-kv": ("my-org", "lmcache-kv", ""),
    "hf://buckets/my-org/lmcache-kv/": ("my-org", "lmcache-kv", ""),
    "hf://buckets/my-org/lmcache-kv/prod": ("my-org", "lmcache-kv", "prod"),
    "hf://buckets/my-org/lmcache-kv/prod/": ("my-org", "lmcache-kv", "prod"),
    "hf://buckets//my-org///lmcache-kv//a//b//": ("my-org", "lmcache-kv", "a/b"),
    "  hf://buckets/my-org/lmcache-kv/prod \n": ("my-org", "lmcache-kv", "prod"),
    "hf://buckets/A_1/b.c-d/v1": ("A_1", "b.c-d", "v1"),
    "hf://buckets/o/b/with space/ü%2F#?": ("o", "b", "with space/ü%2F#?"),
    "hf://buckets/o/b/.hidden": ("o", "b", ".hidden"),
}

INVALID = [
    "",
    "my-org/lmcache-kv",
    "hf://my-org/lmcache-kv",
    "hf:/buckets/my-org/lmcache-kv",
    "https://huggingface.co/buckets/my-org/lmcache-kv",
    "HF://buckets/o/b",
    "hf://buckets",
    "hf://buckets/",
    "hf://buckets//",
    "hf://buckets/only-a-namespace",
    "hf://buckets/o/b?x=1",
    "hf://buckets/o/b#x",
    "hf://buckets/o o/b",
    "hf://buckets/o/-b",
    "hf://buckets/o/b-",
    "hf://buckets/o/.b",
    "hf://buckets/o/a--b",
    "hf://buckets/o/a..b",
    "hf://buckets/../b",
    "hf://buckets/o/" + "b" * 97,
    "hf://buckets/o/ü",
    "hf://buckets/o/b/..",
    "hf://buckets/o/b/a/../c",
    "hf://buckets/o/b/./c",
    f"hf://buckets/o/b/{RESERVED}",
    f"hf://buckets/o/b/prod/{RESERVED}/x",
    "hf://buckets/o/b/a\nb",
    "hf://buckets/o/b/a\x00",
]

prefixes = st.lists(
    st.text(st.characters(exclude_categories=["C", "Z"], exclude_characters="/"), min_size=1).filter(
        lambda part: part not in {".", "..", RESERVED}
    ),
    max_size=3,
).map("/".join)
names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


@pytest.mark.parametrize(("text", "parts"), VALID.items())
def test_a_valid_handle_is_read_as_lmcache_reads_it(text, parts):
    handle = BucketHandle.parse(text)
    theirs = parse_hfbucket_handle(text)

    assert (handle.namespace, handle.bucket, handle.prefix) == parts
    assert (handle.bucket_id, handle.prefix) == (theirs.bucket_id, theirs.object_prefix)
    assert BucketHandle.parse(str(handle)) == handle


@pytest.mark.parametrize("text", INVALID)
def test_what_is_no_handle_is_refused_with_a_message_that_quotes_it(text):
    with pytest.raises(ConfigError) as refused:
        BucketHandle.parse(text)

    assert repr(text) in str(refused.value)
    assert "\n" not in str(refused.value)


@untimed
@given(prefixes, names)
def test_relative_undoes_join(prefix, name):
    handle = BucketHandle("o", "b", prefix)

    assert handle.relative(handle.join(name)) == name
    assert BucketHandle.parse(str(handle)) == handle


@untimed
@given(prefixes.filter(bool), names)
def test_relative_never_takes_a_longer_or_shorter_prefix_for_its_own(prefix, name):
    handle = BucketHandle("o", "b", prefix)

    assert handle.relative(f"{prefix}0/{name}") is None
    assert handle.relative(prefix) is None
    assert handle.relative(f"x{prefix}/{name}") is None


def test_v1_is_not_v10():
    v1 = BucketHandle.parse("hf://buckets/o/b/v1")
    v10 = BucketHandle.parse("hf://buckets/o/b/v10")

    assert v1.relative(v10.join("k")) is None
    assert v10.relative(v1.join("k")) is None
    assert v1.relative("v1/k") == "k"
    assert v1.relative("v1") is None


def test_without_a_prefix_every_path_is_below():
    handle = BucketHandle.parse("hf://buckets/o/b")

    assert handle.join("k") == "k"
    assert handle.relative("a/b") == "a/b"


def test_the_case_of_namespaces_and_buckets_does_not_matter_that_of_prefixes_does():
    one, other = (BucketHandle.parse(f"hf://buckets/{text}") for text in ("Acme/KV-1/eu", "acme/kv-1/eu"))

    assert one == other
    assert len({one, other}) == 1
    assert str(one) != str(other), "what was written is shown"
    assert one != BucketHandle.parse("hf://buckets/acme/kv-1/EU")
    assert one != "hf://buckets/acme/kv-1/eu"
    assert one.same_bucket(BucketHandle.parse("hf://buckets/ACME/kv-1"))
    assert not one.same_bucket(BucketHandle.parse("hf://buckets/acme/kv-2/eu"))


def test_a_handle_in_a_bucket_of_another_name_keeps_its_prefix():
    assert str(BucketHandle.parse("hf://buckets/a/b/eu/x").within("c/d")) == "hf://buckets/c/d/eu/x"
    with pytest.raises(ConfigError):
        BucketHandle.parse("hf://buckets/a/b/eu").within("../x")


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("https://huggingface.co", "https://HuggingFace.co/", True),
        ("https://huggingface.co", "https://huggingface.co:443", True),
        ("HTTP://hub.example.", "http://hub.example:80//", True),
        ("http://[::1]:8080/hub/", "http://[::1]:8080/hub", True),
        ("https://huggingface.co", "http://huggingface.co", False),
        ("https://huggingface.co", "https://huggingface.co:8443", False),
        ("https://huggingface.co", "https://hub.huggingface.co", False),
        ("http://proxy/one", "http://proxy/two", False),
    ],
)
def test_addresses_of_one_hub(one, other, same):
    assert same_endpoint(one, other) is same
