"""Eviction in a full tier of very many chunk files (sparse, of 4 KiB): milliseconds a chunk, and how often the tier is listed.

    python dev/benchmarks/evict.py [--files 1000000] [--chunks 20000] [--dir DIR] [--json FILE]

Compared with a tier of the same number of files that has room enough.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

if TYPE_CHECKING:
    from collections.abc import Iterator

SIZE = 4096
NEW = 1 << 32


def key(number: int) -> str:
    """The key of a chunk."""
    return f"org/model@1@0@{number:x}@bfloat16"


def fill(directory: Path, files: int) -> None:
    """Make sparse chunk files that were written a day ago."""
    old = time.time() - 86_400
    for number in range(files):
        descriptor = os.open(
            directory / (key(number).replace("/", "-SEP-") + ".data"), os.O_CREAT | os.O_WRONLY | os.O_EXCL
        )
        os.ftruncate(descriptor, SIZE)
        os.utime(descriptor, (old + number / 1e4,) * 2)
        os.close(descriptor)


def measure(directory: Path, chunks: int, budget: int, *, evict: bool) -> dict[str, Any]:
    """Open the tier, and put chunks into it."""
    from warmer.tiers import disk_budget
    from warmer.tiers.declare import DirectoryDeclaration, TierOptions
    from warmer.tiers.directory import DirectoryTier

    listed, real = 0, disk_budget.chunk_files

    def counted(*given: Any) -> Iterator[Any]:
        nonlocal listed
        listed += 1
        return real(*given)

    disk_budget.chunk_files = counted
    started = time.perf_counter()
    tier = DirectoryTier(
        DirectoryDeclaration("fs.warm", (directory,), options=TierOptions(evict=evict, max_bytes=budget))
    )
    opened = time.perf_counter()
    tier.draft(key(NEW - 1), SIZE).discard()  # which waits for the first look
    ready, at_start = time.perf_counter(), listed
    for number in range(chunks):
        draft = tier.draft(key(NEW + number), SIZE)
        draft.lease.write(0, b"y" * SIZE)
        draft.publish()
    ended = time.perf_counter()
    tier.close()
    disk_budget.chunk_files = real
    return {
        "open_secs": round(opened - started, 2),
        "first_look_secs": round(ready - started, 2),
        "ms_a_chunk": round((ended - ready) / chunks * 1000, 3),
        "listings_at_start": at_start,
        "listings": listed - at_start,
    }


def main() -> None:
    """Fill a directory, and measure both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument("--chunks", type=int, default=20_000)
    parser.add_argument("--dir", type=Path, help="Where the tier is made. Default: the temporary directory.")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="evict-", dir=options.dir) as root:
        directory = Path(root)
        fill(directory, options.files)
        full = options.files * SIZE
        rows = {
            "full, --evict": measure(directory, options.chunks, full, evict=True),
            "room enough": measure(directory, options.chunks, 4 * full, evict=False),
        }
    for name, row in rows.items():
        print(
            f"{name:14} {options.files:9,} files: open {row['open_secs']:6.2f} s, first look {row['first_look_secs']:6.2f} s, "
            f"{row['ms_a_chunk']:7.3f} ms a chunk, {row['listings']} listings for {options.chunks:,} chunks"
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
