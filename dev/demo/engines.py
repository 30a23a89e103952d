"""The two engines of the demo, each run in a process of its own: one that stores, and a fresh one that retrieves."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from tests.support.lmcache_engine import CpuEngine, prompt

PROMPTS = 4
PROMPT_TOKENS = 1024


def produce(config: Path) -> dict[str, Any]:
    """Store the KV of some prompts, and wait until every bucket instance holds it."""
    engine = CpuEngine("producer", config)
    started = time.monotonic()
    stored = 0
    for seed in range(PROMPTS):
        tokens = prompt(seed, PROMPT_TOKENS)
        kv = engine.random_kv(len(tokens), seed)
        engine.store(tokens, kv)
        engine.wait_written(tokens)
        stored += kv.nbytes
    chunks = PROMPTS * PROMPT_TOKENS // engine.config.chunk_size
    seconds = time.monotonic() - started
    engine.close()
    return {"chunks": chunks, "bytes": stored, "seconds": seconds}


def consume(config: Path) -> dict[str, Any]:
    """Look the same prompts up and retrieve them, and compare every tensor with what was stored."""
    import torch

    engine = CpuEngine("consumer", config)
    started = time.monotonic()
    found = hit = identical = 0
    for seed in range(PROMPTS):
        tokens = prompt(seed, PROMPT_TOKENS)
        found += engine.lookup(tokens)
        tokens_hit, kv = engine.retrieve(tokens)
        hit += tokens_hit
        identical += torch.equal(kv, engine.random_kv(len(tokens), seed))
    seconds = time.monotonic() - started
    engine.close()
    return {
        "tokens": PROMPTS * PROMPT_TOKENS,
        "found": found,
        "hit": hit,
        "identical": identical == PROMPTS,
        "seconds": seconds,
    }


def main() -> None:
    """Run one of them; the last line of output is its result, as JSON."""
    parser = argparse.ArgumentParser(prog="python -m dev.demo.engines", description=__doc__)
    parser.add_argument("role", choices=["produce", "consume"])
    parser.add_argument("config", type=Path)
    options = parser.parse_args()
    result = produce(options.config) if options.role == "produce" else consume(options.config)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
