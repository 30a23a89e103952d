"""Runs a Hub as a process of its own, for tests, the demo and benchmarks."""

import json
import selectors
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any, Self

from localhub.client import HubControl

_START_SECONDS = 30.0
_STOP_SECONDS = 10.0
_SHOWN_STDERR_BYTES = 4000


class HubStartError(RuntimeError):
    """A Hub did not come up; the message ends with what it wrote to stderr."""


class RunningHub:
    """A Hub in a process of its own, which ends with ours. Use it as a context manager, or call `stop`.

    Args:
        root: the directory that it serves.
        arguments: more arguments of `python -m localhub serve`.
        port: port to listen on; 0 for any that is free.
        start_timeout_s: how long it may take to come up, in seconds.

    Attributes:
        root: the directory that it serves; what the process writes to stderr goes to `stderr.log` in it.
        endpoint: its address: what `HF_ENDPOINT` or `HfApi(endpoint=)` is set to.
        control: its faults and counters.

    Raises:
        HubStartError: it does not come up.
    """

    endpoint: str
    control: HubControl

    def __init__(
        self, root: Path, arguments: list[str], *, port: int = 0, start_timeout_s: float = _START_SECONDS
    ) -> None:
        self.root = root
        self._arguments = arguments
        self._port = port
        self._start_timeout_s = start_timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._launch()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """Number of the process.

        Raises:
            RuntimeError: the Hub is stopped.
        """
        if self._process is None:
            raise RuntimeError("this Hub is stopped")
        return self._process.pid

    @property
    def port(self) -> int:
        """Port that it listens on; a restart keeps it."""
        return self._port

    def stop(self) -> int | None:
        """End the process and return its exit status; None when it was stopped already.

        It gets 10 seconds to end by itself (SIGTERM), then it is killed.
        """
        if self._process is None:
            return None
        self._process.terminate()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
        return self._reap()

    def kill(self) -> None:
        """End the process without notice (SIGKILL), as a crash does."""
        if self._process is not None:
            self._process.kill()
            self._reap()

    def restart(self) -> None:
        """Stop the Hub if it runs, and start it again on the same root and port.

        Raises:
            HubStartError: it does not come up.
        """
        self.stop()
        self._launch()

    def _launch(self) -> None:
        command = [sys.executable, "-m", "localhub", "serve", "--until-stdin-closes"]
        command += ["--root", str(self.root), "--port", str(self._port), *self._arguments]
        self.root.mkdir(parents=True, exist_ok=True)
        # A file, not a pipe: nobody reads along, and a full pipe would stop the Hub.
        with (self.root / "stderr.log").open("a+b") as stderr:
            before = stderr.tell()
            # Unbuffered, so that the selector sees what was not read yet.
            self._process = subprocess.Popen(  # noqa: S603 - our own module
                command,
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
            )
            line = self._first_line()
            if not line.endswith(b"\n"):
                self.kill()
                stderr.seek(before)
                raise HubStartError(f"the Hub on {self.root} did not come up: {_tail(stderr.read())}")
        announcement: dict[str, Any] = json.loads(line)
        self.endpoint = announcement["endpoint"]
        self._port = int(self.endpoint.rpartition(":")[2])
        self.control = HubControl(self.endpoint)

    def _first_line(self) -> bytes:
        """Return what the process prints up to the first line's end, less if it ends or takes too long."""
        stdout = self._pipe()
        deadline = time.monotonic() + self._start_timeout_s
        line = b""
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            while not line.endswith(b"\n") and selector.select(max(deadline - time.monotonic(), 0)):
                byte = stdout.read(1)
                if not byte:
                    break
                line += byte
        return line

    def _pipe(self) -> IO[bytes]:
        if self._process is None or self._process.stdout is None:
            raise RuntimeError("this Hub is stopped")
        return self._process.stdout

    def _reap(self) -> int:
        process, self._process = self._process, None
        if process is None:
            raise RuntimeError("this Hub is stopped")
        status = process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
        return status


def start(
    root: Path,
    *,
    port: int = 0,
    page_size: int | None = None,
    tokens: Path | None = None,
    cas_token_ttl_s: float | None = None,
    faults: bool = False,
    start_timeout_s: float = _START_SECONDS,
) -> RunningHub:
    """Start a Hub on 127.0.0.1 in a process of its own.

    Args:
        root: directory of all that it stores; made when missing.
        port: port to listen on; 0 for any that is free.
        page_size: most entries of a listing's page; None for the Hub's own 1000.
        tokens: `tokens.yaml`; None for no access control.
        cas_token_ttl_s: how long storage tokens hold, in seconds; None for 3600.
        faults: whether faults can be ordered through `RunningHub.control`.
        start_timeout_s: how long it may take to come up, in seconds.

    Returns:
        The running Hub.

    Raises:
        HubStartError: it does not come up.
        OSError: the root cannot be made.
    """
    arguments: list[str] = []
    for name, value in (
        ("--page-size", page_size),
        ("--tokens", tokens),
        ("--cas-token-ttl", cas_token_ttl_s),
    ):
        if value is not None:
            arguments += [name, str(value)]
    if faults:
        arguments.append("--faults")
    return RunningHub(root, arguments, port=port, start_timeout_s=start_timeout_s)


def _tail(written: bytes) -> str:
    return written[-_SHOWN_STDERR_BYTES:].decode(errors="replace").strip() or "it wrote nothing to stderr"
