"""One summary of several tiers. Pure."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, Final

from warmer import exits
from warmer.report import RESULTS

if TYPE_CHECKING:
    from collections.abc import Sequence

_SUMS: Final = (
    "copied", "received", "reused", "present", "failed", "unfinished", "bytes",
    "fetched", "fetched_bytes", "refetched", "fetched_alone", "repaired", "left_wrong",
)  # fmt: skip
_OF_A_TIER: Final = ("tier", "result", "exit_code", *_SUMS, "seconds", "failed_by_kind", "nodes")


def combined(summaries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The summary of a run from those of its tiers.

    Args:
        summaries: Of `RunReport.summary`, in the order of the tiers; at least one.

    Returns:
        Of one tier, its summary as it is. Of several, sums, and below `tiers` what is each one's own.
    """
    first = summaries[0]
    if len(summaries) == 1:
        return first
    cut_short = [summary for summary in summaries if summary["message"]]
    code = cut_short[0]["exit_code"] if cut_short else _code({summary["exit_code"] for summary in summaries})
    kinds: Counter[str] = Counter()
    for summary in summaries:
        kinds.update(summary["failed_by_kind"])
    sums = {name: sum(summary[name] for summary in summaries) for name in _SUMS}
    own = [{name: summary[name] for name in _OF_A_TIER} for summary in summaries]
    return first | sums | {
        "result": RESULTS[code],
        "exit_code": code,
        "message": cut_short[0]["message"] if cut_short else "",
        "tier": [summary["tier"] for summary in summaries],
        "seconds": round(sum(summary["seconds"] for summary in summaries), 3),
        "failed_by_kind": dict(kinds),
        "nodes": [node for summary in summaries for node in summary["nodes"]],
        "tiers": own,
    }  # fmt: skip


def _code(codes: set[int]) -> int:
    if len(codes) == 1:
        return next(iter(codes))
    return exits.INTERRUPTED if exits.INTERRUPTED in codes else exits.FAILED
