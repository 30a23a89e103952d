"""Prompts that a node replays through an engine to load them into the engine's memory."""

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
"""Maximum tokens of a batch, a quarter of a MiB; a longer prompt goes alone."""

_CACHED_BATCHES: Final = 16


@dataclass(frozen=True, slots=True)
class AskedPrompt:
    """Prompt that a server must load. It is sent to the nodes.

    Attributes:
        line: Line number in the file, from 1.
        model: Name of the model.
        salt: `cache_salt` of the prompt; empty for none.
        token_ids: Tokens, 4 bytes each.
    """

    line: int
    model: str
    salt: str
    token_ids: array[int]


Batch = tuple[AskedPrompt, ...]


class PromptFile:
    """File of prompts, each for a known model. The file is kept open, so replacing it has no effect.

    Args:
        path: Path of the file.
        models: Models whose prompts are used; all if empty. A single model also applies to prompts that name none.
        chunk_size: Tokens of a chunk.

    Attributes:
        path: Path of the file.
        prompts: Number of prompts, by model.
        chunks: Number of full chunks of all prompts, by model; a chunk that several prompts share counts for each.
        sha256: SHA-256 of the file, in hexadecimal.

    Raises:
        ConfigError: The file cannot be read, a line is not a valid prompt, or a prompt names no model.
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
        """Return the number of batches."""
        return len(self._segments)

    def batch(self, index: int) -> Batch:
        """Read the prompts of one batch.

        Raises:
            RefusedError: The file has changed since it was opened.
            PlanLostError: The file can no longer be read.
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
    """Return the SHA-256 of a prompt file, in hexadecimal.

    Raises:
        ConfigError: The file cannot be read.
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
    """Check that prompts are those from which a plan was made.

    Args:
        found: Present prompts.
        recorded: Fields `path` and `sha256` that the plan records; None if the plan records no prompts.
        plan: Path of the plan, for errors.

    Raises:
        ConfigError: The prompts differ.
    """
    if recorded is None:
        raise ConfigError(f"plan {str(plan)!r} does not say of which prompts it was made: make a new plan")
    if recorded.get("sha256") != found.sha256:
        raise ConfigError(
            f"--prompts {str(found.path)!r} is not the file any more of which plan {str(plan)!r} was made: make a new plan"
        )


@dataclass(frozen=True, slots=True)
class PromptLoad:
    """Result of loading one prompt on a node.

    Attributes:
        line: Line number in the prompt file.
        model: Name of the prompt's model.
        chunks: Full chunks of the prompt.
        copied: Chunks that were loaded.
        present: Chunks that were present before, as far as this is known.
        bytes: Bytes of the loaded chunks.
        ended: `complete`, or why chunks are lacking: `missing`, `no_room`, `config` for a prompt that was refused, or
            `engine` for a failure of the server.
        message: Reason in words; empty if complete.
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
        """Number of chunks that are absent."""
        return self.chunks - self.copied - self.present


@dataclass(frozen=True, slots=True)
class L1Task:
    """Configuration of a node that loads prompts. It is sent to the nodes.

    Attributes:
        tier: Declaration of the L1 tier.
        models: Names of the prompts' models.
        world_size: Workers of each engine.
        chunk_size: Tokens of a chunk, with which the prompts were counted.
        hash_algorithm: Hash algorithm with which the directories were filled.
        wait_secs: Maximum seconds to wait for the server, and for an engine.
        load_secs: Maximum seconds of one load.
    """

    tier: L1Declaration
    models: tuple[str, ...]
    world_size: int
    chunk_size: int
    hash_algorithm: str
    wait_secs: float
    load_secs: float

    def begin(self, place: NodeInfo) -> tuple[frozenset[str], Callable[[Batch], list[PromptLoad]]]:
        """Wait for the engine, on the node; return the models that it serves, and a function that loads their prompts.

        Raises:
            EngineError: The server does not answer in time, or serves none of the models.
            ConfigError: The server splits or hashes prompts differently, or the node has no value for a placeholder.
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
        server: Client of the server.
        address: Address of the server, for messages.
        models: Models served there; prompts of other models are skipped.
        world_size: Workers of each engine.
    """

    def __init__(self, server: L1Server, address: str, models: frozenset[str], world_size: int) -> None:
        self._server = server
        self._address = address
        self._models = models
        self._world_size = world_size
        self._failures = 0  # consecutive prompts that failed because of the server
        self._broken: EngineError | None = None

    def __call__(self, batch: Batch) -> list[PromptLoad]:
        """Load the prompts of a batch and return the results; prompts of models that are not served are skipped.

        A prompt on which the server fails does not affect the others. After several consecutive failures, the rest of the
        batch fails too.

        Raises:
            EngineError: The server failed for several consecutive prompts of the previous batch.
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
