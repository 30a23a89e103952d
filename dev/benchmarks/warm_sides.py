"""What fills a node, side by side: the stock client, LMCache's own bulk load, and `python -m warmer run` on a raylet."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dev.benchmarks.cases import BUCKET, CHUNK_TOKENS
from dev.benchmarks.children import REPOSITORY, serve

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from dev.benchmarks.warm import Case
    from tests.support.ray_cluster import RayCluster

MODEL = "bench/model"
TIER = "fs.warm"
_START_SECS = 120.0


def key(number: int) -> str:
    """The key of a chunk, of an engine with one worker."""
    return f"{MODEL}@1@0@{number + 0x1000:x}@bfloat16"


# The stock client.


def stock(folder: str, into: str) -> dict[str, Any]:
    """Download all that lies in a folder, as the client's documentation says to; asking what there is, is not timed."""
    from huggingface_hub import BucketFile, HfApi, list_bucket_tree

    api = HfApi(token=False)
    found = [one for one in list_bucket_tree(BUCKET, prefix=folder, recursive=True) if isinstance(one, BucketFile)]
    started = time.perf_counter()
    api.download_bucket_files(BUCKET, [(one, f"{into}/{Path(one.path).name}") for one in found])
    return {"seconds": time.perf_counter() - started}


# LMCache's bulk load, by an engine into its own memory.


@dataclass(frozen=True)
class Engine:
    """A classic engine with an internal API, in a process of its own; it holds nothing but what it is told to load.

    Attributes:
        case: For the size and shape of its chunks.
        directory: For its configuration and log.
        environment: Of the process.
        port: Of the worker's API.
    """

    case: Case
    directory: Path
    environment: Mapping[str, str]
    port: int

    @property
    def address(self) -> str:
        """Of the worker's API."""
        return f"http://127.0.0.1:{self.port}"

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Start it, and end it with the block."""
        case = self.case
        config = self.directory / "engine.yaml"
        document = {
            "chunk_size": CHUNK_TOKENS,
            "save_unfull_chunk": False,
            "local_cpu": True,
            "max_local_cpu_size": 0.5 + 1.5 * case.total_bytes / 2**30,
            "internal_api_server_enabled": True,
            "internal_api_server_port_start": self.port - 1,
            "extra_config": {"save_chunk_meta": False},
        }
        config.write_text(json.dumps(document), encoding="utf-8")
        heads = case.hidden // 128
        command = [
            sys.executable, "-m", "lmcache.v1.standalone", "--config", str(config), "--model-name", MODEL,
            "--world-size", "1", "--worker-id", "0", "--kv-dtype", "bfloat16",
            "--kv-shape", f"{case.layers},2,{CHUNK_TOKENS},{heads},128",
            "--kvcache-shape-spec", f"(2,{case.layers},{CHUNK_TOKENS},{heads},128):bfloat16:{case.layers}",
        ]  # fmt: skip
        log = self.directory / "engine.log"
        with log.open("wb") as out:
            process = subprocess.Popen(command, env=self.environment, stdout=out, stderr=out, cwd=REPOSITORY)
        try:
            self._wait(process, log)
            yield
        finally:
            process.kill()
            process.wait()

    def _wait(self, process: subprocess.Popen[bytes], log: Path) -> None:
        import httpx2

        end = time.monotonic() + _START_SECS
        while process.poll() is None and time.monotonic() < end:
            with contextlib.suppress(httpx2.HTTPError):
                if httpx2.get(f"{self.address}/meta").is_success:
                    return
            time.sleep(0.1)
        raise RuntimeError(f"the engine did not come up:\n{log.read_text(errors='replace')[-3000:]}")

    def load(self, config: dict[str, Any]) -> float:
        """Have it load all that a remote lists; returns the seconds.

        Raises:
            RuntimeError: It did not load every chunk.
        """
        import httpx2

        path = self.directory / "load.yaml"
        path.write_text(json.dumps(config), encoding="utf-8")
        started = time.perf_counter()
        answer = httpx2.post(f"{self.address}/cache/load-fs-chunks", json={"config_path": str(path)}, timeout=600)
        seconds = time.perf_counter() - started
        if not answer.is_success or answer.json()["loaded_chunks"] != self.case.chunks:
            raise RuntimeError(f"load-fs-chunks: {answer.text}")
        return seconds

    def load_bucket(self, folder: str) -> float:
        """From the bucket, by LMCache's built-in connector."""
        handle = {"remote_storage_plugin.hfbucket.bucket_handle": f"hf://buckets/{BUCKET}/{folder}"}
        return self.load({"remote_url": "plugin://hfbucket", "blocking_timeout_secs": 300, "extra_config": handle})

    def load_directory(self, directory: Path) -> float:
        """From a directory of its own kind."""
        return self.load({"remote_url": f"fs://localhost:0{directory}", "extra_config": {"save_chunk_meta": False}})


# The warmer.


def warmer(cluster: RayCluster, endpoint: str, folder: str, into: Path, *more: str) -> dict[str, Any]:
    """Warm a directory of the only node of a cluster; returns the summary, and what the whole command took.

    Raises:
        RuntimeError: The command failed.
    """
    head = "remote_storage_plugin."
    extra = {
        "save_chunk_meta": False,
        f"{head}{TIER}.base_path": str(into),
        f"{head}hfbucket.us.bucket_handle": f"hf://buckets/{BUCKET}/{folder}",
        f"{head}hfbucket.us.endpoint": endpoint,
    }
    config = into.parent / "lmcache.yaml"
    config.write_text(json.dumps({"remote_storage_plugins": [TIER, "hfbucket.us"], "extra_config": extra}))
    command = [sys.executable, "-m", "warmer", "run", "--lmcache-config", str(config), "--instance", "hfbucket.us"]
    started = time.perf_counter()
    done = subprocess.run(
        [*command, "--all", "--tier", TIER, "--address", cluster.address, *more],
        env=cluster.environment,
        capture_output=True,
        text=True,
        check=False,
        cwd=REPOSITORY,
    )
    whole = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(f"warmer: exit code {done.returncode}\n{done.stderr[-3000:]}")
    summary: dict[str, Any] = json.loads(done.stdout)
    return summary | {"whole": whole}


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    serve({"stock": stock})
