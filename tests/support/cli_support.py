"""The command line on a bucket of the tests."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from typer.testing import CliRunner

from hfbucket_plugin.cli.app import app
from hfbucket_plugin.cli.context import CheckContext
from hfbucket_plugin.config.instances import InstanceConfig, named_instances
from hfbucket_plugin.core.keys import encode_name
from hfbucket_plugin.hub.connect import opened
from tests.support.plugin_support import SECRET, upload

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    import pytest

INSTANCE = "hfbucket.us"
HEAD = f"remote_storage_plugin.{INSTANCE}."
TOKEN_ENV = "CLI_TEST_TOKEN"
PREFIX = "kv/us"
CHECKS = [
    "config",
    "engine",
    "hash seed",
    "token",
    "endpoint",
    "clock",
    "bucket",
    "right to read",
    "right to write",
    "listing",
    "throughput",
    "records",
    "fingerprint",
    "temp dir",
    "environment directories",
    "environment proxy",
    "environment endpoint",
    "environment token",
    "environment variables",
    "environment ports",
]
NEEDS_HUB = CHECKS[4:13]
PATIENT = "2"
"""Seconds in which all that does not hang has answered, on a busy machine too."""


def classic(number: int, model: str = "org/model", world: int = 2, worker: int = 0) -> str:
    return f"{model}@{world}@{worker}@{number + 0x1000:x}@bfloat16"


def mp(number: int, model: str = "org/model", world: int = 2, worker: int = 0) -> str:
    return f"{model}@{world << 24 | worker << 16 | world << 8 | worker:08x}@1@{number + 0x1000:08x}"


@dataclass
class Ran:
    """A command that has ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def document(self) -> Any:
        (line,) = self.stdout.splitlines()
        return json.loads(line)

    @property
    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.stdout.splitlines()]

    @property
    def findings(self) -> dict[str, dict[str, str]]:
        """What `doctor --json` found in the only instance, by check."""
        (instance,) = self.document["instances"]
        names = [finding["check"] for finding in instance["findings"]]
        assert len(set(names)) == len(names)
        return {finding["check"]: finding for finding in instance["findings"]}

    @property
    def skipped(self) -> set[str]:
        """The checks that were left out."""
        return {name for name, finding in self.findings.items() if finding["found"].startswith("skipped: ")}

    def severities(self) -> dict[str, str]:
        return {name: finding["severity"] for name, finding in self.findings.items()}

    def reported(self, check: str) -> str:
        finding = self.findings[check]
        return f"{finding['severity']}: {finding['found']}; {finding['mend']}"


def run(*arguments: str) -> Ran:
    """Run the command in this process; whatever it says, no token is in it."""
    done = CliRunner().invoke(app, list(arguments))
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert SECRET not in done.output
    return Ran(done.exit_code, done.stdout, done.stderr)


@dataclass
class Desk:
    """An engine's YAML that names a bucket, and commands that are given it."""

    endpoint: str
    bucket_id: str
    directory: Path
    settings: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> Path:
        own = {
            "bucket_handle": f"hf://buckets/{self.bucket_id}/{PREFIX}",
            "endpoint": self.endpoint,
            "token_env": TOKEN_ENV,
            "module_path": "hfbucket_plugin.adapter",
            "class_name": "HFBucketConnectorAdapter",
        } | self.settings
        extra = {f"{HEAD}{name}": value for name, value in own.items()} | self.extra
        path = self.directory / "lmcache.yaml"
        document = {"remote_storage_plugins": [INSTANCE], "extra_config": extra} | self.engine
        path.write_text(json.dumps(document), encoding="utf-8")  # JSON is YAML
        return path

    @property
    def adapter(self) -> str:
        """The same instance as an adapter of MP mode."""
        params = {
            "bucket_handle": f"hf://buckets/{self.bucket_id}/{PREFIX}",
            "endpoint": self.endpoint,
            "token_env": TOKEN_ENV,
            "name": INSTANCE,
        } | self.settings
        module = {"module_path": "hfbucket_plugin.l2_adapter", "class_name": "HFBucketL2Adapter"}
        return json.dumps({"type": "plugin", **module, "adapter_params": params})

    def run(self, command: str, *arguments: str) -> Ran:
        return run(command, "--lmcache-config", str(self.config), *arguments)

    def doctor(self, *arguments: str) -> Ran:
        return self.run("doctor", "--json", *arguments)

    def put(self, chunks: Mapping[str, bytes], prefix: str = PREFIX) -> None:
        upload(self.endpoint, self.bucket_id, {f"{prefix}/{encode_name(key)}": data for key, data in chunks.items()})

    def put_objects(self, objects: Mapping[str, bytes]) -> None:
        upload(self.endpoint, self.bucket_id, {f"{PREFIX}/{name}": data for name, data in objects.items()})

    @property
    def named(self) -> InstanceConfig:
        return named_instances(self.config)[0]

    @contextlib.contextmanager
    def case(self, timeout: float = 10.0) -> Iterator[CheckContext]:
        """The instance as the checks are given it."""
        named = self.named
        with opened(named, timeout) as bucket:
            yield CheckContext(named, bucket, timeout)


def well_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment in which nothing is to be fixed."""
    monkeypatch.setenv(TOKEN_ENV, SECRET)
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
