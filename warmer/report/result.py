"""Result of a warm-up for programs: the summary as frozen values. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmFailure:
    """A chunk that is not in a tier of a node, or the incomplete prompts of an engine that loads by prompts.

    Attributes:
        tier: Name of the tier.
        node: Ray's id of the node.
        node_name: Name of the node.
        key: Key of the chunk; None for prompts.
        kind: Stable identifier of the reason; see `docs/warm-report.md`.
        message: Reason in words.
    """

    tier: str
    node: str
    node_name: str
    key: str | None
    kind: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmedNode:
    """Result on one node, for one tier.

    Attributes:
        id: Ray's id.
        name: Name of the node.
        selected: Number of chunks that the node should hold.
        copied: Number of chunks that were copied and verified.
        present: Number of chunks that were present before.
        failed: Number of chunks that are absent.
        bytes: Bytes of the copied chunks.
        error: Why the node took no part or was lost; None if neither.
    """

    id: str
    name: str
    selected: int
    copied: int
    present: int
    failed: int
    bytes: int
    error: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmSummary:
    """Result of a warm-up. A chunk for three nodes counts three times.

    Attributes:
        result: `complete`, `failed`, `refused` or `interrupted`.
        exit_code: Exit code that the command would have: 0, 3, 4 or 5.
        message: Why the run ended early; empty if it did not.
        instance: Name of the instance from which chunks came.
        bucket: Bucket handle of the instance.
        selected: Number of chunks of the plan.
        selected_bytes: Bytes of these chunks.
        copied: Number of chunks that were copied, verified, and are now in a tier.
        present: Number of chunks that were present before.
        failed: Number of chunks that are absent.
        unfinished: Number of chunks that were not started or were given up when the run was stopped.
        bytes: Bytes of the copied chunks.
        seconds: Seconds from the first actor to the last chunk.
        nodes: Results by node and tier.
        failures: Failed chunks, at most 1000; the file of `WarmRequest.report` names all.
        record: Complete summary as the command prints it; see `docs/warm-report.md`.
    """

    result: str
    exit_code: int
    message: str
    instance: str
    bucket: str
    selected: int
    selected_bytes: int
    copied: int
    present: int
    failed: int
    unfinished: int
    bytes: int
    seconds: float
    nodes: tuple[WarmedNode, ...]
    failures: tuple[WarmFailure, ...]
    record: dict[str, Any] = field(repr=False)

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> WarmSummary:
        """Make a summary from the record that the command prints.

        Args:
            record: Record from `warmer.report.summary.combined`.
        """
        values = record | {
            "nodes": tuple(_known(WarmedNode, node) for node in record["nodes"]),
            "failures": tuple(_known(WarmFailure, failure) for failure in record["failures"]),
            "record": record,
        }
        return _known(cls, values)


def _known(cls: type[_T], values: dict[str, Any]) -> _T:
    """Make a dataclass from the values that match its fields."""
    return cls(**{one.name: values[one.name] for one in fields(cls)})  # type: ignore[arg-type]
