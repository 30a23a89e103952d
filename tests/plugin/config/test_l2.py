"""The settings of an adapter of MP mode, as `lmcache server --l2-adapter` is given them."""

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfbucket_plugin.config.l2 import DEFAULT_GET_SECS, MODULE, L2Settings, from_json, from_params
from hfbucket_plugin.config.settings import InstanceSettings
from hfbucket_plugin.errors import ConfigError
from tests.support.buckets import SECRET, everything_reported
from tests.support.models import any_text, untimed

HANDLE = "hf://buckets/my-org/lmcache-kv/prod"
PARAMS = {"bucket_handle": HANDLE}


def plugin(**values):
    spec = {"type": "plugin", "module_path": MODULE, "class_name": "HFBucketL2Adapter", "adapter_params": PARAMS}
    return json.dumps(spec | values)


def complaint(text):
    with pytest.raises(ConfigError) as refused:
        from_json(text)
    message = str(refused.value)
    assert "\n" not in message
    assert SECRET not in everything_reported(refused.value)
    return message


# --- what is taken -----------------------------------------------------------------------------------------------------


def test_the_json_of_our_adapter():
    own = from_json(plugin(adapter_params=PARAMS | {"name": "hfbucket.us", "token_env": "US_TOKEN"}))

    assert str(own.bucket_handle) == HANDLE
    assert (own.name, own.token_env) == ("hfbucket.us", "US_TOKEN")


def test_what_lmcache_reads_itself_may_stand_beside():
    text = plugin(eviction={"policy": "LRU"}, serde="naive", affinity_tag="a", shared=True, persist_enabled=True)

    assert str(from_json(text).bucket_handle) == HANDLE


def test_the_json_of_the_builtin_adapter():
    spec = {
        "type": "hfbucket",
        "bucket_handle": HANDLE,
        "token_env": "US_TOKEN",
        "num_workers": 4,
        "max_capacity_gb": 1.5,
        "eviction": {"policy": "LRU"},
    }
    own = from_json(json.dumps(spec))

    assert str(own.bucket_handle) == HANDLE
    assert (own.name, own.token_env, own.num_workers, own.max_capacity_gb) == ("hfbucket", "US_TOKEN", 4, 1.5)


def test_every_field_of_the_builtin_adapter_is_known():
    from lmcache.v1.distributed.l2_adapters import hfbucket_l2_adapter

    config = hfbucket_l2_adapter.HFBucketL2AdapterConfig
    fields = getattr(config, "__dataclass_fields__", None) or config.__init__.__annotations__
    own = {name for name in fields if not name.startswith("_") and name not in {"return", "bucket_location"}}

    assert own
    assert own - set(L2Settings.model_fields) <= {"eviction", "eviction_config", "serde", "type"}


def test_all_settings_of_an_instance_are_settings_of_an_adapter():
    assert set(L2Settings.model_fields) >= set(InstanceSettings.model_fields)
    assert all(field.description for field in L2Settings.model_fields.values())


def test_defaults():
    own = from_params(PARAMS)

    assert (own.name, own.max_capacity_gb, own.usage_refresh_secs, own.usage_max_pages) == ("hfbucket", 0, 3600, 100)
    assert (own.object_sizes, own.num_workers) == ("layout", None)


def test_how_long_a_load_may_take():
    assert from_params(PARAMS).load_timeout_secs == DEFAULT_GET_SECS
    assert from_params(PARAMS | {"get_timeout_secs": 4}).load_timeout_secs == 4


# --- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "{", "bucket", "{'type': 'plugin'}", "[" * 100_000, SECRET])
def test_what_is_no_json(text):
    assert "--l2-adapter: not valid JSON" in complaint(text)


@pytest.mark.parametrize("text", ["[]", "1", "null", '"hfbucket"', f'"{SECRET}"'])
def test_what_is_no_object(text):
    assert "must be a JSON object" in complaint(text)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({}, "type None"),
        ({"type": "fs"}, "type 'fs'"),
        ({"type": "plugin"}, "type 'plugin', module_path None"),
        ({"type": "plugin", "module_path": "other.adapter"}, "type 'plugin', module_path 'other.adapter'"),
        (
            {"type": "plugin", "module_path": "hfbucket_plugin.adapter"},
            "type 'plugin', module_path 'hfbucket_plugin.adapter'",
        ),
    ],
)
def test_an_adapter_of_something_else(spec, words):
    message = complaint(json.dumps(spec | {"adapter_params": PARAMS | {"token": SECRET}}))

    assert f"--l2-adapter: {words} is not a bucket adapter" in message
    assert MODULE in message
    assert '"type": "hfbucket"' in message


@pytest.mark.parametrize(
    "spec",
    [
        {"type": SECRET},
        {"type": [SECRET]},
        {"type": "plugin", "module_path": SECRET},
        {"type": "plugin", "module_path": MODULE, "adapter_params": PARAMS | {"name": SECRET, "serde": "x"}},
        {"type": "plugin", "module_path": MODULE, "adapter_params": PARAMS | {"name": SECRET, "role": "x"}},
        {"type": "plugin", "module_path": MODULE, "adapter_params": PARAMS | {SECRET: SECRET}},
    ],
)
def test_a_token_that_stands_where_a_name_should_is_not_repeated(spec):
    assert "***" in complaint(json.dumps(spec))


@pytest.mark.parametrize("params", [None, [], "text", 3])
def test_params_that_are_none(params):
    assert "adapter_params must be a JSON object" in complaint(plugin(adapter_params=params))


def test_params_that_are_left_out():
    spec = {"type": "plugin", "module_path": MODULE}

    assert "adapter_params.bucket_handle: is required" in complaint(json.dumps(spec))


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("bucket_handel", "bucket_handle"),
        ("max_capacity", "max_capacity_gb"),
        ("usage_refresh", "usage_refresh_secs"),
        ("object_size", "object_sizes"),
        ("tokenenv", "token_env"),
        ("max_parallel_read", "max_parallel_reads"),
    ],
)
def test_an_unknown_setting_is_refused_with_the_nearest_known_one(wrong, near):
    message = complaint(plugin(adapter_params=PARAMS | {"name": "hfbucket.eu", wrong: SECRET}))

    assert "instance 'hfbucket.eu'" in message
    assert f"unknown setting adapter_params.{wrong} (did you mean {near!r}?)" in message


def test_an_unknown_setting_of_the_builtin_adapter_is_refused_too():
    text = json.dumps({"type": "hfbucket", "bucket_handle": HANDLE, "max_parallel_raeds": 3})

    assert "did you mean 'max_parallel_reads'" in complaint(text)


@pytest.mark.parametrize("misplaced", ["eviction", "serde", "shared", "affinity_tag", "persist_enabled", "type"])
def test_what_lmcache_reads_must_stand_beside(misplaced):
    message = complaint(plugin(adapter_params=PARAMS | {misplaced: {"policy": "LRU"}}))

    assert f"{misplaced} must stand beside adapter_params, not in it" in message


def test_all_that_is_misplaced_is_told_at_once():
    message = complaint(plugin(adapter_params=PARAMS | {"serde": "x", "eviction": {}}))

    assert "eviction, serde must stand beside" in message


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("name", ""),
        ("name", "a b"),
        ("name", "x" * 65),
        ("name", 7),
        ("max_capacity_gb", -1),
        ("max_capacity_gb", "much"),
        ("usage_refresh_secs", -0.1),
        ("usage_max_pages", 0),
        ("object_sizes", "all"),
        ("num_workers", 0),
        ("bucket_handle", "my-org/bucket"),
    ],
)
def test_an_ill_typed_setting_is_named(setting, value):
    assert f"adapter_params.{setting}: " in complaint(plugin(adapter_params=PARAMS | {setting: value}))


@pytest.mark.parametrize("setting", sorted(L2Settings.model_fields))
@pytest.mark.parametrize("wrap", [str, lambda text: [text], lambda text: {text: text}])
def test_a_token_in_the_wrong_place_is_not_repeated(setting, wrap):
    reported = []
    try:
        own = from_params(PARAMS | {setting: wrap(SECRET)})
    except ConfigError as error:
        reported.append(everything_reported(error))
    else:
        assert setting in {"token", "name", "download_tmp_dir"}
        reported.append(repr(own) if setting == "token" else "")

    assert SECRET not in reported[0]


def test_an_inline_token_does_not_show():
    own = from_params(PARAMS | {"token": SECRET})

    assert SECRET not in repr(own)
    assert own.resolve_token({}) == SECRET


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | any_text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(any_text, inner, max_size=3),
    max_leaves=6,
)
settings_names = st.sampled_from(sorted(L2Settings.model_fields)) | any_text


@untimed
@given(st.dictionaries(settings_names, json_values, max_size=5))
def test_nothing_but_a_config_error_ever_leaves(params):
    with contextlib.suppress(ConfigError):
        assert isinstance(from_json(plugin(adapter_params=PARAMS | params)), L2Settings)


@untimed
@given(any_text | json_values.map(json.dumps))
def test_any_text_is_read_or_refused(text):
    with contextlib.suppress(ConfigError):
        assert isinstance(from_json(text), L2Settings)


@pytest.mark.parametrize(
    "setting", ["max_capacity_gb", "usage_refresh_secs", "usage_max_pages", "server_chunk_size", "num_workers"]
)
@pytest.mark.parametrize("value", [1e300, 10**21, -1, float("nan")])
def test_every_number_has_bounds_that_an_error_says(setting, value):
    with pytest.raises(ConfigError, match=rf"adapter_params\.{setting}: .*\(allowed: .*at most [\d,]+\)"):
        from_params({"bucket_handle": "hf://buckets/o/b", setting: value})
