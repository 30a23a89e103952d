"""Warmed by us, hit by vLLM: the product's main job with a real engine that has a real model, on CPU.

    make e2e-vllm
    python -m dev.e2e --vllm-python .venv-vllm/bin/python

1. A vLLM engine and a `lmcache server` with our L2 adapter write the KV of some prompts into a bucket of a local Hub.
2. Another engine, with a fresh server whose only tier is an empty `fs` directory, is asked the same: nothing is cached.
3. `python -m warmer plan` and `apply` fill that directory while they run, and the Hub is stopped.
4. The same engine is asked again: every full chunk is cached, tokens and log-probabilities are those of step 1.
5. One chunk is overwritten with as many other bytes: the engine takes them for KV, and `python -m warmer check` names it.
6. vLLM's OpenAI server, with a fresh `lmcache server` over the same directory, is the canary of `python -m warmer check`: every
   prompt is cached. One chunk is taken away: the check names its prompt.

Each step is checked; the last line says whether all held.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dev.e2e.processes import REPOSITORY, Engine, OpenAIServer, vllm_environment
from hfbucket_plugin.core.keys import RESERVED
from tests.support.lmcache_server import MPServer
from tests.support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from localhub.process import RunningHub

BUCKET = "e2e/kv"
CHUNK_TOKENS = 32
PROMPTS = 3
PROMPT_TOKENS = 200
FULL_CHUNKS = PROMPT_TOKENS // CHUNK_TOKENS
TOKEN = "hf-of-the-e2e"


def warmer(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m warmer`, with a Ray of its own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.run(
        [sys.executable, "-m", "warmer", *arguments],
        env=environment | {"HF_TOKEN": TOKEN, "RAY_AUTH_MODE": "disabled"},
        capture_output=True,
        text=True,
        check=False,
        cwd=REPOSITORY,
    )


class Report:
    """What was found, step by step."""

    def __init__(self) -> None:
        self.failed: list[str] = []
        self._started = time.monotonic()

    def row(self, step: str, found: str) -> None:
        """Print a step."""
        print(f"{time.monotonic() - self._started:6.1f} s  {step:46} {found}", flush=True)

    def expect(self, step: str, found: Any, expected: Any) -> None:
        """Print a step, and note whether it is as expected."""
        right = found == expected
        self.row(step, f"{found}" if right else f"{found}, NOT {expected}")
        if not right:
            self.failed.append(step)


def prompts() -> list[list[int]]:
    """Token ids; no two share a prefix."""
    dice = random.Random(5)
    return [[dice.randrange(3, 512) for _ in range(PROMPT_TOKENS)] for _ in range(PROMPTS)]


def adapter(endpoint: str) -> dict[str, Any]:
    """The bucket, as `lmcache server --l2-adapter` takes it."""
    return {
        "type": "plugin",
        "module_path": "hfbucket_plugin.l2_adapter",
        "class_name": "HFBucketL2Adapter",
        "adapter_params": {"bucket_handle": f"hf://buckets/{BUCKET}/prod", "endpoint": endpoint},
    }


@contextlib.contextmanager
def local_hub(root: Path) -> Iterator[RunningHub]:
    """A Hub with the bucket."""
    from huggingface_hub import HfApi

    from localhub.process import start

    with start(root) as hub:
        HfApi(endpoint=hub.endpoint, token=False).create_bucket(BUCKET)
        yield hub


def in_bucket(endpoint: str) -> int:
    """How many chunks the bucket lists; fingerprints and other objects of ours are none."""
    from huggingface_hub import HfApi

    listed = HfApi(endpoint=endpoint, token=False).list_bucket_tree(BUCKET, prefix="prod/", recursive=True)
    return sum(1 for one in listed if one.type == "file" and not one.path.startswith(f"prod/{RESERVED}/"))


def produce(python: Path, model: Path, endpoint: str, directory: Path) -> list[dict[str, Any]]:
    """Have the KV of the prompts written into the bucket; returns what the engine made of them."""
    with (
        MPServer([adapter(endpoint)], chunk_size=CHUNK_TOKENS, l1_mib=256, env={"HF_TOKEN": TOKEN}) as server,
        Engine(python, model, server.address, "kv_both", directory / "producer.log") as engine,
    ):
        made = [engine.ask(prompt) for prompt in prompts()]
        eventually(lambda: in_bucket(endpoint) >= PROMPTS * FULL_CHUNKS, 120, "chunks in the bucket")
    return made


def run(python: Path, directory: Path, report: Report) -> None:
    """Go through all steps."""
    tier, model, plan = directory / "tier", directory / "model", directory / "plan.jsonl"
    tier.mkdir()
    with (directory / "prompts.jsonl").open("w", encoding="utf-8") as out:  # as --prompts takes them
        out.writelines(json.dumps({"token_ids": prompt, "model": str(model)}) + "\n" for prompt in prompts())
    subprocess.run(
        [str(python), "-m", "dev.e2e.engine", "model", str(model)],
        env=vllm_environment(),
        check=True,
        capture_output=True,
        cwd=REPOSITORY,
    )
    spec = {"type": "fs", "base_path": str(tier)}
    with local_hub(directory / "hub") as hub:
        produced = produce(python, model, hub.endpoint, directory)
        chunks = in_bucket(hub.endpoint)
        report.expect("vLLM stored chunks in the bucket", chunks, PROMPTS * FULL_CHUNKS)
        report.expect("tokens cached meanwhile", [one["cached"] for one in produced], [0] * PROMPTS)
        server = MPServer([spec], chunk_size=CHUNK_TOKENS, l1_mib=256)
        with server, Engine(python, model, server.address, "kv_consumer", directory / "consumer.log") as engine:
            cold = [engine.ask(prompt) for prompt in prompts()]
            report.expect("cached by a fresh engine, cold tier", [one["cached"] for one in cold], [0] * PROMPTS)
            source = ["--l2-adapter", json.dumps(adapter(hub.endpoint))]
            chosen = ["--all", "--chunk-size", str(CHUNK_TOKENS)]
            planned = warmer("plan", *source, *chosen, "--tier", json.dumps(spec), "--out", str(plan))
            applied = warmer("apply", str(plan), *source)
            if planned.returncode or applied.returncode:
                raise RuntimeError(f"warmer: {planned.stderr[-2000:]}{applied.stderr[-2000:]}")
            summary = json.loads(applied.stdout)
            report.row("the warmer filled the tier", f"{summary['copied']} chunks in {summary['seconds']:.1f} s")
            hub.stop()
            warm = [engine.ask(prompt) for prompt in prompts()]
            cached = [one["cached"] for one in warm]
            report.expect("cached by the same engine, no Hub", cached, [FULL_CHUNKS * CHUNK_TOKENS] * PROMPTS)
            hits = server.count("lmcache_mp_lookup_hit_l2_tokens_total")
            report.row("hit tokens in the tier, by LMCache's count", f"{hits:.0f}")
            for field in ("tokens", "logprobs"):
                same = all(one[field] == other[field] for one, other in zip(warm, produced, strict=True))
                report.expect(f"the same {field} as computed", same, True)
            with corrupted(tier, plan, source, report):
                spoilt = engine.ask(prompts()[0])
                changed = spoilt["logprobs"] != produced[0]["logprobs"]
                report.expect("vLLM takes the corrupted chunk for KV", (spoilt["cached"], changed), (cached[0], True))
        ask_canary(python, model, directory, source, report)


def ask_canary(python: Path, model: Path, directory: Path, source: list[str], report: Report) -> None:
    """Have `check` ask vLLM's OpenAI server the prompts: all chunks are there, then one is not. The Hub is gone."""
    tier, plan = directory / "tier", directory / "plan.jsonl"
    full = FULL_CHUNKS * CHUNK_TOKENS
    with (
        MPServer([{"type": "fs", "base_path": str(tier)}], chunk_size=CHUNK_TOKENS, l1_mib=256) as server,
        OpenAIServer(python, model, server.address, directory / "openai.log") as engine,
    ):
        asking = ["--canary", str(directory / "prompts.jsonl"), "--engine", engine.address]
        code, found = checked(plan, [*source, *asking])
        cached = found["canary"]["engines"][0]["cached_tokens"]
        report.expect("canary: exit code, tokens cached by vLLM", (code, cached), (0, full * PROMPTS))
        # The tier is still warm enough for the check, which else would not ask: it is the prompt that is not.
        chunk = chunk_of_first_prompt(tier)
        chunk.rename(directory / "taken-away")
        code, found = checked(plan, [*source, *asking, "--require", "0.9"])
        cold = [(one["prompt"], one["cached_tokens"]) for one in found["canary"]["cold"]]
        report.expect("canary, a chunk gone: code, prompt and cached", (code, cold), (3, [(1, CHUNK_TOKENS)]))
        (directory / "taken-away").rename(chunk)


@contextlib.contextmanager
def corrupted(tier: Path, plan: Path, source: list[str], report: Report) -> Iterator[None]:
    """Overwrite a chunk of the first prompt for the block, and have `check` find it; the Hub is gone."""
    first = checked(plan, source)
    report.expect("check: exit code, share right", (first[0], first[1]["share"]), (0, 1.0))
    victim = chunk_of_first_prompt(tier)
    content = victim.read_bytes()
    victim.write_bytes(random.Random(1).randbytes(len(content)))
    code, found = checked(plan, source)
    wrong = [one["key"] for one in found["wrong"]]
    named = len(wrong) == 1 and wrong[0].split("@")[3] in victim.name
    report.expect("check, one chunk corrupted: exit code, named", (code, named), (3, True))
    yield
    victim.write_bytes(content)


def checked(plan: Path, source: list[str]) -> tuple[int, dict[str, Any]]:
    """What `python -m warmer check` says of the tier."""
    done = warmer("check", str(plan), *source)
    if not done.stdout:
        raise RuntimeError(f"warmer check: exit code {done.returncode}\n{done.stderr[-2000:]}")
    return done.returncode, json.loads(done.stdout)


def chunk_of_first_prompt(tier: Path) -> Path:
    """The file of the first prompt's second chunk, by LMCache's own hash."""
    from hfbucket_plugin.tools.prompts import mp_hasher

    second = mp_hasher(CHUNK_TOKENS, "blake3")(prompts()[0])[1]
    (found,) = tier.glob(f"*{second}*.data")
    return found


def main() -> int:
    """Run it; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m dev.e2e", description=__doc__)
    parser.add_argument("--vllm-python", type=Path, default=REPOSITORY / ".venv-vllm" / "bin" / "python")
    parser.add_argument(
        "--keep", type=Path, help="a directory for model, prompts, tier, plan and logs; default: a temporary one"
    )
    options = parser.parse_args()
    report = Report()
    with contextlib.ExitStack() as stack:
        directory = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="e2e-")))
        directory.mkdir(parents=True, exist_ok=True)
        os.environ |= {
            "HF_HOME": str(directory / "hf-home"),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "PYTHONHASHSEED": "0",
        }
        # Not resolved: a virtual environment's interpreter is a link.
        run(options.vllm_python.absolute(), directory, report)
    print("all as expected" if not report.failed else f"FAILED: {'; '.join(report.failed)}")
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
