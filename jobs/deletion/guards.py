"""Pure safety checks of listings and plans. A failed check refuses the whole plan."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from hfbucket_plugin.core.units import NOTHING, Extent, count, parse_bytes, size
from hfbucket_plugin.errors import ConfigError, SafetyError

if TYPE_CHECKING:
    from collections.abc import Sequence

DEFAULT_PERCENT: Final = 30.0

_PERCENT: Final = re.compile(r"(\d+(?:\.\d+)?)\s*%", re.ASCII)
_WHOLE: Final = 100.0
_SHRUNK: Final = 2
"""A listing is refused if it holds less than the last run's count divided by this."""

_MISSING: Final = 10
"""A listing is also refused if it lacks more than one in this many of the objects that the bucket reports."""


@dataclass(frozen=True, slots=True)
class MaxDelete:
    """Limits of the deletes of one run on an instance; all that are set must hold.

    Attributes:
        objects: Maximum number of objects.
        percent: Maximum percentage of the instance's objects.
        bytes: Maximum number of bytes.
    """

    objects: int | None = None
    percent: float | None = None
    bytes: int | None = None

    @classmethod
    def parse(cls, texts: Sequence[str]) -> MaxDelete:
        """Parse limits such as `5000`, `30%` and `500GiB`; no limit means `DEFAULT_PERCENT`.

        Raises:
            ConfigError: If a text is not a limit, or a kind of limit occurs twice.
        """
        found: dict[str, float] = {}
        for text in texts:
            kind, value = cls._one(text.strip())
            if kind in found:
                raise ConfigError(f"--max-delete {text!r}: a limit of {kind} was given already")
            found[kind] = value
        if not found:
            return cls(percent=DEFAULT_PERCENT)
        objects, nbytes = found.get("objects"), found.get("bytes")
        return cls(
            None if objects is None else int(objects), found.get("percent"), None if nbytes is None else int(nbytes)
        )

    @staticmethod
    def _one(text: str) -> tuple[str, float]:
        percent = _PERCENT.fullmatch(text)
        if percent is not None and float(percent[1]) <= _WHOLE:
            return "percent", float(percent[1])
        if text.isascii() and text.isdigit():
            return "objects", int(text)
        try:
            return "bytes", parse_bytes(text)
        except ValueError:
            raise ConfigError(
                f"--max-delete {text!r}: must be a number of objects (5000), a share of them (30%) or bytes (500GiB)"
            ) from None

    def check(self, planned: Extent, listed: Extent, what: str = "object") -> None:
        """Refuse a plan that exceeds the limits.

        Args:
            planned: Objects and bytes that the plan deletes.
            listed: Objects and bytes that the instance holds.
            what: Noun for the objects, used in the message.

        Raises:
            GuardError: If the plan exceeds a limit; the message says by how much and how to allow it.
        """
        bounds: list[str] = []
        if self.objects is not None and planned.objects > self.objects:
            bounds.append(f"{self.objects:,} objects")
        if self.percent is not None and planned.objects > listed.objects * self.percent / _WHOLE:
            bounds.append(f"{self.percent:g}% of {count(listed.objects, what)}")
        if self.bytes is not None and planned.bytes > self.bytes:
            bounds.append(size(self.bytes))
        if bounds:
            raise SafetyError(
                f"the plan deletes {planned}, more than --max-delete allows ({' and '.join(bounds)}): nothing is deleted. "
                "If that is what you want, raise --max-delete"
            )

    def record(self) -> dict[str, float]:
        """Return the limits that are set, for JSON."""
        pairs = (("objects", self.objects), ("percent", self.percent), ("bytes", self.bytes))
        return {name: value for name, value in pairs if value is not None}

    @classmethod
    def from_record(cls, record: Any) -> MaxDelete:
        """Parse the result of `record`.

        Raises:
            ValueError: If the record is invalid, or contains no limit.
        """
        if not isinstance(record, dict) or not record or set(record) - {"objects", "percent", "bytes"}:
            raise ValueError("max_delete needs objects, percent or bytes")
        if not all(type(value) in (int, float) and 0 <= value < math.inf for value in record.values()):
            raise ValueError("the limits of max_delete are numbers")
        if record.get("percent", 0) > _WHOLE:
            raise ValueError("max_delete has a percent of more than 100")
        return cls(**record)


def check_not_more(listed: int, distinct: int, in_bucket: int) -> None:
    """Refuse a listing with more objects than the bucket holds: overlapping pages, or objects that were never uploaded.

    Args:
        listed: Number of listed objects, duplicates included.
        distinct: Number of distinct listed objects.
        in_bucket: Number of objects that the bucket reports.

    Raises:
        GuardError: If the listing exceeds that number by more than a tenth.
    """
    if (listed - in_bucket) * _MISSING <= in_bucket:
        return
    twice = f" ({listed - distinct:,} of them again)" if distinct < listed else ""
    raise SafetyError(
        f"the listing shows {count(listed, 'object')}{twice} where the bucket says that it has {in_bucket:,}: it is "
        "wrong, and nothing is deleted. Run again; if the bucket's own count is wrong, give --accept-shrunk"
    )


def check_listing(
    listed: Extent,
    seen: int,
    *,
    in_bucket: int | None,
    last: Extent | None,
    foreign: Extent = NOTHING,
    may_be_empty: bool = False,
    done: str = "deleted",
) -> None:
    """Refuse a listing that cannot be complete.

    Args:
        listed: Listed chunks of the instance.
        foreign: Other listed objects that may be deleted.
        seen: Number of all listed objects, the chunks included.
        in_bucket: Number of objects that the bucket reports; None where the instance is only a part of the bucket.
        last: Chunks that the last run left; None if there was no run, or `--accept-shrunk` was given.
        may_be_empty: Whether an empty listing is accepted.
        done: Participle of the refused action, used in messages.

    Raises:
        GuardError: If the listing is empty, truncated, or has less than half of what the last run left.
    """
    if not listed.and_(foreign).objects and not may_be_empty:
        raise SafetyError(f"the listing is empty: nothing is {done}. Is bucket_handle, with its prefix, the right one?")
    if in_bucket is not None and (in_bucket - seen) * _MISSING > in_bucket:
        raise SafetyError(
            f"the listing has {count(seen, 'object')} where the bucket says that it has {in_bucket:,}: it is truncated, "
            f"and nothing is {done}. Run again; if the bucket's own count is wrong, give --accept-shrunk"
        )
    if last is not None and listed.objects * _SHRUNK < last.objects:
        raise SafetyError(
            f"the listing has {count(listed.objects, 'object')}, less than half of the {last.objects:,} that the last run "
            f"left: nothing is {done}. If others deleted them, give --accept-shrunk once"
        )
