"""The routes of Xet storage (the CAS), as `hf_xet` 1.8 calls them."""

from collections.abc import Callable
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from localhub.errors import HubError, bad_request
from localhub.formats.hashing import from_hex, to_hex
from localhub.formats.reconstruction import MakeUrl, Piece, describe, describe_v2, pieces
from localhub.formats.shards import ShardError
from localhub.formats.xorbs import MAX_XORB_BYTES, XorbError
from localhub.http.routing import Routes
from localhub.http.signing import Right, Scope, Signer
from localhub.http.streaming import FileSlice
from localhub.http.unpacking import FileBytes
from localhub.http.wire import Json, base_url, byte_range, read_body, run_in
from localhub.state.objects import ObjectStore
from localhub.state.spool import Spool
from localhub.state.xorb_store import XorbStore

MAX_XORB_BODY_BYTES = MAX_XORB_BYTES + 4 * 1024 * 1024
"""Largest upload of a xorb: its data, 8 bytes of header per chunk, what LZ4 adds, and a footer."""

MAX_SHARD_BYTES = 64 * 1024 * 1024
"""Largest upload of a shard (public Xet shard specification)."""


class StorageRoutes:
    """Serves xorbs, shards and reconstructions.

    Args:
        xorbs: the xorbs.
        objects: the files made of them.
        signer: checks storage tokens, makes and checks links.
        executor: where blocking work goes.
        uploads: directory for uploads that are under way.
    """

    def __init__(
        self, *, xorbs: XorbStore, objects: ObjectStore, signer: Signer, executor: Executor, uploads: Path
    ) -> None:
        self._xorbs = xorbs
        self._objects = objects
        self._signer = signer
        self._executor = executor
        self._uploads = uploads

    def routes(self, make: Routes) -> list[BaseRoute]:
        """Return the routes, those that are asked most first."""
        return [
            make.route("xorb-data", "GET", "/xorb-data/{hash}", self._xorb_data),
            make.route("reconstruction", "GET", "/v2/reconstructions/{hash}", self._reconstruction_v2),
            make.route("reconstruction", "GET", "/v1/reconstructions/{hash}", self._reconstruction_v1),
            make.route("xorb-upload", "POST", "/v1/xorbs/default/{hash}", self._upload_xorb),
            make.route("shard-upload", "POST", "/v1/shards", self._upload_shard),
            make.route("file-data", "GET", "/file-data/{hash}", self._file_data),
            make.route("chunk-dedup", "GET", "/v1/chunks/default/{hash}", self._chunk),
        ]

    async def _upload_xorb(self, request: Request) -> Response:
        self._scope(request, "write")
        digest = _hash(request)
        with Spool(self._uploads) as spool:
            await spool.fill(request.stream(), MAX_XORB_BODY_BYTES, lambda work: run_in(self._executor, work))
            if self._xorbs.has(digest):
                return Json({"was_inserted": False})
            try:
                inserted = await run_in(self._executor, lambda: self._xorbs.adopt(spool, digest))
            except XorbError as error:
                raise bad_request(str(error)) from error
        return Json({"was_inserted": inserted})

    async def _upload_shard(self, request: Request) -> Response:
        scope = self._scope(request, "write")
        data = await read_body(request, MAX_SHARD_BYTES)
        try:
            await run_in(self._executor, lambda: self._objects.register(data, scope.bucket))
        except ShardError as error:
            raise bad_request(str(error)) from error
        return Json({"result": 1})

    async def _reconstruction_v1(self, request: Request) -> Response:
        return self._reconstruct(request, describe)

    async def _reconstruction_v2(self, request: Request) -> Response:
        return self._reconstruct(request, describe_v2)

    def _reconstruct(self, request: Request, description: Callable[[list[Piece], MakeUrl], dict[str, Any]]) -> Response:
        scope = self._scope(request, "read")
        digest = _hash(request)
        stored = self._objects.get(digest) if self._objects.may_read(digest, scope.bucket) else None
        if stored is None:
            raise HubError(404, f"no such file: {to_hex(digest)}")
        start, stop = byte_range(request, stored.size) or (0, stored.size)
        found = list(pieces(stored.terms, start, stop, self._xorbs.table))
        base = base_url(request)
        return Json(description(found, lambda xorb: base + self._signer.link(f"/xorb-data/{to_hex(xorb)}")))

    async def _xorb_data(self, request: Request) -> Response:
        self._check_link(request)
        digest = _hash(request)
        table = self._xorbs.table(digest)
        if table is None:
            raise HubError(404, "no such xorb")
        size = table.ends[-1]
        return FileSlice(self._xorbs.path(digest), size, byte_range(request, size), self._executor)

    async def _file_data(self, request: Request) -> Response:
        self._check_link(request)
        # The link was made for one who may read the file: that is right enough.
        stored = self._objects.get(_hash(request))
        if stored is None:
            raise HubError(404, "no such file")
        wanted = byte_range(request, stored.size)
        start, stop = wanted or (0, stored.size)
        found = list(pieces(stored.terms, start, stop, self._xorbs.table))
        return FileBytes(found, stored.size, wanted, xorbs=self._xorbs, executor=self._executor)

    async def _chunk(self, request: Request) -> Response:
        self._scope(request, "read")
        raise HubError(404, "no such chunk: this Hub answers no questions about single chunks")

    def _scope(self, request: Request, right: Right) -> Scope:
        return self._signer.open(request.headers.get("authorization"), right)

    def _check_link(self, request: Request) -> None:
        query = request.query_params
        self._signer.check_link(request.url.path, query.get("expires"), query.get("signature"))


def _hash(request: Request) -> bytes:
    try:
        return from_hex(request.path_params["hash"])
    except ValueError as error:
        raise bad_request(str(error)) from error
