import json
import os
import subprocess
import sys

import pytest
import yaml
from lmcache.v1.config import LMCacheEngineConfig

from hfbucket_plugin.config.lmcache_yaml import EngineConfig
from hfbucket_plugin.errors import ConfigError
from tests.support.buckets import SECRET

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


def complaint(tmp_path, text):
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
    assert "cannot be read" in complaint(tmp_path, b"\xff\xfe\x00token: " + SECRET.encode())


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
    assert "is no YAML" in complaint(tmp_path, text)


@pytest.mark.parametrize("text", ["", "- a", "just text", "5", "null", f"[{SECRET}]", f"{SECRET}"])
def test_yaml_that_is_no_mapping(tmp_path, text):
    assert "no mapping" in complaint(tmp_path, text)


@pytest.mark.parametrize("plugins", ["5", "{a: b}", "[1]", "[hfbucket, null]", "true"])
def test_plugins_that_are_no_names(tmp_path, plugins):
    assert "remote_storage_plugins must be a list" in complaint(tmp_path, f"remote_storage_plugins: {plugins}")


@pytest.mark.parametrize("extra", ["5", "[a]", f"{SECRET}"])
def test_extra_config_that_is_no_mapping(tmp_path, extra):
    assert "extra_config must be a mapping" in complaint(tmp_path, f"extra_config: {extra}")


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
    assert "extra_config must be a mapping" in complaint(tmp_path, f"extra_config: '{{\"a\": {SECRET}'")


def test_a_plain_file_costs_no_import_of_lmcache(tmp_path):
    path = tmp_path / "lmcache.yaml"
    path.write_text(yaml.safe_dump(GOOD | {"remote_serde": "naive", "local_cpu": False, "blocking_timeout_secs": 10}))
    code = (
        "import sys; from pathlib import Path; from hfbucket_plugin.config.lmcache_yaml import EngineConfig;"
        "EngineConfig.read(Path(sys.argv[1])); sys.exit('lmcache' in sys.modules)"
    )
    env = {name: value for name, value in os.environ.items() if not name.startswith("LMCACHE_")}

    assert subprocess.run([sys.executable, "-c", code, str(path)], env=env, check=False).returncode == 0
