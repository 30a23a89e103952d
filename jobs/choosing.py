"""What an export is about: the warmer's choice, carried out on the source of an export, for keys of both kinds."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import ValidationError

from hfbucket_plugin.errors import ConfigError
from hfbucket_plugin.keys import is_probe, parse_key
from warmer.choose import Choice
from warmer.flags import flags_of, nested
from warmer.ordered import in_order, newest_first, within
from warmer.plan import PlannedChunk
from warmer.prompts import PromptOrder, classic_hasher, mp_hasher, read_prompts

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Iterable, Iterator, Mapping
    from datetime import datetime
    from pathlib import Path
    from typing import Any

    from hfbucket_plugin.catalog import ChunkEntry
    from hfbucket_plugin.named import NamedInstance
    from jobs.ends import Source
    from warmer.flags import Flag

CHOOSING = tuple(flag for flag in flags_of("choose") if flag.name != "--hottest")
"""The warmer's flags that say which chunks. An export goes by what is there, not by what was read: its budget takes the newest."""


def choice_of(given: Mapping[Flag, Any]) -> Choice:
    """The choice that flags state; without any, all chunks.

    Raises:
        ConfigError: Some are wrong; all of them are named.
    """
    values = nested(given).get("choose", {})
    flags = {flag.place[1]: flag.name for flag in CHOOSING}
    try:
        return Choice.model_validate(values)
    except ValidationError as error:
        problems = [
            (str(item["loc"][0]) if item["loc"] else "", item["msg"].removeprefix("Value error, "))
            for item in error.errors(include_url=False, include_input=False)
        ]
    raise ConfigError("; ".join(f"{flags.get(name, name)}: {words}" if name else words for name, words in problems))


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which chunks of a source.

    Attributes:
        choice: As flags state it.
        now: What `since` counts back from.
        prompts: Where chunks stand among the prompts, when the choice names some.
    """

    choice: Choice
    now: datetime
    prompts: PromptOrder | None = None

    def of(self, source: Source, scratch: Path, skipped: Counter[str]) -> Iterator[PlannedChunk]:
        """Stream what is wanted; in order where the choice cuts it: as the prompts have them, or the newest first.

        Args:
            source: Where chunks come from.
            scratch: A file to sort in.
            skipped: What is passed by is counted there: ``not_chosen``, ``probe``, ``not_in_bucket``, ``no_chunk``.

        Raises:
            HFBucketError: The listing is not complete.
            OSError: There is no room to sort in.
        """
        choice, prompts = self.choice, self.prompts
        chunks = self._filtered(source.entries(choice, skipped), skipped)

        def cut(ordered: Iterable[PlannedChunk]) -> Iterator[PlannedChunk]:
            return within(ordered, choice.newest, choice.max_bytes)

        if prompts is not None:
            return in_order(chunks, lambda chunk: prompts.place(parse_key(chunk.key)) or 0, scratch, cut)
        if choice.newest is None and choice.max_bytes is None:
            return chunks
        return in_order(chunks, newest_first, scratch, cut)

    def _filtered(self, entries: Iterable[ChunkEntry], skipped: Counter[str]) -> Iterator[PlannedChunk]:
        passes = self.choice.filter(self.now)
        for entry in entries:
            if is_probe(entry.text):
                skipped["probe"] += 1
            elif not passes(entry) or (self.prompts is not None and self.prompts.place(entry.key) is None):
                skipped["not_chosen"] += 1
            else:
                content = entry.content
                yield PlannedChunk(entry.text, "", content.xet_hash, content.size, entry.uploaded_at)


def prompts_of(choice: Choice, source: NamedInstance | None, config: Path | None) -> PromptOrder | None:
    """Where chunks stand among the prompts that a choice names; None where it names none.

    Args:
        choice: Which chunks.
        source: The instance; None for a directory.
        config: The LMCache YAML, which says how classic engines hash.

    Raises:
        ConfigError: The prompts cannot be read, or nothing says how they are hashed.
    """
    if choice.prompts is None:
        return None
    if source is None:
        raise ConfigError("--prompts: nothing says how the engine of a directory hashes; export from an instance")
    prompts = read_prompts(choice.prompts)
    first = next(prompts, None)
    if first is None:
        raise ConfigError(f"--prompts {str(choice.prompts)!r} holds no prompt")
    if source.mode == "mp" or config is None:
        hasher = mp_hasher(choice.chunk_size, choice.hash_algorithm)
    else:
        hasher = classic_hasher(config)
    return PromptOrder(itertools.chain([first], prompts), hasher)
