"""The Hub's routes for buckets, as `huggingface_hub` 2.4 calls them."""

import asyncio
from collections.abc import Callable
from email.utils import formatdate
from functools import partial
from typing import Annotated, Literal
from urllib.parse import quote, urlencode

from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import Response

from localhub.errors import HubError
from localhub.faults.injection import REFUSE
from localhub.http.access import Access, Caller
from localhub.http.batch import Batches, ItemError, parse_batch
from localhub.http.routing import RouteSpec
from localhub.http.signing import Right, Signer
from localhub.http.wire import Json, base_url, other_host, read_body, read_model
from localhub.state.buckets import REGIONS, Bucket, BucketStore
from localhub.state.listing import decode_cursor, encode_cursor, tree_page

_FEW_PATHS = 32
"""Up to this many are looked up in the event loop: 1000 take several milliseconds, a switch of threads a tenth of one."""

_BUCKET = "/api/buckets/{namespace}/{name}"


class _Create(BaseModel):
    visibility: Literal["public", "private"] | None = None
    private: bool | None = None
    region: str = REGIONS[0]


class _Settings(BaseModel):
    private: bool


class _Paths(BaseModel):
    paths: Annotated[list[str], Field(max_length=1000)]


class BucketRoutes:
    """Serves buckets.

    Args:
        store: the buckets.
        batches: applies batches to them.
        access: identifies callers.
        signer: signs storage tokens and links.
        page_size: maximum number of entries on a page.
    """

    def __init__(
        self,
        *,
        store: BucketStore,
        batches: Batches,
        access: Access,
        signer: Signer,
        page_size: int,
    ) -> None:
        self._store = store
        self._batches = batches
        self._access = access
        self._signer = signer
        self._page_size = page_size

    def routes(self) -> list[RouteSpec]:
        """Return the routes, the most frequent ones first."""
        return [
            ("paths-info", "POST", _BUCKET + "/paths-info", self._paths_info),
            ("xet-read-token", "GET", _BUCKET + "/xet-read-token", partial(self._storage_token, "read")),
            ("xet-write-token", "GET", _BUCKET + "/xet-write-token", partial(self._storage_token, "write")),
            ("batch", "POST", _BUCKET + "/batch", self._batch),
            ("tree", "GET", _BUCKET + "/tree", self._tree),
            ("tree", "GET", _BUCKET + "/tree/{prefix:text}", self._tree),
            ("resolve", "GET", "/buckets/{namespace}/{name}/resolve/{path:text}", self._resolve),
            ("bucket-settings", "PUT", _BUCKET + "/settings", self._settings),
            ("bucket-info", "GET", _BUCKET, self._info),
            ("bucket-create", "POST", _BUCKET, self._create),
            ("bucket-delete", "DELETE", _BUCKET, self._delete),
            ("bucket-list", "GET", "/api/buckets/{namespace}", self._list),
        ]

    async def _create(self, request: Request) -> Response:
        caller = self._access.caller(request)
        namespace, name = _names(request, caller)
        caller.require_write(f"{namespace}/{name}")
        wanted = await read_model(request, _Create)
        private = wanted.visibility == "private" or bool(wanted.private)
        made = await asyncio.to_thread(self._store.create, namespace, name, private=private, region=wanted.region)
        url = f"{base_url(request)}/buckets/{namespace}/{name}"
        if not made:
            raise HubError(409, "You already created this bucket", extra={"url": url})
        return Json({"url": url, "name": name, "id": f"{namespace}/{name}"})

    async def _info(self, request: Request) -> Response:
        return Json(self._open(request, "read").info())

    async def _list(self, request: Request) -> Response:
        caller = self._access.caller(request)
        namespace = _namespace(request, caller)
        search = request.query_params.get("search", "")
        cursor = request.query_params.get("cursor")
        after = decode_cursor(cursor) if cursor else ""
        found = await asyncio.to_thread(self._store.of_namespace, namespace, search, after, self._page_size + 1)
        if not found and not after and not search and namespace != caller.user:
            raise HubError(404, f"there is no namespace {namespace}")
        page = found[: self._page_size]
        following = encode_cursor(page[-1].name) if len(found) > len(page) else None
        return Json([bucket.info() for bucket in page if caller.may_see(bucket)], headers=_link(request, following))

    async def _delete(self, request: Request) -> Response:
        bucket = self._open(request, "write")
        await asyncio.to_thread(self._store.delete, bucket)
        return Response(status_code=204)

    async def _settings(self, request: Request) -> Response:
        bucket = self._open(request, "write")
        wanted = await read_model(request, _Settings)
        await asyncio.to_thread(self._store.set_private, bucket, wanted.private)
        return Json({"private": wanted.private})

    async def _tree(self, request: Request) -> Response:
        bucket = self._open(request, "read")
        prefix = request.path_params.get("prefix", "")
        # The Hub lists recursively by default, contrary to the docstring of `list_bucket_tree`.
        recursive = request.query_params.get("recursive", "true").lower() not in {"false", "0"}
        cursor = request.query_params.get("cursor")
        items, following = await asyncio.to_thread(
            tree_page, self._store, bucket, prefix=prefix, recursive=recursive, cursor=cursor, limit=self._page_size
        )
        return Json(items, headers=_link(request, following))

    async def _paths_info(self, request: Request) -> Response:
        bucket = self._open(request, "read")
        wanted = await read_model(request, _Paths)
        if len(wanted.paths) <= _FEW_PATHS:
            entries = self._store.files(bucket, wanted.paths)
        else:
            entries = await asyncio.to_thread(self._store.files, bucket, wanted.paths)
        # The Hub dates all of its responses; clients use the date of this one.
        return Json(entries, headers={"Date": formatdate(usegmt=True)})

    async def _batch(self, request: Request) -> Response:
        caller = self._access.caller(request)
        bucket = self._open(request, "write", caller)
        operations = parse_batch(await read_body(request))
        refuse = request.scope.get(REFUSE)
        source = self._source(caller)
        failed = await asyncio.to_thread(self._batches.apply, bucket, operations, source=source, refuse=refuse)
        succeeded = len(operations) - len(failed)
        body = {"success": not failed, "processed": len(operations), "succeeded": succeeded, "failed": failed}
        return Json(body, 200 if succeeded else 422)

    async def _resolve(self, request: Request) -> Response:
        bucket = self._open(request, "read")
        path = request.path_params["path"]
        entry = self._store.file(bucket, path)
        if entry is None:
            raise HubError(404, f"Entry not found: {path}", code="EntryNotFound")
        # Another host, like the real Hub's CDN: the clients read these headers and do not follow the redirect.
        location = other_host(request) + self._signer.link(f"/file-data/{entry['xetHash']}")
        headers = {
            "Location": location,
            "X-Xet-Hash": entry["xetHash"],
            "X-Linked-Size": str(entry["size"]),
            "X-Linked-ETag": f'"{entry["xetHash"]}"',
            "ETag": f'"{entry["xetHash"]}"',
            "X-Xet-Refresh-Route": f"{base_url(request)}/api/buckets/{bucket.id}/xet-read-token",
        }
        return Response(status_code=302, headers=headers)

    async def _storage_token(self, right: Right, request: Request) -> Response:
        token, expires = self._signer.token(right, self._open(request, right).row)
        url = base_url(request)
        headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": token, "X-Xet-Token-Expiration": str(expires)}
        return Json({"casUrl": url, "accessToken": token, "exp": expires}, headers=headers)

    def _open(self, request: Request, right: Right, caller: Caller | None = None) -> Bucket:
        caller = caller or self._access.caller(request)
        namespace, name = _names(request, caller)
        return caller.open(self._store.find(namespace, name), f"{namespace}/{name}", right)

    def _source(self, caller: Caller) -> Callable[[str], Bucket]:
        def find(bucket_id: str) -> Bucket:
            namespace, _, name = bucket_id.partition("/")
            try:
                return caller.open(self._store.find(namespace, name), bucket_id, "read")
            except HubError as error:
                raise ItemError(error.message) from error

        return find


def _namespace(request: Request, caller: Caller) -> str:
    namespace: str = request.path_params["namespace"]
    return caller.user if namespace == "me" else namespace


def _names(request: Request, caller: Caller) -> tuple[str, str]:
    return _namespace(request, caller), request.path_params["name"]


def _link(request: Request, cursor: str | None) -> dict[str, str]:
    if cursor is None:
        return {}
    query = {**request.query_params, "cursor": cursor}
    return {"Link": f'<{base_url(request)}{quote(request.scope["path"])}?{urlencode(query)}>; rel="next"'}
