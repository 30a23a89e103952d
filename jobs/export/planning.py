"""Planning of an export."""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from hfbucket_plugin.core.deadline import Deadline
from hfbucket_plugin.core.keys import ContentId, is_probe, parse_key
from hfbucket_plugin.core.units import Extent
from hfbucket_plugin.errors import ConfigError, SafetyError
from hfbucket_plugin.tools.prompts import PromptOrder, classic_hasher, mp_hasher, read_prompts
from hfbucket_plugin.tools.selection import ChunkRef, Selection, in_order, newest_first, within
from jobs.export.plan import CopyItem, ExportTotals, NewNames, OnConflict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from datetime import datetime
    from pathlib import Path

    from hfbucket_plugin.config.instances import InstanceConfig
    from hfbucket_plugin.hub.listing import ChunkEntry
    from jobs.export.endpoint import DestinationEndpoint, EndpointObject, SourceEndpoint
    from jobs.export.plan import ExportHeader, ExportPlanWriter


@dataclass(frozen=True, slots=True)
class WantedChunks:
    """Selection of the chunks of a source.

    Attributes:
        selection: Selection given by flags.
        now: Time from which `since` counts back.
        prompts: Positions of chunks in the selected prompts, if any.
    """

    selection: Selection
    now: datetime
    prompts: PromptOrder | None = None

    def of(self, source: SourceEndpoint, temp_dir: Path, skipped: Counter[str]) -> Iterator[ChunkRef]:
        """Stream the selected chunks; with a limit, in the order of the prompts or newest first.

        Args:
            source: Endpoint to copy from.
            temp_dir: Directory for temporary sort files.
            skipped: Counter of skipped objects: ``not_chosen``, ``probe``, ``not_in_bucket``, ``no_chunk``.

        Raises:
            HFBucketError: If the listing is incomplete.
            OSError: If the disk has no room for sorting.
        """
        selection, prompts = self.selection, self.prompts
        chunks = self._filtered(source.entries(selection, skipped), skipped)

        def cut(ordered: Iterable[ChunkRef]) -> Iterator[ChunkRef]:
            return within(ordered, selection.newest, selection.max_bytes)

        if prompts is not None:
            return in_order(chunks, lambda chunk: (prompts.place(parse_key(chunk.key)) or 0, chunk.key), temp_dir, cut)
        if selection.newest is None and selection.max_bytes is None:
            return chunks
        return in_order(chunks, newest_first, temp_dir, cut)

    def _filtered(self, entries: Iterable[ChunkEntry], skipped: Counter[str]) -> Iterator[ChunkRef]:
        passes = self.selection.filter(self.now)
        for entry in entries:
            if is_probe(entry.text):
                skipped["probe"] += 1
            elif not passes(entry) or (self.prompts is not None and self.prompts.place(entry.key) is None):
                skipped["not_chosen"] += 1
            else:
                content = entry.content
                yield ChunkRef(entry.text, "", content.xet_hash, content.size, entry.uploaded_at)


def prompts_of(selection: Selection, source: InstanceConfig | None, config: Path | None) -> PromptOrder | None:
    """Return the positions of chunks in the prompts of a selection; None if it has no prompts.

    Args:
        selection: Selection of the chunks.
        source: Source instance; None for a directory.
        config: LMCache YAML, which defines how classic engines hash.

    Raises:
        ConfigError: If the prompts cannot be read, or the hash scheme is unknown.
    """
    if selection.prompts is None:
        return None
    if source is None:
        raise ConfigError("--prompts: nothing says how the engine of a directory hashes; export from an instance")
    prompts = read_prompts(selection.prompts)
    first = next(prompts, None)
    if first is None:
        raise ConfigError(f"--prompts {str(selection.prompts)!r} holds no prompt")
    if source.mode == "mp" or config is None:
        hasher = mp_hasher(selection.chunk_size, selection.hash_algorithm)
    else:
        hasher = classic_hasher(config)
    return PromptOrder(itertools.chain([first], prompts), hasher)


PAGE: Final = 1000
"""Number of keys per look-up: the maximum that the Hub accepts."""

_LOOK_UP_SECS: Final = 330.0
"""Timeout of a look-up in seconds: covers the Hub's longest pause, or the hashing of a thousand files."""


class ExportPlanning:
    """Planner that compares the two endpoints, page by page.

    Args:
        header: Header of the plan.
        source: Endpoint to copy from.
        destination: Endpoint to copy to.
        on_conflict: Action for conflicts.
        writer: Writer of the plan.
        tick: Called for every page; what it raises ends the planning.
    """

    def __init__(
        self,
        header: ExportHeader,
        source: SourceEndpoint,
        destination: DestinationEndpoint,
        *,
        on_conflict: OnConflict,
        writer: ExportPlanWriter,
        tick: Callable[[], None],
    ) -> None:
        self._header = header
        self._source = source
        self._destination = destination
        self._on_conflict = on_conflict
        self._writer = writer
        self._tick = tick
        self._chosen = self._same = self._conflicts = Extent()

    def run(self, wanted: WantedChunks, temp_dir: Path) -> None:
        """Compare the endpoints, and write the plan.

        Raises:
            RenameError: If the name of a copy is invalid or already assigned.
            GuardError: If nothing is selected.
            HFBucketError: If an endpoint cannot be listed.
            OSError: If the disk has no room for the plan.
        """
        skipped: Counter[str] = Counter()
        with contextlib.ExitStack() as stack:
            names = stack.enter_context(NewNames()) if self._header.renames.rules else None
            for page in _pages(wanted.of(self._source, temp_dir, skipped)):
                self._tick()
                self._compare({self._named(chunk, names): chunk for chunk in page})
        if not self._chosen.objects:
            passed_by = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()))
            raise SafetyError(
                f"{self._source.name} has no chunk that was chosen{f' ({passed_by})' if passed_by else ''}: nothing is "
                "copied. Is that the right end, and the right choice?"
            )
        self._writer.finish(
            ExportTotals(self._chosen, dict(self._writer.planned), self._same, self._conflicts, dict(skipped))
        )

    def _named(self, chunk: ChunkRef, names: NewNames | None) -> str:
        to = self._header.renames(chunk.key)
        if names is not None:
            names.give(to, chunk.key)
        return to

    def _compare(self, page: dict[str, ChunkRef]) -> None:
        held = self._destination.look_up(list(page), Deadline.patient(_LOOK_UP_SECS))
        for to, chunk in page.items():
            self._chosen = self._chosen.plus(chunk.size)
            there = held.get(to)
            copy_item = CopyItem(chunk.key, to, ContentId(chunk.xet_hash, chunk.size), chunk.uploaded_at, there)
            if there is None or (there.content != copy_item.content and self._replaces(copy_item, there)):
                self._writer.add(copy_item)
            elif there.content == copy_item.content:
                self._same = self._same.plus(chunk.size)
            else:
                self._conflicts = self._conflicts.plus(chunk.size)
                self._writer.name_conflict(copy_item)

    def _replaces(self, copy_item: CopyItem, there: EndpointObject) -> bool:
        if self._on_conflict is OnConflict.NEWER:
            return (
                copy_item.uploaded_at is not None
                and there.uploaded_at is not None
                and copy_item.uploaded_at > there.uploaded_at
            )
        return self._on_conflict is OnConflict.OVERWRITE


def _pages(chunks: Iterable[ChunkRef]) -> Iterator[list[ChunkRef]]:
    chunks = iter(chunks)
    while page := list(itertools.islice(chunks, PAGE)):
        yield page
