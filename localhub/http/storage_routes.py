"""The routes of Xet storage (the CAS), as `hf_xet` 1.8 calls them."""

import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from localhub.errors import HubError, bad_request
from localhub.formats.hashing import HashError, from_hex, to_hex
from localhub.formats.reconstruction import MakeUrl, Piece, describe, describe_v2, pieces
from localhub.formats.shards import ShardError
from localhub.formats.xorbs import MAX_XORB_BYTES, XorbError
from localhub.http.routing import RouteSpec
from localhub.http.signing import Right, Signer
from localhub.http.streaming import FileSlice, file_bytes
from localhub.http.wire import Json, base_url, byte_range, read_body
from localhub.state.objects import ObjectStore
from localhub.state.spool import Spool
from localhub.state.xorb_store import XorbStore

MAX_XORB_BODY_BYTES = MAX_XORB_BYTES + 4 * 1024 * 1024
"""Largest upload of a xorb: its data, a header of 8 bytes per chunk, the overhead of LZ4, and a footer."""

MAX_SHARD_BYTES = 64 * 1024 * 1024
"""Largest upload of a shard (public Xet shard specification)."""

Description = Callable[[list[Piece], MakeUrl], dict[str, Any]]
"""Returns the response to a request for a reconstruction."""


class StorageRoutes:
    """Serves xorbs, shards and reconstructions.

    Args:
        xorbs: the xorbs.
        objects: the files made of them.
        signer: verifies storage tokens, signs and verifies links.
        uploads: directory for uploads in progress.
    """

    def __init__(self, *, xorbs: XorbStore, objects: ObjectStore, signer: Signer, uploads: Path) -> None:
        self._xorbs = xorbs
        self._objects = objects
        self._signer = signer
        self._uploads = uploads

    def routes(self) -> list[RouteSpec]:
        """Return the routes, the most frequent ones first."""
        return [
            ("xorb-data", "GET", "/xorb-data/{hash}", self._xorb_data),
            ("reconstruction", "GET", "/v2/reconstructions/{hash}", partial(self._reconstruction, describe_v2)),
            ("reconstruction", "GET", "/v1/reconstructions/{hash}", partial(self._reconstruction, describe)),
            ("xorb-upload", "POST", "/v1/xorbs/default/{hash}", self._upload_xorb),
            ("shard-upload", "POST", "/v1/shards", self._upload_shard),
            ("file-data", "GET", "/file-data/{hash}", self._file_data),
            ("chunk-dedup", "GET", "/v1/chunks/default/{hash}", self._chunk),
        ]

    async def _upload_xorb(self, request: Request) -> Response:
        self._bucket(request, "write")
        digest = _hash(request)
        with Spool(self._uploads) as spool:
            await spool.fill(request.stream(), MAX_XORB_BODY_BYTES)
            if self._xorbs.has(digest):
                return Json({"was_inserted": False})
            try:
                inserted = await asyncio.to_thread(self._xorbs.adopt, spool, digest)
            except XorbError as error:
                raise bad_request(str(error)) from error
        return Json({"was_inserted": inserted})

    async def _upload_shard(self, request: Request) -> Response:
        bucket = self._bucket(request, "write")
        data = await read_body(request, MAX_SHARD_BYTES)
        try:
            await asyncio.to_thread(self._objects.register, data, bucket)
        except ShardError as error:
            raise bad_request(str(error)) from error
        return Json({"result": 1})

    async def _reconstruction(self, description: Description, request: Request) -> Response:
        bucket = self._bucket(request, "read")
        digest = _hash(request)
        stored = self._objects.get(digest) if self._objects.may_read(digest, bucket) else None
        if stored is None:
            raise HubError(404, f"file not found: {to_hex(digest)}")
        start, stop = byte_range(request, stored.size) or (0, stored.size)
        found = list(pieces(stored.terms, start, stop, self._xorbs.table))
        base = base_url(request)
        return Json(description(found, lambda xorb: base + self._signer.link(f"/xorb-data/{to_hex(xorb)}")))

    async def _xorb_data(self, request: Request) -> Response:
        self._check_link(request)
        digest = _hash(request)
        table = self._xorbs.table(digest)
        if table is None:
            raise HubError(404, "xorb not found")
        size = table.ends[-1]
        return FileSlice(self._xorbs.path(digest), size, byte_range(request, size))

    async def _file_data(self, request: Request) -> Response:
        self._check_link(request)
        # The link was made for a caller that may read the file; no further check is needed.
        stored = self._objects.get(_hash(request))
        if stored is None:
            raise HubError(404, "file not found")
        wanted = byte_range(request, stored.size)
        start, stop = wanted or (0, stored.size)
        found = list(pieces(stored.terms, start, stop, self._xorbs.table))
        return file_bytes(found, stored.size, wanted, self._xorbs)

    async def _chunk(self, request: Request) -> Response:
        self._bucket(request, "read")
        raise HubError(404, "chunk not found: this Hub has no global deduplication")

    def _bucket(self, request: Request, right: Right) -> int:
        return self._signer.open(request.headers.get("authorization"), right)

    def _check_link(self, request: Request) -> None:
        query = request.query_params
        self._signer.check_link(request.url.path, query.get("expires"), query.get("signature"))


def _hash(request: Request) -> bytes:
    try:
        return from_hex(request.path_params["hash"])
    except HashError as error:
        raise bad_request(str(error)) from error
