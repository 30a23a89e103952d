"""LMCache's YAML, and the instances that it names."""

import json
import os
import subprocess
import sys

import pytest
import yaml
from lmcache.v1.config import LMCacheEngineConfig

from hfbucket_plugin.config.instances import InstanceConfig, named_instances
from hfbucket_plugin.config.l2 import MODULE, L2Settings
from hfbucket_plugin.config.lmcache_yaml import EngineConfig
from hfbucket_plugin.config.settings import InstanceSettings
from hfbucket_plugin.errors import ConfigError
from tests.support.buckets import SECRET, everything_reported

GOOD = {
    "chunk_size": 256,
    "remote_storage_plugins": ["hfbucket.us", "fs.warm"],
    "extra_config": {
        "remote_storage_plugin.hfbucket.us.bucket_handle": "hf://buckets/o/b/us",
        "remote_storage_plugin.hfbucket.us.token": SECRET,
        "remote_storage_plugin.fs.warm.base_path": "/var/warm",
    },
}


def read(tmp_path, text):
    path = tmp_path / "lmcache.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return EngineConfig.read(path)


def file_complaint(tmp_path, text):
    with pytest.raises(ConfigError) as refused:
        read(tmp_path, text)
    message = str(refused.value)
    assert "lmcache.yaml" in message
    assert SECRET not in message
    assert refused.value.__cause__ is None
    assert refused.value.__suppress_context__ or refused.value.__context__ is None, "a traceback would show the file"
    return message


def test_it_reads_what_the_engine_reads(tmp_path):
    config = read(tmp_path, yaml.safe_dump(GOOD))

    assert config.plugins == ("hfbucket.us", "fs.warm")
    assert config.plugin_value("fs.warm", "base_path") == "/var/warm"
    assert config.plugin_value("fs.warm", "nothing") is None
    assert config.instance("hfbucket.us").bucket_handle.prefix == "us"
    assert config.instance("hfbucket.us").resolve_token({}) == SECRET


def test_an_inline_token_does_not_show(tmp_path):
    config = read(tmp_path, yaml.safe_dump(GOOD))

    assert SECRET not in repr(config)
    assert SECRET not in str(config)


def test_names_may_be_one_text_with_commas(tmp_path):
    assert read(tmp_path, "remote_storage_plugins: hfbucket, fs.warm ,").plugins == ("hfbucket", "fs.warm")


@pytest.mark.parametrize("text", ["{}", "chunk_size: 256", "remote_storage_plugins:\nextra_config:\n"])
def test_a_file_without_plugins_has_none(tmp_path, text):
    config = read(tmp_path, text)

    assert config.plugins == ()
    with pytest.raises(ConfigError, match="declares none"):
        config.instance("hfbucket")


def test_an_undeclared_instance_is_refused_with_those_that_are_declared(tmp_path):
    config = read(tmp_path, yaml.safe_dump(GOOD))

    with pytest.raises(ConfigError, match=r"'hfbucket.eu' is not in remote_storage_plugins.*hfbucket.us, fs.warm"):
        config.instance("hfbucket.eu")


def test_wrong_settings_name_the_instance_and_not_the_token(tmp_path):
    GOOD_WITH_A_SLIP = GOOD | {  # noqa: N806 - a constant of this test
        "extra_config": GOOD["extra_config"] | {"remote_storage_plugin.hfbucket.us.tokenn": SECRET}
    }
    config = read(tmp_path, yaml.safe_dump(GOOD_WITH_A_SLIP))

    with pytest.raises(ConfigError, match=r"remote_storage_plugin\.hfbucket\.us\.tokenn") as refused:
        config.instance("hfbucket.us")
    assert SECRET not in str(refused.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml.*cannot be read"):
        EngineConfig.read(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        EngineConfig.read(tmp_path)


def test_a_file_that_is_no_text(tmp_path):
    assert "cannot be read" in file_complaint(tmp_path, b"\xff\xfe\x00token: " + SECRET.encode())


@pytest.mark.parametrize(
    "text",
    [
        f"token: [{SECRET}",
        f"token: {SECRET}\n  nested: {SECRET}",
        f"token: '{SECRET}",
        f"? {SECRET}\n: - a\n b",
        f"token: *{SECRET}",
        f"token: &{SECRET} &{SECRET} 1",
        f"token: !{SECRET} 1",
        f"token: !{SECRET}! 1",
        f"token: !!python/object:{SECRET} 1",
        f"%TAG {SECRET}",
        f"token: @{SECRET}",
        f"token: {SECRET}\x07",
        f"{{{SECRET}: 1, [a]: 2}}",
        f"token: {SECRET}\nwhen: 2024-13-45",
        f"token: {SECRET}\nnumber: {'9' * 5000}",
        f"token: {SECRET}\ndeep: {'[' * 3000}",
        f"{SECRET}: 1\n---\nb: 2",
        f"binary: !!binary {SECRET}*",
        f"float: !!float {SECRET}",
        f"int: !!int {SECRET}",
        f"bool: !!bool {SECRET}",
        f"time: !!timestamp {SECRET}",
    ],
)
def test_bad_yaml_is_told_without_the_lines_that_may_hold_a_token(tmp_path, text):
    assert "is not valid YAML" in file_complaint(tmp_path, text)


@pytest.mark.parametrize("text", ["", "- a", "just text", "5", "null", f"[{SECRET}]", f"{SECRET}"])
def test_yaml_that_is_no_mapping(tmp_path, text):
    assert "not a mapping" in file_complaint(tmp_path, text)


@pytest.mark.parametrize("plugins", ["5", "{a: b}", "[1]", "[hfbucket, null]", "true"])
def test_plugins_that_are_no_names(tmp_path, plugins):
    assert "remote_storage_plugins must be a list" in file_complaint(tmp_path, f"remote_storage_plugins: {plugins}")


@pytest.mark.parametrize("extra", ["5", "[a]", f"{SECRET}"])
def test_extra_config_that_is_no_mapping(tmp_path, extra):
    assert "extra_config must be a mapping" in file_complaint(tmp_path, f"extra_config: {extra}")


# --- as LMCache reads it -----------------------------------------------------------------------------------------------


EXTRA = {"remote_storage_plugin.hfbucket.us.bucket_handle": "hf://buckets/o/b/us", "save_chunk_meta": False}


def as_lmcache_has_it(path):
    theirs = LMCacheEngineConfig.from_file(str(path))
    theirs.update_config_from_env()
    return theirs


@pytest.mark.parametrize(
    "document",
    [
        {"extra_config": json.dumps(EXTRA), "remote_storage_plugins": "fs.warm, hfbucket.us"},
        {"extra_config": "", "remote_storage_plugins": ""},
        {"chunk_size": "512", "save_unfull_chunk": "False", "local_cpu": "1", "use_layerwise": "yes"},
        {"blocking_timeout_secs": 30.7, "internal_api_server_enabled": 1, "local_cpu": 0, "enable_blending": None},
        {"blocking_timeout_secs": "soon", "internal_api_server_port_start": "7000", "remote_serde": None},
        {"run_script_api_enabled": "TRUE", "internal_api_server_host": "0.0.0.0"},  # noqa: S104 - a value in a file
        {"chunk_size": 256, "local_cpu": True, "remote_storage_plugins": ["hfbucket"], "extra_config": EXTRA},
    ],
)
def test_values_are_what_lmcache_makes_of_them(tmp_path, document):
    path = tmp_path / "lmcache.yaml"
    path.write_text(yaml.safe_dump(document))
    theirs, config = as_lmcache_has_it(path), EngineConfig.read(path)

    assert list(config.plugins) == (theirs.remote_storage_plugins or [])
    assert config.extra == (theirs.extra_config or {})
    for name in document.keys() - {"remote_storage_plugins", "extra_config"}:
        assert config.engine[name] == getattr(theirs, name), name


def test_variables_come_before_the_file_as_in_an_engine(tmp_path, monkeypatch):
    path = tmp_path / "lmcache.yaml"
    path.write_text(yaml.safe_dump(GOOD))
    for name, value in {
        "LMCACHE_EXTRA_CONFIG": f"'{json.dumps(EXTRA)}'",
        "LMCACHE_REMOTE_STORAGE_PLUGINS": '"hfbucket.us"',
        "LMCACHE_CHUNK_SIZE": "128",
        "LMCACHE_BLOCKING_TIMEOUT_SECS": "soon",
        "LMCACHE_NO_SUCH_SETTING": "1",
        "LMCACHE_CONFIG_FILE": "/elsewhere.yaml",
    }.items():
        monkeypatch.setenv(name, value)
    theirs, config = as_lmcache_has_it(path), EngineConfig.read(path)

    assert config.plugins == tuple(theirs.remote_storage_plugins) == ("hfbucket.us",)
    assert config.extra == theirs.extra_config == EXTRA
    assert config.engine["chunk_size"] == theirs.chunk_size == 128
    assert "blocking_timeout_secs" not in config.engine
    assert config.overrides == ("LMCACHE_CHUNK_SIZE", "LMCACHE_EXTRA_CONFIG", "LMCACHE_REMOTE_STORAGE_PLUGINS")


def test_a_variable_without_which_there_is_no_instance_is_named(tmp_path, monkeypatch):
    path = tmp_path / "lmcache.yaml"
    path.write_text(yaml.safe_dump(GOOD))
    monkeypatch.setenv("LMCACHE_EXTRA_CONFIG", f'{{"token": "{SECRET}"')

    with pytest.raises(
        ConfigError, match="LMCACHE_EXTRA_CONFIG must be a mapping of settings, or one as JSON"
    ) as refused:
        EngineConfig.read(path)
    assert SECRET not in str(refused.value)


def test_an_extra_config_that_is_no_json_is_named(tmp_path):
    assert "extra_config must be a mapping" in file_complaint(tmp_path, f"extra_config: '{{\"a\": {SECRET}'")


def test_a_plain_file_costs_no_import_of_lmcache(tmp_path):
    path = tmp_path / "lmcache.yaml"
    path.write_text(yaml.safe_dump(GOOD | {"remote_serde": "naive", "local_cpu": False, "blocking_timeout_secs": 10}))
    code = (
        "import sys; from pathlib import Path; from hfbucket_plugin.config.lmcache_yaml import EngineConfig;"
        "EngineConfig.read(Path(sys.argv[1])); sys.exit('lmcache' in sys.modules)"
    )
    env = {name: value for name, value in os.environ.items() if not name.startswith("LMCACHE_")}

    assert subprocess.run([sys.executable, "-c", code, str(path)], env=env, check=False).returncode == 0


HEAD = "remote_storage_plugin."


def write(tmp_path, plugins, **extra):
    path = tmp_path / "lmcache.yaml"
    path.write_text(
        yaml.safe_dump({"chunk_size": 64, "remote_storage_plugins": plugins, "extra_config": extra}), encoding="utf-8"
    )
    return path


def bucket(name, path="us", **values):
    values = {"bucket_handle": f"hf://buckets/my-org/lmcache-kv/{path}"} | values
    return {f"{HEAD}{name}.{setting}": value for setting, value in values.items()}


def adapter(**params):
    params = {"bucket_handle": "hf://buckets/my-org/lmcache-kv/mp"} | params
    return json.dumps({"type": "plugin", "module_path": MODULE, "class_name": "X", "adapter_params": params})


@pytest.fixture
def config(tmp_path):
    return write(
        tmp_path,
        ["fs.warm", "hfbucket.us", "hfbucket", "kv.eu", "s3.x"],
        **bucket("hfbucket.us", token=SECRET),
        **bucket("hfbucket", "plain"),
        **bucket("kv.eu", "eu", module_path="hfbucket_plugin.adapter", class_name="HFBucketConnectorAdapter"),
        **{f"{HEAD}s3.x.module_path": "other.adapter", f"{HEAD}fs.warm.base_path": "/var/warm"},
    )


def complaint(*arguments, **options):
    with pytest.raises(ConfigError) as refused:
        named_instances(*arguments, **options)
    assert SECRET not in everything_reported(refused.value)
    return str(refused.value)


def test_all_bucket_instances_of_a_configuration_in_their_order(config):
    found = named_instances(config)

    assert [one.name for one in found] == ["hfbucket.us", "hfbucket", "kv.eu"]
    assert [one.settings.bucket_handle.prefix for one in found] == ["us", "plain", "eu"]
    assert {one.mode for one in found} == {"classic"}
    assert all(type(one.settings) is InstanceSettings for one in found)


def test_the_engine_comes_along(config):
    (one,) = named_instances(config, ["kv.eu"])

    assert one.engine.engine["chunk_size"] == 64
    assert "extra_config" not in one.engine.engine
    assert one.engine.source == str(config)


def test_only_those_that_are_named_and_in_that_order(config):
    assert [one.name for one in named_instances(config, ["kv.eu", "hfbucket.us"])] == ["kv.eu", "hfbucket.us"]


def test_adapters(config):
    both = named_instances(config, ["hfbucket"], [adapter(name="mp.one"), adapter()])

    assert [(one.name, one.mode) for one in both] == [("hfbucket", "classic"), ("mp.one", "mp"), ("hfbucket", "mp")]
    assert isinstance(both[1].settings, L2Settings)
    assert both[1].engine is None


def test_adapters_alone():
    builtin = json.dumps({"type": "hfbucket", "bucket_handle": "hf://buckets/o/b"})

    assert [one.name for one in named_instances(l2_adapters=[adapter(name="a"), builtin])] == ["a", "hfbucket"]


def test_settings_by_the_names_that_users_wrote(config):
    (classic,) = named_instances(config, ["kv.eu"])
    (mp,) = named_instances(l2_adapters=[adapter(name="kv.eu")])

    assert classic.setting("role") == "remote_storage_plugin.kv.eu.role"
    assert mp.setting("role") == "adapter_params.role"


def test_nothing_named():
    message = complaint()

    assert "--lmcache-config FILE" in message
    assert "--l2-adapter JSON" in message


def test_an_instance_without_its_configuration():
    assert "give --lmcache-config FILE" in complaint(None, ["hfbucket.us"], [adapter()])
    assert "name a configuration" in complaint(None, ["hfbucket.us"])


def test_a_configuration_without_buckets(tmp_path):
    path = write(tmp_path, ["fs.warm"])

    assert f"{path}: remote_storage_plugins declares no bucket instance; it declares fs.warm" in complaint(path)


def test_a_configuration_without_plugins(tmp_path):
    assert "it declares none" in complaint(write(tmp_path, []))


def test_an_instance_that_is_not_declared(config):
    message = complaint(config, ["hfbucket.eu"])

    assert "'hfbucket.eu'" in message
    assert "fs.warm, hfbucket.us, hfbucket, kv.eu, s3.x" in message


def test_a_plugin_that_is_no_bucket_may_be_named_but_has_no_handle(config):
    assert f"{HEAD}s3.x.bucket_handle: is required" in complaint(config, ["s3.x"])


def test_wrong_settings_of_one_instance(tmp_path):
    path = write(tmp_path, ["hfbucket", "hfbucket.us"], **bucket("hfbucket"), **bucket("hfbucket.us", tokenn=SECRET))

    assert f"unknown setting {HEAD}hfbucket.us.tokenn" in complaint(path)


def test_a_wrong_adapter_beside_a_right_configuration(config):
    assert "not valid JSON" in complaint(config, l2_adapters=[SECRET])


def test_a_configuration_that_is_not_there(tmp_path):
    assert "cannot be read" in complaint(tmp_path / "none.yaml")


def test_no_token_shows(config, tmp_path):
    path = tmp_path / "with_password.yaml"
    path.write_text(config.read_text() + f"\nremote_url: redis://user:{SECRET}@host\n")

    for one in named_instances(path, l2_adapters=[adapter(token=SECRET)]):
        assert isinstance(one, InstanceConfig)
        assert SECRET not in repr(one)
