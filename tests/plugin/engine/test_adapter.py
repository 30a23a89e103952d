import logging

import pytest
import yaml
from lmcache.v1.storage_backend.connector import ConnectorContext, ConnectorManager, CreateConnector
from lmcache.v1.storage_backend.connector.fs_connector import FSConnector
from lmcache.v1.storage_backend.connector.hfbucket_connector import HFBucketConnector as BuiltIn

from hfbucket_plugin import adapter
from hfbucket_plugin.adapter import HFBucketConnectorAdapter
from hfbucket_plugin.engine.classic import HFBucketConnector
from hfbucket_plugin.engine.health_monitor import LIFTED
from hfbucket_plugin.errors import ConfigError
from tests.support.buckets import SECRET
from tests.support.lmcache_classic import (
    OURS,
    SEED_MINIMAL,
    SEED_SEVERAL,
    Rig,
    engine_config,
    engine_metadata,
    running_loop,
    served_by_us,
)

THIRD = """
from lmcache.v1.storage_backend.connector import ConnectorAdapter
from lmcache.v1.storage_backend.connector.base_connector import RemoteConnector


class ThirdConnector(RemoteConnector):
    def __init__(self, loop=None, local_cpu_backend=None, config=None, name=None):
        self.name = name

    async def exists(self, key): return False
    def exists_sync(self, key): return False
    async def get(self, key): return None
    async def put(self, key, memory_obj): pass
    async def list(self): return []
    async def close(self): pass


class ThirdAdapter(ConnectorAdapter):
    def __init__(self):
        super().__init__("plugin://third")

    def create_connector(self, context):
        return ThirdConnector(name=context.plugin_name)
"""


@pytest.fixture(autouse=True)
def untaught(monkeypatch):
    """Each test begins as a process does: LMCache's manager does not know our rule."""
    create = ConnectorManager.create_connector
    monkeypatch.setattr(ConnectorManager, "create_connector", getattr(create, "__wrapped__", create))


@pytest.fixture(scope="module")
def loop():
    with running_loop() as one:
        yield one


@pytest.fixture
def build(tmp_path, loop, hub, monkeypatch):
    """Builds connectors as LMCache does, closes them at the end, and returns them without LMCache's wrapper."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    made = []

    def make(text, name, url=None):
        config = engine_config(tmp_path / "lmcache.yaml", text if isinstance(text, str) else yaml.safe_dump(text))
        made.append(CreateConnector(url or f"plugin://{name}", loop, None, config, engine_metadata(), plugin_name=name))
        return made[-1]._connector

    yield make
    import asyncio

    for connector in made:
        asyncio.run_coroutine_threadsafe(connector.close(), loop).result(30)


def instances(*names, **more):
    """A configuration with instances that are ours, each with a prefix that is its name."""
    extra = {}
    for name in names:
        values = OURS | {"bucket_handle": f"hf://buckets/o/b/{name}"}
        extra |= {f"remote_storage_plugin.{name}.{setting}": value for setting, value in values.items()}
    return {"save_unfull_chunk": False, "remote_storage_plugins": list(names), "extra_config": extra | more}


def prefix_of(connector):
    return connector._settings.bucket_handle.prefix


# --- who serves what -----------------------------------------------------------------------------------------------------


def test_the_minimal_configuration_of_the_seed_is_ours(build):
    connector = build(served_by_us(SEED_MINIMAL, "hfbucket"), "hfbucket")

    assert type(connector) is HFBucketConnector
    assert prefix_of(connector) == "prod"
    assert str(connector._settings.download_tmp_dir) == "/tmp/lmcache-hfbucket"  # noqa: S108 - the seed's own


def test_the_several_instances_of_the_seed_are_ours(build):
    text = served_by_us(SEED_SEVERAL, "hfbucket.us", "hfbucket.eu")

    for name in ("hfbucket.us", "hfbucket.eu"):
        connector = build(text, name)
        assert type(connector) is HFBucketConnector
        assert prefix_of(connector) == name.removeprefix("hfbucket.")
        assert connector._settings.token_env == f"HF_{prefix_of(connector).upper()}_TOKEN"


def test_without_our_keys_the_built_in_serves(build):
    build(served_by_us(SEED_MINIMAL, "hfbucket"), "hfbucket")

    assert type(build(SEED_MINIMAL, "hfbucket")) is BuiltIn
    assert type(build(SEED_SEVERAL, "hfbucket.us")) is BuiltIn


@pytest.mark.parametrize("order", [("hfbucket.us", "hfbucket.eu"), ("hfbucket.eu", "hfbucket.us")])
def test_an_instance_that_does_not_name_us_is_left_to_the_built_in(build, order):
    text = served_by_us(SEED_SEVERAL, "hfbucket.us")

    built = {name: type(build(text, name)) for name in order}

    assert built == {"hfbucket.us": HFBucketConnector, "hfbucket.eu": BuiltIn}


@pytest.mark.parametrize(
    "name", ["hfb", "hfb.us", "my-bucket.a.b.c", "hfbucket.prod", "hfbucket.a.b", "hfbucketx", "s3"]
)
def test_ours_under_any_name_that_is_free(build, name):
    connector = build(instances(name), name)

    assert type(connector) is HFBucketConnector
    assert prefix_of(connector) == name
    assert connector._instance == name


def test_managers_come_and_go_and_the_rule_is_taught_once(build):
    for _ in range(5):
        assert prefix_of(build(instances("hfbucket", "hfb.us"), "hfb.us")) == "hfb.us"
        assert prefix_of(build(instances("hfbucket", "hfb.us"), "hfbucket")) == "hfbucket"
        HFBucketConnectorAdapter()

    taught = ConnectorManager.create_connector
    assert hasattr(taught, "__wrapped__")
    assert not hasattr(taught.__wrapped__, "__wrapped__")


@pytest.mark.parametrize("first", ["ours", "third"])
def test_beside_plugins_of_another_type(build, tmp_path, monkeypatch, first):
    (tmp_path / "third_party_store.py").write_text(THIRD)
    monkeypatch.syspath_prepend(tmp_path)
    orders = set()
    # LMCache walks the names as a set: with enough of them every order comes up.
    for number in range(40):
        ours, third = f"hfbucket.n{number}", f"third.n{number}"
        text = instances(ours)
        text["remote_storage_plugins"].append(third)
        text["extra_config"] |= {
            f"remote_storage_plugin.{third}.module_path": "third_party_store",
            f"remote_storage_plugin.{third}.class_name": "ThirdAdapter" if number % 2 else "ThirdConnector",
        }
        orders.add(next(iter({ours, third})).split(".")[0])

        built = {name: build(text, name) for name in ((ours, third) if first == "ours" else (third, ours))}

        assert type(built[ours]) is HFBucketConnector
        assert prefix_of(built[ours]) == ours
        assert type(built[third]).__name__ == "ThirdConnector"
        if number % 2:
            assert built[third].name == third
    assert orders == {"hfbucket", "third"}


def test_beside_a_plugin_that_claims_every_name(build, tmp_path, monkeypatch):
    (tmp_path / "greedy_store.py").write_text(THIRD.replace('"plugin://third"', '"plugin://"'))
    monkeypatch.syspath_prepend(tmp_path)
    text = instances("hfb.us")
    text["remote_storage_plugins"].append("greedy")
    text["extra_config"] |= {
        "remote_storage_plugin.greedy.module_path": "greedy_store",
        "remote_storage_plugin.greedy.class_name": "ThirdAdapter",
    }

    assert type(build(text, "hfb.us")) is HFBucketConnector
    assert type(build(text, "greedy")).__name__ == "ThirdConnector"


def test_beside_lmcaches_own_file_store(build, tmp_path, loop):
    text = instances("hfbucket") | {"max_local_cpu_size": 0.01}
    text["remote_storage_plugins"].append("fs.warm")
    text["extra_config"]["remote_storage_plugin.fs.warm.base_path"] = str(tmp_path / "warm")

    rig = Rig(engine_config(tmp_path / "fs.yaml", yaml.safe_dump(text)), "fs.warm", loop)

    assert isinstance(rig.connector, FSConnector)
    assert type(build(text, "hfbucket")) is HFBucketConnector
    rig.close()


def test_a_subclass_of_ours_is_itself(build, tmp_path, monkeypatch):
    (tmp_path / "own_hfbucket.py").write_text(
        "from hfbucket_plugin.adapter import HFBucketConnectorAdapter\n"
        "class Own(HFBucketConnectorAdapter):\n"
        "    def create_connector(self, context):\n"
        "        connector = super().create_connector(context)\n"
        "        connector.made_by = 'own'\n"
        "        return connector\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    text = instances("hfbucket")
    text["extra_config"] |= {
        "remote_storage_plugin.hfbucket.module_path": "own_hfbucket",
        "remote_storage_plugin.hfbucket.class_name": "Own",
    }

    assert build(text, "hfbucket").made_by == "own"


@pytest.mark.parametrize(
    "broken", [{"module_path": "no_such_module"}, {"class_name": "NoSuchClass"}, {"class_name": ""}]
)
def test_keys_that_name_nothing_leave_the_built_in(build, broken):
    text = instances("hfbucket")
    text["extra_config"] |= {f"remote_storage_plugin.hfbucket.{name}": value for name, value in broken.items()}
    HFBucketConnectorAdapter()

    assert type(build(text, "hfbucket")) is BuiltIn


@pytest.mark.parametrize("name", ["hfbucket", "hfbucket.us", "hfb.us"])
def test_the_older_remote_url(build, name):
    connector = build(instances(name), None, url=f"plugin://{name}")

    assert type(connector) is HFBucketConnector
    assert prefix_of(connector) == name


def test_it_is_made_without_arguments_and_answers_for_its_own_type_only():
    one = HFBucketConnectorAdapter()

    assert [
        url for url in ("plugin://hfbucket", "plugin://hfbucket.us", "plugin://hfbucket.a.b") if one.can_parse(url)
    ] == [
        "plugin://hfbucket",
        "plugin://hfbucket.us",
        "plugin://hfbucket.a.b",
    ]
    for url in (
        "plugin://hfb",
        "plugin://hfbucketx",
        "plugin://",
        "hfbucket",
        "redis://hfbucket",
        "",
        "PLUGIN://hfbucket",
    ):
        assert not one.can_parse(url)


def test_importing_the_module_alone_changes_nothing_in_lmcache():
    assert adapter.HFBucketConnectorAdapter
    assert not hasattr(ConnectorManager.create_connector, "__wrapped__")


# --- what is refused at construction, and what never is --------------------------------------------------------------------


def refusal(build, caplog, text, name="hfbucket"):
    caplog.clear()
    with pytest.raises(ConfigError) as refused, caplog.at_level(logging.ERROR, logger="hfbucket_plugin"):
        build(text, name)
    errors = [record.getMessage() for record in caplog.records if record.name == "hfbucket_plugin.engine.classic"]
    assert errors == [str(refused.value)]
    assert f"instance {name!r}" in errors[0]
    return errors[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"save_unfull_chunk": True}, "save_unfull_chunk"),
        ({"use_layerwise": True}, "use_layerwise"),
        ({"remote_serde": "cachegen"}, "remote_serde"),
        ({"remote_serde": "kivi"}, "remote_serde"),
    ],
    ids=str,
)
def test_what_cannot_work_with_full_chunks_is_refused(build, caplog, change, words):
    assert words in refusal(build, caplog, instances("hfbucket") | change)


def test_chunk_metadata_is_refused(build, caplog):
    message = refusal(build, caplog, instances("hfbucket", save_chunk_meta=True))

    assert "save_chunk_meta" in message
    for text in (instances("hfbucket", save_chunk_meta=False), instances("hfbucket")):
        assert build(text, "hfbucket").save_chunk_meta is False, "which LMCache takes to be on when it is left out"


def test_all_that_the_engine_has_wrong_is_told_at_once(build, caplog):
    wrong = {"save_unfull_chunk": True, "use_layerwise": True, "remote_serde": "kivi"}
    message = refusal(build, caplog, instances("hfbucket", save_chunk_meta=True) | wrong)

    assert all(word in message for word in [*wrong, "save_chunk_meta"])


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("bucket_handle", "nonsense"),
        ("bucket_handel", "x"),
        ("verify", "md5"),
        ("token", [SECRET]),
        ("token_env", SECRET),
    ],
)
def test_wrong_settings_are_one_message_without_a_token(build, caplog, setting, value):
    text = instances("hfbucket.us", **{f"remote_storage_plugin.hfbucket.us.{setting}": value})

    message = refusal(build, caplog, text, "hfbucket.us")

    assert f"remote_storage_plugin.hfbucket.us.{setting}" in message
    assert SECRET not in message


@pytest.mark.parametrize("seconds", [10, 11])
def test_a_get_that_would_outlast_lmcaches_patience_is_refused(build, caplog, seconds):
    text = instances("hfbucket", **{"remote_storage_plugin.hfbucket.get_timeout_secs": seconds})

    assert "blocking_timeout_secs (10)" in refusal(build, caplog, text | {"blocking_timeout_secs": 10})


def test_a_get_ends_before_lmcaches_patience(build):
    assert build(instances("hfbucket") | {"blocking_timeout_secs": 4}, "hfbucket")._get_secs == pytest.approx(3.6)
    text = instances("hfbucket", **{"remote_storage_plugin.hfbucket.get_timeout_secs": 2})
    assert build(text, "hfbucket")._get_secs == 2


def test_a_configuration_that_lmcache_did_not_give(loop):
    for config, metadata in ((None, None), (None, engine_metadata())):
        with pytest.raises(ConfigError, match="LMCache gave no configuration"):
            HFBucketConnectorAdapter().create_connector(
                ConnectorContext("plugin://hfbucket", loop, None, config, metadata, "hfbucket")
            )


@pytest.mark.parametrize(
    "settings",
    [
        {"endpoint": "http://127.0.0.1:9"},
        {"endpoint": "http://no-such-host.invalid"},
        {"bucket_handle": "hf://buckets/no/such-bucket"},
        {"token": "hf_\nbroken"},
        {"token_env": "NOT_SET_ANYWHERE"},
        {"download_tmp_dir": "/dev/null/impossible"},
    ],
    ids=str,
)
def test_trouble_with_token_bucket_network_or_disk_never_shows_at_construction(build, settings):
    more = {f"remote_storage_plugin.hfbucket.{name}": value for name, value in settings.items()}

    assert type(build(instances("hfbucket", **more), "hfbucket")) is HFBucketConnector


def test_a_missing_token_is_warned_of(build, caplog, monkeypatch):
    build(instances("hfbucket"), "hfbucket")
    assert "no token: the environment variable HF_TOKEN (token_env) is not set" in caplog.text

    caplog.clear()
    monkeypatch.setenv("HF_TOKEN", SECRET)
    build(instances("hfbucket"), "hfbucket")
    assert "no token" not in caplog.text
    assert SECRET not in caplog.text


def test_a_token_of_the_configuration_is_in_no_log_of_ours(build, caplog):
    with caplog.at_level(logging.DEBUG):
        connector = build(instances("hfbucket", **{"remote_storage_plugin.hfbucket.token": SECRET}), "hfbucket")

    assert all(
        SECRET not in record.getMessage() for record in caplog.records if record.name.startswith("hfbucket_plugin")
    )
    assert SECRET not in repr(connector)


def test_of_the_engines_configuration_only_the_health_monitors_threshold_is_changed(build, tmp_path, loop):
    config = engine_config(tmp_path / "own.yaml", yaml.safe_dump(instances("hfbucket")))
    before = dict(config.extra_config)
    CreateConnector("plugin://hfbucket", loop, None, config, engine_metadata(), plugin_name="hfbucket")

    assert config.extra_config == before | {"get_blocking_failed_threshold": LIFTED}


@pytest.mark.parametrize("text", [{"get_blocking_failed_threshold": 3}, {"others": ["fs.warm"]}], ids=str)
def test_a_threshold_that_somebody_wants_is_left_alone(tmp_path, loop, text):
    document = instances("hfbucket")
    document["remote_storage_plugins"] += text.pop("others", [])
    document["extra_config"] |= text
    config = engine_config(tmp_path / "own.yaml", yaml.safe_dump(document))
    before = dict(config.extra_config)
    CreateConnector("plugin://hfbucket", loop, None, config, engine_metadata(), plugin_name="hfbucket")

    assert config.extra_config == before


def test_a_refused_instance_leaves_an_engine_without_it(tmp_path, loop, caplog):
    text = instances("hfbucket", **{"remote_storage_plugin.hfbucket.verify": "md5"})
    config = engine_config(tmp_path / "lmcache.yaml", yaml.safe_dump(text | {"max_local_cpu_size": 0.01}))

    rig = Rig(config, "hfbucket", loop)

    assert rig.remote.connection is None
    assert "remote_storage_plugin.hfbucket.verify" in caplog.text
    rig.close()
