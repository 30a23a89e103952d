"""Durations, sizes and shares as people write them in policies and on command lines: the warmer's grammar, in the jobs' words."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Final

from hfbucket_plugin.core.units import parse_bytes, parse_duration

_SECONDS: Final = {"d": 86400, "h": 3600, "min": 60}


def duration(value: Any) -> timedelta:
    """A duration from `14d`, `1h`, `30min`, `30m`, `90s` or `2w`.

    Raises:
        ValueError: It is no such text. A number alone says nothing of its unit, and is refused too.
    """
    if isinstance(value, timedelta):
        return value
    try:
        if isinstance(value, str):
            return parse_duration(value)
    except ValueError:
        pass
    raise ValueError("must be a duration of at most a hundred years with its unit, such as 14d, 1h, 30min or 90s")


def size(value: Any) -> int:
    """Bytes from `2TiB`, `500GB` or a whole number.

    Raises:
        ValueError: It is no such text.
    """
    if type(value) is int and value >= 0:
        return value
    try:
        if isinstance(value, str):
            return parse_bytes(value)
    except ValueError:
        pass
    raise ValueError("must be a number of bytes, such as 2TiB, 500GB or 1048576")


def in_short(length: timedelta) -> str:
    """A duration as `duration` reads it, in its largest unit that loses nothing: `14d`, `36h`, `90s`."""
    seconds = length.total_seconds()
    for unit in _SECONDS:
        if seconds >= _SECONDS[unit] and seconds % _SECONDS[unit] == 0:
            return f"{seconds / _SECONDS[unit]:.0f}{unit}"
    return f"{seconds:g}s"
