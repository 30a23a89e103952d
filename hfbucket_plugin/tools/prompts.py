"""Chunks of prompts: token ids, hashed by LMCache itself, and the positions of the hashes in the prompts."""

from __future__ import annotations

import bisect
import json
import os
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

import numpy as np

from hfbucket_plugin.errors import ConfigError
from hfbucket_plugin.tools.plan_file import Sealed

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    import numpy.typing as npt

    from hfbucket_plugin.core.keys import Key
from hfbucket_plugin.tools.lines import BOM

_FIELDS = frozenset({"token_ids", "model", "cache_salt"})
_MOST_TOKEN_ID = 2**32

MOST_PROMPT_BYTES: Final = 64 * 1024 * 1024
"""Maximum length of a line in bytes: five million tokens."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """Prompt whose chunks are selected.

    Attributes:
        token_ids: Its tokens.
        model: Model of the chunks; None for any.
        cache_salt: Salt of the chunks, empty for none; None for any. MP mode only.
    """

    token_ids: list[int]
    model: str | None = None
    cache_salt: str | None = None


class Located(NamedTuple):
    """Prompt, and its location in the file.

    Attributes:
        line: Line number, from 1.
        start: Offset of the line, in bytes.
        raw: The raw line.
        prompt: The parsed prompt; None for a blank line.
    """

    line: int
    start: int
    raw: bytes
    prompt: Prompt | None


def open_prompts(path: Path, option: str = "--prompts") -> Sealed:
    """Open a file of prompts.

    Args:
        path: Path of the file.
        option: Option that names the file, for errors.

    Raises:
        ConfigError: If the file cannot be read, or is not a regular file.
    """
    return Sealed(path, option, MOST_PROMPT_BYTES)


def located_prompts(
    file: Sealed, path: Path, start: int = 0, line: int = 1, option: str = "--prompts"
) -> Iterator[Located]:
    """Stream the lines of a file of prompts, from a given line on.

    Args:
        file: The file, see `open_prompts`.
        path: Path of the file, for errors.
        start: Offset of the first line, in bytes.
        line: Number of the first line.
        option: Option that names the file, for errors.

    Raises:
        ConfigError: If the file cannot be read, or a line is not a prompt; the message names the line, never the
            prompt.
    """
    number = line
    try:
        for number, raw in enumerate(file.raw_lines(start), line):
            yield Located(number, start, raw, prompt_of(raw))
            start += len(raw)
    except OSError as error:
        raise ConfigError(f"{option} {str(path)!r} cannot be read: {error.strerror}") from None
    except UnicodeError:
        raise ConfigError(f"{option} {str(path)!r}, line {number}: this is no text in UTF-8") from None
    except (ValueError, RecursionError) as error:
        reason = "this is no JSON" if isinstance(error, (json.JSONDecodeError, RecursionError)) else error
        raise ConfigError(f"{option} {str(path)!r}, line {number}: {reason}") from None


def read_prompts(path: Path, option: str = "--prompts") -> Iterator[Prompt]:
    """Stream the prompts of a file, one JSON line each.

    Args:
        path: Path of the file.
        option: Option that names the file, for errors.

    Raises:
        ConfigError: If the file cannot be read, or a line is not a prompt; the message names the line, never the
            prompt.
    """
    file = open_prompts(path, option)
    return (one.prompt for one in located_prompts(file, path, option=option) if one.prompt is not None)


def prompt_of(raw: bytes) -> Prompt | None:
    """Parse the prompt of a line; return None for a blank line.

    Raises:
        ValueError: If the line is not a prompt.
    """
    raw = raw.removeprefix(BOM)  # of the file, or of a file appended to it
    if not raw.strip():
        return None
    record = json.loads(raw.decode())
    if not isinstance(record, dict):
        raise ValueError('a prompt reads {"token_ids": [1, 2, 3]}')  # noqa: TRY004 - the caller adds the line
    unknown = sorted(record.keys() - _FIELDS)
    if unknown:
        raise ValueError(f"{len(unknown)} unknown fields; known are {', '.join(sorted(_FIELDS))}")
    token_ids, model, salt = record.get("token_ids"), record.get("model"), record.get("cache_salt")
    if not isinstance(token_ids, list) or not all(
        type(token) is int and 0 <= token < _MOST_TOKEN_ID for token in token_ids
    ):
        raise ValueError("token_ids must be a list of token ids, as numbers")
    for name, text in (("model", model), ("cache_salt", salt)):
        if text is not None and not isinstance(text, str):
            raise ValueError(f"{name} must be a text")
        if text is not None:
            text.encode()  # JSON may escape lone surrogates, which are invalid in keys
    return Prompt(token_ids, model, salt)


class Hasher(Protocol):
    """Hash function for the chunks of a prompt."""

    def __call__(self, token_ids: list[int]) -> list[str]:
        """Return the hashes of a prompt's chunks in order, as in keys."""


def classic_hasher(config: Path) -> Hasher:
    """Return the hasher of a classic engine, from its LMCache YAML.

    Raises:
        ConfigError: If LMCache cannot read the file, or a requirement of the hashes is missing.
    """
    _quieten()
    # LMCache takes seconds to import.
    from lmcache.v1.config import LMCacheEngineConfig  # noqa: PLC0415
    from lmcache.v1.token_database import ChunkedTokenDatabase  # noqa: PLC0415

    try:
        settings: Any = LMCacheEngineConfig.from_file(str(config))
        settings.update_config_from_env()  # as an engine does
        database: Any = ChunkedTokenDatabase(settings, None)
    except Exception as error:  # noqa: BLE001 - LMCache may raise any error about the file
        raise ConfigError(f"--prompts: LMCache cannot hash with {str(config)!r}: {type(error).__name__}") from None
    if settings.enable_blending:
        raise ConfigError(f"--prompts: enable_blending in {str(config)!r} cuts prompts at separators, not into chunks")
    _refuse_fallback(settings.pre_caching_hash_algorithm, database.hash_func)

    def hashes(token_ids: list[int]) -> list[str]:
        return [f"{value:x}" for _, _, value in database.process_tokens(tokens=token_ids, make_key=False)]

    return hashes


def mp_hasher(chunk_size: int, algorithm: str) -> Hasher:
    """Return the hasher of `lmcache server`.

    Raises:
        ConfigError: If a requirement of the hashes is missing.
    """
    _quieten()
    from lmcache.v1.multiprocess.token_hasher import TokenHasher  # noqa: PLC0415 - as above

    hasher: Any = TokenHasher(chunk_size, algorithm)
    _refuse_fallback(algorithm, hasher.hash_func)

    def hashes(token_ids: list[int]) -> list[str]:
        return [value.hex() for value in hasher.compute_chunk_hashes(token_ids)]

    return hashes


def _quieten() -> None:
    """Suppress LMCache's logs during its import: they use the stream of this command's errors."""
    os.environ.setdefault("LMCACHE_LOG_LEVEL", "WARNING")


def _refuse_fallback(algorithm: str, function: Any) -> None:
    """Refuse an unknown algorithm: LMCache would warn and use Python's `hash`, and not one chunk would match."""
    if function is hash and algorithm != "builtin":
        raise ConfigError(
            f"--prompts: the hash algorithm {algorithm!r} comes with vLLM, which is not installed where this command runs"
        )


class PromptOrder:
    """Positions of chunks in prompts: prompt by prompt, each from its start.

    Memory is 16 bytes per distinct chunk, however many prompts share it. Hashes are compared by 64 bits: for 10,000,000
    chunks of a bucket and as many of prompts, one in a hundred thousand such pairs of sets would have one chunk too
    many
    copied, and none too few.

    Args:
        prompts: Prompts in descending order of priority.
        hasher: Hash function of the engines.

    Attributes:
        prompts: Number of prompts.
        chunks: Number of distinct chunks of the prompts.
    """

    def __init__(self, prompts: Iterable[Prompt], hasher: Hasher) -> None:
        self.prompts = 0
        self._places: dict[tuple[str | None, str | None], _Places] = {}
        at = 0
        for prompt in prompts:
            self.prompts += 1
            places = self._places.setdefault((prompt.model, prompt.cache_salt), _Places())
            for value in hasher(prompt.token_ids):
                places.add(value, at)
                at += 1
        first = np.sort(np.concatenate([places.settle() for places in self._places.values()] or [_NONE]))
        for places in self._places.values():
            places.count_by(first)
        self.chunks = len(first)

    @property
    def models(self) -> frozenset[str] | None:
        """Return the models whose chunks may be included; None for all."""
        models = {model for model, _ in self._places}
        return None if None in models else frozenset(model for model in models if model is not None)

    def place(self, key: Key) -> int | None:
        """Return the position of a chunk; None if it belongs to no prompt."""
        salt = getattr(key, "salt", None)
        found = [
            place
            for wanted in {(key.model, salt), (key.model, None), (None, salt), (None, None)}
            if wanted in self._places and (place := self._places[wanted].find(key.chunk_hash)) is not None
        ]
        return min(found, default=None)


_NONE: Final = np.empty(0, dtype=np.int64)
_PENDING: Final = 1 << 20
"""Maximum number of chunks that wait to be sorted; they take 16 MiB."""


class _Places:
    """First positions of hashes, in two arrays."""

    def __init__(self) -> None:
        self._hashes = array("Q")
        self._places = array("q")
        self._settled = 0

    def add(self, value: str, at: int) -> None:
        """Add the position of a hash; positions must ascend."""
        self._hashes.append(_short(value))
        self._places.append(at)
        if len(self._hashes) - self._settled >= max(_PENDING, self._settled):
            self.settle()

    def settle(self) -> npt.NDArray[np.int64]:
        """Sort by hash, keep the first position of each hash, and return these positions."""
        hashes, first = np.unique(np.frombuffer(self._hashes, dtype=np.uint64), return_index=True)
        places = np.frombuffer(self._places, dtype=np.int64)[first]
        self._hashes, self._places = array("Q", hashes.tobytes()), array("q", places.tobytes())
        self._settled = len(self._hashes)
        return places

    def count_by(self, first: npt.NDArray[np.int64]) -> None:
        """Renumber positions so that they count only first occurrences of hashes."""
        places = np.searchsorted(first, np.frombuffer(self._places, dtype=np.int64)).astype(np.int64)
        self._places = array("q", places.tobytes())

    def find(self, value: str) -> int | None:
        """Return the first position of a hash; None if it is unknown."""
        short = _short(value)
        at = bisect.bisect_left(self._hashes, short)
        return self._places[at] if at < len(self._hashes) and self._hashes[at] == short else None


def _short(value: str) -> int:
    """Return 64 bits that represent a hash in this process."""
    return hash(value) & 0xFFFF_FFFF_FFFF_FFFF
