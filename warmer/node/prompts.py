"""Prompts that a node replays through an engine."""

from __future__ import annotations

import hashlib
import io
from array import array
from collections import Counter, OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from hfbucket_plugin.core.deadline import Deadline
from hfbucket_plugin.errors import ConfigError
from hfbucket_plugin.tools.plan_file import Segment
from hfbucket_plugin.tools.prompts import located_prompts, open_prompts, prompt_of
from warmer.report.outcomes import EngineError, PlanLostError
from warmer.tiers.engine_http import FAILURES
from warmer.tiers.l1 import L1Server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from hfbucket_plugin.errors import HFBucketError
    from hfbucket_plugin.tools.prompts import Prompt
    from warmer.tiers import L1Declaration, NodeInfo


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
        self._segments: list[Segment] = []
        self._cached: OrderedDict[int, Batch] = OrderedDict()
        digest = hashlib.sha256()
        count = tokens = 0
        for one in located_prompts(self._file, path):
            digest.update(one.raw)
            asked = None if one.prompt is None else self._asked(one.line, one.prompt)
            if asked is None:
                self._sum_up(one.raw)
                continue
            if not self._segments or count == BATCH_PROMPTS or tokens + len(asked.token_ids) > BATCH_TOKENS:
                self._segments.append(Segment(one.start, one.line))
                count = tokens = 0
            self._sum_up(one.raw)
            count, tokens = count + 1, tokens + len(asked.token_ids)
            self.prompts[asked.model] += 1
            self.chunks[asked.model] += len(asked.token_ids) // chunk_size
        self.sha256 = digest.hexdigest()

    def _sum_up(self, raw: bytes) -> None:
        if self._segments:
            self._segments[-1].add(raw)

    @property
    def batches(self) -> int:
        """How many batches there are."""
        return len(self._segments)

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
        start = self._segments[index]
        try:
            whole = self._file.again(start)
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
        raise ConfigError(f"plan {str(plan)!r} does not say of which prompts it was made: make a new plan")
    if recorded.get("sha256") != found.sha256:
        raise ConfigError(
            f"--prompts {str(found.path)!r} is not the file any more of which plan {str(plan)!r} was made: make a new plan"
        )


@dataclass(frozen=True, slots=True)
class PromptLoad:
    """What became of one prompt on a node.

    Attributes:
        line: Of the file of prompts.
        model: The prompt's.
        chunks: Full chunks of the prompt.
        copied: Of these, those that were loaded.
        present: Those that were there before, as far as it shows.
        bytes: What those loaded take.
        ended: `complete`; or why the rest is not there: `missing`, `no_room`, `config` for a prompt that is refused, or `engine`
            where the server did not do it.
        message: Why, in words; empty when it is complete.
    """

    line: int
    model: str
    chunks: int
    copied: int
    present: int
    bytes: int
    ended: str
    message: str

    @property
    def lacking(self) -> int:
        """Chunks that are not there."""
        return self.chunks - self.copied - self.present


@dataclass(frozen=True, slots=True)
class L1Task:
    """What a node needs to know to load prompts. It crosses to the nodes.

    Attributes:
        tier: Which L1.
        models: Names of the prompts' models.
        world_size: Workers of the engines.
        chunk_size: Tokens of a chunk, as the prompts were counted.
        hash_algorithm: As directories were filled by it.
        wait_secs: How long to wait for the server, and for an engine.
        load_secs: Most seconds that one load may take.
    """

    tier: L1Declaration
    models: tuple[str, ...]
    world_size: int
    chunk_size: int
    hash_algorithm: str
    wait_secs: float
    load_secs: float

    def begin(self, place: NodeInfo) -> tuple[frozenset[str], Callable[[Batch], list[PromptLoad]]]:
        """Wait for the engine, on the node; returns the models that are there, and what loads prompts of these.

        Raises:
            EngineError: The server is not there in time, or none of the models.
            ConfigError: The server cuts or hashes prompts in another way; or the node has no value for a placeholder.
        """
        address = self.tier.address(place)
        server = L1Server(address, load_secs=self.load_secs)
        ends = Deadline.after(self.wait_secs)
        layout = server.layout(ends)
        for flag, theirs, ours in (
            ("--chunk-size", layout.chunk_size, self.chunk_size),
            ("--hash-algorithm", layout.hash_algorithm or self.hash_algorithm, self.hash_algorithm),
        ):
            if theirs != ours:
                raise ConfigError(f"the server at {address} has {flag} {theirs}, and the prompts were read by {ours}")
        there = server.wait(self.models, self.world_size, ends)
        return there, PromptLoader(server, address, there, self.world_size)


def _failed(prompt: AskedPrompt, chunks: int, error: HFBucketError) -> PromptLoad:
    return PromptLoad(prompt.line, prompt.model, chunks, 0, 0, 0, error.kind, str(error))


class PromptLoader:
    """Loads batches of prompts into one server.

    Args:
        server: Which.
        address: Its address, for messages.
        models: Those that are served there: prompts of others are skipped.
        world_size: Workers of the engines.
    """

    def __init__(self, server: L1Server, address: str, models: frozenset[str], world_size: int) -> None:
        self._server = server
        self._address = address
        self._models = models
        self._world_size = world_size
        self._failures = 0  # prompts in a row that failed for the server
        self._broken: EngineError | None = None

    def __call__(self, batch: Batch) -> list[PromptLoad]:
        """Load the prompts of a batch; what is returned leaves out those of other models.

        A prompt for which the server does not do it fails alone. After some in a row the rest of the batch fails with it.

        Raises:
            EngineError: The server did not do it for several prompts in a row, in the batch before.
        """
        if self._broken is not None:
            raise self._broken
        return [self._load(prompt) for prompt in batch if prompt.model in self._models]

    def _load(self, prompt: AskedPrompt) -> PromptLoad:
        chunks = len(prompt.token_ids) // self._server.layout(Deadline.after(0.0)).chunk_size
        if self._broken is not None:
            return _failed(prompt, chunks, self._broken)
        try:
            warmed = self._server.load(prompt.model, self._world_size, prompt.token_ids, prompt.salt)
        except ConfigError as error:
            return _failed(prompt, chunks, error)
        except EngineError as error:
            self._failures += 1
            if self._failures >= FAILURES:
                self._broken = EngineError(f"{self._failures} loads failed one after the other, the last one: {error}")
            return _failed(prompt, chunks, error)
        self._failures = 0
        words = {
            "complete": "",
            "missing": f"the L2 tiers of the server at {self._address} do not hold chunk {warmed.warmed} of {chunks}",
            "no_room": f"L1 of the server at {self._address} has room for {warmed.warmed} of {chunks} chunks",
        }
        return PromptLoad(
            prompt.line,
            prompt.model,
            chunks,
            warmed.loaded,
            warmed.warmed - warmed.loaded,
            warmed.loaded_bytes,
            warmed.ended,
            words[warmed.ended],
        )
