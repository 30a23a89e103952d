"""The JSON of an L2 adapter is read as `lmcache server` reads it, and files are named as its adapters name them."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfbucket_plugin.core.keys import MPKey
from hfbucket_plugin.engine.mp_tasks import key_string
from hfbucket_plugin.errors import ConfigError
from warmer.tiers import TierOptions, declared_tier
from warmer.tiers.naming import file_name, key_of

SPEC = {"type": "fs", "base_path": "/mnt/kv"}
NATIVE = SPEC | {"type": "fs_native"}


def declared(spec, **options):
    return declared_tier(None, json.dumps(spec), TierOptions(**options))


@st.composite
def object_keys(draw):
    from lmcache.v1.distributed.api import ObjectKey

    text = st.characters(codec="utf-8", exclude_characters="@/\\\x00")
    return ObjectKey(
        chunk_hash=draw(st.binary(min_size=1, max_size=40)),
        model_name=draw(st.text(text, min_size=1, max_size=20) | st.sampled_from(["org/m", "a-SEP-b", "a/b/c"])),
        kv_rank=draw(st.integers(0, 2**34)),
        object_group_id=draw(st.integers(0, 300)),
        cache_salt=draw(st.text(text, max_size=20) | st.just("a-SEP-b")),
    )


@given(object_keys())
def test_files_are_named_as_the_adapter_names_them(key):
    from lmcache.v1.distributed.l2_adapters import fs_l2_adapter

    from hfbucket_plugin.core.keys import parse_key

    ours = parse_key(key_string(key))
    name = fs_l2_adapter._object_key_to_filename(key)
    assert file_name(ours) == name
    theirs = fs_l2_adapter._filename_to_object_key(name)
    assert str(key_of(name)) == key_string(theirs)


@pytest.mark.parametrize(
    ("spec", "alignment", "mode"),
    [
        (SPEC, 1, 0o666),
        (SPEC | {"use_odirect": True, "read_ahead_size": 4096, "relative_tmp_dir": "tmp/x"}, 1, 0o644),
        (SPEC | {"shared": True, "affinity_tag": "fast", "persist_enabled": True, "eviction": None}, 1, 0o666),
        (NATIVE | {"num_workers": 8, "max_capacity_gb": 1.5, "eviction": {"eviction_policy": "LRU"}}, 1, 0o644),
        (NATIVE | {"use_odirect": True}, 4096, 0o644),
    ],
)
def test_every_option_of_the_adapters_is_taken(spec, alignment, mode):
    one = declared(spec, max_bytes=5)
    assert (one.takes, one.base_paths, one.options.max_bytes) == (MPKey, (Path("/mnt/kv"),), 5)
    assert (one.layout.alignment, one.layout.mode) == (alignment, mode)
    assert one.name == f"{spec['type']}:/mnt/kv"
    assert [one.layout.stored(size) for size in (1, 4096, 4097)] == [
        -(-size // alignment) * alignment for size in (1, 4096, 4097)
    ]
    assert lmcache_takes(spec)


def lmcache_takes(spec):
    import lmcache.v1.distributed.l2_adapters.fs_l2_adapter  # noqa: F401 - registers its type
    from lmcache.v1.distributed.l2_adapters.config import get_l2_adapter_config_class

    try:
        get_l2_adapter_config_class(spec["type"]).from_dict(spec)
    except ValueError:
        return False
    return True


WRONG = [None, "", 0, -1, 1.5, True, [], "x"]


@pytest.mark.parametrize("kind", ["fs", "fs_native"])
@pytest.mark.parametrize(
    "option", ["base_path", "relative_tmp_dir", "read_ahead_size", "use_odirect", "num_workers", "max_capacity_gb"]
)
@pytest.mark.parametrize("value", WRONG, ids=repr)
def test_values_are_refused_as_lmcache_refuses_them(kind, option, value):
    spec = SPEC | {"type": kind, option: value}
    if kind == "fs" and option in ("num_workers", "max_capacity_gb"):
        with pytest.raises(ConfigError, match=f"unknown option '{option}'"):
            declared(spec)
        return
    if option == "base_path" and value == "x":  # LMCache takes it: see the next test
        return
    if lmcache_takes(spec):
        declared(spec)
    else:
        with pytest.raises(ConfigError, match=option):
            declared(spec)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (SPEC | {"base_path": "kv"}, "not absolute"),
        (SPEC | {"base_path": "~/kv"}, "not absolute"),
        (SPEC | {"base_path": "/mnt/{pod}"}, "no placeholder"),
        ({"type": "fs"}, "base_path is required"),
        (SPEC | {"relative_tmp_dir": "/tmp"}, "below base_path"),  # noqa: S108 - a path in a setting
        (SPEC | {"relative_tmp_dir": "a/../.."}, "below base_path"),
        (SPEC | {"use_o_direct": True}, "did you mean 'use_odirect'"),
        (SPEC | {"compress": True}, "known are .*base_path"),
        (SPEC | {"serde": {"type": "fp8"}}, "serde"),
        ({"type": "raw_block"}, "cannot be filled from outside; those that can be are fs and fs_native"),
        ({"type": "dax"}, "cannot be filled from outside"),
        ({"type": "nixl_store_dynamic"}, "cannot be filled from outside"),
        ({"type": "hfbucket", "bucket_handle": "hf://buckets/a/b"}, "bucket"),
        ({"type": "s3"}, "not known to be a directory"),
        ({"type": 5}, 'lacks "type"'),
        ({"base_path": "/mnt/kv"}, 'lacks "type"'),
    ],
)
def test_what_cannot_be_filled_is_refused_with_the_reason(spec, words):
    with pytest.raises(ConfigError, match=words):
        declared(spec)


@pytest.mark.parametrize("text", ["{", '{"type": "fs",}', "{]", "{" * 100_000])
def test_a_text_that_is_no_json_is_refused(text):
    with pytest.raises(ConfigError, match="no JSON"):
        declared_tier(None, text)


def test_every_type_that_lmcache_knows_is_a_tier_or_refused():
    from lmcache.v1.distributed.l2_adapters.config import get_registered_l2_adapter_types

    kinds = set(get_registered_l2_adapter_types())
    assert {"fs", "fs_native", "raw_block", "hfbucket"} <= kinds
    for kind in kinds - {"fs", "fs_native"}:
        with pytest.raises(ConfigError, match=f"tier of type '{kind}'"):
            declared({"type": kind, "base_path": "/mnt/kv"})


@pytest.mark.parametrize("name", ["fs.warm", "local_cpu", "l1", "fs_native"])
def test_a_name_needs_a_yaml_and_says_what_to_give_instead(name):
    with pytest.raises(ConfigError, match="JSON"):
        declared_tier(None, name)
