"""What a plan must not be for anything to be deleted. Pure. Every refusal is of the whole plan."""

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
"""A listing with fewer than one in so many of the objects that there were is not believed."""

_MISSING: Final = 10
"""Nor is one that lacks more than one in so many of the objects that the bucket says it has."""


@dataclass(frozen=True, slots=True)
class MaxDelete:
    """Most that one run may delete of an instance; all that are set must hold.

    Attributes:
        objects: Most objects.
        percent: Most objects, of those that the instance has.
        bytes: Most bytes.
    """

    objects: int | None = None
    percent: float | None = None
    bytes: int | None = None

    @classmethod
    def parse(cls, texts: Sequence[str]) -> MaxDelete:
        """Read `5000`, `30%` and `500GiB`; none means `DEFAULT_PERCENT`.

        Raises:
            ConfigError: One is neither, or a kind is named twice.
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
        """Refuse a plan that deletes more.

        Args:
            planned: What it deletes.
            listed: What the instance has.
            what: What these are, for people.

        Raises:
            GuardError: It does; the message says by how much and how to allow it.
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
        """For JSON: what is set."""
        pairs = (("objects", self.objects), ("percent", self.percent), ("bytes", self.bytes))
        return {name: value for name, value in pairs if value is not None}

    @classmethod
    def from_record(cls, record: Any) -> MaxDelete:
        """Read what `record` made.

        Raises:
            ValueError: It is no such thing, or limits nothing.
        """
        if not isinstance(record, dict) or not record or set(record) - {"objects", "percent", "bytes"}:
            raise ValueError("max_delete needs objects, percent or bytes")
        if not all(type(value) in (int, float) and 0 <= value < math.inf for value in record.values()):
            raise ValueError("the limits of max_delete are numbers")
        if record.get("percent", 0) > _WHOLE:
            raise ValueError("max_delete has a percent of more than 100")
        return cls(**record)


def check_not_more(listed: int, distinct: int, in_bucket: int) -> None:
    """Refuse a listing that shows more than there is: pages that overlap, or objects that nobody put.

    Args:
        listed: The objects that it shows, those of it that it shows again included.
        distinct: The same, each counted once.
        in_bucket: How many the bucket says it has.

    Raises:
        GuardError: It shows more than one in ten too many.
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
    """Refuse a listing that cannot be all of it.

    Args:
        listed: The chunks of the instance in it.
        foreign: What else may be deleted.
        seen: All objects in it, ours included.
        in_bucket: How many the bucket says it has; None where the instance is only a part of it.
        last: What the last run left of its chunks; None where there was none, or the shrinking was accepted.
        may_be_empty: Whether there may be nothing in it.
        done: What is not done then, for messages.

    Raises:
        GuardError: It is empty, truncated, or has less than half of what there was.
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
