"""Files are named and placed as LMCache's own connector names and places them."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfbucket_plugin.engine_config import EngineConfig
from hfbucket_plugin.errors import ConfigError
from warmer.tiers import declared_tier
from warmer.tiers.declaration import DirectoryDeclaration

BASE = "remote_storage_plugin.fs.warm.base_path"


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


def test_a_tier_with_headers_is_refused_with_the_setting_and_what_to_set():
    for engine in (config(**{BASE: "/mnt/tier"}), config(**{BASE: "/mnt/tier", "save_chunk_meta": True})):
        message = refusal(engine)
        assert "extra_config.save_chunk_meta" in message
        assert "save_chunk_meta: false" in message
    message = refusal(config(layerwise=True, save_chunk_meta=False, **{BASE: "/mnt/tier"}))
    assert "use_layerwise: false" in message


def test_a_tier_that_is_not_declared_is_refused_with_those_that_are():
    message = refusal(raw(), "fs.other")
    assert "'fs.other' is not in remote_storage_plugins" in message
    assert "fs.warm, hfbucket.us" in message
    assert "none" in refusal(config(plugins=()))


def test_another_instance_is_no_tier():
    assert "type 'hfbucket'" in refusal(raw(), "hfbucket.us")


@pytest.mark.parametrize("tier", ["local_disk", "local_cpu", "gds.fast", "raw_block", "dax", "fs_native"])
def test_a_tier_that_cannot_be_filled_is_refused_with_the_reason(tier):
    message = refusal(raw(), tier)
    assert tier in message
    assert "cannot be filled from outside" in message or "not supported yet" in message
