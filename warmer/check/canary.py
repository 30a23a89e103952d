"""Canary of a check: send prompts to running vLLM engines, which must report that the tokens came from the cache.

Chunks in a tier do not guarantee hits: an engine may read elsewhere, hash differently, or serve another model. vLLM reports
cached tokens in `usage.prompt_tokens_details.cached_tokens` of `POST /v1/completions` with `--enable-prompt-tokens-details`
(versions before 0.30 omit a count of 0). A prompt that was sent is in the engine's prefix cache, and usually in LMCache, and
then hits whatever the tier holds: so each is sent once, and should be new to the engine since its start.
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
"""Option of vLLM that makes it report cached tokens."""

DEFAULT_REQUIRE: Final = 0.9
NAMED: Final = 1000
"""Maximum number of cold prompts in the record."""

_COLD: Final = ("engine", "prompt", "cached_tokens", "tokens")
_LOGGED: Final = 20
_AT_ONCE: Final = 32
"""Engines that are tested at the same time; each gets one prompt at a time."""

_ANSWER_SECS: Final = 300.0
"""Seconds to wait for an answer: a busy engine needs a minute to compute a long prompt that is not cached."""

_TICK_SECS: Final = 0.25


@dataclass(frozen=True, slots=True)
class Canary:
    """Prompts and engines of a canary.

    Attributes:
        prompts: Path of a file in the format of `--prompts`.
        engines: Addresses of the engines' HTTP servers; an address with placeholders yields one for each node.
        require: Part of each prompt's full chunks that must come from the cache, from 0 to 1.
        key_env: Name of the environment variable with the engines' API key; None for no key.
        chunk_tokens: Tokens of a chunk in the engines' configuration.
    """

    prompts: Path
    engines: tuple[str, ...]
    require: float = DEFAULT_REQUIRE
    key_env: str | None = None
    chunk_tokens: int = 256

    @classmethod
    def read(cls, prompts: Path | None, engines: Sequence[str], require: float, key_env: str | None) -> Canary | None:
        """Make a canary from the values of options; return None if none is given.

        Raises:
            ConfigError: The options are incomplete or invalid.
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
        ):  # read the whole file, so that errors are reported before any prompt is sent
            raise ConfigError(f"--canary {str(prompts)!r} holds no prompt")
        if key_env is not None and not os.environ.get(key_env):
            raise ConfigError(f"--engine-key-env: the environment variable {key_env} is not set")
        return cls(prompts, tuple(engines), require, key_env)

    def addresses(self, places: Iterable[NodeInfo]) -> list[str]:
        """Return the addresses of the engines to test, each once.

        Raises:
            ConfigError: A node has no value for a placeholder.
        """
        places = list(places)
        found = [place.expand(engine) for engine in self.engines for place in places]
        return list(dict.fromkeys(found))


@dataclass(slots=True)
class EngineFound:
    """Result of the canary on one engine.

    Attributes:
        engine: Address of the engine.
        prompts: Number of prompts with a full chunk, which were sent.
        too_short: Number of prompts without a full chunk, which were not sent.
        tokens: Tokens of the full chunks of the prompts.
        cached_tokens: Tokens of these that came from the cache.
        share: Lowest cached share of a prompt; 1 without prompts.
        error: Why the engine could not be tested; None if it was.
        cold: Prompts below the required share: their number in the file, tokens and cached tokens.
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
    """Return the number of tokens that can come from the cache: those of full chunks that end before the last token.

    An engine computes at least one token to continue from, and some recompute the whole chunk for it.
    """
    return max(0, length - 1) // chunk_tokens * chunk_tokens


def ask_engines(canary: Canary, places: Iterable[NodeInfo], stop: Stop) -> dict[str, Any]:
    """Send all prompts to all engines.

    Args:
        canary: Prompts and engines.
        places: Identities of the nodes.
        stop: Whether to stop.

    Returns:
        The findings, ready for JSON, with their `exit_code`; see `docs/warm.md`.

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
    """Wait until an engine was tested or the run must stop; an answer in progress is then abandoned."""
    while not stop.requested:
        if futures.wait([future], _TICK_SECS).done:
            future.result()
            return


def _ask_engine(canary: Canary, found: EngineFound, stop: Stop) -> None:
    """Test one engine; errors are recorded in `found`."""
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
    """Send the prompts to one engine, one after the other; return how many answers lack the number of cached tokens.

    Raises:
        EngineError: The engine does not answer, or not as vLLM does; the message names the prompt.
        ConfigError: The engine refuses a prompt, which the message names, or does not serve the prompt's model.
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
        except (
            ConfigError,
            EngineError,
        ) as error:  # stop here: if this prompt crashed the engine, the next would be blamed
            raise type(error)(f"prompt {number}: {error}") from None
        silent += cached is None
        found.add(number, tokens, cached or 0, canary.require)
    return silent


def _served(engine: EngineHTTP) -> list[dict[str, Any]]:
    """Return the models of an engine.

    Raises:
        EngineError: The engine does not answer, or reports no model.
    """
    models = engine.ask("GET", "/v1/models").get("data")
    listed = models if isinstance(models, list) else []
    found = [one for one in listed if isinstance(one, dict) and isinstance(one.get("id"), str)]
    if not found:
        raise EngineError(f"GET {engine.address}/v1/models: the answer tells no model; is this a vLLM server?")
    return found


def _model(address: str, prompt: Prompt, served: Sequence[dict[str, Any]]) -> str:
    """Return the engine's name of a prompt's model, which may differ from the name of the model's files.

    Raises:
        ConfigError: The engine does not serve the model, or serves several and the prompt names none.
    """
    base = [one for one in served if not one.get("parent")]  # without adapters, whose chunks have other keys
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
    """Send a prompt; return how many of its tokens were cached, or None if the answer lacks the number.

    Raises:
        EngineError: The engine does not answer, or not as vLLM does.
        ConfigError: The engine refuses the prompt.
    """
    # A prompt hits only with the salt with which its chunks were stored.
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
