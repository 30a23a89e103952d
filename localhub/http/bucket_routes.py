"""The Hub's routes for buckets, as `huggingface_hub` 2.4 calls them."""

from collections.abc import Callable
from concurrent.futures import Executor
from email.utils import formatdate
from typing import Annotated, Literal
from urllib.parse import quote, urlencode

from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from localhub.errors import HubError, entry_not_found
from localhub.faults.injection import REFUSE
from localhub.http.access import Access, Caller
from localhub.http.batch import Batches, ItemError, parse_batch
from localhub.http.routing import Routes
from localhub.http.signing import Right, Signer
from localhub.http.wire import Json, Result, base_url, other_host, read_body, read_model, run_in
from localhub.state.buckets import REGIONS, Bucket, BucketStore
from localhub.state.listing import decode_cursor, encode_cursor, tree_page

_FEW_PATHS = 32
"""As many are looked up at once, more in a thread: 1000 take several milliseconds, a change of threads a tenth."""

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
        access: tells who asks.
        signer: makes storage tokens and links.
        executor: where blocking work goes.
        page_size: most entries of a page.
    """

    def __init__(
        self,
        *,
        store: BucketStore,
        batches: Batches,
        access: Access,
        signer: Signer,
        executor: Executor,
        page_size: int,
    ) -> None:
        self._store = store
        self._batches = batches
        self._access = access
        self._signer = signer
        self._executor = executor
        self._page_size = page_size

    def routes(self, make: Routes) -> list[BaseRoute]:
        """Return the routes, those that are asked most first."""
        return [
            make.route("paths-info", "POST", _BUCKET + "/paths-info", self._paths_info),
            make.route("xet-read-token", "GET", _BUCKET + "/xet-read-token", self._read_token),
            make.route("xet-write-token", "GET", _BUCKET + "/xet-write-token", self._write_token),
            make.route("batch", "POST", _BUCKET + "/batch", self._batch),
            make.route("tree", "GET", _BUCKET + "/tree", self._tree),
            make.route("tree", "GET", _BUCKET + "/tree/{prefix:text}", self._tree),
            make.route("resolve", "GET", "/buckets/{namespace}/{name}/resolve/{path:text}", self._resolve),
            make.route("bucket-settings", "PUT", _BUCKET + "/settings", self._settings),
            make.route("bucket-info", "GET", _BUCKET, self._info),
            make.route("bucket-create", "POST", _BUCKET, self._create),
            make.route("bucket-delete", "DELETE", _BUCKET, self._delete),
            make.route("bucket-list", "GET", "/api/buckets/{namespace}", self._list),
        ]

    async def _create(self, request: Request) -> Response:
        caller = self._access.caller(request)
        namespace, name = _names(request, caller)
        caller.require_write(f"{namespace}/{name}")
        wanted = await read_model(request, _Create)
        private = wanted.visibility == "private" or bool(wanted.private)
        made = await self._run(lambda: self._store.create(namespace, name, private=private, region=wanted.region))
        url = f"{base_url(request)}/buckets/{namespace}/{name}"
        if not made:
            raise HubError(409, "You already created this bucket", extra={"url": url})
        return Json({"url": url, "name": name, "id": f"{namespace}/{name}"})

    async def _info(self, request: Request) -> Response:
        return Json(self._readable(request).info())

    async def _list(self, request: Request) -> Response:
        caller = self._access.caller(request)
        namespace = request.path_params["namespace"]
        namespace = caller.user if namespace == "me" else namespace
        search = request.query_params.get("search", "")
        cursor = request.query_params.get("cursor")
        after = decode_cursor(cursor) if cursor else ""
        found = await self._run(lambda: self._store.of_namespace(namespace, search, after, self._page_size + 1))
        if not found and not after and not search and namespace != caller.user:
            raise HubError(404, f"there is no namespace {namespace}")
        page = found[: self._page_size]
        following = encode_cursor(page[-1].name) if len(found) > len(page) else None
        return Json([bucket.info() for bucket in page if caller.may_see(bucket)], headers=_link(request, following))

    async def _delete(self, request: Request) -> Response:
        bucket = self._writable(request)
        await self._run(lambda: self._store.delete(bucket))
        return Response(status_code=204)

    async def _settings(self, request: Request) -> Response:
        bucket = self._writable(request)
        wanted = await read_model(request, _Settings)
        await self._run(lambda: self._store.set_private(bucket, wanted.private))
        return Json({"private": wanted.private})

    async def _tree(self, request: Request) -> Response:
        bucket = self._readable(request)
        prefix = request.path_params.get("prefix", "")
        # The Hub lists recursively unless told otherwise, whatever the docstring of `list_bucket_tree` says.
        recursive = request.query_params.get("recursive", "true").lower() not in {"false", "0"}
        cursor = request.query_params.get("cursor")
        page = await self._run(
            lambda: tree_page(
                self._store, bucket, prefix=prefix, recursive=recursive, cursor=cursor, limit=self._page_size
            )
        )
        return Json(page.items, headers=_link(request, page.cursor))

    async def _paths_info(self, request: Request) -> Response:
        bucket = self._readable(request)
        wanted = await read_model(request, _Paths)
        if len(wanted.paths) <= _FEW_PATHS:
            answer = Json(self._store.files(bucket, wanted.paths))
        else:
            answer = Json(await self._run(lambda: self._store.files(bucket, wanted.paths)))
        # The Hub dates all of its answers; of these, clients make use.
        answer.headers["Date"] = formatdate(usegmt=True)
        return answer

    async def _batch(self, request: Request) -> Response:
        caller = self._access.caller(request)
        bucket = self._writable(request, caller)
        operations = parse_batch(await read_body(request))
        refuse = request.scope.get(REFUSE)
        outcome = await self._run(
            lambda: self._batches.apply(bucket, operations, source=self._source(caller), refuse=refuse)
        )
        return Json(outcome.body(), outcome.status)

    async def _read_token(self, request: Request) -> Response:
        return self._storage_token(request, self._readable(request), "read")

    async def _write_token(self, request: Request) -> Response:
        return self._storage_token(request, self._writable(request), "write")

    async def _resolve(self, request: Request) -> Response:
        bucket = self._readable(request)
        path = request.path_params["path"]
        entry = self._store.file(bucket, path)
        if entry is None:
            raise entry_not_found(path)
        # Another host, as the real Hub's CDN is: the clients read these headers and do not follow.
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

    def _storage_token(self, request: Request, bucket: Bucket, right: Right) -> Response:
        token, expires = self._signer.token(right, bucket.row)
        url = base_url(request)
        headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": token, "X-Xet-Token-Expiration": str(expires)}
        return Json({"casUrl": url, "accessToken": token, "exp": expires}, headers=headers)

    def _readable(self, request: Request) -> Bucket:
        caller = self._access.caller(request)
        namespace, name = _names(request, caller)
        return caller.readable(self._store.find(namespace, name), f"{namespace}/{name}")

    def _writable(self, request: Request, caller: Caller | None = None) -> Bucket:
        caller = caller or self._access.caller(request)
        namespace, name = _names(request, caller)
        return caller.writable(self._store.find(namespace, name), f"{namespace}/{name}")

    def _source(self, caller: Caller) -> Callable[[str], Bucket]:
        def find(bucket_id: str) -> Bucket:
            namespace, _, name = bucket_id.partition("/")
            try:
                return caller.readable(self._store.find(namespace, name), bucket_id)
            except HubError as error:
                raise ItemError(error.message) from error

        return find

    async def _run(self, work: Callable[[], Result]) -> Result:
        return await run_in(self._executor, work)


def _names(request: Request, caller: Caller) -> tuple[str, str]:
    namespace, name = request.path_params["namespace"], request.path_params["name"]
    return (caller.user if namespace == "me" else namespace), name


def _link(request: Request, cursor: str | None) -> dict[str, str]:
    if cursor is None:
        return {}
    query = {**request.query_params, "cursor": cursor}
    return {"Link": f'<{base_url(request)}{quote(request.scope["path"])}?{urlencode(query)}>; rel="next"'}
