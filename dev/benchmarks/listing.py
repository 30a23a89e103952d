"""Listing very many chunks of a local Hub, page after page and several pages at a time: seconds, requests, memory.

    python dev/benchmarks/listing.py [--keys 200000] [--delay-ms 40] [--json FILE]

Every page is answered that much later. All chunks are of one content; what is listed is compared, chunk by chunk.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hfbucket_plugin.hub.bucket import Bucket

MODEL = "meta-llama/Llama-3.1-8B-Instruct"
BATCH = 1000


def fill(bucket_client: Bucket, keys: int) -> None:
    """Put as many names of one content into the bucket."""
    from hfbucket_plugin.core.deadline import Deadline
    from hfbucket_plugin.core.keys import encode_name
    from hfbucket_plugin.hub.transfer import Upload

    bucket_client.create(Deadline.after(30))
    content = bucket_client.transfer.upload([b"chunk"], Deadline.after(30), Upload())[0]
    dice = random.Random(1)
    for start in range(0, keys, BATCH):
        names = [f"{MODEL}@1@0@{dice.getrandbits(64):016x}@bfloat16" for _ in range(min(BATCH, keys - start))]
        if failed := bucket_client.add(
            {bucket_client.handle.join(encode_name(name)): content for name in names}, Deadline.after(60)
        ):
            raise SystemExit(f"not added: {failed}")


def measure(hub: Any, chunks: Callable[[], Iterator[Any]]) -> tuple[dict[str, Any], int]:
    """List once; also tells a digest of what came, in its order."""
    hub.control.reset_counters()
    started = time.perf_counter()
    count = digest = 0
    for entry in chunks():
        count += 1
        digest = hash((digest, entry.text))
    seconds = time.perf_counter() - started
    requests = hub.control.counters().route("tree").requests
    return {"keys": count, "seconds": round(seconds, 2), "requests": requests}, digest


def main() -> None:
    """List both ways and print the ratio."""
    from hfbucket_plugin.config.settings import InstanceSettings
    from hfbucket_plugin.core.telemetry import MemorySink
    from hfbucket_plugin.hub.connect import open_bucket
    from hfbucket_plugin.hub.listing import list_chunks, list_chunks_ahead
    from localhub.faults import Fault
    from localhub.process import start

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keys", type=int, default=200_000)
    parser.add_argument("--delay-ms", type=int, default=40)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as root, start(Path(root), faults=True) as hub:
        settings = InstanceSettings.model_validate(
            {"bucket_handle": "hf://buckets/org/bench/prod", "endpoint": hub.endpoint}
        )
        bucket_client = open_bucket(settings, "bench", MemorySink(), 60.0)
        fill(bucket_client, options.keys)
        hub.control.add_fault(Fault(delay_s=options.delay_ms / 1000))
        prefixes = [f"{MODEL}@1@0@"]
        one, first = measure(hub, lambda: list_chunks(bucket_client, prefixes))
        many, second = measure(hub, lambda: list_chunks_ahead(bucket_client, prefixes))
        bucket_client.close()
    if first != second:
        raise SystemExit("the two listings differ")
    for name, row in (("page after page", one), ("several at a time", many)):
        print(f"{name:18} {row['keys']:9,} keys {row['seconds']:7} s {row['requests']:6,} requests")
    print(f"ratio {many['seconds'] / one['seconds']:.2f}")
    if options.json:
        options.json.write_text(json.dumps({"page after page": one, "several at a time": many}, indent=1))


if __name__ == "__main__":
    main()
