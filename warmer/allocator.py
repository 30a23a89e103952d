"""How a process of the warmer's own keeps memory that is freed, in place of giving it back to take it again at once."""

from __future__ import annotations

import ctypes
from typing import Final

_MIB: Final = 1024 * 1024
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
"""Of glibc's `malloc.h`."""

_LARGEST: Final = 32 * _MIB
"""The most that glibc takes from its arenas in place of a mapping of its own; hf_xet's buffers have 16 MiB."""

_KEPT: Final = 256 * _MIB
"""What an arena may keep at its end, twice what hf_xet may have in flight: never reached, and never the reason to give back."""

_ARENAS: Final = 4
"""Else there are up to eight for each core, and each keeps what it once had."""


def keep_freed_memory() -> bool:
    """Have malloc keep what is freed. For processes that move bytes through large buffers and do nothing else.

    A buffer of 16 MiB is else a mapping of its own, whose 4,096 pages are made, cleared and given back for each piece: 260,000
    page faults for 2 GiB, in place of 40,000 to 120,000 (docs/decisions/0019).

    Returns:
        Whether this is a C library that can be told so.
    """
    try:
        tell = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not glibc
        return False
    wanted = ((_M_MMAP_THRESHOLD, _LARGEST), (_M_TRIM_THRESHOLD, _KEPT), (_M_ARENA_MAX, _ARENAS))
    told = [tell(name, value) for name, value in wanted]  # all of them, whatever becomes of the first
    return all(told)
