"""Exports between two buckets of a local Hub, and to a directory and back: seconds, calls, bytes and memory.

    python dev/benchmarks/export.py [--objects 500] [--kib 256] [--delay-ms 40] [--json FILE]

Every request to the Hub and the store is answered that much later. Each case is the real command in a process of its own.
"Memory" is the peak of that process beyond what it had when its modules were loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

REPOSITORY = Path(__file__).resolve().parents[2]
DATA = ("xorb-upload", "xorb-data", "file-data")
CASES = {
    "copied by the Hub": ("us", "eu-same-region", ()),
    "once more": ("us", "eu-same-region", ()),
    "streamed": ("us", "eu-other-region", ()),
    "to a directory": ("us", "DIR", ()),
    "and back": ("DIR", "eu-back", ()),
    "streamed, --window 96MiB": ("us-large", "eu-large", ("--window", "96MiB")),
    "streamed, --window 512MiB": ("us-large", "eu-larger", ("--window", "512MiB")),
}


def child(arguments: list[str]) -> None:
    """The command, and after it its peak memory on a line of its own."""
    from jobs.cli.app import app

    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # else the peak is that of the parent process
    before = peak_kib()
    try:
        app(arguments, prog_name="jobs")
    except SystemExit as done:
        print(json.dumps({"code": done.code, "mib": (peak_kib() - before) / 1024}))


def peak_kib() -> int:
    """The largest memory of this process so far."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0])


def stock(hub: Any, objects: int, kib: int) -> None:
    """Two buckets in one region, one in another; many small objects, and some large ones."""
    from huggingface_hub import HfApi

    from hfbucket_plugin.core.keys import encode_name

    api = HfApi(endpoint=hub.endpoint, token=False)
    api.create_bucket("org/us", region="us")
    api.create_bucket("org/near", region="us")
    api.create_bucket("org/far", region="eu")
    dice = random.Random(1)
    for prefix, count, size in (("us", objects, kib * 1024), ("us-large", 32, 8 * 1024 * 1024)):
        for start in range(0, count, 100):
            some = range(start, min(start + 100, count))
            add = [
                (dice.randbytes(size), f"{prefix}/{encode_name(f'org/model@1@0@{number:08x}@bfloat16')}")
                for number in some
            ]
            api.batch_bucket_files("org/us", add=add)


def configured(hub: Any, directory: Path) -> Path:
    """The YAML that names an instance for each prefix."""
    buckets = {"us": "us", "us-large": "us", "eu-same-region": "near"}
    far = ("eu-other-region", "eu-back", "eu-large", "eu-larger")
    places = buckets | dict.fromkeys(far, "far")
    extra = {}
    for name, bucket in places.items():
        extra[f"remote_storage_plugin.hfbucket.{name}.bucket_handle"] = f"hf://buckets/org/{bucket}/{name}"
        extra[f"remote_storage_plugin.hfbucket.{name}.endpoint"] = hub.endpoint
    path = directory / "lmcache.yaml"
    plugins = [f"hfbucket.{name}" for name in places]
    path.write_text(json.dumps({"remote_storage_plugins": plugins, "extra_config": extra}), encoding="utf-8")
    return path


def measure(hub: Any, config: Path, source: str, to: str, more: tuple[str, ...]) -> dict[str, Any]:
    """One case."""
    backup = f"{config.parent / 'backup'}/"
    ends = [backup if one == "DIR" else f"hfbucket.{one}" for one in (source, to)]
    command = ["export", "--lmcache-config", str(config), "--from", ends[0], "--to", ends[1], "--local", *more]
    hub.control.reset_counters()
    # What hf_xet uploaded once to a Hub it does not upload again: each case begins without that memory.
    with tempfile.TemporaryDirectory() as home:
        environment = os.environ | {"HF_HOME": home, "HF_HUB_DISABLE_TELEMETRY": "1"}
        done = subprocess.run(
            [sys.executable, __file__, "--child", *command],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
            cwd=REPOSITORY,
        )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    if not lines or lines[-1].get("code"):
        raise SystemExit(done.stderr)
    summary, ended = lines[-2:]
    routes = hub.control.counters().routes
    hub_calls = sum(one.requests for name, one in routes.items() if name in ("batch", "paths-info", "tree"))
    carried = sum(one.bytes_in + one.bytes_out for name, one in routes.items() if name in DATA)
    return {
        "seconds": summary["seconds"],
        "moved": summary["copied"]["objects"] + summary["streamed"]["objects"],
        "bytes": summary["copied"]["bytes"] + summary["streamed"]["bytes"],
        "how": summary["how"],
        "calls": hub_calls,
        "carried_mib": carried / 2**20,
        "memory_mib": ended["mib"],
    }


def main() -> None:
    """Run the cases and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objects", type=int, default=500)
    parser.add_argument("--kib", type=int, default=256)
    parser.add_argument("--delay-ms", type=float, default=40)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child)
        return
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    from localhub.faults import Fault
    from localhub.process import start

    results = {}
    with tempfile.TemporaryDirectory() as name, start(Path(name, "hub"), faults=True) as hub:
        stock(hub, options.objects, options.kib)
        hub.control.add_fault(Fault(delay_s=options.delay_ms / 1000))
        config = configured(hub, Path(name))
        print(
            f"{'case':26} {'how':7} {'seconds':>8} {'objects':>8} {'Hub calls':>10} {'MiB here':>9} {'MiB memory':>11}"
        )
        for case, (source, to, more) in CASES.items():
            results[case] = found = measure(hub, config, source, to, more)
            print(
                f"{case:26} {found['how'] or '-':7} {found['seconds']:8.2f} {found['moved']:8} {found['calls']:10} "
                f"{found['carried_mib']:9.1f} {found['memory_mib']:11.0f}"
            )
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
