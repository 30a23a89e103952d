"""A Ray cluster that `ray start` made, private to one test: its own ports, directory and token."""

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from tests.support.warming import environment

BIN = Path(sys.executable).parent


def free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


class PrivateRay:
    """A head node. Like a cluster that operators secure, it lets in only who knows its token."""

    def __init__(self, **variables):
        dashboard, agent, client = free_ports(3)
        self.dashboard = f"http://127.0.0.1:{dashboard}"
        self.directory = Path(tempfile.mkdtemp(prefix="rs-"))  # short: Ray puts sockets below it
        # `ray start` and `ray job submit` know the token; the token of the Hub is only in the cluster's environment.
        self.access = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        command = [
            str(BIN / "ray"), "start", "--head", "--block", "--port=0", f"--dashboard-port={dashboard}",
            f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}", "--min-worker-port=0",
            "--max-worker-port=0", f"--temp-dir={self.directory}", "--num-cpus=1",
            "--object-store-memory=80000000", "--disable-usage-stats",
        ]  # fmt: skip
        self._log = self.directory / "start.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                env=self._environment(**variables),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _environment(self, **variables):
        path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
        return environment(PATH=path, **self.access, **variables)

    def __enter__(self):
        while not (found := re.search(r"ray start --address='(.+)'", self._log.read_text())):
            assert self._process.poll() is None, self._log.read_text()
            time.sleep(0.1)
        self.address = found[1]
        return self

    def submit(self, directory, *command, options=()):
        """Submit a job, whose working directory is a copy of `directory`, and wait for it."""
        options = ["--address", self.dashboard, "--working-dir", str(directory), *options]
        return subprocess.run(
            [str(BIN / "ray"), "job", "submit", *options, "--", *command],
            env=self._environment(),
            capture_output=True,
            text=True,
            check=False,
        )

    def metrics(self):
        """What the metrics agents of the cluster tell."""
        (found,) = self.directory.glob("prom_metrics_service_discovery.json")
        reported = []
        for target in {target for one in json.loads(found.read_text()) for target in one["targets"]}:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{target}/metrics", timeout=5) as answer:
                reported.append(answer.read().decode())
        return "".join(reported)

    def __exit__(self, *_):
        # Not `ray stop`, which ends every cluster on the machine: this session of processes and no other.
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        shutil.rmtree(self.directory, ignore_errors=True)
