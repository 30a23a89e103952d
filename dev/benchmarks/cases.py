"""Batches that are measured, the two sides, and how each is configured."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final

MIB: Final = 1024 * 1024
CHUNK_TOKENS: Final = 256
SIDES: Final = ("built-in", "ours")
INDEXED: Final = "indexed"
"""Ours, with `index: snapshot`."""

BUCKET: Final = "bench/kv"


@dataclass(frozen=True)
class Case:
    """A batch: how many chunks, and the model that makes them as large as they are."""

    name: str
    chunks: int
    layers: int
    hidden: int

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a chunk: K and V, bfloat16."""
        return 2 * self.layers * CHUNK_TOKENS * self.hidden * 2

    @property
    def tokens(self) -> int:
        """Tokens of the batch."""
        return self.chunks * CHUNK_TOKENS


CASES: Final = {
    case.name: case
    for case in (
        Case("16 x 512 KiB", 16, 4, 128),
        Case("16 x 4 MiB", 16, 8, 512),
        Case("8 x 32 MiB", 8, 32, 1024),
        Case("1 x 32 MiB", 1, 32, 1024),
        Case("32 x 32 MiB", 32, 32, 1024),
        Case("64 x 32 MiB", 64, 32, 1024),
    )
}


def own_settings(side: str) -> dict[str, Any]:
    """Settings of ours for a side, beside the handle."""
    return {"index": "snapshot"} if side == INDEXED else {}


def classic_yaml(side: str, case: Case, folder: str, *, blocking_secs: float = 30, pool: float = 2.5) -> str:
    """The minimal configuration of a classic engine, with our class named or not.

    Args:
        side: Whose backend.
        case: For the size of the engine's memory.
        folder: The prefix in the bucket.
        blocking_secs: LMCache's own timeout of a get.
        pool: The engine's memory, in batches.
    """
    lines = [
        f"chunk_size: {CHUNK_TOKENS}",
        "local_cpu: false",
        "save_unfull_chunk: false",
        'remote_serde: "naive"',
        f"blocking_timeout_secs: {blocking_secs:g}",
        f"max_local_cpu_size: {max(0.25, pool * case.chunks * case.chunk_bytes / 2**30)}",
        'remote_storage_plugins: ["hfbucket"]',
        "extra_config:",
        f'  remote_storage_plugin.hfbucket.bucket_handle: "hf://buckets/{BUCKET}/{folder}"',
    ]
    if side != "built-in":
        lines += [
            "  remote_storage_plugin.hfbucket.module_path: hfbucket_plugin.adapter",
            "  remote_storage_plugin.hfbucket.class_name: HFBucketConnectorAdapter",
        ]
        lines += [f"  remote_storage_plugin.hfbucket.{name}: {value}" for name, value in own_settings(side).items()]
    return "\n".join(lines) + "\n"


def mp_json(side: str, folder: str) -> str:
    """The JSON that `lmcache server --l2-adapter` takes."""
    own = {"bucket_handle": f"hf://buckets/{BUCKET}/{folder}"}
    if side == "built-in":
        return json.dumps({"type": "hfbucket", **own})
    return json.dumps(
        {
            "type": "plugin",
            "module_path": "hfbucket_plugin.l2_adapter",
            "class_name": "HFBucketL2Adapter",
            "adapter_params": own | own_settings(side),
        }
    )
