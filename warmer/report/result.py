"""What a program learns from a warm-up: the summary as frozen values. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmFailure:
    """A chunk that is not in a tier of a node, or the incomplete prompts of an engine that loads by prompts.

    Attributes:
        tier: The tier.
        node: Ray's id of the node.
        node_name: Its name.
        key: The chunk; None for prompts.
        kind: A stable word for the reason, see `docs/warm-report.md`.
        message: The reason in words.
    """

    tier: str
    node: str
    node_name: str
    key: str | None
    kind: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmedNode:
    """What happened on one node; of several tiers, one entry for each.

    Attributes:
        id: Ray's id.
        name: The node's name.
        selected: Chunks that the node is to hold.
        copied: Chunks that were copied and verified.
        present: Chunks that were there before.
        failed: Chunks that are not there.
        bytes: Bytes of the chunks copied.
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
    """What a warm-up did. A chunk for three nodes counts three times.

    Attributes:
        result: `complete`, `failed`, `refused` or `interrupted`.
        exit_code: What the command would have exited with: 0, 3, 4 or 5.
        message: Why the run ended early; empty if it did not.
        instance: The instance that chunks came from.
        bucket: Its bucket handle.
        selected: Chunks of the plan.
        selected_bytes: Their bytes.
        copied: Chunks that were copied, verified, and are now in a tier.
        present: Chunks that were there before.
        failed: Chunks that are not there.
        unfinished: Chunks that were not begun or were given up when the run was stopped.
        bytes: Bytes of the chunks copied.
        seconds: From the first actor to the last chunk.
        nodes: The same for each node.
        failures: The failed chunks, 1000 at most; the file of `WarmRequest.report` names all.
        record: The whole summary as the command prints it, see `docs/warm-report.md`.
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
        """Make a summary of the record that the command prints.

        Args:
            record: Of `warmer.report.summary.combined`.
        """
        values = record | {
            "nodes": tuple(_known(WarmedNode, node) for node in record["nodes"]),
            "failures": tuple(_known(WarmFailure, failure) for failure in record["failures"]),
            "record": record,
        }
        return _known(cls, values)


def _known(cls: type[_T], values: dict[str, Any]) -> _T:
    """Make a dataclass of those values that it has fields for."""
    return cls(**{one.name: values[one.name] for one in fields(cls)})  # type: ignore[arg-type]
