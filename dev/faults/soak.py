"""The soak: random faults, switched on and off, while three engines work on one bucket.

    python -m dev.faults.soak [--minutes 5] [--seed N] [--verbose]

Two classic engines and one MP adapter, all with `verify: hash`, are worked by four threads; every chunk that is returned is
compared. Exits 0 only if no chunk was wrong, every failure was counted, memory, threads, descriptors and files are where they
were, and service is full at the end.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from dev.faults.environment import environment

_ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    """Run it in a process of its own, with an environment of its own; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, help="of the faults and of the load; a random one by default")
    parser.add_argument("--verbose", action="store_true", help="print each fault when it begins")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else random.randrange(1_000_000)
    with tempfile.TemporaryDirectory(prefix="soak-", ignore_cleanup_errors=True) as directory:
        command = [sys.executable, "-m", "dev.faults.soaking", directory, str(options.minutes * 60), str(seed)]
        command += ["--verbose"] if options.verbose else []
        home = Path(directory) / "home"
        home.mkdir()
        return subprocess.run(command, env=environment(home), cwd=_ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
