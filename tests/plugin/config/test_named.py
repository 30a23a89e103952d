"""Instances named by the configuration of engines."""

import json

import pytest
import yaml

from hfbucket_plugin.config.instances import InstanceConfig, named_instances
from hfbucket_plugin.config.l2 import MODULE, L2Settings
from hfbucket_plugin.config.settings import InstanceSettings
from hfbucket_plugin.errors import ConfigError
from tests.support.buckets import SECRET, everything_reported

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
    assert "this is no JSON" in complaint(config, l2_adapters=[SECRET])


def test_a_file_that_is_not_there(tmp_path):
    assert "cannot be read" in complaint(tmp_path / "none.yaml")


def test_no_token_shows(config, tmp_path):
    path = tmp_path / "with_password.yaml"
    path.write_text(config.read_text() + f"\nremote_url: redis://user:{SECRET}@host\n")

    for one in named_instances(path, l2_adapters=[adapter(token=SECRET)]):
        assert isinstance(one, InstanceConfig)
        assert SECRET not in repr(one)
