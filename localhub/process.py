"""A Hub in a process of its own, for tests, the demo and benchmarks."""

import json
import select
import subprocess
import sys
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import IO, cast

from localhub.client import HubControl

_START_SECONDS = 30.0
_STOP_SECONDS = 10.0
_SHOWN_STDERR_BYTES = 4000


class HubStartError(RuntimeError):
    """A Hub did not start; the message ends with what it wrote to stderr."""


class RunningHub(AbstractContextManager["RunningHub"]):
    """A Hub in a process of its own, which ends with this one. Use it as a context manager, or call `stop`.

    Args:
        root: the directory that the Hub serves.
        arguments: more arguments of `python -m localhub serve`.
        port: port to listen on; 0 for any free port.
        start_timeout_s: time that the start may take, in seconds.

    Attributes:
        root: the directory that the Hub serves; the process writes its stderr to `stderr.log` in it.
        endpoint: the URL of the Hub: the value for `HF_ENDPOINT` or `HfApi(endpoint=)`.
        port: the port that the Hub listens on; a restart keeps it.
        control: faults and counters of the Hub.

    Raises:
        HubStartError: the Hub does not start.
    """

    endpoint: str
    control: HubControl

    def __init__(
        self, root: Path, arguments: list[str], *, port: int = 0, start_timeout_s: float = _START_SECONDS
    ) -> None:
        self.root = root
        self.port = port
        self._arguments = arguments
        self._start_timeout_s = start_timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._launch()

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

    def stop(self) -> int | None:
        """End the process and return its exit status; None when it was stopped before.

        The process receives SIGTERM, and SIGKILL if it still runs 10 seconds later.
        """
        if self._process is not None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_SECONDS)
        return self.kill()

    def kill(self) -> int | None:
        """End the process with SIGKILL, as a crash does, and return its exit status; None when it was stopped before."""
        process, self._process = self._process, None
        if process is None:
            return None
        with process:
            process.kill()
        return process.returncode

    def restart(self) -> None:
        """Stop the Hub if it runs, and start it again on the same root and port.

        Raises:
            HubStartError: the Hub does not start.
        """
        self.stop()
        self._launch()

    def _launch(self) -> None:
        command = [sys.executable, "-m", "localhub", "serve", "--until-stdin-closes"]
        command += ["--root", str(self.root), "--port", str(self.port), *self._arguments]
        self.root.mkdir(parents=True, exist_ok=True)
        # A file, not a pipe: no thread reads it, and a full pipe would block the Hub.
        with (self.root / "stderr.log").open("a+b") as stderr:
            before = stderr.tell()
            self._process = subprocess.Popen(  # noqa: S603 - this package's own command
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr
            )
            stdout = cast("IO[bytes]", self._process.stdout)
            poll = select.poll()  # `select.select` takes no descriptor above 1023
            poll.register(stdout, select.POLLIN)
            # The Hub writes the whole line at once.
            line = stdout.readline() if poll.poll(self._start_timeout_s * 1000) else b""
            if not line.endswith(b"\n"):
                self.kill()
                stderr.seek(before)
                written = stderr.read()[-_SHOWN_STDERR_BYTES:].decode(errors="replace").strip()
                raise HubStartError(f"the Hub on {self.root} did not start: {written or 'nothing on stderr'}")
        self.endpoint = json.loads(line)["endpoint"]
        self.port = int(self.endpoint.rpartition(":")[2])
        self.control = HubControl(self.endpoint)


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
        root: directory of everything that the Hub stores; created when missing.
        port: port to listen on; 0 for any free port.
        page_size: maximum number of entries on a page of a listing; None for the default, 1000.
        tokens: `tokens.yaml`; None for no access control.
        cas_token_ttl_s: validity of storage tokens and links, in seconds; None for the default, 3600.
        faults: whether `RunningHub.control` can add faults.
        start_timeout_s: time that the start may take, in seconds.

    Returns:
        The running Hub.

    Raises:
        HubStartError: the Hub does not start.
        OSError: the root cannot be created.
    """
    options = {"--page-size": page_size, "--tokens": tokens, "--cas-token-ttl": cas_token_ttl_s}
    arguments = [text for name, value in options.items() if value is not None for text in (name, str(value))]
    arguments += ["--faults"] * faults
    return RunningHub(root, arguments, port=port, start_timeout_s=start_timeout_s)
