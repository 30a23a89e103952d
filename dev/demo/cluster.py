"""A real Ray cluster of one node, private to the demo, and a real `ray job submit` to it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_START_SECS = 120.0
_STOP_SECS = 20.0
_BIN = Path(sys.executable).parent


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on at this moment."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


class RayCluster:
    """A head node that was started with `ray start`.

    Attributes:
        dashboard: Where jobs are submitted to.
        environment: Of its processes, and of those that submit to it.
    """

    def __init__(self, directory: Path, environment: Mapping[str, str], *, serves_jobs: bool = True) -> None:
        dashboard, agent, client = free_ports(3)
        self.dashboard = f"http://127.0.0.1:{dashboard}"
        self.environment = environment
        self._log = directory / "ray-start.log"
        command = [
            str(_BIN / "ray"), "start", "--head", "--block", "--port=0", f"--dashboard-port={dashboard}",
            f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}",
            "--min-worker-port=0", "--max-worker-port=0", f"--temp-dir={directory}", "--num-cpus=2",
            "--object-store-memory=100000000", "--disable-usage-stats", f"--include-dashboard={serves_jobs}",
        ]  # fmt: skip
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait_until_up(self) -> None:
        """Wait for the cluster.

        Raises:
            RuntimeError: It did not come up; the message ends with what it said.
        """
        end = time.monotonic() + _START_SECS
        while "Ray runtime started" not in self._said():
            if self._process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"Ray did not come up:\n{self._said()[-3000:]}")
            time.sleep(0.2)

    @property
    def address(self) -> str:
        """Where drivers join it: `<host>:<port>`."""
        found = re.search(r"ray start --address='(.+)'", self._said())
        if found is None:
            raise RuntimeError(f"Ray does not say where it is:\n{self._said()[-3000:]}")
        return found[1]

    def _said(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    def submit(self, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """Submit a job as a user does, and wait for it; its output is on stdout, between Ray's own lines."""
        return subprocess.run(
            [str(_BIN / "ray"), "job", "submit", "--address", self.dashboard, "--", *command],
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def stop(self) -> None:
        """End what was started, and nothing else on the machine: not `ray stop`, which ends every cluster."""
        if self._process.poll() is None:
            self._process.terminate()  # `ray start --block` ends its processes in turn
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_SECS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # our own session: whatever is left of it
        self._process.wait()


@contextlib.contextmanager
def ray_cluster(directory: Path, environment: Mapping[str, str], *, serves_jobs: bool = True) -> Iterator[RayCluster]:
    """A running cluster, ended with the block.

    Args:
        directory: For Ray's files.
        environment: Of its processes.
        serves_jobs: Whether jobs can be submitted, for which a head runs a dashboard; a node that is warmed has none.

    Raises:
        RuntimeError: It did not come up.
    """
    cluster = RayCluster(directory, environment, serves_jobs=serves_jobs)
    try:
        cluster.wait_until_up()
        yield cluster
    finally:
        cluster.stop()
