"""Which chunks a run is about: a choice as people state it, and the filter that it is. Pure.

As much of a choice as possible is asked of the Hub itself: a listing starts at the longest starts of keys that cannot
leave out a selected chunk (`listing_prefixes`). Everything else is filtered afterwards.
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
"""Beyond as many, fewer and shorter ones are listed: each costs a request at least."""


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
    """For pydantic: ranks of workers from `0-3,7`, or from the number that YAML makes of `3`."""
    if isinstance(value, bool):
        raise ValueError("ranks of workers read 0-3,7")  # noqa: TRY004 - as above
    return parse_ranks(str(value)) if isinstance(value, (str, int)) else value


Texts = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_as_list)]
"""One text or several, none empty."""

Bytes = Annotated[int, BeforeValidator(_as_bytes), Field(gt=0)]
"""A number of bytes, or a text such as `50GiB`."""

Seconds = Annotated[float, BeforeValidator(_as_seconds), Field(gt=0)]
"""A number of seconds, or a text such as `30m`."""

Length = Annotated[timedelta, BeforeValidator(_as_duration), Field(ge=timedelta(0)), PlainSerializer(format_duration)]
"""A length of time, or a text such as `24h`."""

Ranks = Annotated[frozenset[int], BeforeValidator(as_ranks), PlainSerializer(format_ranks)]
"""Ranks of workers."""


class Selection(BaseModel):
    """Which chunks of an instance. All that is given has to hold; of several texts in one field, one has to."""

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
        """Whether it says which chunks at all."""
        return self.all or bool(self.prefix or self.model or self.keys_from or self.prompts)

    @property
    def wants_access(self) -> bool:
        """Whether chunks are wanted in the order in which they are read most."""
        return self.prompts is None and self.newest is None and (self.hottest or self.max_bytes) is not None

    @property
    def most(self) -> int | None:
        """The most chunks, whichever of `newest` and `hottest` says so."""
        return self.newest if self.hottest is None else self.hottest

    def listing_prefixes(self, kind: type[Key] | None = None) -> list[str]:
        """Starts of keys, such that each chunk of the choice starts with one of them.

        Args:
            kind: The only kind of key that is wanted; None for both, whose common prefixes are shorter.
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
        # A rank has at least 8 digits: the world size, two digits of the worker, and four that are local.
        start = f"{model}@{self.world_size:02x}"
        if self.workers is None:
            return [start]
        return [f"{start}{worker:02x}" for worker in sorted(self.workers) if worker < 256]  # noqa: PLR2004 - a byte

    def filter(self, now: datetime) -> Filter:
        """The choice as a filter.

        Args:
            now: What `since` counts back from.
        """
        return Filter(self, now)


def _both(prefix: str, start: str) -> str | None:
    """The start of the keys that start with both."""
    if prefix.startswith(start):
        return prefix
    return start if start.startswith(prefix) else None


class Filter:
    """Whether a chunk is selected, as far as its entry alone decides it.

    Args:
        selection: What is wanted.
        now: What `since` counts back from.
    """

    def __init__(self, selection: Selection, now: datetime) -> None:
        self._choice = selection
        self._after = None if selection.since is None else now - selection.since
        self._models = frozenset(selection.model)
        self._include = _pattern(selection.include)
        self._exclude = _pattern(selection.exclude)

    def __call__(self, entry: ChunkEntry) -> bool:
        """Whether a chunk is of the choice."""
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
    """A chunk of a bucket, as plans name it.

    Attributes:
        key: Its key string.
        path: Of its object, from the root of the bucket.
        xet_hash: Of its content, 64 hexadecimal digits.
        size: Bytes.
        uploaded_at: When the Hub took it; None when it did not say.
        gone: Whether the bucket no longer held it when it was last looked up.
        worker: Rank of the one worker that reads it; None when all do, as where an engine has but one world, or stores
            what all its workers share (MLA) as if it had one.
        heat: How hot it is (`hfbucket_plugin.index.access.stats.buckets`); None where that was not asked or is not known.
        last_hit: When it was last read; None where that is not known.
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
        """The chunk as one line of JSON, its newline included."""
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
        """Read what `to_line` wrote.

        Raises:
            ValueError: The line is no planned chunk.
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
"""No file is larger, and no count is."""


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
    """The rank of a chunk in an order from newest to oldest; one without a date counts as the oldest."""
    return _age(chunk.uploaded_at), chunk.key


def hottest_first(chunk: ChunkRef) -> tuple[int, int, int, str]:
    """The rank of a chunk in an order from most to least read, then from last to first used, then from newest to oldest."""
    used = min(_age(chunk.last_hit), _age(chunk.uploaded_at))
    return -(chunk.heat or 0), used, *newest_first(chunk)


def _age(moment: datetime | None) -> int:
    return _OLDEST if moment is None else (_EPOCH - moment) // _MICROSECOND


def within(chunks: Iterable[ChunkRef], most: int | None, max_bytes: int | None) -> Iterator[ChunkRef]:
    """Yield the first chunks that fit a budget.

    The first chunk that does not fit ends it: smaller ones behind it are less wanted, or useless without it.

    Args:
        chunks: In the order in which they are wanted.
        most: Chunks; None for no bound.
        max_bytes: The sum of their sizes; None for no bound.
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
