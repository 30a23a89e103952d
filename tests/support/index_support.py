"""A builder of key indexes for tests, and what tests ask of an index."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dev.faults.surface import counted
from hfbucket_plugin.core import telemetry
from hfbucket_plugin.core.deadline import Deadline
from hfbucket_plugin.index import build as index_build
from hfbucket_plugin.index.format import snapshot_of, to_bytes
from hfbucket_plugin.index.store import IndexStore
from tests.support.plugin_support import eventually, opened
from tests.support.surface_support import PREFIX, store_of

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Callable

    from hfbucket_plugin.index.format import Pointer
    from hfbucket_plugin.index.reader import KeyIndex

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
