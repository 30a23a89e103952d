"""What several tests of the plugin share."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from huggingface_hub import HfApi
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from hfbucket_plugin.config.settings import load
from hfbucket_plugin.core.telemetry import MemorySink
from hfbucket_plugin.hub.connect import open_bucket

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from hfbucket_plugin.config.settings import InstanceSettings
    from hfbucket_plugin.hub.bucket import Bucket

SECRET = "hf_Zq8yLw3VbN5tRk2XsJ7mPd4cGf6hT9aQ"

untimed = hypothesis_settings(deadline=None)
"""For property tests: how long an example takes is no matter of theirs."""

any_text = st.text(st.characters(exclude_categories=["Cs"]))
field_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="@"), min_size=1)
"""What may stand between two '@' of a key."""


class Clock:
    """Seconds that pass when a test says so, or, with `step`, whenever somebody looks."""

    def __init__(self, step: float = 0.0) -> None:
        self.now = 1000.0
        self.step = step

    def __call__(self) -> float:
        self.now += self.step
        return self.now


def eventually(condition: Callable[[], Any], seconds: float = 30.0) -> Any:
    """Wait until a condition holds, and return its value."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"not within {seconds} s: {condition}"
        time.sleep(0.01)
    return value


def in_threads(count: int, function: Callable[[int], Any]) -> list[Any]:
    """Call a function with 0, 1, … in as many threads at once, and return what it returned or raised."""
    results: list[Any] = [None] * count
    start = threading.Barrier(count)

    def run(number: int) -> None:
        start.wait()
        try:
            results[number] = function(number)
        except Exception as error:  # noqa: BLE001 - handed to the test
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


class Recorder:
    """A web server of somebody else's: answers `[]` to everything, and remembers the headers that it was sent, and where to.

    Use it as a context manager.
    """

    def __init__(self) -> None:
        self.seen: list[dict[str, str]] = []
        self.targets: list[str] = []
        recorder = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                recorder.targets.append(f"{self.command} {self.path}")
                recorder.seen.append({name.lower(): value for name, value in self.headers.items()})
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self.send_response(200)
                self.send_header("Content-Length", "2")
                self.end_headers()
                self.wfile.write(b"[]")

            do_POST = do_GET  # noqa: N815 - http.server's spelling

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def unused_port() -> int:
    """A port of the loopback on which nobody listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def instance_settings(endpoint: str, bucket_id: str, prefix: str = "", **values: Any) -> InstanceSettings:
    """Settings of an instance on a Hub of the tests."""
    values = {"bucket_handle": f"hf://buckets/{bucket_id}/{prefix}", "endpoint": endpoint} | values
    return load({f"remote_storage_plugin.hfbucket.{name}": value for name, value in values.items()}, "hfbucket")


@contextlib.contextmanager
def opened(
    endpoint: str,
    bucket_id: str,
    prefix: str = "",
    sink: MemorySink | None = None,
    get_secs: float = 9.0,
    **values: Any,
) -> Iterator[Bucket]:
    """The client of a bucket, closed at the end."""
    own = instance_settings(endpoint, bucket_id, prefix, **values)
    bucket = open_bucket(own, "hfbucket", sink or MemorySink(), get_secs)
    try:
        yield bucket
    finally:
        bucket.close()


def upload(endpoint: str, bucket_id: str, files: Mapping[str, bytes]) -> None:
    """Put objects into a bucket, with huggingface_hub and nothing of ours."""
    HfApi(endpoint=endpoint, token=False).batch_bucket_files(
        bucket_id, add=[(data, path) for path, data in files.items()]
    )


def download(endpoint: str, bucket_id: str, path: str) -> bytes:
    """Read an object, with huggingface_hub and nothing of ours."""
    with tempfile.TemporaryDirectory() as directory:
        target = Path(directory, "object")
        HfApi(endpoint=endpoint, token=False).download_bucket_files(bucket_id, [(path, str(target))])
        return target.read_bytes()


def all_paths(endpoint: str, bucket_id: str) -> list[str]:
    """All paths of a bucket, with huggingface_hub and nothing of ours."""
    listed = HfApi(endpoint=endpoint, token=False).list_bucket_tree(bucket_id, recursive=True)
    return sorted(item.path for item in listed if item.type == "file")


def paths(endpoint: str, bucket_id: str) -> list[str]:
    """The same but for fingerprints, which every engine that stores may leave, sooner or later."""
    return [path for path in all_paths(endpoint, bucket_id) if "/.hfbucket/fingerprints/" not in f"/{path}"]


def noise(size: int, seed: int = 0) -> bytes:
    """Bytes that nothing compresses, as real KV is."""
    return random.Random(seed).randbytes(size)


def everything_reported(error: BaseException) -> str:
    """All that a log with a traceback would show of an error."""
    return "\n".join([str(error), repr(error), repr(vars(error)), *traceback.format_exception(error)])


def run_script(script: str, arguments: list[str], home: Path) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own, which finds the helpers of the tests: for what forks.

    Args:
        script: The text of the program.
        arguments: Its arguments.
        home: The process's HF_HOME.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HOME": str(home)}
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
        env=environment,
    )
