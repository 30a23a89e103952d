"""Runs `lmcache` in this process, and ends it when standard input closes: it does not outlive its parent process.

python -m dev.demo.mp_launch server --port 5555 …
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

_GRACE_SECONDS = 30.0


def end_with_parent() -> None:
    """Block until standard input closes, then end this process: SIGTERM, and SIGKILL after 30 seconds."""
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """Run the `lmcache` command with this process's arguments."""
    threading.Thread(target=end_with_parent, name="end-with-parent", daemon=True).start()
    from lmcache.cli.main import main as lmcache

    lmcache(sys.argv[1:])


if __name__ == "__main__":
    main()
