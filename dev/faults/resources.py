"""What a process holds: memory, threads, descriptors, temporary files."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import hf_xet
import torch

_MIB = 1024 * 1024


@dataclass(frozen=True)
class Held:
    """At one moment.

    Attributes:
        rss_mib: Resident memory.
        threads: Of the system's, those of hf_xet included.
        python_threads: Of Python's.
        descriptors: Open files and sockets.
        files: Temporary files of ours.
        names: Of the system's threads, how many there are of each name.
    """

    rss_mib: float
    threads: int
    python_threads: int
    descriptors: int
    files: int
    names: dict[str, int]


def warm_libraries(temporary: Path) -> None:
    """Have the libraries start what they keep for the life of a process: threads of hf_xet's hashing, and of torch."""
    temporary.mkdir(parents=True, exist_ok=True)
    sample = temporary / "sample"
    sample.write_bytes(bytes(_MIB))
    hf_xet.hash_files([str(sample)])
    sample.unlink()
    torch.zeros(4 * _MIB).add_(1)


def held(temporary: Path) -> Held:
    """What this process holds now, after what nobody refers to was given back to the system.

    Args:
        temporary: Where temporary files lie.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    names: Counter[str] = Counter()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it has just ended
            names[(task / "comm").read_text().strip()] += 1
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Held(
        rss_mib=pages * os.sysconf("SC_PAGE_SIZE") / _MIB,
        threads=names.total(),
        python_threads=threading.active_count(),
        descriptors=len(list(Path("/proc/self/fd").iterdir())),
        files=sum(len(files) for _, _, files in os.walk(temporary)),
        names=dict(names),
    )
