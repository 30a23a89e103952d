"""An environment in which nothing calls home, reads a user's settings, or meets what another Hub stored."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_FOREIGN = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "HF_ENDPOINT",
    "HF_XET_CACHE",
    "HF_HUB_CACHE",
    "PROMETHEUS_MULTIPROC_DIR",
)


def environment(home: Path) -> dict[str, str]:
    """The environment of a process that talks to one Hub.

    Args:
        home: Its `HF_HOME`: hf_xet remembers there what it uploaded to which address.
    """
    ours = {name: value for name, value in os.environ.items() if name not in _FOREIGN}
    return ours | {
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "LMCACHE_TRACK_USAGE": "false",
        "LMCACHE_LOG_LEVEL": "CRITICAL",
        "DO_NOT_TRACK": "1",
    }
