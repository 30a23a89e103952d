"""Buckets with chunks in them, the YAML of engines that name them, and commands that are given it."""

from __future__ import annotations

import contextlib
import json
import os
import random
import sqlite3
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from huggingface_hub import HfApi

from hfbucket_plugin.config.instances import InstanceConfig, named_instances
from hfbucket_plugin.config.lmcache_yaml import EngineConfig
from hfbucket_plugin.config.settings import load
from hfbucket_plugin.core.keys import encode_name
from hfbucket_plugin.core.telemetry import MemorySink
from hfbucket_plugin.hub import connect
from hfbucket_plugin.hub.listing import list_chunks

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    import pytest

    from hfbucket_plugin.cli.context import CheckContext
    from hfbucket_plugin.config.settings import InstanceSettings
    from hfbucket_plugin.core.keys import Key
    from hfbucket_plugin.hub.bucket import Bucket
    from hfbucket_plugin.tools.selection import ChunkRef
    from localhub.process import RunningHub
    from warmer.plan.plan_file import WarmPlanFile

ROOT = Path(__file__).parents[2]
SECRET = "hf_Zq8yLw3VbN5tRk2XsJ7mPd4cGf6hT9aQ"
MODEL = "org/model"
INSTANCE, US, EU = "hfbucket.us", "hfbucket.us", "hfbucket.eu"
PREFIX = "kv/us"
HEAD = f"remote_storage_plugin.{INSTANCE}."
KEY_PREFIX = f"{MODEL}@1@0@"
"""Of the keys of an engine with one worker."""
TOKEN_ENV = "CLI_TEST_TOKEN"
HOUR = 3600.0
DAY = 24 * HOUR
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
DATA_ROUTES = ("xorb-upload", "shard-upload", "reconstruction", "xorb-data", "file-data")
"""Whatever carries data, or says where it is."""


def key(number: int, model: str = MODEL, worker: int = 0, world: int = 2) -> str:
    """A key of a classic engine, by default one of two workers."""
    return f"{model}@{world}@{worker}@{number + 0x1000:x}@bfloat16"


def classic_key(number: int, model: str = MODEL, worker: int = 0, world: int = 1) -> str:
    """The same of one worker by default."""
    return key(number, model, worker, world)


def l2_key(number: int, model: str = MODEL, world: int = 2, worker: int = 0) -> str:
    """A key of MP mode, by default of two workers and group 1."""
    return f"{model}@{world << 24 | worker << 16 | world << 8 | worker:08x}@1@{number + 0x1000:08x}"


def mp_key(number: int, model: str = MODEL) -> str:
    """A key of MP mode, of one worker and group 0."""
    return f"{model}@01000100@0@{number + 0x1000:08x}"


OLD = [key(number) for number in range(4)]
NEW = [key(number) for number in range(100, 120)]
"""What the fixture `stocked` of the jobs puts in: 20 days old, and one."""


def noise(size: int, seed: int = 0) -> bytes:
    """Bytes that nothing compresses, as real KV is."""
    return random.Random(seed).randbytes(size)


def content(number: int, size: int = 20_000) -> bytes:
    """What is in a numbered chunk."""
    return noise(size, number)


def everything_reported(error: BaseException) -> str:
    """All that a log with a traceback would show of an error."""
    return "\n".join([str(error), repr(error), repr(vars(error)), *traceback.format_exception(error)])


def instance_settings(endpoint: str, bucket_id: str, prefix: str = "", **values: Any) -> InstanceSettings:
    """Settings of an instance on a Hub of the tests."""
    values = {"bucket_handle": f"hf://buckets/{bucket_id}/{prefix}", "endpoint": endpoint} | values
    return load({f"remote_storage_plugin.hfbucket.{name}": value for name, value in values.items()}, "hfbucket")


@contextlib.contextmanager
def opened(
    endpoint: str,
    bucket_id: str,
    prefix: str = "",
    sink: MemorySink | None = None,
    get_secs: float = 9.0,
    **values: Any,
) -> Iterator[Bucket]:
    """The client of a bucket, closed at the end."""
    own = instance_settings(endpoint, bucket_id, prefix, **values)
    with closing(connect.open_bucket(own, "hfbucket", sink or MemorySink(), get_secs)) as bucket:
        yield bucket


def upload(endpoint: str, bucket_id: str, files: Mapping[str, bytes], token: str | bool = False) -> None:
    """Put objects into a bucket, with huggingface_hub and nothing of ours."""
    api = HfApi(endpoint=endpoint, token=token)
    api.batch_bucket_files(bucket_id, add=[(data, path) for path, data in files.items()])


def download(endpoint: str, bucket_id: str, path: str) -> bytes:
    """Read an object, with huggingface_hub and nothing of ours."""
    with tempfile.TemporaryDirectory() as directory:
        target = Path(directory, "object")
        HfApi(endpoint=endpoint, token=False).download_bucket_files(bucket_id, [(path, str(target))])
        return target.read_bytes()


def all_paths(endpoint: str, bucket_id: str) -> list[str]:
    """All paths of a bucket, with huggingface_hub and nothing of ours."""
    listed = HfApi(endpoint=endpoint, token=False).list_bucket_tree(bucket_id, recursive=True)
    return sorted(item.path for item in listed if item.type == "file")


def paths(endpoint: str, bucket_id: str) -> list[str]:
    """The same but for fingerprints, which every engine that stores may leave, sooner or later."""
    return [path for path in all_paths(endpoint, bucket_id) if "/.hfbucket/fingerprints/" not in f"/{path}"]


@dataclass
class Ran:
    """A command that has ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def lines(self) -> list[Any]:
        """What it printed, as JSON lines."""
        return [json.loads(line) for line in self.stdout.splitlines()]

    @property
    def summary(self) -> Any:
        """Its only line."""
        (one,) = self.lines
        return one

    def counts(self, *names: str) -> list[int]:
        """Objects of these, as the summary of a job counts them."""
        return [self.summary[name]["objects"] for name in names]

    @property
    def findings(self) -> dict[str, dict[str, str]]:
        """What `doctor --json` found in the only instance, by check."""
        (instance,) = self.summary["instances"]
        names = [finding["check"] for finding in instance["findings"]]
        assert len(set(names)) == len(names)
        return {finding["check"]: finding for finding in instance["findings"]}

    @property
    def skipped(self) -> set[str]:
        """The checks that were left out."""
        return {name for name, finding in self.findings.items() if finding["found"].startswith("skipped: ")}

    def severities(self) -> dict[str, str]:
        """Of the checks."""
        return {name: finding["severity"] for name, finding in self.findings.items()}

    def reported(self, check: str) -> str:
        """What is said of a check."""
        finding = self.findings[check]
        return f"{finding['severity']}: {finding['found']}; {finding['mend']}"


def run(*arguments: str, module: str = "hfbucket_plugin", stdin: str | None = None) -> Ran:
    """Run the command of a package in this process; whatever it says, no token is in it."""
    from importlib import import_module

    from typer.testing import CliRunner

    done = CliRunner().invoke(import_module(f"{module}.cli.app").app, list(arguments), input=stdin)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert SECRET not in done.output
    return Ran(done.exit_code, done.stdout, done.stderr)


def environment(**variables: str | None) -> dict[str, str]:
    """Of a command: no Ray cluster but the one named, and a home without Ray's authentication token."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    inherited |= {"HOME": os.environ["HF_HOME"], "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    return inherited | {name: value for name, value in variables.items() if value is not None}


def started(module: str, *arguments: str, **variables: str | None) -> subprocess.Popen[str]:
    """The command of a package in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen[str], timeout: float = 120.0) -> Ran:
    """Wait for a command's end."""
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except BaseException:
        process.kill()
        process.communicate()
        raise
    return Ran(process.returncode, stdout, stderr)


class _EngineBucket:
    """The bucket of an instance, named by the YAML of an engine."""

    token_env: ClassVar[str]
    endpoint: str
    bucket_id: str
    directory: Path
    prefix: str

    def _values(self) -> dict[str, Any]:
        """The settings that every instance has."""
        handle = f"hf://buckets/{self.bucket_id}/{self.prefix}"
        return {"bucket_handle": handle, "endpoint": self.endpoint, "token_env": self.token_env}

    def _write(self, plugins: Iterable[str], extra: dict[str, Any], **more: Any) -> Path:
        """Write the engine's YAML."""
        path = self.directory / "lmcache.yaml"
        document = {"remote_storage_plugins": list(plugins), "extra_config": extra} | more
        path.write_text(json.dumps(document, indent=1), encoding="utf-8")  # JSON is YAML
        return path

    @property
    def config(self) -> Path:
        raise NotImplementedError

    @property
    def named(self) -> InstanceConfig:
        """The instance, as commands find it."""
        return named_instances(self.config, [INSTANCE])[0]

    def path(self, key: str) -> str:
        """Where a chunk lies in the bucket."""
        return f"{self.prefix}/{encode_name(key)}" if self.prefix else encode_name(key)

    def all_paths(self) -> set[str]:
        """All objects of the bucket but for fingerprints."""
        return set(paths(self.endpoint, self.bucket_id))


def _of(instance: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"remote_storage_plugin.{instance}.{name}": value for name, value in values.items()}


@dataclass
class Desk(_EngineBucket):
    """A bucket, and the plugin's commands that are given an engine's YAML."""

    endpoint: str
    bucket_id: str
    directory: Path
    settings: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    prefix: str = PREFIX
    token_env = TOKEN_ENV

    @property
    def config(self) -> Path:
        """The YAML of a classic engine."""
        module = {"module_path": "hfbucket_plugin.adapter", "class_name": "HFBucketConnectorAdapter"}
        own = self._values() | module | self.settings
        return self._write([INSTANCE], _of(INSTANCE, own) | self.extra, **self.engine)

    @property
    def adapter(self) -> str:
        """The same instance as an adapter of MP mode."""
        params = self._values() | {"name": INSTANCE} | self.settings
        module = {"module_path": "hfbucket_plugin.l2_adapter", "class_name": "HFBucketL2Adapter"}
        return json.dumps({"type": "plugin", **module, "adapter_params": params})

    def run(self, command: str, *arguments: str) -> Ran:
        """Run a command."""
        return run(command, "--lmcache-config", str(self.config), *arguments)

    def doctor(self, *arguments: str) -> Ran:
        """Run `doctor --json`."""
        return self.run("doctor", "--json", *arguments)

    def put(self, chunks: Mapping[str, bytes], prefix: str = PREFIX) -> None:
        """Store chunks."""
        upload(self.endpoint, self.bucket_id, {f"{prefix}/{encode_name(key)}": data for key, data in chunks.items()})

    def put_objects(self, objects: Mapping[str, bytes]) -> None:
        """Store objects of any name below the prefix."""
        upload(self.endpoint, self.bucket_id, {f"{PREFIX}/{name}": data for name, data in objects.items()})

    @contextlib.contextmanager
    def case(self, timeout: float = 10.0) -> Iterator[CheckContext]:
        """The instance as the checks are given it."""
        from hfbucket_plugin.cli.context import CheckContext

        named = self.named
        with connect.opened(named, timeout) as bucket:
            yield CheckContext(named, bucket, timeout)


def well_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment in which nothing is to be fixed."""
    monkeypatch.setenv(TOKEN_ENV, SECRET)
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


@dataclass
class Depot(_EngineBucket):
    """A bucket with chunks of every age, and the commands of the jobs."""

    hub: RunningHub
    bucket_id: str
    directory: Path
    prefix: str = PREFIX
    settings: dict[str, Any] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)
    token_env = "JOBS_TEST_TOKEN"

    @property
    def endpoint(self) -> str:
        """Of the Hub."""
        return self.hub.endpoint

    @property
    def config(self) -> Path:
        """The YAML of engines: this instance, and `others` with their prefixes."""
        extra = _of(INSTANCE, self._values() | self.settings)
        for name, prefix in self.others.items():
            extra |= _of(name, self._values() | {"bucket_handle": f"hf://buckets/{self.bucket_id}/{prefix}"})
        return self._write([INSTANCE, *self.others], extra)

    def put(self, chunks: Mapping[str, bytes] | Iterable[str], age: float = 10 * DAY) -> None:
        """Store chunks that the Hub took so many seconds ago."""
        files = chunks if hasattr(chunks, "items") else {one: one.encode() for one in chunks}
        self.put_paths({self.path(one): data for one, data in files.items()}, age)

    def put_paths(self, files: Mapping[str, bytes], age: float = 10 * DAY) -> None:
        """The same of objects of any name."""
        upload(self.endpoint, self.bucket_id, files)
        self.make_older(files, age)

    def make_older(self, files: Iterable[str], age: float) -> None:
        """Turn the Hub's own record of when it took objects back; it has no call for that."""
        at = int((time.time() - age) * 1000)
        with closing(sqlite3.connect(self.hub.root / "hub.sqlite", timeout=30)) as base, base:
            base.executemany(
                "UPDATE files SET uploaded_ms = ? WHERE path = ? AND bucket ="
                " (SELECT id FROM buckets WHERE namespace || '/' || name = ?)",
                [(at, path, self.bucket_id) for path in files],
            )

    def left(self) -> set[str]:
        """What is in the bucket, but for our own records."""
        return {path for path in self.all_paths() if "/.hfbucket/" not in f"/{path}"}

    def paths_of(self, keys: Iterable[str]) -> set[str]:
        """Where chunks lie."""
        return {self.path(one) for one in keys}

    def arguments(self, command: str, *more: str) -> list[str]:
        """Of a command."""
        where = ["--lmcache-config", str(self.config)]
        if command != "apply" and not {"--all-instances", "--instance"} & set(more):
            where += ["--instance", INSTANCE]
        return [*command.split(), *where, *more]

    def run(self, command: str, *more: str, stdin: str | None = None) -> Ran:
        """Run a command in this process."""
        return run(*self.arguments(command, *more), module="jobs", stdin=stdin)

    def cleanup(self, *more: str, stdin: str | None = None) -> Ran:
        """Run a cleanup in this process."""
        return self.run("cleanup", *more, stdin=stdin)

    def started(self, command: str, *more: str) -> subprocess.Popen[str]:
        """The command in a process of its own."""
        return started("jobs", *self.arguments(command, *more), TMPDIR=str(self.directory))


@dataclass
class ExportRig:
    """Two instances, `hfbucket.us` and `hfbucket.eu`, and the exports between them.

    Attributes:
        us: The bucket of one, with things that are done to it.
        eu: The bucket of the other.
        tokens: What each instance's token is called, and is.
    """

    hub: RunningHub
    directory: Path
    us: Depot
    eu: Depot
    tokens: dict[str, str] = field(default_factory=dict)

    @classmethod
    def on(cls, hub: RunningHub, directory: Path, us: str, eu: str) -> ExportRig:
        """The instances on two buckets."""
        own = {}
        for name, bucket in (("us", us), ("eu", eu)):
            (directory / name).mkdir()
            own[name] = Depot(hub, bucket, directory / name, prefix=f"kv/{name}")
        return cls(hub, directory, own["us"], own["eu"])

    @property
    def config(self) -> Path:
        """The YAML that names both."""
        extra = {}
        for name, depot in ((US, self.us), (EU, self.eu)):
            token = {"token_env": f"JOBS_TEST_{name[-2:].upper()}"}
            extra |= _of(name, depot._values() | token | depot.settings)
        path = self.directory / "rig.yaml"
        path.write_text(json.dumps({"remote_storage_plugins": [US, EU], "extra_config": extra}), encoding="utf-8")
        return path

    def arguments(self, *more: str, source: str = US, to: str = EU) -> list[str]:
        """Of an export."""
        return ["export", "--lmcache-config", str(self.config), "--from", source, "--to", to, *more]

    def export(self, *more: str, source: str = US, to: str = EU) -> Ran:
        """Run an export in this process."""
        return self.command(self.arguments(*more, source=source, to=to))

    def apply(self, plan: str, *more: str) -> Ran:
        """Apply a plan in this process."""
        return self.command(["apply", plan, *more])

    @staticmethod
    def command(arguments: list[str]) -> Ran:
        """Run any command of the jobs in this process."""
        return run(*arguments, module="jobs")

    def started(self, *more: str, source: str = US, to: str = EU) -> subprocess.Popen[str]:
        """An export in a process of its own."""
        return started("jobs", *self.arguments(*more, source=source, to=to), TMPDIR=str(self.directory))

    def listing(self, depot: Depot) -> dict[str, tuple[str, int]]:
        """Name → hash and size of what an instance holds, by huggingface_hub, but for records of ours."""
        api = HfApi(endpoint=self.hub.endpoint, token=self.tokens.get("admin", False))
        head = f"{depot.prefix}/"
        return {
            item.path.removeprefix(head): (item.xet_hash, item.size)
            for item in api.list_bucket_tree(depot.bucket_id, recursive=True)
            if item.type == "file" and item.path.startswith(head) and "/.hfbucket/" not in item.path
        }

    def data_requests(self) -> dict[str, int]:
        """Requests of clients that carried data, by route, since the counters were reset."""
        routes = self.hub.control.counters().routes
        return {name: routes[name].requests for name in DATA_ROUTES if name in routes}


def names(keys: Iterable[str]) -> set[str]:
    """The object names of keys."""
    return {encode_name(one) for one in keys}


@dataclass
class Warehouse(_EngineBucket):
    """A bucket with chunks in it, and an engine's YAML that names it and a tier."""

    endpoint: str
    bucket_id: str
    directory: Path
    prefix: str = PREFIX
    chunks: dict[str, bytes] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    tiers: tuple[str, ...] = ("fs.warm",)
    token_env = "WARM_TEST_TOKEN"

    @property
    def tier(self) -> Path:
        """The tier's directory."""
        return self.directory / "tier"

    @property
    def config(self) -> Path:
        """The YAML of an engine."""
        extra = {"save_chunk_meta": False, "remote_storage_plugin.fs.warm.base_path": str(self.tier)}
        return self._write([*self.tiers, INSTANCE], extra | _of(INSTANCE, self._values()) | self.extra)

    def put(self, chunks: dict[str, bytes], token: str | bool = False) -> None:
        """Store chunks."""
        upload(self.endpoint, self.bucket_id, {self.path(key): data for key, data in chunks.items()}, token)
        self.chunks |= chunks

    def delete(self, key: str) -> None:
        """Delete a chunk."""
        HfApi(endpoint=self.endpoint, token=False).batch_bucket_files(self.bucket_id, delete=[self.path(key)])

    def open(self, timeout: float = 60.0) -> Bucket:
        """The bucket, as the warmer opens it."""
        settings = EngineConfig.read(self.config).instance(INSTANCE)
        return connect.open_bucket(settings, INSTANCE, MemorySink(), timeout)

    def declaration(self, **options: Any) -> Any:
        """What the YAML says of the tier."""
        from warmer.tiers import TierOptions, declared_tier

        return declared_tier(EngineConfig.read(self.config), "fs.warm", TierOptions(**options))

    def plan(self, *prefixes: str) -> list[ChunkRef]:
        """The chunks of a plan."""
        path = self.directory / "plan.jsonl"
        plan, _ = select(self.open(), prefixes or (KEY_PREFIX,), self.declaration().takes, path)
        return [chunk for index in range(plan.segments) for chunk in plan.segment(index)]

    def in_tier(self, tier: Path | None = None) -> dict[str, bytes]:
        """What an engine would find: by key, as LMCache's connector reads file names back."""
        files = (tier or self.tier).glob("*.data")
        return {file.stem.replace("-SEP-", "/"): file.read_bytes() for file in files}

    def leftovers(self, tier: Path | None = None) -> list[str]:
        """Names of files that are no chunks."""
        return sorted(path.name for path in (tier or self.tier).rglob("*") if path.is_file() and path.suffix != ".data")


def select(bucket: Bucket, prefixes: Sequence[str], takes: type[Key], path: Path) -> tuple[WarmPlanFile, Counter[str]]:
    """List chunks into a plan; returns it, and how many were skipped, by reason."""
    from warmer.plan.plan_file import Planner, WarmPlanFile

    planner = Planner(bucket.handle, takes)
    plan = WarmPlanFile.write(path, planner.plan(list_chunks(bucket, prefixes)))
    return plan, planner.skipped


def command(*arguments: str, timeout: float = 120.0, **variables: str | None) -> Ran:
    """Run `python -m warmer` in a process of its own: it joins a cluster, which this process must not."""
    return ended(started("warmer", *arguments, **variables), timeout)


def arguments(config: Path, *more: str) -> list[str]:
    """The command line of a warm-up of the chunks of `classic_key` into the tier."""
    line = [sys.executable, "-m", "warmer", "run", "--lmcache-config", str(config), "--instance", INSTANCE]
    options = list(more)
    for option, value in (("--prefix", KEY_PREFIX), ("--tier", "fs.warm")):
        if option not in options:
            options += [option, value]
    return line + options


def warm(config: Path, *more: str, timeout: float = 120.0, **variables: str | None) -> Ran:
    """Run it."""
    return command(*arguments(config, *more)[3:], timeout=timeout, **variables)
