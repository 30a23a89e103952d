"""What identifies the content of an object."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Content:
    """What identifies the content of an object: its Xet hash (64 hexadecimal digits) and its size in bytes."""

    xet_hash: str
    size: int
