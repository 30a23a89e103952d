"""Puts a Hub together: one root directory, its stores, its routes."""

import contextlib
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from starlette.convertors import Convertor, register_url_convertor
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Mount, Router
from starlette.types import ASGIApp

from localhub.errors import HubError
from localhub.faults.rules import FaultBook
from localhub.http.access import Access, Token
from localhub.http.batch import Batches
from localhub.http.bucket_routes import BucketRoutes
from localhub.http.control_routes import ControlRoutes
from localhub.http.routing import Routes
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
    """How a Hub is run.

    Attributes:
        root: directory of all that it stores; made when missing.
        page_size: most entries of a listing's page.
        tokens: who may do what; None for no access control.
        cas_token_ttl_s: how long storage tokens and links hold, in seconds.
        faults: whether faults can be ordered over the wire.
    """

    root: Path
    page_size: int = 1000
    tokens: dict[str, Token] | None = None
    cas_token_ttl_s: float = 3600.0
    faults: bool = False


class _Text(Convertor[str]):
    """The rest of a path whatever it holds: Starlette's own stops at a line break."""

    regex = "(?s:.*)"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


def make_app(options: Options) -> ASGIApp:
    """Return the ASGI application of a Hub.

    Raises:
        RuntimeError: the root was made by another version of this package, or is not a Hub's (`RootError`).
    """
    register_url_convertor("text", _Text())
    check_root(options.root)
    database = Database(options.root / DATABASE)
    uploads = options.root / UPLOADS
    uploads.mkdir(exist_ok=True)
    remove_stale(uploads)
    executor = ThreadPoolExecutor(_THREADS, thread_name_prefix="localhub")

    access = Access(options.tokens)
    signer = Signer(database.secret(), options.cas_token_ttl_s)
    xorbs = XorbStore(options.root, database)
    buckets = BucketRoutes(
        store=BucketStore(database),
        batches=Batches(database, only_arrived=access.controlled),
        access=access,
        signer=signer,
        executor=executor,
        page_size=options.page_size,
    )
    storage = StorageRoutes(
        xorbs=xorbs,
        objects=ObjectStore(database, xorbs, only_arrived=access.controlled),
        signer=signer,
        executor=executor,
        uploads=uploads,
    )
    counters = Counters()
    faults = FaultBook() if options.faults else None
    make = Routes(counters, faults)

    @contextlib.asynccontextmanager
    async def lifespan(_app: object) -> AsyncIterator[None]:
        yield
        executor.shutdown()
        database.close()

    routes: list[BaseRoute] = [
        *storage.routes(make),
        *buckets.routes(make),
        *ControlRoutes(counters, faults).routes(),
    ]
    # Whatever else a client probes for is answered at once, and counted.
    routes.append(Mount("/", make.app("unknown", _unknown)))
    # Not a Starlette: its middleware would catch what no endpoint here lets out, at a tenth of a small request.
    return Router(routes, redirect_slashes=False, lifespan=lifespan)


async def _unknown(request: Request) -> Response:
    raise HubError(404, f"this Hub has no {request.method} {request.scope['path']}")
