"""Jobs that maintain bucket instances: retention cleanup, deletion by name, export and import, key indexes, status.

::

    cli, api → options ─┬─ deletion    cleanup, deletion by name, and the chunks that a mirror deletes at its destination
                        ├─ export      export, import and mirror
                        ├─ index       build, verify and prune a key index
                        └─ status      what an instance holds, and what the next cleanup would do

    deletion, export, index → batch        apply a plan in batches, in this process or on Ray actors
                            → lock         one job at a time, by the Hub's clock
                            → retention    the policy: which chunks expire, and in which order
                            → report       what happened, and the exit code that it stands for

`retention` is pure except for the sort on disk; only the modules named `ray` and `ray_pool` import Ray. Because jobs
delete
delete data, every check fails closed.

The public names are those in `__all__`; each is loaded on first use. The modules may change in any release. See
`docs/python.md`.
"""

from __future__ import annotations

from importlib import import_module as _import_module
from typing import TYPE_CHECKING

from hfbucket_plugin.core.texts import clean_logs as _clean_logs

if TYPE_CHECKING:
    from hfbucket_plugin.core.units import Extent
    from hfbucket_plugin.tools.selection import Selection
    from jobs.api import CleanupRequest, ExportRequest, read_status, run_cleanup, run_export
    from jobs.deletion.guards import MaxDelete
    from jobs.deletion.report import DeletionSummary
    from jobs.export.report import ExportSummary
    from jobs.retention.policy import Models, Policy, Rule
    from jobs.status.status import Status

__all__ = [
    "CleanupRequest",
    "DeletionSummary",
    "ExportRequest",
    "ExportSummary",
    "Extent",
    "MaxDelete",
    "Models",
    "Policy",
    "Rule",
    "Selection",
    "Status",
    "read_status",
    "run_cleanup",
    "run_export",
]

_clean_logs(__name__, __path__)

_HOMES = {
    "hfbucket_plugin.core.units": ("Extent",),
    "hfbucket_plugin.tools.selection": ("Selection",),
    "jobs.api": ("CleanupRequest", "ExportRequest", "read_status", "run_cleanup", "run_export"),
    "jobs.deletion.guards": ("MaxDelete",),
    "jobs.deletion.report": ("DeletionSummary",),
    "jobs.export.report": ("ExportSummary",),
    "jobs.retention.policy": ("Models", "Policy", "Rule"),
    "jobs.status.status": ("Status",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

if not TYPE_CHECKING:  # a type checker reports misspelt names

    def __getattr__(name: str) -> object:
        if name not in _HOME_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return globals().setdefault(name, getattr(_import_module(_HOME_OF[name]), name))

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
