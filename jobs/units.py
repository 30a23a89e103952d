"""Durations, sizes and shares as people write them in policies and on command lines."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any, Final

_SECONDS: Final = {"s": 1, "min": 60, "h": 3600, "d": 86400, "w": 604800}
_BYTES: Final = {"B": 1} | {
    f"{letter}{unit}": base**power
    for power, letter in enumerate("KMGTP", start=1)
    for unit, base in (("iB", 1024), ("B", 1000))
}
_NUMBER_UNIT: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", re.ASCII)
_LONGEST_DAYS: Final = 36500


def duration(value: Any) -> timedelta:
    """A duration from `14d`, `1h`, `30min`, `90s` or `2w`.

    Raises:
        ValueError: It is no such text. A number alone says nothing of its unit, and is refused too.
    """
    if isinstance(value, timedelta):
        return value
    match = _NUMBER_UNIT.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None or match[2] not in _SECONDS:
        raise ValueError("must be a duration with its unit, such as 14d, 1h, 30min or 90s")
    seconds = float(match[1]) * _SECONDS[match[2]]
    if seconds > _LONGEST_DAYS * _SECONDS["d"]:
        raise ValueError(f"must be at most {_LONGEST_DAYS}d")
    return timedelta(seconds=seconds)


def size(value: Any) -> int:
    """Bytes from `2TiB`, `500GB` or a whole number.

    Raises:
        ValueError: It is no such text.
    """
    if type(value) is int and value >= 0:
        return value
    match = _NUMBER_UNIT.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None or match[2] not in _BYTES | {"": 1}:
        raise ValueError("must be a number of bytes, such as 2TiB, 500GB or 1048576")
    return int(float(match[1]) * _BYTES[match[2]]) if match[2] else _whole(match[1])


def _whole(text: str) -> int:
    if not text.isdigit():
        raise ValueError("must be a whole number of bytes, or one with a unit such as 1.5TiB")
    return int(text)


def in_short(length: timedelta) -> str:
    """A duration as `duration` reads it, in its largest unit that loses nothing: `14d`, `36h`, `90s`."""
    seconds = length.total_seconds()
    for unit in ("d", "h", "min"):
        if seconds >= _SECONDS[unit] and seconds % _SECONDS[unit] == 0:
            return f"{seconds / _SECONDS[unit]:.0f}{unit}"
    return f"{seconds:g}s"
