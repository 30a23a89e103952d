"""vLLM in processes of their own: an engine that is driven over pipes, and an OpenAI server as fleets run it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from dev.e2e.engine import OPTIONS, transfer
from tests.support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

REPOSITORY = Path(__file__).resolve().parents[2]
HOST = "127.0.0.1"
SERVED_NAME = "tiny"
"""What the OpenAI server calls the model: another name than its path, as in most fleets."""

_READY_SECS = 300.0
_ANSWER_SECS = 300.0
"""An engine that hangs is none; loading vLLM is the longest that it takes, a minute."""

_SHOWN_LOG_CHARS = 4000


class Engine:
    """A vLLM engine in a process of its own, which ends with the block.

    Args:
        python: Of the environment that holds vLLM.
        model: Its directory.
        server: Address of the `lmcache server`.
        role: `kv_both`, or `kv_consumer`, which stores nothing.
        log: What it says.
    """

    def __init__(self, python: Path, model: Path, server: str, role: str, log: Path) -> None:
        command = [str(python), "-m", "dev.e2e.engine", "serve", str(model), "--server", server, "--role", role]
        self._log = log
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                command, env=vllm_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=out, text=True
            )

    def __enter__(self) -> Self:
        self._read()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def ask(self, token_ids: list[int]) -> dict[str, Any]:
        """What it makes of a prompt."""
        assert self._process.stdin is not None  # noqa: S101 - for the type checker
        self._process.stdin.write(json.dumps(token_ids) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None  # noqa: S101 - for the type checker
        ready, _, _ = select.select([self._process.stdout], [], [], _ANSWER_SECS)  # one line comes for each question
        line = self._process.stdout.readline() if ready else ""
        if not line:
            said = "ended" if ready else f"has not answered within {_ANSWER_SECS:g} s"
            raise RuntimeError(f"the engine {said}:\n{self._log.read_text(errors='replace')[-_SHOWN_LOG_CHARS:]}")
        found: dict[str, Any] = json.loads(line)
        return found


class OpenAIServer:
    """vLLM's OpenAI server beside a `lmcache server`, of which it only reads. It ends with the block.

    Args:
        python: Of the environment that holds vLLM.
        model: Its directory.
        server: Address of the `lmcache server`.
        log: What it says.

    Attributes:
        address: Where it serves: `http://127.0.0.1:PORT`.
    """

    def __init__(self, python: Path, model: Path, server: str, log: Path) -> None:
        with socket.create_server((HOST, 0)) as free:
            port = free.getsockname()[1]
        self.address = f"http://{HOST}:{port}"
        self._log = log
        command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--host", HOST, "--port", str(port)]
        command += [
            "--model",
            str(model),
            "--served-model-name",
            SERVED_NAME,
            *flags(),
            "--enable-prompt-tokens-details",
        ]
        command += ["--kv-transfer-config", json.dumps(transfer(server, "kv_consumer"))]
        with log.open("wb") as out:
            # A session of its own: its engine is another process, which has to end with it.
            self._process = subprocess.Popen(
                command, env=vllm_environment(), stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )

    def __enter__(self) -> Self:
        try:
            self._await_health()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def _await_health(self) -> None:
        eventually(lambda: self._process.poll() is not None or self._healthy(), _READY_SECS, "a healthy vLLM")
        if self._process.poll() is not None:
            raise RuntimeError(f"vLLM ended:\n{self._log.read_text(errors='replace')[-_SHOWN_LOG_CHARS:]}")

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.address}/health", timeout=10):  # noqa: S310 - our own server
                return True
        except OSError:
            return False

    def _end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def flags() -> Iterator[str]:
    """The options that vLLM needs on CPU, as its servers take them."""
    for name, value in OPTIONS.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            yield f"--{flag}" if value else f"--no-{flag}"
        else:
            yield from (f"--{flag}", str(value))


def vllm_environment() -> dict[str, str]:
    """Of a vLLM engine on a small machine, which calls home nowhere."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return inherited | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONHASHSEED": "0",
        "LMCACHE_TRACK_USAGE": "false",
        "LMCACHE_DISABLE_BANNER": "1",
        "PYTHONPATH": str(REPOSITORY),
    }
