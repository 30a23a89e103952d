"""Key indexes: built, forged, asked; and depots with one: what writers put there and tell, what a reader sees."""

from __future__ import annotations

import contextlib
import tempfile
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfbucket_plugin.core import telemetry
from hfbucket_plugin.core.deadline import Deadline
from hfbucket_plugin.core.keys import RESERVED, encode_name
from hfbucket_plugin.index import build as index_build
from hfbucket_plugin.index.format import snapshot_of, to_bytes
from hfbucket_plugin.index.journal import JournalWriter
from hfbucket_plugin.index.refresh import SnapshotSource
from hfbucket_plugin.index.store import JOURNALS, IndexStore
from hfbucket_plugin.index.table import digests_of
from tests.support.buckets import opened
from tests.support.surface import PREFIX, counted, store_of
from tests.support.waiting import eventually

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Callable, Iterable, Iterator

    from hfbucket_plugin.core.keys import ContentId
    from hfbucket_plugin.hub.bucket import Bucket
    from hfbucket_plugin.index.format import Pointer
    from hfbucket_plugin.index.reader import KeyIndex
    from tests.support.buckets import Depot, Ran

SECS = 30.0


def build(endpoint: str, bucket_id: str, prefix: str = PREFIX, *, incremental: bool = False) -> Pointer:
    """Make a snapshot of an instance and publish it."""
    with opened(endpoint, bucket_id, prefix) as bucket_client, tempfile.TemporaryDirectory() as directory:
        store = IndexStore(bucket_client, "builder")
        if incremental:
            built = index_build.from_journals(bucket_client, store, Path(directory), SECS)
        else:
            built = index_build.from_listing(bucket_client, Path(directory), SECS)
        return index_build.publish(store, built, Deadline.after(SECS))


def index_of(surface: Any) -> KeyIndex:
    """The index of a surface."""
    index = store_of(surface).index
    assert index is not None
    return index


def in_use(surface: Any) -> KeyIndex:
    """The index of a surface, when it is in use."""
    index = index_of(surface)
    eventually(lambda: index.status()["state"] == "usable")
    return index


def answers(surface: Any) -> Counter[str]:
    """What the index said so far: outcome to number of keys."""
    return counted_by_outcome(surface, telemetry.INDEX_ANSWERS)


def counted_by_outcome(surface: Any, name: str) -> Counter[str]:
    """A counter of a surface's instance, by outcome."""
    import prometheus_client

    found: Counter[str] = counted(surface.instance, name, "none")
    for family in prometheus_client.REGISTRY.collect():
        for sample in family.samples:
            if sample.name == name and sample.labels.get("instance") == surface.instance:
                found[sample.labels["outcome"]] += round(sample.value)
    return +found


def gauge(surface: Any, name: str, **labels: str) -> float | None:
    """A gauge of a surface's instance."""
    import prometheus_client

    value: float | None = prometheus_client.REGISTRY.get_sample_value(name, {"instance": surface.instance} | labels)
    return value


def forge(
    endpoint: str, bucket_id: str, rows_of: Callable[[Any], Any], prefix: str = PREFIX, **pointer: Any
) -> Pointer:
    """Publish a snapshot that somebody wrote who knows the format.

    Args:
        endpoint: The Hub's.
        bucket_id: Whose index.
        rows_of: Makes the rows of it of those of the present one.
        prefix: The instance's.
        pointer: What its pointer says instead of the truth.
    """
    with opened(endpoint, bucket_id, prefix) as bucket_client, tempfile.TemporaryDirectory() as directory:
        store = IndexStore(bucket_client, "forger")
        deadline = Deadline.after(SECS)
        info = store.list(deadline).pointer
        assert info is not None
        present, path = store.read_pointer(info, deadline), Path(directory) / "snapshot.npy"
        index_build.fetch_snapshot(bucket_client, store, present, path, deadline)
        rows = rows_of(snapshot_of(path.read_bytes(), "it").rows.copy())
        path.write_bytes(to_bytes(rows))
        built = index_build.BuiltSnapshot(
            path, len(rows), present.covers, present.listed, present.full, heat=present.heat
        )
        made = replace(index_build.put(store, built, deadline), **pointer)
        store.publish(made, deadline)
        return made


def unsorted(rows: Any) -> Any:
    """Rows as no reader takes them, two or more."""
    assert len(rows) > 1
    return rows[::-1]


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


def build_job(depot: Depot, *more: str, code: int = 0) -> Ran:
    ran = depot.run("index", *more)
    assert ran.code == code, ran.stderr
    return ran
