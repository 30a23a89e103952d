"""A real vLLM engine on CPU beside a `lmcache server`, driven over stdin and stdout: one JSON line asks, one answers.

    python -m dev.e2e.engine model DIRECTORY
    python -m dev.e2e.engine serve DIRECTORY --server tcp://127.0.0.1:5555 --role kv_both

Runs in the environment that holds vLLM, and needs nothing of ours. A question is a list of token ids. The answer is
`{"cached": tokens that came from the cache, "tokens": [...], "logprobs": [...]}`: what was generated, greedily.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

NEW_TOKENS = 8
OPTIONS: dict[str, str | int | bool] = {
    "dtype": "float32",
    "max_model_len": 512,
    "block_size": 32,
    "skip_tokenizer_init": True,
    "enforce_eager": True,
    "enable_prefix_caching": False,  # else the engine's own cache would answer, and prove nothing
}
"""What vLLM needs to serve the model on CPU, by the names of `vllm.LLM`; its servers take them as flags."""


def make_model(directory: Path) -> None:
    """A Llama of two layers with random weights, always the same."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=512,
        max_position_embeddings=1024,
        dtype="float32",
    )
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(directory)


def transfer(server: str, role: str) -> dict[str, Any]:
    """The fields of vLLM's `KVTransferConfig` by which KV goes to and comes from a `lmcache server`."""
    address = urlsplit(server)
    return {
        "kv_connector": "LMCacheMPConnector",
        "kv_role": role,
        "kv_connector_module_path": "lmcache.integration.vllm.lmcache_mp_connector",
        "kv_connector_extra_config": {
            "lmcache.mp.host": f"tcp://{address.hostname}",
            "lmcache.mp.port": address.port,
        },
    }


def make_engine(model: str, server: str, role: str) -> Any:
    """An engine in this process; its KV goes to and comes from the `lmcache server` alone."""
    from vllm import LLM
    from vllm.config import KVTransferConfig

    return LLM(
        model=model, **OPTIONS, kv_transfer_config=KVTransferConfig(**transfer(server, role)), disable_log_stats=True
    )


def answer(engine: Any, token_ids: list[int]) -> dict[str, Any]:
    """What the engine makes of a prompt."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, logprobs=1, detokenize=False, ignore_eos=True)
    (output,) = engine.generate([{"prompt_token_ids": token_ids}], sampling, use_tqdm=False)
    made = output.outputs[0]
    logprobs = [step[token].logprob for token, step in zip(made.token_ids, made.logprobs, strict=True)]
    return {"cached": output.num_cached_tokens or 0, "tokens": list(made.token_ids), "logprobs": logprobs}


def main() -> None:
    """Make the model, or answer until stdin closes."""
    parser = argparse.ArgumentParser(prog="python -m dev.e2e.engine", description=__doc__)
    parser.add_argument("action", choices=["model", "serve"])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--server")
    parser.add_argument("--role", default="kv_both", choices=["kv_both", "kv_consumer"])
    options = parser.parse_args()
    # vLLM and LMCache log to stdout: the answers have it for themselves.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    if options.action == "model":
        make_model(options.directory)
        return
    engine = make_engine(str(options.directory), options.server, options.role)
    answers.write(json.dumps({"ready": True}) + "\n")
    for line in sys.stdin:
        answers.write(json.dumps(answer(engine, json.loads(line))) + "\n")


if __name__ == "__main__":
    main()
