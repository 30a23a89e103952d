"""The canary of a check: running vLLM engines are asked prompts, and have to say that they took them from the cache.

That chunks lie in a tier is not yet a hit: an engine may look elsewhere, hash otherwise, or be of another model. What an
engine answers in `usage.prompt_tokens_details.cached_tokens` of `POST /v1/completions` is what it did not compute.
vLLM tells it when it is started with `--enable-prompt-tokens-details` (0.30 also where it is 0; older versions leave that out).

A prompt that was asked is in the engine's own prefix cache (and, as a rule, stored through LMCache): asked a second time
it hits, whatever the tier holds. So each prompt is asked once, and a canary that is to be trusted asks prompts that this
engine has not had since it started.
"""

from __future__ import annotations

import logging
import os
from concurrent import futures
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Final

from hfbucket_plugin.core.concurrency import WorkerPool
from hfbucket_plugin.errors import ConfigError, HFBucketError
from hfbucket_plugin.tools import exit_codes
from hfbucket_plugin.tools.prompts import read_prompts
from warmer.report.outcomes import EngineError
from warmer.tiers.engine_http import EngineHTTP
from warmer.tiers.naming import check as expect_placeholders

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from hfbucket_plugin.tools.prompts import Prompt
    from hfbucket_plugin.tools.signals import Stop
    from warmer.tiers import NodeInfo

_log = logging.getLogger(__name__)

FLAG: Final = "--enable-prompt-tokens-details"
"""Of vLLM."""

DEFAULT_REQUIRE: Final = 0.9
NAMED: Final = 1000
"""Cold prompts in the record."""

_COLD: Final = ("engine", "prompt", "cached_tokens", "tokens")
_LOGGED: Final = 20
_AT_ONCE: Final = 32
"""Engines that are asked at one time; each has one prompt at a time."""

_ANSWER_SECS: Final = 300.0
"""What is not cached is computed: a long prompt takes an engine that is busy a minute."""

_TICK_SECS: Final = 0.25


@dataclass(frozen=True, slots=True)
class Canary:
    """What is asked of whom.

    Attributes:
        prompts: A file as of `--prompts`.
        engines: Addresses of engines' HTTP servers; with placeholders, one for each node.
        require: The part of each prompt's full chunks that has to come from the cache, from 0 to 1.
        key_env: Name of the variable with the engines' API key; None for none.
        chunk_tokens: Tokens of a chunk, as the engines have it.
    """

    prompts: Path
    engines: tuple[str, ...]
    require: float = DEFAULT_REQUIRE
    key_env: str | None = None
    chunk_tokens: int = 256

    @classmethod
    def read(cls, prompts: Path | None, engines: Sequence[str], require: float, key_env: str | None) -> Canary | None:
        """What flags say; None where they say nothing.

        Raises:
            ConfigError: They say half of it, or something wrong.
        """
        if prompts is None and not engines:
            return None
        if prompts is None or not engines:
            raise ConfigError("--canary and --engine go together: which prompts, and which engines are asked them")
        for engine in engines:
            expect_placeholders(engine)
            if "@" in engine:
                raise ConfigError(
                    "--engine: an address with a user or a password in it would stand in reports; give http://<host>:<port>, and "
                    "a key by --engine-key-env"
                )
        if not 0 <= require <= 1:
            raise ConfigError(f"--canary-require {require} is no share from 0 to 1")
        if not sum(
            1 for _ in read_prompts(prompts, "--canary")
        ):  # the whole file: what is wrong with it is told before
            raise ConfigError(f"--canary {str(prompts)!r} holds no prompt")
        if key_env is not None and not os.environ.get(key_env):
            raise ConfigError(f"--engine-key-env: the environment variable {key_env} is not set")
        return cls(prompts, tuple(engines), require, key_env)

    def addresses(self, places: Iterable[NodeInfo]) -> list[str]:
        """The engines to ask, each once.

        Raises:
            ConfigError: A node has no value for a placeholder.
        """
        places = list(places)
        found = [place.expand(engine) for engine in self.engines for place in places]
        return list(dict.fromkeys(found))


@dataclass(slots=True)
class EngineFound:
    """What one engine answered.

    Attributes:
        engine: Its address.
        prompts: Prompts with a full chunk that it was asked.
        too_short: Prompts without one, which it was not asked.
        tokens: Of the full chunks of the prompts.
        cached_tokens: Those of them that came from the cache.
        share: The least share of a prompt; 1 of none.
        error: Why it could not be asked; None when it could.
        cold: The prompts below what is required, by their place in the file, with tokens and those cached.
    """

    engine: str
    prompts: int = 0
    too_short: int = 0
    tokens: int = 0
    cached_tokens: int = 0
    share: float = 1.0
    error: str | None = None
    cold: list[tuple[int, int, int]] = field(default_factory=list)

    def add(self, number: int, tokens: int, cached: int, require: float) -> None:
        """Count a prompt."""
        cached = min(cached, tokens)
        self.prompts += 1
        self.tokens += tokens
        self.cached_tokens += cached
        self.share = min(self.share, cached / tokens)
        if not cached / tokens >= require and len(self.cold) < NAMED:
            self.cold.append((number, tokens, cached))


def full_chunk_tokens(length: int, chunk_tokens: int) -> int:
    """The tokens of a prompt that can come from the cache: its full chunks, less one that ends with its last token.

    An engine computes at least one token to have something to go on from, and some give up the whole chunk for it.
    """
    return max(0, length - 1) // chunk_tokens * chunk_tokens


def ask_engines(canary: Canary, places: Iterable[NodeInfo], stop: Stop) -> dict[str, Any]:
    """Ask all engines all prompts.

    Args:
        canary: What and whom.
        places: The nodes.
        stop: Whether to stop.

    Returns:
        What was found, ready for JSON, with the `exit_code` that it stands for; see `docs/warm.md`.

    Raises:
        ConfigError: A node has no value for a placeholder.
    """
    addresses = canary.addresses(places)
    found = [EngineFound(address) for address in addresses]
    pool = WorkerPool("canary", min(_AT_ONCE, len(found)))
    asked: list[futures.Future[None]] = [pool.submit(_ask_engine, canary, one, stop) for one in found]
    try:
        for future in asked:
            _wait(future, stop)
    finally:
        pool.close()
    return _record(canary, found, stopped=stop.requested)


def _wait(future: futures.Future[None], stop: Stop) -> None:
    """Wait until an engine was asked, or there is an order to stop: an answer in progress is left behind."""
    while not stop.requested:
        if futures.wait([future], _TICK_SECS).done:
            future.result()
            return


def _ask_engine(canary: Canary, found: EngineFound, stop: Stop) -> None:
    """Ask one engine; what goes wrong is told in `found`."""
    key = None if canary.key_env is None else os.environ.get(canary.key_env)
    try:
        with EngineHTTP(found.engine, key) as engine:
            silent = _ask_prompts(canary, engine, found, stop)
    except HFBucketError as error:
        found.error = str(error)
        return
    if stop.requested:
        return
    if not found.prompts:
        found.error = f"--canary: no prompt has a full chunk of {canary.chunk_tokens} tokens and one token more"
    elif silent == found.prompts:
        found.cold.clear()
        found.error = (
            f"engine {found.engine} tells no cached tokens: start vLLM with {FLAG}; older versions, which leave out what is "
            "0, have none of the prompts cached"
        )


def _ask_prompts(canary: Canary, engine: EngineHTTP, found: EngineFound, stop: Stop) -> int:
    """Ask one engine the prompts, one after the other; returns how many answers did not tell of cached tokens.

    Raises:
        EngineError: It does not answer, or not as vLLM does; the message says at which prompt.
        ConfigError: It refuses a prompt; the message says which. Or it is asked for what it does not serve.
    """
    silent = 0
    served = _served(engine)
    for number, prompt in enumerate(read_prompts(canary.prompts, "--canary"), 1):
        if stop.requested:
            break
        tokens = full_chunk_tokens(len(prompt.token_ids), canary.chunk_tokens)
        if not tokens:
            found.too_short += 1
            continue
        try:
            cached = _cached_tokens(engine, _model(found.engine, prompt, served), prompt)
        except (ConfigError, EngineError) as error:  # one may be the end of an engine: the next would be blamed for it
            raise type(error)(f"prompt {number}: {error}") from None
        silent += cached is None
        found.add(number, tokens, cached or 0, canary.require)
    return silent


def _served(engine: EngineHTTP) -> list[dict[str, Any]]:
    """The models of an engine.

    Raises:
        EngineError: It does not answer, or tells none.
    """
    models = engine.ask("GET", "/v1/models").get("data")
    listed = models if isinstance(models, list) else []
    found = [one for one in listed if isinstance(one, dict) and isinstance(one.get("id"), str)]
    if not found:
        raise EngineError(f"GET {engine.address}/v1/models: the answer tells no model; is this a vLLM server?")
    return found


def _model(address: str, prompt: Prompt, served: Sequence[dict[str, Any]]) -> str:
    """What an engine calls the model of a prompt: it may serve it under another name than that of its files.

    Raises:
        ConfigError: It does not serve it, or several and the prompt does not say which.
    """
    base = [one for one in served if not one.get("parent")]  # adapters have keys of their own
    fitting = [one for one in served if prompt.model in (one["id"], one.get("root"))] if prompt.model else base
    if prompt.model and fitting:
        return str(fitting[0]["id"])
    names = ", ".join(one["id"] for one in served)
    if prompt.model:
        raise ConfigError(f"engine {address} does not serve {prompt.model!r}, the model of a prompt; it serves {names}")
    if len(fitting) != 1:
        raise ConfigError(f'engine {address} serves {names}: say in --canary which, as "model" of each prompt')
    return str(fitting[0]["id"])


def _cached_tokens(engine: EngineHTTP, model: str, prompt: Prompt) -> int | None:
    """Ask a prompt; how many of its tokens were cached, None where the answer does not say.

    Raises:
        EngineError: It does not answer, or not as vLLM does.
        ConfigError: It refuses the prompt.
    """
    # Without the salt that its chunks were stored with, no prompt hits; with any other one, none would either.
    salted = {} if not prompt.cache_salt else {"cache_salt": prompt.cache_salt}
    body = {"model": model, "prompt": prompt.token_ids, "max_tokens": 1, "temperature": 0, **salted}
    usage = engine.ask("POST", "/v1/completions", body, _ANSWER_SECS).get("usage")
    if not isinstance(usage, dict):
        raise EngineError(f"POST {engine.address}/v1/completions: the answer has no usage; is this a vLLM server?")
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    return cached if isinstance(cached, int) and not isinstance(cached, bool) else None


def _record(canary: Canary, found: Sequence[EngineFound], *, stopped: bool) -> dict[str, Any]:
    engines = [asdict(one) for one in found]
    cold = [
        {"engine": one["engine"], "prompt": number, "tokens": tokens, "cached_tokens": cached}
        for one in engines
        for number, tokens, cached in one.pop("cold")
    ]
    errors = [one.error for one in found if one.error is not None]
    for error in errors[:_LOGGED]:
        _log.warning("%s", error)
    for one in cold[:_LOGGED]:
        _log.warning("engine %s: prompt %d: %d of %d tokens cached", *(one[name] for name in _COLD))
    if stopped:
        code = exit_codes.INTERRUPTED
    elif len(errors) == len(found):
        code = exit_codes.USAGE
    else:
        code = exit_codes.FAILED if errors or cold else exit_codes.COMPLETE
    return {
        "exit_code": code,
        "require": canary.require,
        "share": round(min((one.share for one in found if one.error is None), default=0.0), 6),
        "engines": [one | {"share": round(one["share"], 6)} for one in engines],
        "cold": cold[:NAMED],
    }
