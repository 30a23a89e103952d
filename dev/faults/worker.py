"""A process that makes trials against a Hub of its own: specifications come on stdin, reports go to stdout, a line each."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import tempfile
import traceback
from pathlib import Path


def main() -> None:
    """Make trials until stdin ends."""
    # Whatever the libraries print must not get between the reports.
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    logging.disable(logging.CRITICAL)

    from dev.faults.classic import running_loop
    from dev.faults.trial import Bench, Report, Trial
    from localhub.process import start

    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="faults-")))
        hub = stack.enter_context(start(directory / "hub", faults=True))
        bench = Bench(hub, stack.enter_context(running_loop()), directory)
        for line in sys.stdin:
            trial = Trial(**json.loads(line))
            try:
                report = bench.run(trial)
            except Exception:  # noqa: BLE001 - told, and the next one is made all the same
                report = Report(trial, problem=traceback.format_exc())
                hub.restart()
            out.write(json.dumps(report.record()) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
