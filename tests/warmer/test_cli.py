"""What the command refuses, how it says so, and with which code: all of it before any Ray is started."""

import json
import os
import pickle
import socket
import sqlite3
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hfbucket_plugin.config.instances import InstanceConfig
from hfbucket_plugin.config.lmcache_yaml import EngineConfig
from localhub.faults import Fault
from tests.support.buckets import INSTANCE, SECRET, Warehouse, arguments, classic_key
from warmer.cli.app import app
from warmer.node.worker import NodeConfig
from warmer.request.resolve import without_token

HEAD = f"remote_storage_plugin.{INSTANCE}."


@pytest.fixture
def refused(monkeypatch):
    """Runs the command, which must end with a code and one clean line on stderr; returns the line."""
    monkeypatch.setenv("WARM_TEST_TOKEN", SECRET)
    for variable in ("RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
        monkeypatch.delenv(variable, raising=False)

    def run(code, config, *more):
        done = CliRunner().invoke(app, arguments(config, *more)[3:])
        assert done.exit_code == code, done.stderr
        assert done.stdout == ""
        assert SECRET not in done.stderr
        (line,) = done.stderr.splitlines()
        assert line.startswith("warmer: ")
        return line

    return run


def test_a_configuration_that_is_not_there(refused, tmp_path):
    assert "cannot be read" in refused(2, tmp_path / "none.yaml")


def test_a_configuration_that_is_no_yaml(refused, tmp_path):
    path = tmp_path / "lmcache.yaml"
    path.write_text(f'extra_config: {{"token": "{SECRET}"')
    assert "is not valid YAML" in refused(2, path)


def test_a_setting_that_is_unknown_is_named_with_the_nearest(refused, warehouse):
    warehouse.extra = {f"{HEAD}bucket_handel": "x"}
    line = refused(2, warehouse.config)
    assert f"{HEAD}bucket_handel" in line
    assert "did you mean 'bucket_handle'" in line


@pytest.mark.parametrize("tier", ["fs.other", "local_disk", INSTANCE])
def test_a_tier_that_cannot_be_filled(refused, warehouse, tier):
    assert f"tier {tier!r}" in refused(2, warehouse.config, "--tier", tier)


def test_a_tier_with_headers(refused, warehouse):
    warehouse.extra = {"save_chunk_meta": True}
    assert "set save_chunk_meta: false" in refused(2, warehouse.config)


def test_an_inline_token_never_leaves_the_driver(refused, warehouse, monkeypatch):
    monkeypatch.delenv("WARM_TEST_TOKEN")
    warehouse.extra = {f"{HEAD}token": SECRET}
    line = refused(2, warehouse.config)
    assert f"{HEAD}token" in line
    assert "WARM_TEST_TOKEN" in line
    assert "token_env" in line


def test_where_the_variable_is_set_an_inline_token_is_left_behind(warehouse, monkeypatch):
    warehouse.extra = {f"{HEAD}token": SECRET}
    settings = EngineConfig.read(warehouse.config).instance(INSTANCE)
    monkeypatch.setenv("WARM_TEST_TOKEN", "another")
    bare = without_token(InstanceConfig(INSTANCE, settings, "classic"))
    config = NodeConfig(INSTANCE, bare, warehouse.declaration(), token_expected=True)
    assert SECRET.encode() not in pickle.dumps(config)
    assert pickle.loads(pickle.dumps(config)) == config  # noqa: S301 - our own bytes
    with pytest.raises(ValueError, match="must not leave"):
        NodeConfig(INSTANCE, settings, warehouse.declaration(), token_expected=True)


def test_a_report_that_cannot_be_written(refused, warehouse):
    assert "--report" in refused(2, warehouse.config, "--report", str(warehouse.directory / "no" / "report.jsonl"))


def test_a_bucket_that_is_not_there(refused, hub, tmp_path):
    line = refused(2, Warehouse(hub.endpoint, "tests/nowhere", tmp_path).config)
    assert INSTANCE in line
    assert "bucket_handle" in line


@pytest.mark.parametrize("token", ["a-wrong-token", None])
def test_a_token_that_is_refused(refused, hub_factory, tmp_path, monkeypatch, token):
    tokens = tmp_path / "tokens.yaml"
    tokens.write_text(f"tokens:\n  - {{token: {SECRET}, buckets: {{org/*: write}}}}\n")
    hub = hub_factory(tokens=tokens)
    monkeypatch.setenv("WARM_TEST_TOKEN", token or "")
    line = refused(2, Warehouse(hub.endpoint, "org/private", tmp_path).config)
    assert INSTANCE in line
    assert "WARM_TEST_TOKEN (token_env)" in line
    assert "a-wrong-token" not in line


@pytest.mark.parametrize("status", [401, 403])
def test_a_listing_that_is_denied(refused, hub, warehouse, status):
    hub.control.add_fault(Fault(route="tree", status=status, body=f"you sent {SECRET}"))
    line = refused(2, warehouse.config)
    assert str(status) in line
    assert "WARM_TEST_TOKEN (token_env)" in line


@pytest.mark.parametrize("status", [429, 500])
def test_a_listing_that_fails_may_be_tried_again(refused, hub, warehouse, monkeypatch, status):
    monkeypatch.setattr("warmer.run._LISTING_SECS", 3.0)  # pauses are waited out until then
    hub.control.add_fault(Fault(route="tree", status=status))
    assert str(status) in refused(3, warehouse.config)


@pytest.mark.parametrize(
    ("error", "reported"),
    [
        (OSError(28, "No space left on device"), "make room there"),
        (sqlite3.OperationalError("database or disk is full"), "set TMPDIR to another directory"),
        (MemoryError(), "not enough memory"),
        (ValueError("negative count"), "please report it: ValueError at "),
    ],
    ids=lambda one: type(one).__name__ if isinstance(one, Exception) else None,
)
def test_what_this_machine_lacks_is_no_wrong_configuration_and_no_traceback(
    refused, warehouse, monkeypatch, error, reported
):
    def failing(*_, **__):
        raise error

    monkeypatch.setattr("warmer.plan.build.list_chunks_ahead", failing)

    assert reported in refused(3, warehouse.config)


def test_a_hub_that_cannot_be_reached(refused, tmp_path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
        line = refused(3, Warehouse(endpoint, "org/bucket", tmp_path).config)
    assert endpoint in line
    assert "the instance's endpoint" in line


@pytest.fixture
def stocked(warehouse):
    warehouse.put({classic_key(1): b"chunk"})
    return warehouse


def test_a_cluster_that_does_not_answer(refused, stocked, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        assert address in refused(2, stocked.config, "--address", address)
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert address in refused(2, stocked.config)


def test_a_cluster_that_refuses_us(refused, stocked, monkeypatch):
    import ray

    def refuse(*_, **__):
        raise ConnectionError("Failed to connect to Ray cluster\n\nA page of advice.")

    monkeypatch.setattr(ray, "init", refuse)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        line = refused(2, stocked.config, "--address", f"127.0.0.1:{listening.getsockname()[1]}")
    assert "Failed to connect" in line
    assert "RAY_AUTH_MODE=token" in line
    assert "advice" not in line


@pytest.mark.parametrize("address", ["ray://127.0.0.1:10001", "http://127.0.0.1:8265", "somewhere", "host:port"])
def test_an_address_that_cannot_be_joined(refused, stocked, address):
    assert address in refused(2, stocked.config, "--address", address)


def test_an_address_of_the_dashboard_is_named_with_its_variable(refused, stocked, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    line = refused(2, stocked.config)
    assert "RAY_ADDRESS 'http://127.0.0.1:8265' is the dashboard's" in line
    assert "6379" in line


def test_a_submitted_job_joins_its_cluster_and_starts_none(monkeypatch):
    from warmer.cluster.ray import configured_address

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    assert configured_address(None) is None
    assert configured_address("local") is None
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"metadata": {}}))
    assert configured_address(None) == "auto"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert configured_address(None) == "10.0.0.1:6379"
    assert configured_address("10.0.0.2:6379") == "10.0.0.2:6379"


@pytest.mark.parametrize("option", ["--require", "--canary-require"])
@pytest.mark.parametrize("share", ["nan", "1.1", "-0.1", "most"])
def test_a_share_that_is_none(option, share):
    done = CliRunner().invoke(app, ["check", "--all", option, share])

    assert (done.exit_code, done.stdout) == (2, "")
    assert option in done.stderr


@pytest.mark.parametrize("home", ["none", "file", "there"])
def test_a_local_ray_has_a_token_where_no_home_can_keep_one(home, tmp_path, monkeypatch):
    from warmer.cluster import ray as cluster

    for variable in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(variable, raising=False)
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("HOME", str(tmp_path / home))
    if home == "none":
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    cluster._expect_token()

    token = os.environ.pop("RAY_AUTH_TOKEN", None)
    assert (token is None) == (home == "there")
