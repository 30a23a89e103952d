"""Plain HTTP requests to a Hub, and xorbs and shards made by hand."""

import http.client
import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import lz4.frame

from localhub.formats.hashing import chunk_hash, file_hash, to_hex, xorb_hash

EMPTY = to_hex(bytes(32))
"""The hash of the empty file."""

END = b"\xff" * 32
TAG = b"HFRepoMetaData\0" + bytes([85, 105, 103, 69, 106, 123, 129, 87, 131, 165, 189, 217, 92, 205, 209, 74, 169])


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


def upload(raw: Raw, bucket: str, chunks: Sequence[bytes], scheme: int = 0) -> str:
    """Upload a file of these chunks by hand and return its hash as text."""
    token = raw.storage_token(bucket)
    body, xorb = make_xorb(chunks, scheme)
    assert raw.post_xorb(xorb, body, token).status == 200
    shard, digest = make_shard(xorb, chunks)
    assert raw.call("POST", "/v1/shards", shard, token).status == 200
    return to_hex(digest)
