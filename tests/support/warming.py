"""What the warmer's tests share: chunks in a bucket, the YAML of an engine, and the command itself."""

import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from hfbucket_plugin.config.lmcache_yaml import EngineConfig
from hfbucket_plugin.core import telemetry
from hfbucket_plugin.core.keys import Key, encode_name
from hfbucket_plugin.hub.bucket import Bucket
from hfbucket_plugin.hub.connect import open_bucket
from hfbucket_plugin.hub.listing import list_chunks
from hfbucket_plugin.tools.selection import ChunkRef
from warmer.plan.plan_file import Planner, WarmPlanFile
from warmer.tiers import TierOptions, declared_tier

INSTANCE = "hfbucket.us"
MODEL = "org/model"
PREFIX = f"{MODEL}@1@0@"
SECRET = "hf_this-must-never-be-printed"


def classic_key(number: int, model: str = MODEL, worker: int = 0, world: int = 1) -> str:
    return f"{model}@{world}@{worker}@{number + 0x1000:x}@bfloat16"


def mp_key(number: int, model: str = MODEL) -> str:
    return f"{model}@01000100@0@{number + 0x1000:08x}"


def content(number: int, size: int = 20_000) -> bytes:
    return random.Random(number).randbytes(size)


@dataclass
class Warehouse:
    """A bucket with chunks in it, and an engine's YAML that names it and a tier."""

    endpoint: str
    bucket_id: str
    directory: Path
    prefix: str = "kv/us"
    chunks: dict[str, bytes] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    tiers: tuple[str, ...] = ("fs.warm",)

    @property
    def tier(self) -> Path:
        return self.directory / "tier"

    @property
    def config(self) -> Path:
        path = self.directory / "lmcache.yaml"
        head = "remote_storage_plugin."
        extra = {
            "save_chunk_meta": False,
            f"{head}fs.warm.base_path": str(self.tier),
            f"{head}{INSTANCE}.bucket_handle": f"hf://buckets/{self.bucket_id}/{self.prefix}",
            f"{head}{INSTANCE}.endpoint": self.endpoint,
            f"{head}{INSTANCE}.token_env": "WARM_TEST_TOKEN",
        } | self.extra
        # JSON is YAML.
        document = {"remote_storage_plugins": [*self.tiers, INSTANCE], "extra_config": extra}
        path.write_text(json.dumps(document, indent=1), encoding="utf-8")
        return path

    def put(self, chunks: dict[str, bytes], token: str | bool = False) -> None:
        api = HfApi(endpoint=self.endpoint, token=token)
        api.batch_bucket_files(self.bucket_id, add=[(data, self.path(key)) for key, data in chunks.items()])
        self.chunks |= chunks

    def delete(self, key: str) -> None:
        HfApi(endpoint=self.endpoint, token=False).batch_bucket_files(self.bucket_id, delete=[self.path(key)])

    def path(self, key: str) -> str:
        return f"{self.prefix}/{encode_name(key)}"

    def open(self, timeout: float = 60.0) -> Bucket:
        settings = EngineConfig.read(self.config).instance(INSTANCE)
        return open_bucket(settings, INSTANCE, telemetry.MemorySink(), timeout)

    def declaration(self, **options: Any) -> Any:
        return declared_tier(EngineConfig.read(self.config), "fs.warm", TierOptions(**options))

    def plan(self, *prefixes: str) -> list[ChunkRef]:
        path = self.directory / "plan.jsonl"
        plan, _ = select(self.open(), prefixes or (PREFIX,), self.declaration().takes, path)
        return [chunk for index in range(plan.segments) for chunk in plan.segment(index)]

    def in_tier(self, tier: Path | None = None) -> dict[str, bytes]:
        """What an engine would find: by key, as LMCache's connector reads file names back."""
        files = (tier or self.tier).glob("*.data")
        return {file.stem.replace("-SEP-", "/"): file.read_bytes() for file in files}

    def leftovers(self, tier: Path | None = None) -> list[str]:
        """Names of files that are no chunks."""
        return sorted(path.name for path in (tier or self.tier).rglob("*") if path.is_file() and path.suffix != ".data")


@dataclass
class Ran:
    """A command that has ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def summary(self) -> dict[str, Any]:
        (line,) = self.stdout.splitlines()
        return json.loads(line)


def environment(**variables: str | None) -> dict[str, str]:
    """Of a command: no Ray cluster but the one named, and a home without Ray's authentication token."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    inherited |= {"HOME": os.environ["HF_HOME"], "PYTHONWARNINGS": "ignore"}
    return inherited | {name: value for name, value in variables.items() if value is not None}


def command(*arguments: str, timeout: float = 120.0, **variables: str | None) -> Ran:
    """Run `python -m warmer` with some arguments."""
    done = subprocess.run(
        [sys.executable, "-m", "warmer", *arguments],
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    return Ran(done.returncode, done.stdout, done.stderr)


def arguments(config: Path, *more: str) -> list[str]:
    command = [sys.executable, "-m", "warmer", "run", "--lmcache-config", str(config), "--instance", INSTANCE]
    options = list(more)
    for option, value in (("--prefix", PREFIX), ("--tier", "fs.warm")):
        if option not in options:
            options += [option, value]
    return command + options


def warm(config: Path, *more: str, timeout: float = 120.0, **variables: str | None) -> Ran:
    """Run `python -m warmer run`."""
    done = subprocess.run(
        arguments(config, *more),
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    return Ran(done.returncode, done.stdout, done.stderr)


def select(bucket: Bucket, prefixes: Sequence[str], takes: type[Key], path: Path) -> tuple[WarmPlanFile, Counter[str]]:
    """List chunks into a plan; returns it, and how many were skipped, by reason."""
    planner = Planner(bucket.handle, takes)
    plan = WarmPlanFile.write(path, planner.plan(list_chunks(bucket, prefixes)))
    return plan, planner.skipped
