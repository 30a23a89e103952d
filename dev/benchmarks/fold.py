"""What a refresh and a load cost an engine: CPU, memory, and how long another thread waits for Python's lock.

    python dev/benchmarks/fold.py [--changes 1000000] [--keys 5000000] [--json FILE]

*fold*: 100 new changes beside so many since the snapshot, a hundred times, and the one merge of all of it that becomes due now and
then. *listing*: so many rows put in order, as of a listing of the process's own. *load*: memory of as many rows taken, filled and hashed.
The longest wait is that of a thread that sleeps for a millisecond at a time: on a busy machine it shows the machine, too.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Self

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np


class Watch:
    """How long a thread that has nothing to do but to run now and then has to wait. Use it as a context manager."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._began = (0.0, 0.0)
        self.longest = self.seconds = self.cpu = 0.0

    def __enter__(self) -> Self:
        self._thread.start()
        self._began = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds, self.cpu = time.perf_counter() - self._began[0], time.process_time() - self._began[1]
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        last = time.perf_counter()
        while not self._ended.is_set():
            time.sleep(0.001)
            now = time.perf_counter()
            self.longest, last = max(self.longest, now - last), now


def random_rows(number: int, dtype: np.dtype[Any], seed: int) -> Any:
    """Rows with digests by chance."""
    import numpy as np

    chance = np.random.default_rng(seed)
    rows = np.zeros(number, dtype)
    for name in ("digest_hi", "digest_lo"):
        rows[name] = chance.integers(0, 2**63, number, dtype=np.uint64)
    if "kind" in (dtype.names or ()):
        rows["kind"], rows["at"] = 1, 1.0
    return rows


def figures(changes: int, keys: int) -> dict[str, dict[str, float]]:
    """All of them."""
    import numpy as np

    from dev.benchmarks.gauges import Memory
    from hfbucket_plugin.core.keys import ContentId
    from hfbucket_plugin.hub.records import RecordStore, hash_of
    from hfbucket_plugin.index.table import CHANGE, ROW, Table, View, in_order, last_of_each, merged, newest

    found: dict[str, dict[str, float]] = {}

    def measure(name: str, work: Callable[[], object]) -> None:
        memory = Memory()
        with Watch() as watch:
            kept = work()
        found[name] = {
            "seconds": watch.seconds,
            "cpu_seconds": watch.cpu,
            "longest_wait_ms": 1e3 * watch.longest,
            "memory_mib": memory.extra_mib(),
        }
        del kept

    table = Table(newest(random_rows(changes, CHANGE, 1)))
    fresh = [random_rows(100, CHANGE, seed) for seed in range(2, 102)]

    def fold() -> View:
        view = View(Table(np.zeros(0, ROW)), 0.0, 0.0, table)
        for rows in fresh:
            view = view.folded(rows)
        return view

    measure(f"fold: 100 new beside {changes:,}, a hundred times", fold)
    other = Table(newest(random_rows(changes // 4, CHANGE, 200)))
    measure(f"fold: {changes // 4:,} merged with {changes:,}", lambda: merged(table, other))
    rows = random_rows(keys, ROW, 300)
    measure(f"listing: {keys:,} rows in order", lambda: Table(last_of_each(in_order(rows))))
    data = rows.tobytes()
    content = ContentId(hash_of(bytearray(data)), len(data))

    class Transfer:
        def read(self, reads: Any, _deadline: object) -> None:
            piece = 1 << 20  # as much as arrives at a time
            for read in reads:
                for start in range(0, len(data), piece):
                    read.lease.write(start, data[start : start + piece])

    own = RecordStore(SimpleNamespace(transfer=Transfer()), "benchmark")  # type: ignore[arg-type] # all that is used of it
    measure(f"load: {len(data) / 2**20:.0f} MiB read and hashed", lambda: own.read([("it", content)], None))  # type: ignore[arg-type] # same
    own.close()
    return found


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--changes", type=int, default=1_000_000)
    parser.add_argument("--keys", type=int, default=5_000_000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = figures(options.changes, options.keys)
    for name, one in found.items():
        print(
            f"{name}: {one['seconds']:.2f} s, {one['cpu_seconds']:.2f} s of CPU, longest wait {one['longest_wait_ms']:.0f} ms, "
            f"memory {one['memory_mib']:+.0f} MiB"
        )
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
