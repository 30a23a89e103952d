"""How sizes, ages and the texts of others are shown to people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from hfbucket_plugin import texts

if TYPE_CHECKING:
    from datetime import datetime

_STEP: Final = 1024
_BYTE_UNITS: Final = ("KiB", "MiB", "GiB", "TiB", "PiB")
_AGE_UNITS: Final = ((86400, "d"), (3600, "h"), (60, "min"))


def size(amount: float) -> str:
    """Bytes in words: `512 B`, `1.5 MiB`."""
    if amount < _STEP:
        return f"{amount:.0f} B"
    for unit in _BYTE_UNITS[:-1]:
        amount /= _STEP
        if amount < _STEP:
            return f"{amount:.1f} {unit}"
    return f"{amount / _STEP:.1f} {_BYTE_UNITS[-1]}"


def age(moment: datetime | None, now: datetime) -> str:
    """How long ago a moment was, in its largest unit: `3 d`, `20 min`; `-` where it is not known."""
    if moment is None:
        return "-"
    seconds = max(0, int((now - moment).total_seconds()))  # clocks differ: nothing was uploaded in the future
    for length, unit in _AGE_UNITS:
        if seconds >= length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"


def instant(moment: datetime | None) -> str | None:
    """A moment as ISO 8601 with its offset, to the second."""
    return moment.isoformat(timespec="seconds") if moment is not None else None


def count(number: int, one: str) -> str:
    """A number with its noun: `1 object`, `2,000 objects`."""
    return f"{number:,} {one}" + ("" if number == 1 else "s")


printable = texts.printable
