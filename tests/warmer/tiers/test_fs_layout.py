"""Files are named and placed as LMCache's own connector names and places them."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfbucket_plugin.config.lmcache_yaml import EngineConfig
from hfbucket_plugin.core.keys import parse_key
from hfbucket_plugin.errors import ConfigError
from warmer.report.outcomes import TierError
from warmer.tiers import declared_tier
from warmer.tiers.declare import DirectoryDeclaration

BASE, SHAPE, DTYPE = (f"remote_storage_plugin.fs.warm.{name}" for name in ("base_path", "kv_shape", "kv_dtype"))


@pytest.fixture(scope="module")
def connector():
    """LMCache's connector with its own naming, over any base paths: what it needs beyond them is an engine."""
    from lmcache.v1.storage_backend.connector.fs_connector import FSConnector

    def make(*paths):
        one = FSConnector.__new__(FSConnector)
        one.base_paths = [Path(path) for path in paths]
        return one

    return make


models = st.text(st.characters(codec="utf-8", exclude_characters="@\x00"), min_size=1, max_size=30)
hashes = st.integers(-(2**64), 2**64)
tags = st.dictionaries(st.from_regex(r"[a-z]{1,5}", fullmatch=True), st.from_regex(r"[a-z0-9]{1,5}", fullmatch=True))


@st.composite
def engine_keys(draw):
    import torch
    from lmcache.utils import CacheEngineKey, LayerCacheEngineKey

    fields = {
        "model_name": draw(models),
        "world_size": 8,
        "worker_id": 3,
        "chunk_hash": draw(hashes),
        "dtype": torch.bfloat16,
        "request_configs": {f"lmcache.tag.{name}": value for name, value in draw(tags).items()} or None,
    }
    return LayerCacheEngineKey(**fields, layer_id=5) if draw(st.booleans()) else CacheEngineKey(**fields)


@given(engine_keys(), st.integers(1, 4))
def test_every_key_has_the_file_that_the_connector_looks_for(connector, key, paths):
    base_paths = tuple(Path(f"/tiers/{n}") for n in range(paths))
    ours = DirectoryDeclaration("fs.warm", base_paths).file(key.to_string())
    assert ours == connector(*base_paths)._get_file_path(key)


def config(plugins=("fs.warm", "hfbucket.us"), layerwise=False, **extra):
    return EngineConfig("lmcache.yaml", tuple(plugins), extra, layerwise)


def raw(**extra):
    return config(**({"save_chunk_meta": False, BASE: "/mnt/tier"} | extra))


@pytest.mark.parametrize(
    ("value", "paths"),
    [("/mnt/tier", ["/mnt/tier"]), ("/a, /b,/c", ["/a", "/b", "/c"])],
)
def test_base_paths_are_read_as_the_connector_reads_them(value, paths):
    assert declared_tier(raw(**{BASE: value}), "fs.warm").base_paths == tuple(map(Path, paths))


def test_the_general_base_path_is_the_fallback():
    declared = declared_tier(config(save_chunk_meta=False, fs_base_path="/mnt/general"), "fs.warm")
    assert declared.base_paths == (Path("/mnt/general"),)
    assert declared_tier(raw(fs_base_path="/mnt/general"), "fs.warm").base_paths == (Path("/mnt/tier"),)


def refusal(engine, tier="fs.warm"):
    with pytest.raises(ConfigError) as caught:
        declared_tier(engine, tier)
    return str(caught.value)


@pytest.mark.parametrize("value", ["tier", "~/tier", "", "  ", "/a,b", "/a,", 5, None])
def test_a_base_path_that_no_other_process_would_find_is_refused(value):
    assert BASE in refusal(raw(**{BASE: value}))


def test_a_tier_with_headers_of_unknown_shape_is_refused_with_the_settings_and_what_to_set():
    for engine in (config(**{BASE: "/mnt/tier"}), config(**{BASE: "/mnt/tier", "save_chunk_meta": True})):
        message = refusal(engine)
        assert "extra_config.save_chunk_meta" in message
        assert "save_chunk_meta: false" in message
        assert "remote_storage_plugin.fs.warm.kv_shape" in message


def test_a_layerwise_tier_is_refused_whatever_else_is_set():
    for meta in (True, False):
        message = refusal(config(layerwise=True, save_chunk_meta=meta, **{BASE: "/mnt/tier", SHAPE: "4,2,64,2,8"}))
        assert "use_layerwise: false" in message


def headed(shape, dtype=None):
    return declared_tier(config(**{BASE: "/mnt/tier", SHAPE: shape} | ({DTYPE: dtype} if dtype else {})), "fs.warm")


@st.composite
def headers(draw):
    """Groups of layers as LMCache has them, and the text that says the same."""
    import torch

    kv, chunk, tokens = draw(st.integers(1, 2)), draw(st.integers(1, 300)), draw(st.integers(1, 300))
    names = {"half": torch.half, "bfloat16": torch.bfloat16, "float": torch.float, "float64": torch.double,
             "uint8": torch.uint8, "fp8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}  # fmt: skip
    groups = draw(
        st.lists(
            st.tuples(st.integers(1, 99), st.integers(1, 9), st.integers(1, 99), st.sampled_from([*names])),
            min_size=1,
            max_size=3,
        )
    )
    tokens = min(tokens, chunk)
    shape = ";".join(f"{layers},{kv},{chunk},{heads},{head}" for layers, heads, head, _ in groups)
    shapes = [torch.Size([kv, layers, tokens, heads * head]) for layers, heads, head, _ in groups]
    return shape, ";".join(name for *_, name in groups), shapes, [names[name] for *_, name in groups], kv == 1


@given(headers())
def test_a_header_is_the_one_that_lmcache_writes(given):
    from lmcache.v1 import protocol
    from lmcache.v1.memory_management import MemoryFormat

    shape, dtypes, shapes, torch_dtypes, mla = given
    size = sum(one.numel() * dtype.itemsize for one, dtype in zip(shapes, torch_dtypes, strict=True))
    protocol.init_remote_metadata_info(len(shapes))
    fmt = MemoryFormat.KV_MLA_FMT if mla else MemoryFormat.KV_2LTD
    theirs = protocol.RemoteMetadata(size, shapes, torch_dtypes, fmt).serialize()

    layout = headed(shape, dtypes).layout

    assert layout.header.bytes_for(parse_key("m@1@0@1@half"), size) == theirs
    assert layout.stored(size) == len(theirs) + size
    assert layout.content(layout.stored(size)) == size
    assert layout.content(3) is None


def test_the_dtype_is_that_of_the_key_unless_it_is_given():
    def heads(engine):
        header = engine.layout.header
        return {dtype: header.bytes_for(parse_key(f"m@1@0@1@{dtype}"), 8)[8] for dtype in ("half", "bfloat16")}

    assert heads(headed([1, 2, 64, 1, 2])) == {"half": 2, "bfloat16": 3}
    assert heads(headed("(1, 2, 64, 1, 4)", "uint8")) == {"half": 6, "bfloat16": 6}


@pytest.mark.parametrize(
    ("dtype", "size", "words"),
    [("int64", 64, "int64"), ("half", 9, "does not fit kv_shape"), ("half", 0, "fit"), ("half", 8 * 65, "64 tokens")],
)
def test_a_chunk_that_is_none_of_the_engines_has_no_header(dtype, size, words):
    with pytest.raises(TierError, match=words):
        headed("1,2,64,1,2").layout.header.bytes_for(parse_key(f"m@1@0@1@{dtype}"), size)


@pytest.mark.parametrize(
    ("shape", "dtype", "words"),
    [
        ("1,2,64,1", None, "kv_shape"),
        ("1,3,64,1,2", None, "kv_shape"),
        ("0,2,64,1,2", None, "kv_shape"),
        ("a,2,64,1,2", None, "kv_shape"),
        (True, None, "kv_shape"),
        ("1,2,64,1,2;1,1,64,1,2", None, "differ"),
        ("1,2,64,1,2", "int4", "int4"),
        ("1,2,64,1,2", "half;half", "2 dtypes"),
    ],
)
def test_a_shape_that_does_not_read_so_is_refused(shape, dtype, words):
    with pytest.raises(ConfigError, match=words):
        headed(shape, dtype)


def test_a_tier_that_is_not_declared_is_refused_with_those_that_are():
    message = refusal(raw(), "fs.other")
    assert "'fs.other' is not in remote_storage_plugins" in message
    assert "fs.warm, hfbucket.us" in message
    assert "none" in refusal(config(plugins=()))


def test_another_instance_is_no_tier():
    assert "type 'hfbucket'" in refusal(raw(), "hfbucket.us")


@pytest.mark.parametrize("tier", ["local_disk", "gds.fast", "raw_block", "dax", "fs_native"])
def test_a_tier_that_cannot_be_filled_is_refused_with_the_reason(tier):
    message = refusal(raw(), tier)
    assert tier in message
    assert "cannot be filled from outside" in message or "not supported yet" in message
