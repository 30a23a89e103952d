"""A depot with a key index: what writers put there and tell, what a reader sees, what lies in the bucket."""

from __future__ import annotations

import contextlib
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from hfbucket_plugin.core.deadline import Deadline
from hfbucket_plugin.core.keys import RESERVED, encode_name
from hfbucket_plugin.index.journal import JournalWriter
from hfbucket_plugin.index.refresh import SnapshotSource
from hfbucket_plugin.index.store import JOURNALS, SNAPSHOTS, IndexStore
from hfbucket_plugin.index.table import digests_of
from tests.support.plugin_support import opened

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from hfbucket_plugin.core.keys import ContentId
    from hfbucket_plugin.hub.bucket import Bucket
    from hfbucket_plugin.index.format import Pointer
    from tests.support.depot import Depot, Ran

__all__ = ["JOURNALS", "SNAPSHOTS"]

SECS = 30.0


@contextlib.contextmanager
def bucket_client(depot: Depot) -> Iterator[tuple[Bucket, IndexStore]]:
    with opened(depot.hub.endpoint, depot.bucket_id, depot.prefix) as bucket:
        store = IndexStore(bucket, "test")
        try:
            yield bucket, store
        finally:
            store.close()


class Writer:
    """A writer with a journal of its own; what it puts and deletes, it does, and tells when it is told to."""

    def __init__(self, depot: Depot) -> None:
        self.depot = depot
        self.journal = JournalWriter(50_000, 50_000)
        self.hits = JournalWriter(50_000, 50_000, hits=True)

    def put(self, *keys: str, data: bytes | None = None, age: float = 0.0) -> None:
        self.depot.put({key: data if data is not None else key.encode() for key in keys}, age=age)
        with bucket_client(self.depot) as (bucket, _):
            infos = bucket.stat([self.depot.path(key) for key in keys], Deadline.after(SECS))
        for key in keys:
            self._note(key, infos[self.depot.path(key)].content, age)

    def delete(self, *keys: str) -> None:
        with bucket_client(self.depot) as (bucket, _):
            bucket.delete([self.depot.path(key) for key in keys], Deadline.after(SECS))
        for key in keys:
            self._note(key, None)

    def _note(self, key: str, content: ContentId | None, age: float = 0.0) -> None:
        self.journal.note(digests_of([encode_name(key)]).tobytes(), content, time.monotonic() - age)

    def tell(self, journal: JournalWriter | None = None) -> str:
        journal = self.journal if journal is None else journal
        draft = journal.draft(time.monotonic(), datetime.now(UTC))
        assert draft is not None
        with bucket_client(self.depot) as (_, store):
            store.put_journal(draft.name.text, draft.data, draft.instead_of, Deadline.after(SECS))
        journal.written(draft)
        return f"{self.depot.prefix}/{JOURNALS}/{draft.name.text}"


def pointer(depot: Depot) -> Pointer:
    with bucket_client(depot) as (_, store):
        info = store.list(Deadline.after(SECS)).pointer
        assert info is not None
        return store.read_pointer(info, Deadline.after(SECS))


def seen(depot: Depot, keys: Iterable[str]) -> dict[str, ContentId]:
    """What a fresh reader knows of keys: those that are in its view, with their contents."""
    keys = list(keys)
    with bucket_client(depot) as (_, store):
        refreshed = SnapshotSource(store, "nobody", 2**30).refresh(None)
    assert refreshed.view is not None
    assert (refreshed.problem, refreshed.unread, refreshed.garbage) == (None, 0, 0)
    found = refreshed.view.look_up(digests_of(map(encode_name, keys)))
    return {key: one for key, one in zip(keys, found, strict=True) if hasattr(one, "xet_hash")}


def listed(depot: Depot, keys: Iterable[str]) -> dict[str, ContentId]:
    """What the bucket has of keys."""
    keys = list(keys)
    with bucket_client(depot) as (bucket, _):
        infos = bucket.stat([depot.path(key) for key in keys], Deadline.after(SECS))
    return {key: infos[depot.path(key)].content for key in keys if depot.path(key) in infos}


def objects(depot: Depot) -> dict[str, tuple[str, object]]:
    """All objects of the bucket: path to hash and time."""
    with bucket_client(depot) as (bucket, _):
        return {info.path: (info.content.xet_hash, info.uploaded_at) for info in bucket.list_objects("", SECS)}


def of_index(depot: Depot, part: str) -> list[str]:
    """Paths of the index: its journals or snapshots."""
    return sorted(path for path in depot.all_paths() if path.startswith(f"{depot.prefix}/{part}/"))


def strangers(depot: Depot) -> dict[str, tuple[str, object]]:
    """What a builder must not touch: all but its index, locks and report."""
    own = [f"{depot.prefix}/{RESERVED}/{name}" for name in ("index/", "index-locks/", "reports/index.json")]
    return {path: what for path, what in objects(depot).items() if not path.startswith(tuple(own))}


def build(depot: Depot, *more: str, code: int = 0) -> Ran:
    ran = depot.run("index", *more)
    assert ran.code == code, ran.stderr
    return ran
