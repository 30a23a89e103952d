"""Memory of `lmcache server` (its L1) as a tier: the server loads given prompts from its own L2 tiers.

Follows `lmcache/v1/multiprocess/http_apis/cache_api.py` of LMCache 0.5.6. The server accepts token ids, not keys, and
reports after a load how many of a prompt's keys are in L1. It reserves room for all keys of a load or for none, and from a
watermark on evicts a fifth of L1, just loaded chunks included. A prompt is therefore loaded in growing prefixes while L1
stays below the watermark, so that L1 always holds a prefix, which an engine can use. Chunks already in L1 take no room, but
the server reports them only in answer to a load; a prompt in an L1 without room is thus not followed to its end.
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
"""Maximum chunks of a step, the most that are loaded in vain if a chunk before them is missing."""

_OTHERS_SECS: Final = 30.0
"""Seconds to wait for further engines on a server on which one engine is present."""

_UNSEEN: Final = 2
"""Factor on the mean size of L1's objects that estimates the size of a chunk until it is measured."""


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """Chunks of a prompt that L1 holds after a load.

    Attributes:
        chunks: Full chunks of the prompt.
        warmed: Chunks, from the start of the prompt, that are known to be in L1 for all ranks.
        ended: `complete`, or why no more chunks are in L1: `missing` (the server's L2 tiers lack the next one) or `no_room`.
        used_bytes: Used bytes of L1 at the end.
        total_bytes: Capacity of L1 in bytes.
        loaded: Chunks of `warmed` that were not in L1 before, estimated from the growth of L1: stores and evictions by the
            server itself distort it.
        loaded_bytes: Bytes by which L1 grew.
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
    """Parameters by which a server splits and hashes prompts.

    Attributes:
        chunk_size: Tokens of a chunk.
        hash_algorithm: Name as in `--hash-algorithm` of `lmcache server`; empty if the server does not report it.
    """

    chunk_size: int
    hash_algorithm: str


class L1Server:
    """L1 of one server. Use it as a context manager, from one thread.

    Args:
        http: HTTP address of the server, such as `http://127.0.0.1:8080`.
        load_secs: Maximum seconds of one load.
        pause: Waits for a number of seconds. It may raise to give up.

    Raises:
        ConfigError: The address is invalid.
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
        """Return how the server splits and hashes prompts; requested once.

        Args:
            ends: Deadline until which to wait for the server.

        Raises:
            EngineError: The server does not answer in time.
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
            models: Names of models, as engines report them.
            world_size: Workers of each engine.
            ends: Deadline for the first engine. The others get 30 s more: an engine that stays absent serves elsewhere.

        Returns:
            The models whose engines are present.

        Raises:
            EngineError: No engine registers in time.
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
        """Load a prompt, as far as there is room, without waiting for an engine.

        Args:
            model: Name of the model, as the engine reports it.
            world_size: Workers of the engine.
            token_ids: Tokens of the prompt.
            salt: `cache_salt` of the prompt; empty for none.

        Raises:
            EngineError: The server or the model is absent, or a load does not end in time.
            ConfigError: The server refuses the request: an invalid salt, or too many tokens.
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
    """Used and free bytes of L1, and the mean size of its objects."""

    used: int
    total: int
    free: int
    mean: int


@dataclass(frozen=True, slots=True)
class _Load:
    """Result of a load."""

    found: int
    keys: int

    @property
    def complete(self) -> bool:
        return self.found == self.keys


class _ForgottenError(EngineError):
    """The server no longer knows a load, and an earlier answer about that load was lost."""


class _Loader:
    """Loads of one model on one server."""

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
        """Minimum number of objects of a chunk: one for each worker."""
        return int(self._request["world_size"])

    def room(self) -> _Room:
        """Return the room of L1 before it evicts; of several L1s, that of the fullest."""
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
        """Request a load of less than a chunk: like any load, it is answered only after the model has registered."""
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
            if answer["status"] != "completed":  # the server reports completion only once
                return None
            return _Load(int(answer["found_keys"]), int(answer["total_keys"]))

    def load(self, tokens: list[int]) -> _Load:
        """Load a prompt, and wait for the end of the load through broken connections and a server that is busy for a moment."""
        ends = Deadline.after(self._load_secs)
        number = self._begun(tokens, ends)
        while True:
            try:
                answer = once_more(functools.partial(self._progress, number), ends, self._pause)
            except _ForgottenError:
                # Completion is reported only once and that answer was lost: a second load finds the loaded chunks at once.
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
    """Load growing prefixes: the step doubles after each complete load, and is halved after an incomplete one."""
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
        if step == 1:  # of several chunks, some may have been in L1 before
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
    # Stores by others in the meantime may have evicted the chunks that were loaded first.
    while loads > 1 and warmed and not loader.load(tokens[: warmed * chunk_size]).complete:
        warmed, ended = warmed // 2, "no_room"
    room = loader.room()
    return LoadProgress(chunks, warmed, ended, room.used, room.total, min(loaded, warmed), taken)


def _chunks_in(grown: int, chunk_bytes: int, step: int) -> int:
    """Return how many chunks of a step were loaded, from the growth of L1; the others were there before."""
    if grown <= 0:
        return 0
    return min(step, max(1, round(grown / chunk_bytes))) if chunk_bytes else step
