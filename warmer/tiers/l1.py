"""The memory of `lmcache server` (its L1) as a tier: loaded by itself, from its own L2 tiers, for prompts that it is told.

Follows `lmcache/v1/multiprocess/http_apis/cache_api.py` of LMCache 0.5.6. The server takes token ids and no keys, tells
how many of a prompt's keys it has in L1 after a load, and reserves room for all of them or for none. From a watermark
on it evicts a fifth of L1, and so what was just loaded. A prompt is therefore loaded in growing prefixes, as long as L1
stays below the watermark: what there is then is always a prefix, which is what an engine can use.

What is in L1 already takes no room, but the server tells of it only when it is asked to load it. So a prompt is not
followed to its end in an L1 that has no room left, though all of it may be there.
"""

from __future__ import annotations

import contextlib
import functools
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, Self

from hfbucket_plugin.core.deadline import Deadline
from warmer.report.outcomes import EngineError
from warmer.tiers.engine_http import EngineHTTP, NotReadyError, once_more, when_ready

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_POLL_SECS: Final = 0.02
_LARGEST_STEP: Final = 64
"""Chunks: so many are loaded for nothing at most when one before them is missing."""

_OTHERS_SECS: Final = 30.0
"""How long a server on which one engine is there is waited at for other engines."""

_UNSEEN: Final = 2
"""Until a chunk was seen to take room, it is taken to be so many times the mean of what L1 holds."""


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """What L1 holds of a prompt.

    Attributes:
        chunks: Full chunks of the prompt.
        warmed: How many of them, from its start, are known to be in L1 for all ranks.
        ended: Why no more are: `complete`, `missing` (the server's L2 tiers do not hold the next one) or `no_room`.
        used_bytes: Of L1, in the end.
        total_bytes: Of L1.
        loaded: Those of `warmed` that were not there before, by the room that they took: what the server itself stores or
            evicts meanwhile may blur it.
        loaded_bytes: What they took.
    """

    chunks: int
    warmed: int
    ended: Literal["complete", "missing", "no_room"]
    used_bytes: int
    total_bytes: int
    loaded: int = 0
    loaded_bytes: int = 0


@dataclass(frozen=True, slots=True)
class ServerLayout:
    """How a server cuts and hashes prompts.

    Attributes:
        chunk_size: Tokens of a chunk.
        hash_algorithm: As `--hash-algorithm` of `lmcache server` names it; empty when the server does not tell.
    """

    chunk_size: int
    hash_algorithm: str


class L1Server:
    """The L1 of one server. Use it as a context manager, from one thread.

    Args:
        http: Address of the server's HTTP, such as `http://127.0.0.1:8080`.
        load_secs: Most seconds that one load may take.
        pause: Waits; given the seconds. It may raise to give up.

    Raises:
        ConfigError: The address is none.
    """

    def __init__(self, http: str, *, load_secs: float = 120.0, pause: Callable[[float], object] = time.sleep) -> None:
        self._server = EngineHTTP(http)
        self._load_secs = load_secs
        self._pause = pause
        self._layout: ServerLayout | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._server.__exit__(*error)

    def layout(self, ends: Deadline) -> ServerLayout:
        """How the server cuts and hashes; asked once.

        Args:
            ends: How long to wait for the server.

        Raises:
            EngineError: It is not there in time.
        """
        if self._layout is None:
            status = when_ready(lambda: self._server.ask("GET", "/status"), ends, self._pause)
            try:
                self._layout = ServerLayout(int(status["chunk_size"]), str(status.get("hash_algorithm") or ""))
            except (KeyError, TypeError, ValueError) as error:
                raise EngineError(
                    f"{self._server.address}/status: the answer is not that of `lmcache server`: {type(error).__name__} {error}"
                ) from None
        return self._layout

    def wait(self, models: Sequence[str], world_size: int, ends: Deadline) -> frozenset[str]:
        """Wait until engines have registered with the server.

        Args:
            models: Names of models, as engines tell them.
            world_size: Workers of each engine.
            ends: How long to wait for the first. Others have 30 s more: one that does not come serves elsewhere.

        Returns:
            Which of the models are there.

        Raises:
            EngineError: None is there in time.
        """
        there = {when_ready(lambda: self._one_of(models, world_size), ends, self._pause)}
        others = Deadline.after(min(ends.remaining(), _OTHERS_SECS))
        while len(there) < len(set(models)):
            there |= {model for model in models if model not in there and self._has(model, world_size)}
            if others.passed:
                break
            if len(there) < len(set(models)):
                self._pause(min(1.0, others.remaining()))
        return frozenset(there)

    def _one_of(self, models: Sequence[str], world_size: int) -> str:
        for model in models[:-1]:
            if self._has(model, world_size):
                return model
        self._loader(models[-1], world_size).begin_nothing()
        return models[-1]

    def _has(self, model: str, world_size: int) -> bool:
        try:
            self._loader(model, world_size).begin_nothing()
        except NotReadyError:
            return False
        return True

    def load(self, model: str, world_size: int, token_ids: Sequence[int], salt: str = "") -> LoadProgress:
        """Load a prompt, as far as there is room. Waits for no engine.

        Args:
            model: The model's name, as the engine tells it.
            world_size: Workers of the engine.
            token_ids: The prompt.
            salt: Its `cache_salt`.

        Raises:
            EngineError: The server or the model is not there, or a load does not end.
            ConfigError: The server refuses the request: a salt that cannot be, or too many tokens.
        """
        loader = self._loader(model, world_size, salt)
        chunk_size = self.layout(Deadline.after(0.0)).chunk_size
        chunks = len(token_ids) // chunk_size
        if not chunks:
            room = loader.room()
            return LoadProgress(0, 0, "complete", room.used, room.total)
        return _grow(loader, list(token_ids[: chunks * chunk_size]), chunk_size)

    def _loader(self, model: str, world_size: int, salt: str = "") -> _Loader:
        request = {"model_name": model, "world_size": world_size, "cache_salt": salt}
        return _Loader(self._server, request, self._load_secs, self._pause)


@dataclass(frozen=True, slots=True)
class _Room:
    """How full L1 is: bytes, and the mean of an object's."""

    used: int
    total: int
    free: int
    mean: int


@dataclass(frozen=True, slots=True)
class _Load:
    """How a load ended."""

    found: int
    keys: int

    @property
    def complete(self) -> bool:
        return self.found == self.keys


class _ForgottenError(EngineError):
    """The server knows a load no longer, an answer about which was lost."""


class _Loader:
    """One model on one server."""

    def __init__(
        self, server: EngineHTTP, request: dict[str, Any], load_secs: float, pause: Callable[[float], object]
    ) -> None:
        self._server = server
        self._request = request
        self._load_secs = load_secs
        self._pause = pause
        self._doubted = False  # whether an answer about the present load was lost

    @property
    def least_keys(self) -> int:
        """Objects of a chunk, at least: one of each worker."""
        return int(self._request["world_size"])

    def room(self) -> _Room:
        """What L1 may take before it evicts; of several, the fullest."""
        answer = self._again("GET", "/status", Deadline.after(self._load_secs))
        rooms = []
        with self._understood("/status"):
            status = answer["storage_manager"]
            for name, one in status["l1_managers"].items():
                watermark = status["l1_eviction_controllers"].get(name, {}).get("trigger_watermark", 1.0)
                used, total = int(one["memory_used_bytes"]), int(one["memory_total_bytes"])
                mean = used // one["total_object_count"] if one["total_object_count"] else 0
                rooms.append(_Room(used, total, int(watermark * total) - used - 1, mean))
            return min(rooms, key=lambda room: room.free)

    def _again(self, method: str, path: str, ends: Deadline, body: dict[str, Any] | None = None) -> dict[str, Any]:
        return once_more(lambda: self._server.ask(method, path, body), ends, self._pause)

    @contextlib.contextmanager
    def _understood(self, path: str) -> Iterator[None]:
        try:
            yield
        except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
            raise EngineError(
                f"{self._server.address}{path}: the answer is not that of `lmcache server`: {type(error).__name__} {error}"
            ) from None

    def begin_nothing(self) -> None:
        """Ask for less than a chunk: answered as any load, and so not before the model has registered."""
        self._submit([])

    def _submit(self, tokens: list[int]) -> dict[str, Any]:
        return self._server.ask("POST", "/cache/prefetches", {**self._request, "token_ids": tokens})

    def _begun(self, tokens: list[int], ends: Deadline) -> Any:
        answer = self._again("POST", "/cache/prefetches", ends, {**self._request, "token_ids": tokens})
        self._doubted = False
        with self._understood("/cache/prefetches"):
            return answer["request_id"]

    def _progress(self, number: Any) -> dict[str, Any]:
        try:
            return self._server.ask("GET", f"/cache/prefetches/{number}")
        except NotReadyError:
            self._doubted = True
            raise
        except EngineError as error:
            if self._doubted:
                self._doubted = False
                raise _ForgottenError(str(error)) from None
            raise

    def _ended(self, answer: dict[str, Any]) -> _Load | None:
        with self._understood("/cache/prefetches"):
            if answer["status"] != "completed":  # told only once
                return None
            return _Load(int(answer["found_keys"]), int(answer["total_keys"]))

    def load(self, tokens: list[int]) -> _Load:
        """Load a prompt, and wait for the end. A connection that breaks, or a server that is busy for a moment, is no end."""
        ends = Deadline.after(self._load_secs)
        number = self._begun(tokens, ends)
        while True:
            try:
                answer = once_more(functools.partial(self._progress, number), ends, self._pause)
            except _ForgottenError:
                # That it is completed is told only once, and that answer was lost: what is loaded is found at once now.
                number = self._begun(tokens, ends)
                continue
            if (load := self._ended(answer)) is not None:
                return load
            if ends.remaining() <= 0:
                raise EngineError(
                    f"{self._server.address}: the load of {len(tokens)} tokens did not end within {self._load_secs:g} s"
                )
            self._pause(_POLL_SECS)


def _grow(loader: _Loader, tokens: list[int], chunk_size: int) -> LoadProgress:
    """Load ever longer prefixes: twice as much more each time, half as much after one that did not load whole."""
    chunks, warmed, step = len(tokens) // chunk_size, 0, 1
    keys, seen, loads, loaded, taken = loader.least_keys, 0, 0, 0, 0
    ended: Literal["complete", "missing", "no_room"] = "complete"
    room = loader.room()
    while warmed < chunks:
        step = min(step, chunks - warmed, room.free // max(1, seen, room.mean * keys * (1 if seen else _UNSEEN)))
        if step < 1:
            ended = "no_room"
            break
        load = loader.load(tokens[: (warmed + step) * chunk_size])
        loads += 1
        keys = load.keys // (warmed + step)
        before, room = room, loader.room()
        grown = room.used - before.used
        if step == 1:  # of several, some may have been there
            seen = max(seen, grown)
        if load.complete:
            warmed += step
            loaded += _chunks_in(grown, seen or room.mean * keys, step)
            taken += max(0, grown)
            step = 1 if grown > 0 and not seen else min(2 * step, _LARGEST_STEP)
        elif step > 1:
            step //= 2
        else:
            ended = "missing"
            break
    # What others stored meanwhile may have driven out what was loaded first.
    while loads > 1 and warmed and not loader.load(tokens[: warmed * chunk_size]).complete:
        warmed, ended = warmed // 2, "no_room"
    room = loader.room()
    return LoadProgress(chunks, warmed, ended, room.used, room.total, min(loaded, warmed), taken)


def _chunks_in(grown: int, chunk_bytes: int, step: int) -> int:
    """How many of the chunks of a step were loaded, by the bytes by which L1 grew; the rest was there before."""
    if grown <= 0:
        return 0
    return min(step, max(1, round(grown / chunk_bytes))) if chunk_bytes else step
