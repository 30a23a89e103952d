"""Command `ls`: the keys of instances, streamed as records or rows."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from hfbucket_plugin.cli.findings import as_text
from hfbucket_plugin.core import units
from hfbucket_plugin.core.keys import ClassicKey, MPKey
from hfbucket_plugin.errors import HFBucketError
from hfbucket_plugin.hub.connect import opened
from hfbucket_plugin.tools import console, options
from hfbucket_plugin.tools.inventory import Classifier, ListedObject, ObjectKind

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hfbucket_plugin.config.instances import InstanceConfig
    from hfbucket_plugin.hub.bucket import Bucket
    from hfbucket_plugin.hub.listing import ChunkEntry


_WIDTHS: Final = (12, 7, 24, 5, 6, 8, 10, 7, 25)
HEADER: Final = ("INSTANCE", "KIND", "MODEL", "WORLD", "WORKER", "PART", "SIZE", "AGE", "UPLOADED", "KEY")


class Keys:
    """Keys of one instance.

    Args:
        bucket: Client of its bucket.
        key_prefix: Prefix of the keys; empty for all.
        page_secs: Timeout of a listing page, in seconds.
        model: Model of the keys; None for all models.

    Attributes:
        passed_by: Number of listed objects that are not keys so far, by kind.
    """

    def __init__(self, bucket: Bucket, key_prefix: str, page_secs: float, model: str | None = None) -> None:
        self._listed = Classifier(bucket).walk(page_secs, key_prefix=key_prefix, model=model)
        self.passed_by: Counter[ObjectKind] = Counter()

    def __iter__(self) -> Iterator[tuple[ListedObject, ChunkEntry]]:
        """Stream the keys.

        Raises:
            HFBucketError: If a page cannot be listed, so that keys are missing.
        """
        for listed in self._listed:
            if listed.chunk is None:
                self.passed_by[listed.shown_kind] += 1
            else:
                yield listed, listed.chunk


def record(instance: str, kind: ObjectKind, chunk: ChunkEntry, now: datetime) -> dict[str, Any]:
    """Return the JSON record of a key."""
    key, uploaded = chunk.key, chunk.uploaded_at
    return {
        "instance": instance,
        "key": chunk.text,
        "kind": str(kind),
        "model": key.model,
        "world_size": key.world_size,
        "worker": key.worker_id,
        "layer": key.layer_id if isinstance(key, ClassicKey) else None,
        "group": key.group if isinstance(key, MPKey) else None,
        "size": chunk.content.size,
        "xet_hash": chunk.content.xet_hash,
        "uploaded_at": units.instant(uploaded),
        "age_seconds": max(0, round((now - uploaded).total_seconds())) if uploaded is not None else None,
    }


def row(instance: str, kind: ObjectKind, chunk: ChunkEntry, now: datetime) -> tuple[str, ...]:
    """Return the table row of a key, with the columns of `HEADER`."""
    key = chunk.key
    uploaded = chunk.uploaded_at.astimezone(UTC) if chunk.uploaded_at is not None else None
    cells = (
        instance,
        str(kind),
        key.model,
        str(key.world_size),
        str(key.worker_id),
        _part(chunk),
        units.size(chunk.content.size),
        units.age(uploaded, now),
        units.instant(uploaded) or "-",
        chunk.text,
    )
    return tuple(units.printable(cell) for cell in cells)


def _part(chunk: ChunkEntry) -> str:
    if isinstance(chunk.key, MPKey):
        return f"group {chunk.key.group}"
    return "-" if chunk.key.layer_id is None else f"layer {chunk.key.layer_id}"


def aligned(cells: tuple[str, ...]) -> str:
    """Align cells in columns of fixed width, because later rows are not known: a long cell shifts its own row."""
    *most, last = cells
    return " ".join([cell.ljust(width) for cell, width in zip(most, _WIDTHS, strict=True)] + [last])


def ls(  # noqa: PLR0917 - Typer makes options of them
    lmcache_config: options.LMCacheConfig = None,
    instances: options.Instances = None,
    l2_adapters: options.L2Adapters = None,
    model: options.Model = None,
    prefix: options.Prefix = None,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Stop after N keys, of all instances together.")
    ] = None,
    as_json: options.AsJson = False,
    timeout: options.Timeout = options.DEFAULT_TIMEOUT_SECS,
) -> None:
    """List the keys of instances, as they come; with --json, one line each. What is no key is counted on stderr.

    Exits 0, or 1 when --model or --prefix selects nothing, 2 for a wrong command or configuration, 3 when a listing is
    not complete.
    """
    start = options.key_prefix(model, prefix)
    chosen = options.chosen(lmcache_config, instances, l2_adapters)
    shown = _Shown(limit, model, as_json=as_json)
    with console.results():
        if not as_json and console.stdout_console().is_terminal:
            console.line(aligned(HEADER))
        for named in chosen:
            if not shown.enough:
                shown.add(named, start, timeout)
    raise typer.Exit(options.listing_code(start, failed=shown.failed, empty=not shown.keys))


class _Shown:
    """Output of several instances.

    Attributes:
        keys: Number of keys shown.
        failed: Whether a listing is incomplete.
    """

    def __init__(self, limit: int | None, model: str | None, *, as_json: bool) -> None:
        self._limit = limit
        self._model = model
        self._as_json = as_json
        self.keys = 0
        self.failed = False

    @property
    def enough(self) -> bool:
        """Whether the limit is reached."""
        return self.keys == self._limit

    def add(self, named: InstanceConfig, start: str, timeout: float) -> None:
        """Show the keys of an instance."""
        now = datetime.now(UTC)
        with opened(named, timeout) as bucket:
            keys = Keys(bucket, start, timeout, self._model)
            try:
                for listed, chunk in keys:
                    if self._as_json:
                        console.json_line(record(named.name, listed.shown_kind, chunk, now))
                    else:
                        console.line(aligned(row(named.name, listed.shown_kind, chunk, now)))
                    self.keys += 1
                    if self.enough:
                        break
            except HFBucketError as error:
                self.failed = True
                console.print_error(f"the listing is not complete: {as_text(error, named)}")
        if keys.passed_by:
            skipped = ", ".join(kind.counted(number) for kind, number in sorted(keys.passed_by.items()))
            console.print_error(f"instance {named.name!r}: objects that are no keys: {skipped}")
