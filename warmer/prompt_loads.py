"""Loads prompts into the L1 of one node's `lmcache server`. Plain Python: `warmer.errands` makes an actor's work of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hfbucket_plugin.deadlines import Deadline
from hfbucket_plugin.errors import ConfigError
from warmer.errors import EngineError
from warmer.tiers.engine_http import FAILURES
from warmer.tiers.l1 import L1Server

if TYPE_CHECKING:
    from collections.abc import Callable

    from hfbucket_plugin.errors import HFBucketError
    from warmer.prompt_file import AskedPrompt, Batch
    from warmer.tiers import L1Declaration, Place


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
class L1Errand:
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

    def begin(self, place: Place) -> tuple[frozenset[str], Callable[[Batch], list[PromptLoad]]]:
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
        models: Those that are served there: prompts of others are passed by.
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
