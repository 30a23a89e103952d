"""A bucket with chunks of every age, the YAML of engines that name it, and the command line of the jobs."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typer.testing import CliRunner

from hfbucket_plugin.config.instances import named_instances
from hfbucket_plugin.core.keys import encode_name
from jobs.cli.app import app
from tests.support.plugin_support import SECRET, paths, upload

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from localhub.process import RunningHub

INSTANCE = "hfbucket.us"
PREFIX = "kv/us"
MODEL = "org/model"
HOUR = 3600.0
DAY = 24 * HOUR
ROOT = Path(__file__).parents[2]


def key(number: int, model: str = MODEL, worker: int = 0) -> str:
    return f"{model}@2@{worker}@{number + 0x1000:x}@bfloat16"


def mp_key(number: int, model: str = MODEL) -> str:
    return f"{model}@02000200@1@{number + 0x1000:08x}"


OLD = [key(number) for number in range(4)]
NEW = [key(number) for number in range(100, 120)]
"""What the fixture `stocked` puts in: 20 days old, and one."""


@dataclass
class Ran:
    """A command that has ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def summaries(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.stdout.splitlines()]

    @property
    def summary(self) -> dict[str, Any]:
        (one,) = self.summaries
        return one

    def counts(self, *names: str) -> list[int]:
        return [self.summary[name]["objects"] for name in names]


@dataclass
class Depot:
    """A bucket, and what is done to it."""

    hub: RunningHub
    bucket_id: str
    directory: Path
    prefix: str = PREFIX
    settings: dict[str, Any] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)

    @property
    def config(self) -> Path:
        own = {
            "bucket_handle": f"hf://buckets/{self.bucket_id}/{self.prefix}",
            "endpoint": self.hub.endpoint,
            "token_env": "JOBS_TEST_TOKEN",
        } | self.settings
        head = "remote_storage_plugin."
        extra = {f"{head}{INSTANCE}.{name}": value for name, value in own.items()}
        for name, prefix in self.others.items():
            extra |= {
                f"{head}{name}.bucket_handle": f"hf://buckets/{self.bucket_id}/{prefix}",
                f"{head}{name}.endpoint": self.hub.endpoint,
                f"{head}{name}.token_env": "JOBS_TEST_TOKEN",
            }
        path = self.directory / "lmcache.yaml"
        document = {"remote_storage_plugins": [INSTANCE, *self.others], "extra_config": extra}
        path.write_text(json.dumps(document), encoding="utf-8")  # JSON is YAML
        return path

    @property
    def named(self) -> Any:
        return named_instances(self.config, [INSTANCE])[0]

    def path(self, text: str) -> str:
        return f"{self.prefix}/{encode_name(text)}" if self.prefix else encode_name(text)

    def put(self, chunks: Mapping[str, bytes] | Iterable[str], age: float = 10 * DAY) -> None:
        """Store chunks that the Hub took so many seconds ago."""
        files = chunks if hasattr(chunks, "items") else {one: one.encode() for one in chunks}
        self.put_paths({self.path(one): data for one, data in files.items()}, age)

    def put_paths(self, files: Mapping[str, bytes], age: float = 10 * DAY) -> None:
        upload(self.hub.endpoint, self.bucket_id, files)
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

    def all_paths(self) -> set[str]:
        return set(paths(self.hub.endpoint, self.bucket_id))

    def left(self) -> set[str]:
        """What is in the bucket, but for our own records."""
        return {path for path in self.all_paths() if "/.hfbucket/" not in f"/{path}"}

    def paths_of(self, keys: Iterable[str]) -> set[str]:
        return {self.path(one) for one in keys}

    def arguments(self, command: str, *more: str) -> list[str]:
        where = ["--lmcache-config", str(self.config)]
        if command != "apply" and not {"--all-instances", "--instance"} & set(more):
            where += ["--instance", INSTANCE]
        return [*command.split(), *where, *more]

    def run(self, command: str, *more: str, stdin: str | None = None) -> Ran:
        """Run a command in this process; whatever it says, no token is in it."""
        done = CliRunner().invoke(app, self.arguments(command, *more), input=stdin)
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        assert SECRET not in done.output
        return Ran(done.exit_code, done.stdout, done.stderr)

    def cleanup(self, *more: str, stdin: str | None = None) -> Ran:
        return self.run("cleanup", *more, stdin=stdin)

    def started(self, command: str, *more: str) -> subprocess.Popen[str]:
        """The command in a process of its own."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        return subprocess.Popen(
            [sys.executable, "-m", "jobs", *self.arguments(command, *more)],
            env=environment | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "TMPDIR": str(self.directory)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


def ended(process: subprocess.Popen[str], timeout: float = 120.0) -> Ran:
    stdout, stderr = process.communicate(timeout=timeout)
    return Ran(process.returncode, stdout, stderr)
