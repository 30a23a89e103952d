"""The ASGI application of a Hub: one root directory, its stores, its routes."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from starlette.convertors import PathConvertor, register_url_convertor
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route, Router
from starlette.types import ASGIApp

from localhub.errors import HubError
from localhub.faults.rules import FaultBook
from localhub.http.access import Access, Token
from localhub.http.batch import Batches
from localhub.http.bucket_routes import BucketRoutes
from localhub.http.control_routes import ControlRoutes
from localhub.http.routing import ObservedEndpoint
from localhub.http.signing import Signer
from localhub.http.storage_routes import StorageRoutes
from localhub.state.buckets import BucketStore
from localhub.state.counters import Counters
from localhub.state.database import Database
from localhub.state.objects import ObjectStore
from localhub.state.root import DATABASE, UPLOADS, check_root
from localhub.state.spool import remove_stale
from localhub.state.xorb_store import XorbStore

_THREADS = 8


@dataclass(frozen=True)
class Options:
    """Settings of a Hub.

    Attributes:
        root: directory of everything that the Hub stores; created when missing.
        page_size: maximum number of entries on a page of a listing.
        tokens: the tokens by their secret; None for no access control.
        cas_token_ttl_s: validity of storage tokens and links, in seconds.
        faults: whether clients can add faults.
    """

    root: Path
    page_size: int = 1000
    tokens: dict[str, Token] | None = field(default=None, repr=False)  # its keys are secrets
    cas_token_ttl_s: float = 3600.0
    faults: bool = False


class _Text(PathConvertor):
    """The rest of a path, line breaks included, at which Starlette's own convertor stops."""

    regex = "(?s:.*)"


def make_app(options: Options) -> ASGIApp:
    """Return the ASGI application of a Hub.

    Raises:
        RuntimeError: the root was made by another version of this package, or is not the root of a Hub (`RootError`).
    """
    register_url_convertor("text", _Text())
    check_root(options.root)
    database = Database(options.root / DATABASE)
    uploads = options.root / UPLOADS
    uploads.mkdir(exist_ok=True)
    remove_stale(uploads)

    signer = Signer(database.secret(), options.cas_token_ttl_s)
    xorbs = XorbStore(options.root, database)
    objects = ObjectStore(database, xorbs, only_arrived=options.tokens is not None)
    buckets = BucketRoutes(
        store=BucketStore(database),
        batches=Batches(database, objects),
        access=Access(options.tokens),
        signer=signer,
        page_size=options.page_size,
    )
    storage = StorageRoutes(xorbs=xorbs, objects=objects, signer=signer, uploads=uploads)
    counters, faults = Counters(), FaultBook()

    @contextlib.asynccontextmanager
    async def lifespan(_app: object) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(_THREADS, thread_name_prefix="localhub"))
        yield
        await loop.shutdown_default_executor()
        database.close()

    routes = [
        *(
            Route(path, ObservedEndpoint(handler, name, counters, faults), methods=[method], name=name)
            for name, method, path, handler in storage.routes() + buckets.routes()
        ),
        *ControlRoutes(counters, faults).routes(faults=options.faults),
        # Anything else that a client probes for is answered at once, and counted.
        Mount("/", ObservedEndpoint(_unknown, "unknown", counters, faults)),
    ]
    # Not a Starlette: its middleware catches exceptions, of which endpoints raise none, and costs a tenth of a small request.
    return Router(routes, redirect_slashes=False, lifespan=lifespan)


async def _unknown(request: Request) -> Response:
    raise HubError(404, f"this Hub has no {request.method} {request.scope['path']}")
