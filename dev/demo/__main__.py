"""The main job, end to end, on real parts: store → warm with `ray job submit` → Hub gone → every token hit.

1. A local Hub starts, with access control.
2. A real LMCache engine, configured as in LMCache's own documentation plus the two lines that name our plugin, stores
   the KV of some prompts into two bucket instances.
3. `ray start`; `ray job submit` runs the warmer, which fills a local tier from one of the buckets.
4. The Hub is stopped.
5. A fresh engine that lists the tier before the bucket looks the prompts up and retrieves them.

Exits 0 only if every token is hit and every tensor is identical. Leaves nothing running.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localhub.process import start
from tests.support.ray_cluster import ray_cluster

REPOSITORY = Path(__file__).resolve().parents[2]
MODEL_PREFIX = "demo/tiny-llama@1@0@"

PRODUCER = """\
chunk_size: 256
local_cpu: false
max_local_cpu_size: 0.25
save_unfull_chunk: false
remote_serde: "naive"
blocking_timeout_secs: 10
remote_storage_plugins: ["hfbucket.us", "hfbucket.eu"]
extra_config:
  remote_storage_plugin.hfbucket.us.bucket_handle: "hf://buckets/my-org/lmcache-kv/us"
  remote_storage_plugin.hfbucket.us.token_env: "HF_US_TOKEN"
  remote_storage_plugin.hfbucket.us.create_bucket_if_missing: true
  remote_storage_plugin.hfbucket.us.module_path: "hfbucket_plugin.adapter"
  remote_storage_plugin.hfbucket.us.class_name: "HFBucketConnectorAdapter"
  remote_storage_plugin.hfbucket.eu.bucket_handle: "hf://buckets/my-org/lmcache-kv/eu"
  remote_storage_plugin.hfbucket.eu.token_env: "HF_EU_TOKEN"
  remote_storage_plugin.hfbucket.eu.create_bucket_if_missing: true
  remote_storage_plugin.hfbucket.eu.module_path: "hfbucket_plugin.adapter"
  remote_storage_plugin.hfbucket.eu.class_name: "HFBucketConnectorAdapter"
"""

# The engine that takes the traffic asks its own disk first. The warmer reads this very file.
CONSUMER = """\
chunk_size: 256
local_cpu: false
max_local_cpu_size: 0.25
save_unfull_chunk: false
remote_serde: "naive"
blocking_timeout_secs: 10
remote_storage_plugins: ["fs.warm", "hfbucket.us"]
extra_config:
  save_chunk_meta: false
  remote_storage_plugin.fs.warm.base_path: "{tier}"
  remote_storage_plugin.hfbucket.us.bucket_handle: "hf://buckets/my-org/lmcache-kv/us"
  remote_storage_plugin.hfbucket.us.token_env: "HF_US_TOKEN"
  remote_storage_plugin.hfbucket.us.module_path: "hfbucket_plugin.adapter"
  remote_storage_plugin.hfbucket.us.class_name: "HFBucketConnectorAdapter"
"""

TOKENS = """\
tokens:
  - {token: us-secret-of-the-demo, buckets: {my-org/*: write}}
  - {token: eu-secret-of-the-demo, buckets: {my-org/*: write}}
"""


@dataclass(frozen=True)
class Step:
    """One line of the table."""

    name: str
    chunks: int
    bytes: int
    seconds: float


def run(command: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """Run a command of ours; the last line of its output is JSON.

    Raises:
        RuntimeError: It failed; the message ends with what it said.
    """
    done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(command)} exited {done.returncode}:\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
        )
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def say(text: str) -> None:
    """Tell how far it is, beside the result on stdout."""
    print(text, file=sys.stderr, flush=True)


def environment(directory: Path, endpoint: str) -> dict[str, str]:
    """What every process of the demo is given: tokens by variable name, and nothing that calls home."""
    return os.environ | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(directory / "hf-home"),
        "HF_US_TOKEN": "us-secret-of-the-demo",
        "HF_EU_TOKEN": "eu-secret-of-the-demo",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "LMCACHE_TRACK_USAGE": "false",
        "LMCACHE_LOG_LEVEL": "ERROR",
        "PYTHONHASHSEED": "0",  # LMCache hashes prefixes with Python's hash here: both engines must agree
        "PYTHONPATH": str(REPOSITORY),
        "RAY_AUTH_MODE": "disabled",  # whatever a token in ~/.ray would have this cluster of ours ask for
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # the job's `python`
    }


def warm(directory: Path, config: Path, variables: dict[str, str]) -> dict[str, Any]:
    """Submit the warm-up as an operator does, and return its summary.

    Raises:
        RuntimeError: The job failed; the message ends with its log.
    """
    command = [
        "python", "-m", "warmer", "run", "--lmcache-config", str(config), "--instance", "hfbucket.us",
        "--prefix", MODEL_PREFIX, "--tier", "fs.warm",
    ]  # fmt: skip
    with ray_cluster(directory, variables) as cluster:
        say(f"  ray job submit --address {cluster.dashboard} -- {' '.join(command)}")
        done = cluster.submit(command)
    if done.returncode:
        raise RuntimeError(f"the warm-up failed:\n{done.stdout[-4000:]}\n{done.stderr[-1000:]}")
    return summary_in(done.stdout)


def summary_in(output: str) -> dict[str, Any]:
    """The warmer's JSON summary among the lines of a job's log.

    Raises:
        RuntimeError: There is none.
    """
    for line in reversed(output.splitlines()):
        if line.startswith("{") and '"copied"' in line:
            summary: dict[str, Any] = json.loads(line)
            return summary
    raise RuntimeError(f"the warm-up printed no summary:\n{output[-4000:]}")


def show(steps: list[Step], consumed: dict[str, Any]) -> None:
    """Print the table, and the two lines that say whether the job was done."""
    print(f"{'step':34} {'chunks':>7} {'MiB':>8} {'seconds':>8}")
    for step in steps:
        print(f"{step.name:34} {step.chunks:>7} {step.bytes / 2**20:>8.1f} {step.seconds:>8.2f}")
    print(f"hit tokens {consumed['hit']}/{consumed['tokens']}")
    print(f"identical: {'yes' if consumed['identical'] else 'no'}")


def demo(directory: Path) -> int:
    """Do it all below a directory; returns the exit code."""
    tier = directory / "tier"
    tier.mkdir()
    for name, text in (("producer", PRODUCER), ("consumer", CONSUMER.format(tier=tier)), ("tokens", TOKENS)):
        (directory / f"{name}.yaml").write_text(text, encoding="utf-8")
    with start(directory / "hub", tokens=directory / "tokens.yaml") as hub:
        variables = environment(directory, hub.endpoint)
        say(f"a local Hub listens on {hub.endpoint}")
        say("a real LMCache engine stores the KV of 4 prompts into hfbucket.us and hfbucket.eu …")
        produced = run(
            [sys.executable, "-m", "dev.demo.engines", "produce", str(directory / "producer.yaml")], variables
        )
        say("ray start; the warm-up is submitted …")
        warmed = warm(directory, directory / "consumer.yaml", variables)
        hub.stop()
        say("the Hub is stopped; a fresh engine retrieves …")
        consumed = run(
            [sys.executable, "-m", "dev.demo.engines", "consume", str(directory / "consumer.yaml")], variables
        )
    show(
        [
            Step("engine stores into two instances", produced["chunks"], produced["bytes"], produced["seconds"]),
            Step("ray job warms fs.warm", warmed["copied"], warmed["bytes"], warmed["seconds"]),
            Step("fresh engine retrieves, no Hub", produced["chunks"], produced["bytes"], consumed["seconds"]),
        ],
        consumed,
    )
    return exit_code(consumed)


def exit_code(consumed: dict[str, Any]) -> int:
    """0 only if every token was found and hit, and every tensor is what was stored."""
    complete = consumed["hit"] == consumed["found"] == consumed["tokens"] and consumed["identical"]
    return 0 if complete else 1


def main() -> None:
    """Run the demo in a temporary directory that it removes."""
    directory = Path(tempfile.mkdtemp(prefix="hfd-"))  # short: Ray puts sockets below it, whose paths are limited
    try:
        code = demo(directory)
    except RuntimeError as error:
        say(str(error))
        code = 1
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
