"""Ray actors that fill node-local LMCache tiers from a bucket before traffic arrives.

::

    cli → run ─┬─ plan                      which chunks to copy, as a file
               ├─ cluster → schedule        which node gets which batch next
               │          └─ node → tiers   bytes into one node's tier
               ├─ check                     whether tiers hold the plan, and engines hit it
               └─ report                    results

`schedule` is pure; only `cluster` imports Ray.

The names in `__all__` are public and are loaded on first use. The modules may change in any release. See
`docs/python.md`.
"""

from __future__ import annotations

from importlib import import_module as _import_module
from typing import TYPE_CHECKING

from hfbucket_plugin.core.texts import clean_logs as _clean_logs

if TYPE_CHECKING:
    from hfbucket_plugin.tools.selection import Selection
    from warmer.report.outcomes import ClusterError, NothingToDoError
    from warmer.report.result import WarmedNode, WarmFailure, WarmSummary
    from warmer.request.model import (
        FillOptions,
        LimitOptions,
        NodeOptions,
        SourceOptions,
        TransferOptions,
        WarmRequest,
    )
    from warmer.request.warm_file import read_request
    from warmer.run import warm_up

__all__ = [
    "ClusterError",
    "FillOptions",
    "LimitOptions",
    "NodeOptions",
    "NothingToDoError",
    "Selection",
    "SourceOptions",
    "TransferOptions",
    "WarmFailure",
    "WarmRequest",
    "WarmSummary",
    "WarmedNode",
    "read_request",
    "warm_up",
]

_clean_logs(__name__, __path__)

_HOMES = {
    "hfbucket_plugin.tools.selection": ("Selection",),
    "warmer.report.outcomes": ("ClusterError", "NothingToDoError"),
    "warmer.report.result": ("WarmFailure", "WarmSummary", "WarmedNode"),
    "warmer.request.model": (
        "FillOptions",
        "LimitOptions",
        "NodeOptions",
        "SourceOptions",
        "TransferOptions",
        "WarmRequest",
    ),
    "warmer.request.warm_file": ("read_request",),
    "warmer.run": ("warm_up",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

if not TYPE_CHECKING:  # a type checker would otherwise accept misspelt names

    def __getattr__(name: str) -> object:
        if name not in _HOME_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return globals().setdefault(name, getattr(_import_module(_HOME_OF[name]), name))

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
