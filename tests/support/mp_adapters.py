"""L2 adapters over a bucket, which the same tests run against: what each takes as `--l2-adapter`."""

from dataclasses import dataclass
from typing import Any

import pytest

OURS = "hfbucket_plugin.l2_adapter"


@dataclass(frozen=True)
class Place:
    """Where an adapter keeps its objects."""

    endpoint: str
    bucket_id: str
    prefix: str = "kv/mp"

    @property
    def handle(self) -> str:
        return f"hf://buckets/{self.bucket_id}/{self.prefix}"


def built_in(place: Place) -> dict[str, Any]:
    """LMCache's own; its endpoint is `HF_ENDPOINT`."""
    return {"type": "hfbucket", "bucket_handle": place.handle}


def ours(place: Place) -> dict[str, Any]:
    """This package's; it believes nothing for longer than a question, so that deletes are seen at once."""
    return {
        "type": "plugin",
        "module_path": OURS,
        "class_name": "HFBucketL2Adapter",
        "adapter_params": {"bucket_handle": place.handle, "endpoint": place.endpoint, "metadata_cache_ttl_secs": 0},
    }


def indexed(place: Place) -> dict[str, Any]:
    """The same, with a key index."""
    adapter = ours(place)
    return adapter | {"adapter_params": adapter["adapter_params"] | {"index": "snapshot", "fingerprint": "off"}}


EVERY_ADAPTER = [
    pytest.param(built_in, id="built-in"),
    pytest.param(ours, id="ours"),
]
