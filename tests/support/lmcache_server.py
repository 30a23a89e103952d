"""A real `lmcache server` (MP mode) on loopback and CPU, in a process of its own, and a client of one.

    python -m tests.support.lmcache_server server --port 5555 …

runs `lmcache` in this process, and ends it when standard input closes: it does not outlive its parent process.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

os.environ.setdefault("LMCACHE_TRACK_USAGE", "false")

import torch
from lmcache.v1.multiprocess.custom_types import IPCCacheServerKey
from lmcache.v1.multiprocess.transfer_context import EngineDrivenTransferContext
from lmcache.v1.multiprocess.transfer_context.shm import EngineDrivenContextShm
from lmcache.v1.multiprocess.transport.factory import RequestClientFactory
from prometheus_client.parser import text_string_to_metric_families

from tests.support.waiting import HOST, eventually, free_ports

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from prometheus_client.samples import Sample

REPOSITORY = Path(__file__).resolve().parents[2]
_GRACE_SECONDS = 30.0
_HTTP_SECONDS = 30.0
_POLL_SECONDS = 0.001
_STOP_SECONDS = 30.0
_SHOWN_LOG_CHARS = 6000
_numbers = itertools.count(1)
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

        eventually(empty, timeout_s, "nothing in L1 is in use")

    def _start(self) -> None:
        """Start it, again while somebody else was faster to take its ports."""
        while not self._comes_up():
            self._reap(0.0)
            if "Address already in use" not in self.log:
                raise MPServerError(f"the server ended: {self._log[-_SHOWN_LOG_CHARS:]}")

    def _comes_up(self) -> bool:
        """Start it on ports that are free now, and wait until it answers; false when it ends instead."""
        self.port, http_port = free_ports(2)
        self.address = f"tcp://{HOST}:{self.port}"
        self.http = f"http://{HOST}:{http_port}"
        process = self._process = self._launch(http_port)
        try:
            eventually(lambda: _has_ended(process) or self._answers(), self._start_timeout_s, "an answer")
        except TimeoutError as error:
            raise MPServerError(f"{error}: {self.log[-_SHOWN_LOG_CHARS:]}") from None
        return not _has_ended(process)

    def _launch(self, http_port: int) -> subprocess.Popen[bytes]:
        command = [
            sys.executable,
            "-m",
            "tests.support.lmcache_server",
            "server",
            "--host",
            HOST,
            "--port",
            str(self.port),
        ]
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
            eventually(lambda: _has_ended(process), patience_s, "the end")
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


class MPClient:
    """A worker of an engine. Use it as a context manager, or call `close`.

    Its KV cache has room for one prompt, whose place is the cache's start: what is stored or retrieved next lies there.

    Args:
        address: Of the server, such as `tcp://127.0.0.1:5555`.
        layers: Of the model.
        hidden: Bytes of a token's KV are `2 * layers * hidden * 2` (bfloat16).
        tokens: Of the longest prompt.
        block: Tokens of a block of the KV cache. Chunks are a multiple of it.
        model: The model's name, as it stands in keys.
        salt: The `cache_salt` of every request; prompts under different salts share nothing.
        timeout_s: How long the server may take for a request, and for the loads of a lookup, in seconds.

    Attributes:
        chunk_size: Tokens of a chunk, as the server says.

    Raises:
        TimeoutError: The server does not answer.
        ValueError: Its chunks are no multiple of `block`.
    """

    def __init__(
        self,
        address: str,
        *,
        layers: int = 2,
        hidden: int = 64,
        tokens: int = 1024,
        block: int = 16,
        model: str = "demo/tiny-llama",
        salt: str = "",
        timeout_s: float = 60.0,
    ) -> None:
        self._model = model
        self._salt = salt
        self._timeout_s = timeout_s
        self._block = block
        self._cache = torch.zeros((layers, 2, -(-tokens // block), block, 1, hidden), dtype=torch.bfloat16)
        self._caches = {f"layer.{number}": layer for number, layer in enumerate(self._cache)}
        self._instance = os.getpid() << 16 | next(_numbers)
        self._server: Any = RequestClientFactory.create(address)
        self._transfer: Any = EngineDrivenTransferContext(self._instance, self._server)
        try:
            self.chunk_size = int(self._answer(self._server.get_chunk_size()))
            self._register()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a chunk, and of the object that it becomes."""
        return int(self.kv(self.chunk_size).nbytes)

    @property
    def shares_memory(self) -> bool:
        """Whether it copies to and from the server's L1 itself; if not, KV is sent."""
        return isinstance(self._transfer.engine_driven_context, EngineDrivenContextShm)

    def kv(self, tokens: int) -> torch.Tensor:
        """The place of a prompt in the KV cache, `[2, layers, tokens, hidden]` as in chunks: the cache itself, no copy."""
        return self._cache.flatten(2, 4).transpose(0, 1)[:, :, :tokens]

    def random_kv(self, tokens: int, seed: int) -> torch.Tensor:
        """KV of that many tokens, shaped as `kv`: incompressible, as real KV nearly is."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.kv(tokens).shape, generator=generator).to(torch.bfloat16)

    def store(self, tokens: Sequence[int], kv: torch.Tensor | None = None) -> None:
        """Store the full chunks of a prompt in L1; the server writes them to its adapters in the background.

        Args:
            tokens: The prompt.
            kv: Its KV, `[2, layers, tokens, hidden]`; None for what the KV cache holds.

        Raises:
            RuntimeError: The server did not take it. That L1 has no room for a chunk, it does not tell.
        """
        if kv is not None:
            self.kv(len(tokens)).copy_(kv)
        request = replace(self._request(tokens), worker_id=0)
        self._move(self._transfer.submit_store, request)
        self._answer(self._server.end_session(request.request_id))

    def lookup(self, tokens: Sequence[int]) -> int:
        """How many tokens of a prompt are cached, from its start.

        The server loads the hits into L1 for it, and forgets them at once when they came from an adapter.

        Raises:
            TimeoutError: The adapters took too long.
        """
        request = self._request(tokens)
        hit = self._prefetch(request)
        self._answer(self._server.free_lookup_locks(replace(request, end=hit), 1))
        self._answer(self._server.end_session(request.request_id))
        return hit

    def retrieve(self, tokens: Sequence[int]) -> tuple[int, torch.Tensor]:
        """Look a prompt up and retrieve what is cached of it.

        Returns:
            How many tokens were hit, from its start, and its place in the KV cache: zeros where they were not. The next
            call overwrites it.

        Raises:
            TimeoutError: The adapters took too long.
            RuntimeError: The server did not hand out what the lookup had hit.
        """
        place = self.kv(len(tokens))
        place.zero_()
        request = self._request(tokens)
        hit = self._prefetch(request)
        if hit:
            self._move(self._transfer.submit_retrieve, replace(request, worker_id=0, end=hit))
        self._answer(self._server.end_session(request.request_id))
        return hit, place

    def close(self) -> None:
        """Leave the server; no error when it is gone."""
        left = self._transfer.unregister()
        if left is not None:
            left.wait(timeout=1.0)
        self._transfer.close()
        self._server.close()

    def _register(self) -> None:
        """Tell the server how the KV cache is laid out."""
        if self.chunk_size % self._block:
            raise ValueError(f"chunks of {self.chunk_size} tokens are no multiple of blocks of {self._block}")
        blocks, hints = self.chunk_size // self._block, {"kv_layout": "NHD"}
        self._transfer.register(self._caches, self._model, 1, blocks, self._timeout_s, layout_hints=hints)

    def _request(self, tokens: Sequence[int]) -> Any:
        """A new request for a prompt's full chunks."""
        if len(tokens) > (room := self._cache[0, 0].shape[0] * self._block):
            raise ValueError(f"a prompt of {len(tokens)} tokens, and room for {room}")
        return IPCCacheServerKey(
            model_name=self._model,
            world_size=1,
            worker_id=None,
            num_kv_readers=1,
            token_ids=tuple(tokens),
            start=0,
            end=len(tokens) // self.chunk_size * self.chunk_size,
            request_id=f"{self._instance}-{next(_numbers)}",
            cache_salt=self._salt,
        )

    def _prefetch(self, request: Any) -> int:
        """Have the server load a request's hits into L1; returns how many tokens they are."""
        self._answer(self._server.lookup(request, 1))
        end = time.monotonic() + self._timeout_s
        while (chunks := self._answer(self._server.query_prefetch_status(request.request_id))) is None:
            if time.monotonic() > end:
                raise TimeoutError(f"the lookup did not end within {self._timeout_s} s")
            time.sleep(_POLL_SECONDS)
        return int(chunks) * self.chunk_size

    def _move(self, submit: Any, request: Any) -> None:
        """Copy a request's KV between the KV cache and L1."""
        blocks = list(range(request.end // self._block))
        moved = submit(request.request_id, request, self._caches, [blocks], None, self.chunk_size // self._block)
        if not self._answer(moved):
            raise RuntimeError(f"the server did not do {submit.__name__} of {request.end} tokens")

    def _answer(self, future: Any) -> Any:
        return future.result(timeout=self._timeout_s)


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
