"""Selection of the chunks of a run: the user's criteria, and the filter made from them. Pure.

The Hub applies as much of a selection as possible: a listing uses the longest key prefixes that cannot exclude a
selected chunk (`listing_prefixes`). The rest is filtered afterwards.
"""

from __future__ import annotations

import fnmatch
import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, PositiveInt, model_validator

from hfbucket_plugin.core.keys import ClassicKey, MPKey
from hfbucket_plugin.core.units import format_duration, format_ranks, parse_bytes, parse_duration, parse_ranks
from hfbucket_plugin.tools.external_sort import sort_rows
from hfbucket_plugin.tools.options import Option

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from hfbucket_plugin.core.keys import Key
    from hfbucket_plugin.hub.listing import ChunkEntry

KINDS: Final[tuple[type[Key], ...]] = (ClassicKey, MPKey)

ADVICE: Final = (
    "nothing says which chunks: give --prefix 'org/model@8@', --model, --keys-from or --prompts; or --all for every "
    "chunk of the instance"
)

_MOST_PREFIXES: Final = 256
"""Maximum number of prefixes; beyond it, fewer and shorter ones are listed, as each costs at least one request."""


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, (str, Path)) else value


def _as_bytes(value: Any) -> Any:
    return parse_bytes(value) if isinstance(value, str) else value


def _as_duration(value: Any) -> Any:
    if isinstance(value, (int, float)):
        raise ValueError("a length of time has a unit, such as 24h")  # noqa: TRY004 - pydantic words ValueError only
    return parse_duration(value) if isinstance(value, str) else value


def _as_seconds(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return parse_duration(value).total_seconds()


def as_ranks(value: Any) -> Any:
    """Parse worker ranks for pydantic from `0-3,7`, or from the number that YAML makes of `3`."""
    if isinstance(value, bool):
        raise ValueError("ranks of workers read 0-3,7")  # noqa: TRY004 - as above
    return parse_ranks(str(value)) if isinstance(value, (str, int)) else value


Texts = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_as_list)]
"""One or more texts, none empty."""

Bytes = Annotated[int, BeforeValidator(_as_bytes), Field(gt=0)]
"""A number of bytes, or a text such as `50GiB`."""

Seconds = Annotated[float, BeforeValidator(_as_seconds), Field(gt=0)]
"""A number of seconds, or a text such as `30m`."""

Length = Annotated[timedelta, BeforeValidator(_as_duration), Field(ge=timedelta(0)), PlainSerializer(format_duration)]
"""Duration, or a text such as `24h`."""

Ranks = Annotated[frozenset[int], BeforeValidator(as_ranks), PlainSerializer(format_ranks)]
"""Ranks of workers."""


class Selection(BaseModel):
    """Selection of an instance's chunks. All given criteria must hold; of several texts in a field, one must match."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    all: bool = Field(
        default=False,
        description="Select every chunk of the instance. Must be given explicitly, since there may be millions.",
    )
    prefix: Annotated[Texts, Option("TEXT", many=True)] = Field(
        default=(),
        description="Select chunks whose key starts with this, such as 'org/model@8@'. An empty text is refused; use "
        "`--all`.",
    )
    model: Annotated[Texts, Option("NAME", many=True)] = Field(
        default=(), description="Select chunks of this model, by its full name."
    )
    world_size: Annotated[PositiveInt | None, Option("N")] = Field(
        default=None, description="Select chunks of engines with N workers."
    )
    workers: Annotated[Ranks | None, Option("RANKS")] = Field(
        default=None, description="Select chunks of these workers, such as 0-3,7."
    )
    include: Annotated[Texts, Option("GLOB", many=True)] = Field(
        default=(), description="Keep only keys that match this glob, such as '*@bfloat16'; * also matches / and @."
    )
    exclude: Annotated[Texts, Option("GLOB", many=True)] = Field(
        default=(), description="Skip keys that match this glob."
    )
    since: Annotated[Annotated[Length, Field(gt=timedelta(0))] | None, Option("TIME")] = Field(
        default=None,
        description="Keep only chunks that the Hub received within this time, such as 24h, by the Hub's clock.",
    )
    newest: Annotated[PositiveInt | None, Option("N")] = Field(
        default=None, description="Keep at most N chunks, the newest."
    )
    hottest: Annotated[PositiveInt | None, Option("N")] = Field(
        default=None,
        description="Keep at most N chunks, those that engines read most (see docs/index.md); the newest if the "
        "instance's key index records no reads.",
    )
    max_bytes: Annotated[Bytes | None, Option("SIZE")] = Field(
        default=None,
        description="Keep at most this many bytes, such as 50GiB: the chunks read most, as with `--hottest`; with "
        "`--newest`, and in an export, the newest; with `--prompts`, the first of the prompts.",
    )
    keys_from: Annotated[tuple[Path, ...], BeforeValidator(_as_list), Option("FILE", many=True)] = Field(
        default=(),
        description="Select only the keys in this file: one a line, or JSON lines with a `key`, such as an earlier "
        "plan or report; or the keys of the chunks in this LMCache directory.",
    )
    prompts: Annotated[Path | None, Option("FILE")] = Field(
        default=None,
        description="Select only chunks of the prompts in this file, in their order: one JSON line each, "
        '{"token_ids": [...]}, with "model" and "cache_salt" if needed.',
    )
    chunk_size: Annotated[PositiveInt, Option("N")] = Field(
        default=256, description="Tokens of a chunk, for `--prompts` in MP mode: the value of `lmcache server`."
    )
    hash_algorithm: Annotated[str, Option("NAME")] = Field(
        default="blake3",
        description="Hash algorithm for tokens, for `--prompts` in MP mode: the value of `lmcache server`.",
    )

    @model_validator(mode="after")
    def _is_one(self) -> Selection:
        if self.all and self.prefix:
            raise ValueError("all and prefix contradict each other: say --all, or name the prefixes")
        for name in ("newest", "hottest"):
            if getattr(self, name) is not None and self.prompts is not None:
                raise ValueError(
                    f"{name} and prompts contradict each other: prompts are warmed from their start; use max_bytes"
                )
        if self.newest is not None and self.hottest is not None:
            raise ValueError("newest and hottest contradict each other: give one of them")
        if self.workers is not None and self.world_size is not None and max(self.workers) >= self.world_size:
            raise ValueError(
                f"an engine of {self.world_size} workers has no worker {max(self.workers)}: they count from 0"
            )
        return self

    @property
    def given(self) -> bool:
        """Whether any criterion is given."""
        return self.all or bool(self.prefix or self.model or self.keys_from or self.prompts)

    @property
    def wants_access(self) -> bool:
        """Whether the most read chunks are selected first."""
        return self.prompts is None and self.newest is None and (self.hottest or self.max_bytes) is not None

    @property
    def most(self) -> int | None:
        """Maximum number of chunks, from `newest` or `hottest`."""
        return self.newest if self.hottest is None else self.hottest

    def listing_prefixes(self, kind: type[Key] | None = None) -> list[str]:
        """Return key prefixes such that each selected chunk starts with one of them.

        Args:
            kind: Kind of the keys; None for both, whose common prefixes are shorter.
        """
        prefixes = list(self.prefix) or [""]
        if not self.model:
            return sorted(set(prefixes))
        kinds = KINDS if kind is None else (kind,)
        starts = [start for model in self.model for one in kinds for start in self._starts(model, one)]
        if len(starts) > _MOST_PREFIXES:
            starts = [f"{model}@" for model in self.model]
        return sorted({both for prefix in prefixes for start in starts if (both := _both(prefix, start)) is not None})

    def _starts(self, model: str, kind: type[Key]) -> list[str]:
        if self.world_size is None:
            return [f"{model}@"]
        if kind is ClassicKey:
            start = f"{model}@{self.world_size}@"
            return [start] if self.workers is None else [f"{start}{worker}@" for worker in sorted(self.workers)]
        # A rank has at least 8 digits: the world size, two digits of the worker, and four of the local ranks.
        start = f"{model}@{self.world_size:02x}"
        if self.workers is None:
            return [start]
        return [f"{start}{worker:02x}" for worker in sorted(self.workers) if worker < 256]  # noqa: PLR2004 - a byte

    def filter(self, now: datetime) -> Filter:
        """Return the selection as a filter.

        Args:
            now: Time from which `since` counts back.
        """
        return Filter(self, now)


def _both(prefix: str, start: str) -> str | None:
    """Return the prefix of the keys that start with both; None if there are none."""
    if prefix.startswith(start):
        return prefix
    return start if start.startswith(prefix) else None


class Filter:
    """Filter of chunks by the criteria that depend on a single entry.

    Args:
        selection: The selection.
        now: Time from which `since` counts back.
    """

    def __init__(self, selection: Selection, now: datetime) -> None:
        self._choice = selection
        self._after = None if selection.since is None else now - selection.since
        self._models = frozenset(selection.model)
        self._include = _pattern(selection.include)
        self._exclude = _pattern(selection.exclude)

    def __call__(self, entry: ChunkEntry) -> bool:
        """Return whether a chunk is selected."""
        return self._named(entry.text) and self._written_by(entry.key) and self._recent(entry.uploaded_at)

    def _named(self, text: str) -> bool:
        if self._choice.prefix and not text.startswith(self._choice.prefix):
            return False
        if self._include is not None and not self._include.match(text):
            return False
        return self._exclude is None or not self._exclude.match(text)

    def _written_by(self, key: Key) -> bool:
        selection = self._choice
        if self._models and key.model not in self._models:
            return False
        if selection.world_size is not None and key.world_size != selection.world_size:
            return False
        return selection.workers is None or key.worker_id in selection.workers

    def _recent(self, uploaded_at: datetime | None) -> bool:
        return self._after is None or (uploaded_at is not None and uploaded_at >= self._after)


def _pattern(globs: Iterable[str]) -> re.Pattern[str] | None:
    texts = [fnmatch.translate(glob) for glob in globs]
    return re.compile("|".join(texts)) if texts else None


@dataclass(frozen=True, slots=True)
class ChunkRef:
    """Reference to a chunk of a bucket in plans.

    Attributes:
        key: Its key string.
        path: Path of its object, from the root of the bucket.
        xet_hash: Xet hash of its content, 64 hexadecimal digits.
        size: Size in bytes.
        uploaded_at: Upload time by the Hub's clock; None if the Hub did not say.
        gone: Whether the last look-up did not find it in the bucket.
        worker: Rank of the only worker that reads it; None if all do, as where an engine has a single worker, or stores
            data shared by all its workers (MLA) as if it had one.
        heat: Its heat (`hfbucket_plugin.index.access.stats.buckets`); None if not requested or unknown.
        last_hit: Time of the last read; None if unknown.
    """

    key: str
    path: str
    xet_hash: str
    size: int
    uploaded_at: datetime | None = None
    gone: bool = False
    worker: int | None = None
    heat: int | None = None
    last_hit: datetime | None = None

    def to_line(self) -> str:
        """Return the chunk as one JSON line, its newline included."""
        record: dict[str, Any] = {"key": self.key, "path": self.path, "xet_hash": self.xet_hash, "size": self.size}
        if self.uploaded_at is not None:
            record["uploaded_at"] = self.uploaded_at.isoformat()
        if self.gone:
            record["gone"] = True
        if self.worker is not None:
            record["worker"] = self.worker
        if self.heat is not None:
            record["heat"] = self.heat
        if self.last_hit is not None:
            record["last_hit"] = self.last_hit.isoformat()
        return json.dumps(record) + "\n"

    @classmethod
    def from_line(cls, line: str) -> ChunkRef:
        """Parse the result of `to_line`.

        Raises:
            ValueError: If the line is not a valid chunk.
        """
        record = json.loads(line)
        if not isinstance(record, dict) or not all(isinstance(record.get(name), str) for name in _TEXTS):
            raise ValueError("a planned chunk needs key, path and xet_hash, as texts")
        return cls(
            key=record["key"],
            path=record["path"],
            xet_hash=_hash(record["xet_hash"]),
            size=_number(record, "size", "a size in bytes"),
            uploaded_at=_moment(record, "uploaded_at"),
            gone=_flag(record, "gone"),
            worker=None if record.get("worker") is None else _number(record, "worker", "a rank"),
            heat=None if record.get("heat") is None else _number(record, "heat", "a number of reads"),
            last_hit=_moment(record, "last_hit"),
        )


_TEXTS: Final = ("key", "path", "xet_hash")
_HASH: Final = re.compile(r"[0-9a-f]{64}")
_MOST: Final = 2**63 - 1
"""Upper limit of file sizes and counts."""


def _hash(text: str) -> str:
    if not _HASH.fullmatch(text):
        raise ValueError("xet_hash must be 64 hexadecimal digits")
    return text


def _number(record: dict[str, Any], name: str, what: str) -> int:
    value = record.get(name)
    if type(value) is not int or not 0 <= value <= _MOST:
        raise ValueError(f"{name} must be {what}")
    return value


def _flag(record: dict[str, Any], name: str) -> bool:
    value = record.get(name, False)
    if type(value) is not bool:
        raise ValueError(f"{name} must be true or false")
    return value


def _moment(record: dict[str, Any], name: str) -> datetime | None:
    value = record.get(name)
    if value is None:
        return None
    try:
        moment = datetime.fromisoformat(value) if isinstance(value, str) else None
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None:
        raise ValueError(f"{name} must be a date and time with its offset, as text")
    return moment


_OLDEST: Final = 1 << 62
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)


def newest_first(chunk: ChunkRef) -> tuple[int, str]:
    """Return the sort key for newest first; a chunk without a date counts as the oldest."""
    return _age(chunk.uploaded_at), chunk.key


def hottest_first(chunk: ChunkRef) -> tuple[int, int, int, str]:
    """Return the sort key for most reads first, then latest use first, then newest first."""
    used = min(_age(chunk.last_hit), _age(chunk.uploaded_at))
    return -(chunk.heat or 0), used, *newest_first(chunk)


def _age(moment: datetime | None) -> int:
    return _OLDEST if moment is None else (_EPOCH - moment) // _MICROSECOND


def within(chunks: Iterable[ChunkRef], most: int | None, max_bytes: int | None) -> Iterator[ChunkRef]:
    """Yield the first chunks that fit a budget.

    The first chunk that does not fit ends the result: smaller ones after it have lower priority, or are useless without
    it.

    Args:
        chunks: Chunks in descending order of priority.
        most: Maximum number of chunks; None for no limit.
        max_bytes: Maximum sum of their sizes; None for no limit.
    """
    size = 0
    for count, chunk in enumerate(chunks, 1):
        size += chunk.size
        if (most is not None and count > most) or (max_bytes is not None and size > max_bytes):
            return
        yield chunk


def in_order(
    chunks: Iterable[ChunkRef],
    rank: Callable[[ChunkRef], tuple[int | str, ...]],
    path: Path,
    cut: Callable[[Iterable[ChunkRef]], Iterator[ChunkRef]] | None = None,
    **limits: int,
) -> Iterator[ChunkRef]:
    """Sort any number of chunks; see `sort_rows`."""
    return sort_rows(chunks, rank, path, dump=ChunkRef.to_line, load=ChunkRef.from_line, cut=cut, **limits)
