"""Hubs for tests, a web server that is none, and plain requests to a Hub with xorbs and shards made by hand.

`hf_xet` remembers, under `HF_HOME`, which xorbs it uploaded to which endpoint, and does not upload them again. A Hub
with an empty root at an address that this session used before would therefore refuse later uploads. So one Hub lives
as long as the session, tests on it take a fresh bucket each, and no other Hub is ever given a port that was used.
"""

import http.client
import itertools
import json
import os
import shutil
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import lz4.frame
import pytest

from localhub.formats.hashing import chunk_hash, file_hash, to_hex, xorb_hash
from localhub.process import RunningHub, start

EMPTY = to_hex(bytes(32))
"""The hash of the empty file."""

END = b"\xff" * 32
TAG = b"HFRepoMetaData\0" + bytes([85, 105, 103, 69, 106, 123, 129, 87, 131, 165, 189, 217, 92, 205, 209, 74, 169])

HubFactory = Callable[..., RunningHub]

_used_ports: set[int] = set()
_bucket_numbers = itertools.count(1)


def start_on_fresh_port(root: Path, **options: object) -> RunningHub:
    """Start a Hub whose address no client of this session has met."""
    while True:
        running = start(root, **options)  # type: ignore[arg-type]
        if running.port not in _used_ports:
            _used_ports.add(running.port)
            return running
        running.stop()


@pytest.fixture(scope="session")
def session_hub() -> Iterator[RunningHub]:
    """The Hub of the whole session, with faults and without access control."""
    root = Path(tempfile.mkdtemp(prefix="localhub-"))
    try:
        with start_on_fresh_port(root, faults=True) as running:
            yield running
    finally:
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture
def hub(session_hub: RunningHub) -> Iterator[RunningHub]:
    """The Hub of the session without faults and with counters at zero."""
    session_hub.control.clear_faults()
    session_hub.control.reset_counters()
    yield session_hub
    session_hub.control.clear_faults()


@pytest.fixture
def hub_factory(tmp_path: Path) -> Iterator[HubFactory]:
    """Starts Hubs with options of `localhub.process.start`; `root` is a directory below the test's own by default."""
    running: list[RunningHub] = []
    roots = itertools.count(1)

    def make(root: Path | None = None, **options: object) -> RunningHub:
        running.append(start_on_fresh_port(root or tmp_path / f"hub-{next(roots)}", **options))
        return running[-1]

    try:
        yield make
    finally:
        for one in running:
            one.stop()


@pytest.fixture
def new_bucket(hub: RunningHub) -> Callable[..., str]:
    """Makes buckets on `hub`, with options of `HfApi.create_bucket`, and returns their ids."""
    from huggingface_hub import HfApi

    def make(**options: object) -> str:
        bucket_id = f"tests/bucket-{os.getpid()}-{next(_bucket_numbers)}"
        HfApi(endpoint=hub.endpoint, token=False).create_bucket(bucket_id, **options)
        return bucket_id

    return make


@pytest.fixture
def bucket(new_bucket: Callable[..., str]) -> str:
    """The id of a bucket on `hub` that no other test uses."""
    return new_bucket()


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


@dataclass(frozen=True)
class Answer:
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        return self.json["error"]


class Raw:
    """Sends single requests to a Hub, each on a connection of its own."""

    def __init__(self, endpoint: str, token: str | None = None) -> None:
        self.endpoint = endpoint
        self._token = token

    def call(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
        address = urlsplit(self.endpoint)
        connection = http.client.HTTPConnection(address.hostname, address.port, timeout=60)
        sent = dict(headers or {})
        if self._token is not None:
            sent.setdefault("Authorization", f"Bearer {self._token}")
        if body is not None and not isinstance(body, bytes | str):
            body = json.dumps(body)
        try:
            connection.request(method, path, body, sent)
            response = connection.getresponse()
            return Answer(response.status, response.headers, response.read())
        finally:
            connection.close()

    def batch(self, bucket: str, *operations: dict[str, Any]) -> Answer:
        return self.call("POST", f"/api/buckets/{bucket}/batch", "\n".join(json.dumps(one) for one in operations))

    def info(self, bucket: str) -> Answer:
        return self.call("GET", f"/api/buckets/{bucket}")

    def post_xorb(self, digest: bytes, body: bytes, headers: dict[str, str]) -> Answer:
        return self.call("POST", f"/v1/xorbs/default/{to_hex(digest)}", body, headers)

    def reconstruct(self, digest: str, headers: dict[str, str]) -> Answer:
        return self.call("GET", f"/v1/reconstructions/{digest}", headers=headers)

    def xorb_link(self, bucket: str, digest: str) -> str:
        """Path and query at which the only xorb of a file is served."""
        ((fetch,),) = self.reconstruct(digest, self.storage_token(bucket, "read")).json["fetch_info"].values()
        return fetch["url"].removeprefix(self.endpoint)

    def storage_token(self, bucket: str, right: str = "write") -> dict[str, str]:
        token = self.call("GET", f"/api/buckets/{bucket}/xet-{right}-token").json["accessToken"]
        return {"Authorization": f"Bearer {token}"}


def add_file(path: str, digest: str = EMPTY) -> dict[str, Any]:
    """The operation of a batch that adds an uploaded file, by default the empty one."""
    return {"type": "addFile", "path": path, "xetHash": digest, "mtime": 0}


def packed(chunk: bytes, scheme: int = 0) -> bytes:
    """One chunk as it is in a xorb."""
    if scheme == 2:
        data = lz4.frame.compress(b"".join(chunk[group::4] for group in range(4)))
    else:
        data = lz4.frame.compress(chunk) if scheme == 1 else chunk
    return b"\0" + len(data).to_bytes(3, "little") + bytes([scheme]) + len(chunk).to_bytes(3, "little") + data


def make_xorb(chunks: Sequence[bytes], scheme: int = 0) -> tuple[bytes, bytes]:
    """Body and hash of the xorb of these chunks."""
    body = b"".join(packed(chunk, scheme) for chunk in chunks)
    return body, xorb_hash([(chunk_hash(chunk), len(chunk)) for chunk in chunks])


def make_shard(
    xorb: bytes,
    chunks: Sequence[bytes],
    *,
    digest: bytes | None = None,
    terms: Sequence[tuple[int, int, int]] | None = None,
    with_xorb: bool = True,
) -> tuple[bytes, bytes]:
    """Body and file hash of a shard of one file that takes chunks of one xorb.

    `terms` are (unpacked bytes, first chunk, end chunk); by default one term takes all.
    """
    nodes = [(chunk_hash(chunk), len(chunk)) for chunk in chunks]
    digest = digest or file_hash(nodes)
    terms = terms or [(sum(len(chunk) for chunk in chunks), 0, len(chunks))]
    body = TAG + struct.pack("<QQ", 2, 0)
    body += struct.pack("<32sIIQ", digest, 0, len(terms), 0)
    body += b"".join(struct.pack("<32sIIII", xorb, 0, *term) for term in terms)
    body += END + bytes(16)
    if with_xorb:
        body += struct.pack("<32sIIII", xorb, 0, len(nodes), sum(len(chunk) for chunk in chunks), 0)
        start = 0
        for one, size in nodes:
            body += struct.pack("<32sIIQ", one, start, size, 0)
            start += size
    return body + END + bytes(16), digest


def upload_by_hand(raw: Raw, bucket: str, chunks: Sequence[bytes], scheme: int = 0) -> str:
    """Upload a file of these chunks by hand and return its hash as text."""
    token = raw.storage_token(bucket)
    body, xorb = make_xorb(chunks, scheme)
    assert raw.post_xorb(xorb, body, token).status == 200
    shard, digest = make_shard(xorb, chunks)
    assert raw.call("POST", "/v1/shards", shard, token).status == 200
    return to_hex(digest)
