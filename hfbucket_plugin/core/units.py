"""Text forms of sizes, durations, ages and worker ranks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final, TypeVar

from hfbucket_plugin.core import texts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from datetime import datetime

_T = TypeVar("_T")

_STEP: Final = 1024
_BYTE_UNITS: Final = ("KiB", "MiB", "GiB", "TiB", "PiB")
_AGE_UNITS: Final = ((86400, "d"), (3600, "h"), (60, "min"))


def size(amount: float) -> str:
    """Format a number of bytes: `512 B`, `1.5 MiB`."""
    if amount < _STEP:
        return f"{amount:.0f} B"
    for unit in _BYTE_UNITS[:-1]:
        amount /= _STEP
        if amount < _STEP:
            return f"{amount:.1f} {unit}"
    return f"{amount / _STEP:.1f} {_BYTE_UNITS[-1]}"


def age(moment: datetime | None, now: datetime) -> str:
    """Format the age of a time in its largest unit: `3 d`, `20 min`; `-` if unknown."""
    if moment is None:
        return "-"
    seconds = max(0, int((now - moment).total_seconds()))  # clocks differ, but nothing was uploaded in the future
    for length, unit in _AGE_UNITS:
        if seconds >= length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"


def instant(moment: datetime | None) -> str | None:
    """Format a time as ISO 8601 with its offset, to the second."""
    return moment.isoformat(timespec="seconds") if moment is not None else None


def count(number: int, one: str) -> str:
    """Format a number with its noun: `1 object`, `2,000 objects`."""
    return f"{number:,} {one}" + ("" if number == 1 else "s")


printable = texts.printable


_QUANTITY: Final = re.compile(r"([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*([A-Za-z]*)")
_BYTES: Final = {"": 1, "B": 1} | {
    f"{letter}{unit}": base**power
    for power, letter in enumerate("KMGTP", start=1)
    for unit, base in (("iB", 1024), ("B", 1000))
}
_MOST_BYTES: Final = 2**63 - 1
_SECONDS: Final = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400, "w": 604800}
_LONGEST_SECS: Final = 100 * 366 * 86400

_RANKS: Final = re.compile(r"([0-9]{1,7})(?:-([0-9]{1,7}))?")
_MOST_RANKS: Final = 65536


def parse_bytes(text: object) -> int:
    """Parse a size.

    Args:
        text: `50GiB`, `500GB`, or a number of bytes, as text or as an integer. Binary units (`KiB` to `PiB`) are powers
            of 1024, decimal ones (`KB` to `PB`) of 1000; a fraction of a byte is dropped.

    Raises:
        ValueError: It is not a size; the message names the expected format.
    """
    if type(text) is int and 0 <= text <= _MOST_BYTES:
        return text
    match = _QUANTITY.fullmatch(text.strip()) if isinstance(text, str) else None
    if match is None:
        raise ValueError(f"invalid size {text!r}: expected a number of bytes, or a value such as 50GiB or 500GB")
    number, unit = match[1], match[2]
    if unit not in _BYTES:
        raise ValueError(
            f"invalid size {text!r}: unknown unit {unit!r}{_nearest_unit(unit)}; known are KiB, MiB, GiB, TiB, PiB and KB, "
            "MB, GB, TB, PB"
        )
    size = Decimal(number) * _BYTES[unit]
    if size != int(size) and _BYTES[unit] == 1:
        raise ValueError(f"invalid size {text!r}: not a whole number of bytes")
    if size > _MOST_BYTES:
        raise ValueError(f"invalid size {text!r}: more than {_MOST_BYTES} bytes")
    return int(size)


def _nearest_unit(unit: str) -> str:
    """Return the unit to propose: `Gi`, `gib` and `G` mean GiB to most, but 7 % less to some, so it is not assumed."""
    near = f"{unit[:1].upper()}iB"
    return f" (did you mean {near}?)" if near in _BYTES else ""


def parse_duration(text: object) -> timedelta:
    """Parse a duration.

    Args:
        text: Number with a unit, such as `90s`, `30m` or `30min`, `24h`, `14d` or `2w`; or a parsed duration.

    Raises:
        ValueError: It is not a duration, such as a number without a unit; the message names the expected format.
    """
    if isinstance(text, timedelta):
        return text
    match = _QUANTITY.fullmatch(text.strip()) if isinstance(text, str) else None
    if match is None or match[2] not in _SECONDS:
        raise ValueError(
            f"invalid duration {text!r}: expected a number with its unit, such as 90s, 30min, 24h, 14d or 2w"
        )
    seconds = Decimal(match[1]) * _SECONDS[match[2]]
    if seconds > _LONGEST_SECS:
        raise ValueError(f"invalid duration {text!r}: more than a hundred years")
    return timedelta(seconds=float(seconds))


def format_duration(value: timedelta) -> str:
    """Format a duration for `parse_duration`, in its largest unit without loss: `14d`, `36h`, `90s`."""
    seconds = value.total_seconds()
    for length, unit in _AGE_UNITS:
        if seconds >= length and seconds % length == 0:
            return f"{seconds / length:.0f}{unit}"
    return f"{seconds:.6f}".rstrip("0").rstrip(".") + "s"


def parse_ranks(text: str) -> frozenset[int]:
    """Parse worker ranks, such as `0-3,7`.

    Raises:
        ValueError: They are not ranks; the message names the expected format.
    """
    ranks: set[int] = set()
    for part in text.split(","):
        match = _RANKS.fullmatch(part.strip())
        if match is None:
            raise ValueError(f"{text!r} are no ranks of workers: they read 0-3 or 0-3,7")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f"{text!r}: {part.strip()!r} ends before it begins")
        if last - first >= _MOST_RANKS:
            raise ValueError(f"{text!r}: {part.strip()!r} are more workers than any engine has")
        ranks.update(range(first, last + 1))
    return frozenset(ranks)


def format_ranks(ranks: Iterable[int]) -> str:
    """Format ranks for `parse_ranks`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in runs)


@dataclass(frozen=True, slots=True)
class Extent:
    """Number and size of objects.

    Attributes:
        objects: Number of objects.
        bytes: Sum of their sizes in bytes.
    """

    objects: int = 0
    bytes: int = 0

    def plus(self, nbytes: int) -> Extent:
        """Return the sum with one more object of `nbytes` bytes."""
        return Extent(self.objects + 1, self.bytes + nbytes)

    def and_(self, other: Extent) -> Extent:
        """Return the sum with another extent."""
        return Extent(self.objects + other.objects, self.bytes + other.bytes)

    def minus(self, other: Extent) -> Extent:
        """Return the difference to another extent, at least zero."""
        return Extent(max(0, self.objects - other.objects), max(0, self.bytes - other.bytes))

    def record(self) -> dict[str, int]:
        """Return a record for JSON."""
        return {"objects": self.objects, "bytes": self.bytes}

    @classmethod
    def from_record(cls, record: Any) -> Extent:
        """Parse the result of `record`.

        Raises:
            ValueError: It is not such a record.
        """
        objects, nbytes = (record.get("objects"), record.get("bytes")) if isinstance(record, dict) else (None, None)
        if type(objects) is not int or type(nbytes) is not int or objects < 0 or nbytes < 0:
            raise ValueError("an extent needs objects and bytes, as numbers")
        return cls(objects, nbytes)

    def __str__(self) -> str:
        return f"{count(self.objects, 'object')}, {size(self.bytes)}"


NOTHING: Final = Extent()


def batches(items: Iterable[_T], limit: int, nbytes: Callable[[_T], int]) -> Iterator[list[_T]]:
    """Split items into lists of at most `limit` bytes, or of a single larger item.

    Args:
        items: Items in order.
        limit: Maximum bytes of a list.
        nbytes: Returns the bytes of an item.
    """
    batch: list[_T] = []
    amount = 0
    for item in items:
        if batch and amount + nbytes(item) > limit:
            yield batch
            batch, amount = [], 0
        batch.append(item)
        amount += nbytes(item)
    if batch:
        yield batch
