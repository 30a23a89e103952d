"""Prompts on their way to engines: a file of any length, read batch by batch, and known again by its digest.

A server loads for prompts what it holds of them, so the prompts themselves have to reach the nodes. Where each batch
begins is remembered, and not what it holds: nodes that keep pace share one reading of a batch, others read it again.
"""

from __future__ import annotations

import hashlib
import io
from array import array
from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from hfbucket_plugin.errors import ConfigError
from warmer.errors import PlanLostError
from warmer.prompts import located_prompts, open_prompts, prompt_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from warmer.prompts import Prompt

BATCH_PROMPTS: Final = 16
BATCH_TOKENS: Final = 65_536
"""Most tokens of a batch, a quarter of a MiB; a longer prompt goes alone."""

_CACHED_BATCHES: Final = 16


@dataclass(frozen=True, slots=True)
class AskedPrompt:
    """One prompt that a server is to load. It crosses to the nodes.

    Attributes:
        line: Its number in the file, from 1.
        model: The model's name.
        salt: Its `cache_salt`, empty for none.
        token_ids: Its tokens, 4 bytes each.
    """

    line: int
    model: str
    salt: str
    token_ids: array[int]


Batch = tuple[AskedPrompt, ...]


@dataclass(slots=True)
class _Start:
    """Of a batch in the file: the byte and the line, and of all that stands from there up to the next one, length and SHA-256."""

    byte: int
    line: int
    length: int = 0
    digest: Any = field(default_factory=hashlib.sha256)


class PromptFile:
    """A file of prompts, each of a model that is known. It is held open: another file in its place changes nothing.

    Args:
        path: Of the file.
        models: Only prompts of these models, where any are given; a single one is also that of prompts that name none.
        chunk_size: Tokens of a chunk.

    Attributes:
        path: Of the file.
        prompts: How many there are, by model.
        chunks: The full chunks of all of them, by model: one that several prompts share counts for each.
        sha256: Of the file's bytes, in hexadecimal.

    Raises:
        ConfigError: It cannot be read, a line is no prompt, or a prompt names no model.
    """

    def __init__(self, path: Path, models: Sequence[str], chunk_size: int) -> None:
        self.path = path
        self._file = open_prompts(path)
        self._models = tuple(dict.fromkeys(models))
        self.prompts: Counter[str] = Counter()
        self.chunks: Counter[str] = Counter()
        self._starts: list[_Start] = []
        self._cached: OrderedDict[int, Batch] = OrderedDict()
        digest = hashlib.sha256()
        count = tokens = 0
        for one in located_prompts(self._file, path):
            digest.update(one.raw)
            asked = None if one.prompt is None else self._asked(one.line, one.prompt)
            if asked is None:
                self._sum_up(one.raw)
                continue
            if not self._starts or count == BATCH_PROMPTS or tokens + len(asked.token_ids) > BATCH_TOKENS:
                self._starts.append(_Start(one.start, one.line))
                count = tokens = 0
            self._sum_up(one.raw)
            count, tokens = count + 1, tokens + len(asked.token_ids)
            self.prompts[asked.model] += 1
            self.chunks[asked.model] += len(asked.token_ids) // chunk_size
        self.sha256 = digest.hexdigest()

    def _sum_up(self, raw: bytes) -> None:
        if self._starts:
            self._starts[-1].length += len(raw)
            self._starts[-1].digest.update(raw)

    @property
    def batches(self) -> int:
        """How many batches there are."""
        return len(self._starts)

    def batch(self, index: int) -> Batch:
        """The prompts of one batch.

        Raises:
            RefusedError: The file is not what it was any more.
            PlanLostError: The file cannot be read any more.
        """
        found = self._cached.get(index)
        if found is None:
            found = self._cached[index] = tuple(self._read(index))
            if len(self._cached) > _CACHED_BATCHES:
                self._cached.popitem(last=False)
        return found

    def _read(self, index: int) -> Iterator[AskedPrompt]:
        start = self._starts[index]
        try:
            whole = self._file.again(start.byte, start.length, start.digest.digest())
        except OSError as error:
            raise PlanLostError(f"--prompts {str(self.path)!r} cannot be read any more: {error.strerror}") from None
        for number, raw in enumerate(io.BytesIO(whole), start.line):
            prompt = prompt_of(raw)
            asked = None if prompt is None else self._asked(number, prompt)
            if asked is not None:
                yield asked

    def _asked(self, line: int, prompt: Prompt) -> AskedPrompt | None:
        model = prompt.model or (self._models[0] if len(self._models) == 1 else None)
        if model is None:
            raise ConfigError(
                f"--prompts {str(self.path)!r}, line {line}: an engine is asked for prompts of its model, and this one "
                'names none; write "model" into each line, or give --model once'
            )
        if self._models and model not in self._models:
            return None
        return AskedPrompt(line, model, prompt.cache_salt or "", array("I", prompt.token_ids))


def digest_of(path: Path) -> str:
    """The SHA-256 of a file of prompts, in hexadecimal.

    Raises:
        ConfigError: It cannot be read.
    """
    digest, file = hashlib.sha256(), open_prompts(path)
    try:
        for line in file.raw_lines():
            digest.update(line)
    except OSError as error:
        raise ConfigError(f"--prompts {str(path)!r} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"--prompts {str(path)!r}: {error}") from None
    return digest.hexdigest()


def expect_recorded(found: PromptFile, recorded: Mapping[str, str] | None, plan: Path) -> None:
    """Make sure that prompts are those of which a plan was made.

    Args:
        found: The prompts by now.
        recorded: What the plan says of them: `path` and `sha256`; None where the plan has nothing of it.
        plan: The plan's file, for errors.

    Raises:
        ConfigError: They are others.
    """
    if recorded is None:
        raise ConfigError(f"plan {str(plan)!r} does not say of which prompts it was made: plan anew")
    if recorded.get("sha256") != found.sha256:
        raise ConfigError(
            f"--prompts {str(found.path)!r} is not the file any more of which plan {str(plan)!r} was made: plan anew"
        )
