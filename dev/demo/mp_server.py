"""A real `lmcache server` (MP mode) on loopback and CPU, in a process of its own."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from prometheus_client.parser import text_string_to_metric_families

from dev.demo.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from prometheus_client.samples import Sample

REPOSITORY = Path(__file__).resolve().parents[2]
HOST = "127.0.0.1"
_HTTP_SECONDS = 30.0
_STOP_SECONDS = 30.0
_SHOWN_LOG_CHARS = 6000
_QUIET = {
    "LMCACHE_LOG_LEVEL": "INFO",  # what this process asks for itself is not inherited: the log says why a server ended
    "LMCACHE_TRACK_USAGE": "false",
    "LMCACHE_DISABLE_BANNER": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}


class MPServerError(RuntimeError):
    """A server did not come up; the message ends with its log."""


class MPServer:
    """A `lmcache server`, which ends with this process. Use it as a context manager, or call `stop`.

    Its temporary files, its Hugging Face cache and its log lie in a directory of its own, which goes when it ends.

    Args:
        adapters: Its L2 adapters, each what `--l2-adapter` takes as JSON, in the order in which they are preferred.
        chunk_size: Tokens of a chunk.
        l1_mib: Memory of L1, in MiB; all of it is taken at the start.
        shared_memory: Whether clients copy to and from L1 themselves; if not, KV is sent, which takes ten times as long.
        arguments: More arguments of `lmcache server`.
        env: Variables of its environment beyond ours, such as `HF_ENDPOINT`.
        start_timeout_s: How long it may take to come up, in seconds.

    Attributes:
        address: Where engines connect to, over ZMQ: `tcp://127.0.0.1:PORT`.
        http: Where its HTTP server is: `http://127.0.0.1:PORT`.
        port: Of `address`.

    Raises:
        MPServerError: It does not come up.
    """

    address: str
    http: str
    port: int

    def __init__(
        self,
        adapters: Sequence[Mapping[str, Any]] = (),
        *,
        chunk_size: int = 32,
        l1_mib: int = 64,
        shared_memory: bool = False,
        arguments: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        start_timeout_s: float = 120.0,
    ) -> None:
        self._home = tempfile.TemporaryDirectory(prefix="mp-server-")
        self._arguments = ["--chunk-size", str(chunk_size), "--l1-size-gb", str(l1_mib / 1024), "--no-l1-use-lazy"]
        self._arguments += ["--eviction-policy", "LRU", "--supported-transfer-mode", "auto"]
        if shared_memory:
            self._arguments += ["--shm-name", self._shared_memory.name]
        for adapter in adapters:
            self._arguments += ["--l2-adapter", json.dumps(adapter)]
        self._arguments += arguments
        self._env = dict(env or {})
        self._start_timeout_s = start_timeout_s
        self._log = ""
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._start()
        except BaseException:
            self.kill()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """Number of the process.

        Raises:
            RuntimeError: The server is stopped.
        """
        if self._process is None:
            raise RuntimeError("this server is stopped")
        return self._process.pid

    @property
    def log(self) -> str:
        """All that it has written to stdout and stderr; it can be read after the end, too."""
        return self._log if self._process is None else self._read_log()

    def stop(self) -> int | None:
        """End it and return its exit status, negative for a signal; None when it was stopped already.

        It gets 30 seconds to end by itself (SIGTERM), then it is killed.
        """
        if self._process is None:
            return None
        self._process.terminate()
        status = self._reap(_STOP_SECONDS)
        self._clean_up()
        return status

    def kill(self) -> None:
        """End it without notice (SIGKILL), as a crash does."""
        if self._process is not None:
            self._reap(0.0)
        self._clean_up()

    def request(self, method: str, path: str, body: object = None) -> str:
        """Ask its HTTP server, with JSON unless `body` is None, and return the answer's body.

        Raises:
            urllib.error.HTTPError: It refuses.
            OSError: It cannot be reached.
        """
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.http + path, data, headers, method=method)  # noqa: S310 - our own server
        with urllib.request.urlopen(request, timeout=_HTTP_SECONDS) as response:  # noqa: S310 - same
            return str(response.read().decode())

    def status(self) -> dict[str, Any]:
        """What it tells of itself: L1, controllers, and the `report_status` of each adapter."""
        status: dict[str, Any] = json.loads(self.request("GET", "/status"))
        return status

    def metrics(self) -> dict[str, list[Sample]]:
        """Its Prometheus samples by name. They come a moment later than what they count: wait for them."""
        metrics: dict[str, list[Sample]] = {}
        for family in text_string_to_metric_families(self.request("GET", "/metrics")):
            for sample in family.samples:
                metrics.setdefault(sample.name, []).append(sample)
        return metrics

    def count(self, name: str, **labels: str) -> float:
        """Sum of those samples of a metric that have these labels; 0 when there is none, as before the first event."""
        return sum(one.value for one in self.metrics().get(name, []) if labels.items() <= one.labels.items())

    def clear_l1(self, timeout_s: float = 60.0) -> None:
        """Empty L1, so that only adapters can answer the next lookup.

        Wait first until they hold what was stored: what they have not begun to read is lost to them. Objects in use
        stay, so L1 is cleared until it is empty. Its memory keeps its bytes, though: an adapter that reports loads
        without doing them may seem to work, which only a fresh server tells.

        Raises:
            TimeoutError: Something stays in use.
        """

        def empty() -> bool:
            self.request("POST", "/cache/clear", {"tier": "l1"})
            return not self.status()["storage_manager"]["l1_manager"]["total_object_count"]

        wait_until(empty, timeout_s, "nothing in L1 is in use")

    def _start(self) -> None:
        """Start it, again while somebody else was faster to take its ports."""
        while not self._comes_up():
            self._reap(0.0)
            if "Address already in use" not in self.log:
                raise MPServerError(f"the server ended: {self._log[-_SHOWN_LOG_CHARS:]}")

    def _comes_up(self) -> bool:
        """Start it on ports that are free now, and wait until it answers; false when it ends instead."""
        self.port, http_port = _free_ports(2)
        self.address = f"tcp://{HOST}:{self.port}"
        self.http = f"http://{HOST}:{http_port}"
        process = self._process = self._launch(http_port)
        try:
            wait_until(lambda: _has_ended(process) or self._answers(), self._start_timeout_s, "an answer")
        except TimeoutError as error:
            raise MPServerError(f"{error}: {self.log[-_SHOWN_LOG_CHARS:]}") from None
        return not _has_ended(process)

    def _launch(self, http_port: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "dev.demo.mp_launch", "server", "--host", HOST, "--port", str(self.port)]
        command += ["--http-host", HOST, "--http-port", str(http_port), *self._arguments]
        own = {"TMPDIR": self._home.name, "HF_HOME": self._home.name}
        # An engine in this process names that directory, for metrics of several processes; the server's are its own.
        ours = {name: value for name, value in os.environ.items() if name != "PROMETHEUS_MULTIPROC_DIR"}
        env = ours | _QUIET | own | self._env
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), env.get("PYTHONPATH")]))
        with self._log_path.open("wb") as log:
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": log, "stderr": subprocess.STDOUT}
            return subprocess.Popen(command, env=env, start_new_session=True, **pipes)

    def _answers(self) -> bool:
        try:
            self.request("GET", "/healthcheck")
        except (OSError, http.client.HTTPException):  # the latter of somebody else, who was faster to take the port
            return False
        return True

    def _reap(self, patience_s: float) -> int:
        """Wait for the end, bring it about when it does not come, and keep the log beyond it."""
        process = self._process
        if process is None or process.stdin is None:
            raise RuntimeError("this server is stopped")
        with contextlib.suppress(TimeoutError):
            wait_until(lambda: _has_ended(process), patience_s, "the end")
        # Its session too: Python's tracker of shared memory is a process of its own.
        os.killpg(process.pid, signal.SIGKILL)
        status = process.wait()
        process.stdin.close()
        self._log = self._read_log()
        self._process = None
        return status

    def _clean_up(self) -> None:
        # A server that was killed leaves its shared memory.
        self._shared_memory.unlink(missing_ok=True)
        self._home.cleanup()

    @property
    def _shared_memory(self) -> Path:
        """Where its shared memory is; LMCache puts that prefix before any other name."""
        return Path("/dev/shm", f"lmcache_l1_pool_{Path(self._home.name).name}")  # noqa: S108 - where it must be

    @property
    def _log_path(self) -> Path:
        return Path(self._home.name, "log")

    def _read_log(self) -> str:
        return self._log_path.read_text(encoding="utf-8", errors="replace")


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Whether a process has ended, which is not collected yet: its number stays its own."""
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _free_ports(count: int) -> list[int]:
    """Ports of the loopback on which nobody listens, each another."""
    listeners = [socket.create_server((HOST, 0)) for _ in range(count)]
    ports = [int(listener.getsockname()[1]) for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports
