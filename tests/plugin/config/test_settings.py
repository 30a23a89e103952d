import os
import re
from pathlib import Path

import pytest
from huggingface_hub import constants
from hypothesis import given
from hypothesis import strategies as st
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.storage_backend.connector.hfbucket_connector import (
    HFBucketConnectorConfig,
    resolve_hfbucket_connector_config,
)

from hfbucket_plugin.config.settings import InstanceSettings, load
from hfbucket_plugin.errors import ConfigError
from hfbucket_plugin.hub.client import token_problem
from tests.support.buckets import SECRET
from tests.support.models import untimed

HANDLE = "hf://buckets/my-org/lmcache-kv/prod"
SEED_KEYS = {
    "bucket_handle",
    "token_env",
    "token",
    "create_bucket_if_missing",
    "download_tmp_dir",
    "metadata_cache_ttl_secs",
}


def config(instance="hfbucket", **values):
    values = {"bucket_handle": HANDLE} | values
    return {f"remote_storage_plugin.{instance}.{name}": value for name, value in values.items()}


def complaint(extra, instance="hfbucket", declared=()):
    with pytest.raises(ConfigError) as refused:
        load(extra, instance, declared)
    message = str(refused.value)
    assert "\n" not in message
    assert repr(instance) in message
    assert refused.value.__cause__ is None
    assert refused.value.__suppress_context__ or refused.value.__context__ is None, "a traceback would show the values"
    return message


# --- the reference of the seed -----------------------------------------------------------------------------------------


def test_defaults_are_those_of_the_built_in_backend():
    theirs = resolve_hfbucket_connector_config(LMCacheEngineConfig.from_defaults(extra_config=config()), "hfbucket")
    ours = load(config(), "hfbucket")

    assert {
        "token_env": ours.token_env,
        "token": ours.token,
        "create_bucket_if_missing": ours.create_bucket_if_missing,
        "metadata_cache_ttl_secs": ours.metadata_cache_ttl_secs,
    } == {name: getattr(theirs, name) for name in SEED_KEYS - {"bucket_handle", "download_tmp_dir"}}
    assert ours.bucket_handle.bucket_id == theirs.bucket_location.bucket_id
    assert ours.bucket_handle.prefix == theirs.bucket_location.object_prefix
    assert (ours.token_env, ours.create_bucket_if_missing, ours.metadata_cache_ttl_secs) == ("HF_TOKEN", False, 30)
    # Theirs is the same for all users: who makes it first owns the files of the others.
    assert ours.download_tmp_dir == theirs.download_tmp_dir.with_name(f"lmcache-hfbucket-{os.geteuid()}")


def test_a_home_in_a_path_is_this_users_and_its_lack_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load(config(download_tmp_dir="~/scratch"), "hfbucket").download_tmp_dir == tmp_path / "scratch"

    assert "download_tmp_dir: cannot expand '~': this user has no home directory" in complaint(
        config(download_tmp_dir="~nobody-here/x")
    )


def test_every_key_of_the_built_in_backend_is_known():
    known = set(HFBucketConnectorConfig.__dataclass_fields__) - {"plugin_name", "bucket_location"} | {"bucket_handle"}

    assert known == SEED_KEYS
    assert set(InstanceSettings.model_fields) >= known


def test_values_are_taken_as_written():
    own = load(
        config(
            token_env="MY_TOKEN",
            token=SECRET,
            create_bucket_if_missing=True,
            download_tmp_dir="/dev/shm/lmcache-hfbucket",  # noqa: S108 - the seed's own example
            metadata_cache_ttl_secs=7.5,
        ),
        "hfbucket",
    )

    assert own.token_env == "MY_TOKEN"
    assert own.token.get_secret_value() == SECRET
    assert own.create_bucket_if_missing is True
    assert own.download_tmp_dir == Path("/dev/shm/lmcache-hfbucket")  # noqa: S108 - same
    assert own.metadata_cache_ttl_secs == 7.5


@pytest.mark.parametrize("text", ["1", "true", "True", "yes", "on", "ON", "0", "false", "no", "off"])
def test_truths_written_as_text_mean_what_they_mean_to_the_built_in_backend(text):
    extra = config(create_bucket_if_missing=text)
    theirs = resolve_hfbucket_connector_config(LMCacheEngineConfig.from_defaults(extra_config=extra), "hfbucket")

    assert load(extra, "hfbucket").create_bucket_if_missing is theirs.create_bucket_if_missing


def test_numbers_written_as_text_are_numbers():
    assert load(config(metadata_cache_ttl_secs="12.5"), "hfbucket").metadata_cache_ttl_secs == 12.5


def test_every_setting_tells_what_it_is_for():
    assert [name for name, field in InstanceSettings.model_fields.items() if not field.description] == []


# --- tokens ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "settings", "expected"),
    [
        ({}, {}, None),
        ({"HF_TOKEN": "from-env"}, {}, "from-env"),
        ({"HF_TOKEN": "from-env"}, {"token": "inline"}, "from-env"),
        ({"HF_TOKEN": "", "OTHER": "x"}, {"token": "inline"}, "inline"),
        ({"HF_TOKEN": "  \n"}, {"token": "inline"}, "inline"),
        ({"HF_TOKEN": " from-env\n"}, {}, "from-env"),
        ({"HF_TOKEN": "default", "MY": "mine"}, {"token_env": "MY"}, "mine"),
        ({"HF_TOKEN": "default"}, {"token_env": "MY"}, None),
        ({"HF_TOKEN": "default"}, {"token_env": "MY", "token": "inline"}, "inline"),
        ({}, {"token": ""}, None),
    ],
)
def test_a_variable_that_is_not_empty_wins_over_an_inline_token(environment, settings, expected):
    assert load(config(**settings), "hfbucket").resolve_token(environment) == expected


def test_the_token_is_looked_up_each_time(monkeypatch):
    own = load(config(token_env="ROTATED"), "hfbucket")

    monkeypatch.setenv("ROTATED", "first")
    assert own.resolve_token() == "first"
    monkeypatch.setenv("ROTATED", "second")
    assert own.resolve_token() == "second"
    monkeypatch.delenv("ROTATED")
    assert own.resolve_token() is None


def test_a_token_never_shows():
    own = load(config(token=SECRET), "hfbucket")

    for text in (repr(own), str(own), str(own.model_dump()), own.model_dump_json(), f"{own.token}"):
        assert SECRET not in text


@pytest.mark.parametrize("setting", sorted(set(InstanceSettings.model_fields) - {"token", "download_tmp_dir"}))
@pytest.mark.parametrize("wrap", [str, lambda secret: [secret], lambda secret: {secret: secret}, str.encode])
def test_a_token_in_the_wrong_place_is_refused_and_not_repeated(setting, wrap):
    assert SECRET not in complaint(config(**{setting: wrap(SECRET)}))


@pytest.mark.parametrize("value", [[SECRET], {"value": SECRET}, {SECRET: 1}, SECRET.encode() + b"\xff"])
def test_an_ill_typed_token_is_refused_and_not_repeated(value):
    message = complaint(config(token=value))

    assert SECRET not in message
    assert "remote_storage_plugin.hfbucket.token" in message


@pytest.mark.parametrize(
    "token", [SECRET, "hf_" + "a" * 34, "api_org_" + "A" * 34, "hf_oauth_eyJhbGciOiJFZERTQSJ9.eyJzY29wZSI6W10.x-y"]
)
def test_a_token_named_as_its_variable_is_refused_and_not_repeated(token):
    message = complaint(config(token_env=token))

    assert token not in message
    assert "remote_storage_plugin.hfbucket.token_env" in message


def test_a_token_under_a_mistyped_key_is_not_repeated():
    message = complaint(config(tokn=SECRET))

    assert SECRET not in message
    assert "did you mean 'token'" in message


# --- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("bucket_handel", "bucket_handle"),
        ("bucket", "bucket_handle"),
        ("tokenenv", "token_env"),
        ("create_bucket_if_mising", "create_bucket_if_missing"),
        ("download_tmpdir", "download_tmp_dir"),
        ("metadata_cache_ttl_seconds", "metadata_cache_ttl_secs"),
        ("Bucket_Handle", "bucket_handle"),
    ],
)
def test_an_unknown_setting_is_refused_with_the_nearest_known_one(wrong, near):
    message = complaint(config(**{wrong: 1}))

    assert f"remote_storage_plugin.hfbucket.{wrong} (did you mean {near!r}?)" in message


def test_an_unknown_setting_like_no_other_is_refused_with_all_known_ones():
    message = complaint(config(zzz=1))

    assert "remote_storage_plugin.hfbucket.zzz" in message
    assert all(name in message for name in InstanceSettings.model_fields)


@pytest.mark.parametrize("extra", [None, {}, {"unrelated": 1}, config(instance="other")])
def test_a_missing_handle_is_named(extra):
    assert "remote_storage_plugin.hfbucket.bucket_handle: is required" in complaint(extra)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("bucket_handle", None),
        ("bucket_handle", ["hf://buckets/o/b"]),
        ("bucket_handle", "hf://o/b"),
        ("token_env", ""),
        ("token_env", None),
        ("token_env", "MY TOKEN"),
        ("token_env", 5),
        ("create_bucket_if_missing", "maybe"),
        ("create_bucket_if_missing", None),
        ("download_tmp_dir", 5),
        ("metadata_cache_ttl_secs", -1),
        ("metadata_cache_ttl_secs", "soon"),
        ("metadata_cache_ttl_secs", float("nan")),
        ("metadata_cache_ttl_secs", float("inf")),
        ("miss_cache_ttl_secs", -0.1),
        ("miss_cache_ttl_secs", 31),
        ("metadata_cache_entries", 0),
        ("lookup_timeout_secs", 0),
        ("lookup_timeout_secs", float("inf")),
        ("get_timeout_secs", 0),
        ("put_timeout_secs", -1),
        ("close_timeout_secs", "never"),
        ("verify", "sha256"),
        ("verify", "size\n"),
        ("max_inflight_bytes", 1024),
        ("max_inflight_bytes", 1.5),
        ("max_parallel_reads", 0),
        ("max_parallel_reads", 257),
        ("max_parallel_writes", 65),
        ("endpoint", "huggingface.co"),
        ("endpoint", "ftp://huggingface.co"),
        ("endpoint", "http://"),
        ("endpoint", "http://host:port"),
        ("endpoint", "http://host:99999"),
        ("endpoint", "http://[::1"),
        ("endpoint", "http://ho st"),
        ("endpoint", "http://user:password@host"),
        ("endpoint", "http://host?token=x"),
    ],
)
def test_an_ill_typed_setting_is_named(setting, value):
    assert setting in complaint(config(**{setting: value}))


def test_all_that_is_wrong_is_told_at_once():
    message = complaint(config(bucket_handle="nonsense", metadata_cache_ttl_secs="soon", tokn="x", verify="md5"))

    for setting in ("bucket_handle", "metadata_cache_ttl_secs", "tokn", "verify"):
        assert re.search(rf"remote_storage_plugin\.hfbucket\.{setting}\b", message), setting


@untimed
@given(
    st.dictionaries(
        st.sampled_from([*InstanceSettings.model_fields, "x", "x.y", ""]),
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.lists(st.integers())),
    )
)
def test_nothing_but_a_config_error_ever_leaves_load(values):
    try:
        load(config() | {f"remote_storage_plugin.hfbucket.{name}": value for name, value in values.items()}, "hfbucket")
    except ConfigError as error:
        assert "hfbucket" in str(error)  # noqa: PT017 - most examples do not raise


def test_keys_that_are_no_text_are_no_concern_of_ours():
    assert load({1: 2, None: 3, **config()}, "hfbucket").bucket_handle.prefix == "prod"


# --- several instances ---------------------------------------------------------------------------------------------------


def test_instances_do_not_see_each_other():
    extra = (
        config("hfbucket", token_env="PLAIN")
        | config("hfbucket.us", bucket_handle="hf://buckets/o/b/us", token_env="US")
        | config("hfbucket.us.east", bucket_handle="hf://buckets/o/b/us-east", token_env="EAST")
        | config("hfbucket.usa", bucket_handle="hf://buckets/o/b/usa", token_env="USA")
    )
    declared = ["hfbucket", "hfbucket.us", "hfbucket.us.east", "hfbucket.usa"]

    loaded = [load(extra, name, declared) for name in declared]

    assert [own.token_env for own in loaded] == ["PLAIN", "US", "EAST", "USA"]
    assert [own.bucket_handle.prefix for own in loaded] == ["prod", "us", "us-east", "usa"]


def test_settings_of_an_instance_that_is_commented_out_do_no_harm():
    extra = config("hfbucket") | config("hfbucket.us", token=SECRET, module_path="a.b", class_name="C")

    assert load(extra, "hfbucket", ["hfbucket"]).token is None


def test_a_longer_named_instance_of_another_class_may_have_any_settings():
    extra = config("hfbucket") | {"remote_storage_plugin.hfbucket.theirs.whatever": 1}

    load(extra, "hfbucket", ["hfbucket", "hfbucket.theirs"])
    assert "theirs.whatever" in complaint(extra, declared=["hfbucket"])


def test_keys_of_the_loader_are_no_settings():
    load(config(module_path="hfbucket_plugin.adapter", class_name="HFBucketConnectorAdapter"), "hfbucket")


def test_a_longer_instance_does_not_inherit():
    extra = config("hfbucket", token=SECRET)

    assert "remote_storage_plugin.hfbucket.us.bucket_handle: is required" in complaint(extra, "hfbucket.us")


# --- what follows from settings ------------------------------------------------------------------------------------------


def test_misses_are_believed_no_longer_than_hits():
    assert load(config(), "hfbucket").effective_miss_ttl_secs == 5
    assert load(config(metadata_cache_ttl_secs=2), "hfbucket").effective_miss_ttl_secs == 2
    assert load(config(metadata_cache_ttl_secs=0), "hfbucket").effective_miss_ttl_secs == 0
    assert load(config(miss_cache_ttl_secs=0), "hfbucket").effective_miss_ttl_secs == 0
    assert load(config(metadata_cache_ttl_secs=60, miss_cache_ttl_secs=60), "hfbucket").effective_miss_ttl_secs == 60


@untimed
@given(st.integers(1024 * 1024, 2**40), st.integers(1, 256), st.integers(1, 64))
def test_ranges_and_commits_stay_within_what_is_in_flight(inflight, reads, writes):
    own = load(config(max_inflight_bytes=inflight, max_parallel_reads=reads, max_parallel_writes=writes), "hfbucket")

    assert 1 <= own.range_bytes <= inflight
    assert 1 <= own.buffer_bytes <= inflight
    assert inflight <= own.commit_bytes <= 4 * inflight


def test_the_hub_is_the_one_of_the_environment_unless_named(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")

    assert load(config(), "hfbucket").endpoint == "http://127.0.0.1:1"
    assert load(config(endpoint="http://127.0.0.1:2"), "hfbucket").endpoint == "http://127.0.0.1:2"


def test_settings_do_not_change():
    own = load(config(), "hfbucket")

    with pytest.raises(ValueError, match="frozen"):
        own.token_env = "OTHER"
    assert "OTHER" not in os.environ


# --- numbers -----------------------------------------------------------------------------------------------------------

NUMBERS = sorted(
    name
    for name, field in InstanceSettings.model_fields.items()
    if any(part in str(field.annotation) for part in ("float", "int"))
)


@pytest.mark.parametrize("value", [1e300, 10**21, 10**400, -1, -(10**21), float("nan"), float("inf"), "1e300", "many"])
@pytest.mark.parametrize("setting", NUMBERS)
def test_every_number_has_bounds_that_an_error_says(setting, value):
    message = complaint(config(**{setting: value}))

    assert f"remote_storage_plugin.hfbucket.{setting}: " in message
    assert re.search(r"\(allowed: (above|at least) [\d,]+, at most [\d,]+\)", message)


def test_what_is_allowed_is_said_once_and_as_it_is():
    assert "(allowed: above 0, at most 256)" in complaint(config(max_parallel_reads=257))
    assert "(allowed: at least 1,048,576, at most 1,125,899,906,842,624)" in complaint(config(max_inflight_bytes=5))
    assert "(allowed: above 0, at most 31,536,000)" in complaint(config(get_timeout_secs=float("nan")))
    assert "allowed" not in complaint(config(verify="sha256"))


# --- what is more than a token -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f'"{SECRET}"', "quotes"),
        (f"'{SECRET}'", "quotes"),
        (f'{SECRET}"', "quotes"),
        ('""', "quotes"),
        (f"\u201c{SECRET}\u201d", "cannot be sent"),
        (f"Bearer {SECRET}", "Bearer"),
        (f"bearer\t{SECRET}", "cannot be sent"),
        (f"{SECRET} # prod", "comment"),
        (f"{SECRET}#prod", "comment"),
        (f"HF_TOKEN={SECRET}", "assignment"),
        (f"{SECRET} {SECRET}", "blanks"),
        (f"{SECRET}\n{SECRET}", "line breaks"),
    ],
)
def test_what_a_text_holds_beside_a_token_is_said_without_the_token(text, said):
    problem = token_problem(text)

    assert said in problem
    assert SECRET not in problem


@pytest.mark.parametrize(
    "token", [SECRET, "first", "api_org_" + "A" * 34, "hf_oauth_eyJhbGciOiJFZERTQSJ9.eyJzY29wZSI6W10.x-y=="]
)
def test_a_token_is_no_problem(token):
    assert token_problem(token) is None


# --- HF_ENDPOINT -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("empty", ["", "  "])
def test_an_empty_hf_endpoint_is_the_default(empty, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", empty)

    assert load(config(), "hfbucket").endpoint == "https://huggingface.co"


@pytest.mark.parametrize(
    "wrong", ["hf-mirror.example", "localhost:4321", '"https://huggingface.co"', "https://u:p@mirror"]
)
def test_a_wrong_hf_endpoint_is_named_as_that_variable(wrong, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", wrong)

    assert "the environment variable HF_ENDPOINT: must be " in complaint(config())
    assert "HF_ENDPOINT" not in complaint(config(endpoint=wrong))
