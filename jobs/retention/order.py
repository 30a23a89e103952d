"""Retention decisions from a policy and entries, each with its reason. Pure except for a spill file; no network access.

The order of the reasons is that of the checks: objects of unknown age, too young objects and shielded objects are kept
before any rule applies. Budgets delete the least recently used objects first, ties by key, and count all objects,
those they may not delete included. A use is a put or a read; where reads are not known, it is the put.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from hfbucket_plugin.tools.inventory import RetentionEntry
from jobs.retention.ordering import FIRST, Ordering, Row, State, moment_of, ticks_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from datetime import datetime
    from pathlib import Path

    from jobs.retention.ordering import Rank
    from jobs.retention.policy import Policy, RetentionLimits


class Reason(StrEnum):
    """Why an object is kept or deleted. The values appear in plans and reports."""

    EXPIRED = "expired"
    IDLE = "idle"
    OVER_BUDGET = "over-budget"
    MODEL_RETIRED = "model-retired"
    FOREIGN = "foreign"
    ASKED = "asked"  # requested by `rm`
    NOT_AT_SOURCE = "not-at-source"  # deleted by a mirror
    NO_DATE = "no-date"
    TOO_YOUNG = "too-young"
    SHIELDED = "shielded"
    KEPT = "kept"


BY_USE: Final = frozenset({Reason.IDLE, Reason.OVER_BUDGET})
"""Reasons that a read invalidates."""


@dataclass(frozen=True, slots=True)
class Decision:
    """Decision on an entry.

    Attributes:
        entry: The entry.
        reason: Why it is deleted or kept.
        delete: Whether it is deleted.
    """

    entry: RetentionEntry
    reason: Reason
    delete: bool


def decide(
    policy: Policy, entries: Iterable[RetentionEntry], now: datetime, directory: Path | None = None
) -> Iterator[Decision]:
    """Yield a decision for each entry.

    Age and idle rules stream. If budgets or `keep_newest` need an order, the relevant fields of the entries are spilled
    to
    disk, and decisions come least recently used first: memory does not grow with the number of entries in either case.

    Args:
        policy: Policy of the instance.
        entries: Entries in any order.
        now: Current time by the clock of `uploaded_at`.
        directory: Directory of the spill file; None for the system's directory of temporary files.
    """
    judge = _Judge(policy, now)
    if policy.streams:
        for entry in entries:
            yield _decision(entry, judge.state(entry))
        return
    with Ordering(directory) as ordering:
        ordering.fill(judge.row(entry) for entry in entries)
        whole = _Whole(policy, ordering)
        for row in ordering.unused_first():
            yield _decision(_entry(row), whole.state(row))


@dataclass(frozen=True, slots=True)
class _Judge:
    """Decisions that depend on a single entry."""

    policy: Policy
    now: datetime

    def row(self, entry: RetentionEntry) -> Row:
        at, used = (None if one is None else ticks_of(one) for one in (entry.uploaded_at, entry.last_used))
        return Row(used, at, entry.key, self._rule(entry.key), entry.size, entry.xet_hash, self.state(entry))

    def state(self, entry: RetentionEntry) -> State:
        policy = self.policy
        if entry.uploaded_at is None:
            return State.NO_DATE
        age = self.now - entry.uploaded_at
        if age < policy.min_age:
            return State.TOO_YOUNG
        if entry.key.startswith(policy.keep_prefix):
            return State.SHIELDED
        if policy.models is not None and entry.model not in policy.models.keep:
            return State.RETIRED
        rule = self._rule(entry.key)
        limits: RetentionLimits = policy if rule is None else policy.rules[rule]
        if limits.max_age is not None and age > limits.max_age:
            return State.EXPIRED
        since = entry.idle_since or entry.uploaded_at
        return State.IDLE if limits.max_idle is not None and self.now - since > limits.max_idle else State.OPEN

    def _rule(self, key: str) -> int | None:
        return next((number for number, rule in enumerate(self.policy.rules) if rule.matches(key)), None)


_REASONS = {
    State.NO_DATE: Reason.NO_DATE,
    State.TOO_YOUNG: Reason.TOO_YOUNG,
    State.SHIELDED: Reason.SHIELDED,
    State.RETIRED: Reason.MODEL_RETIRED,
    State.EXPIRED: Reason.EXPIRED,
    State.IDLE: Reason.IDLE,
    State.OVER: Reason.OVER_BUDGET,
    State.OPEN: Reason.KEPT,
}
_DELETED = frozenset({State.RETIRED, State.EXPIRED, State.IDLE, State.OVER})


def _decision(entry: RetentionEntry, state: State) -> Decision:
    return Decision(entry, _REASONS[state], state in _DELETED)


def _entry(row: Row) -> RetentionEntry:
    at, used = (None if one is None else moment_of(one) for one in (row.at, row.used))
    return RetentionEntry(row.key, row.xet_hash, row.size, at, used)


class _Whole:
    """Decisions that depend on all entries.

    Only ranks are stored: the age from which the entries of a scope are its newest, and the use up to which entries
    expire.

    Args:
        policy: Policy of the instance.
        ordering: All entries of the instance.
    """

    def __init__(self, policy: Policy, ordering: Ordering) -> None:
        # A rule's budget applies before the instance's, which would otherwise delete for what the rule is about to
        # free.
        scopes: dict[int | None, RetentionLimits] = {**dict(enumerate(policy.rules)), None: policy}
        self._newest = {
            rule: ordering.newest(limits.keep_newest, rule) for rule, limits in scopes.items() if limits.keep_newest
        }
        self._over: dict[int | None, Rank] = {}
        for rule, limits in scopes.items():
            if limits.max_bytes is not None or limits.max_objects is not None:
                self._over[rule] = self._threshold(rule, limits, ordering)

    def state(self, row: Row) -> State:
        """Return the state of an entry among all others."""
        if row.state <= State.SHIELDED:
            return row.state
        if any(scope in self._newest and row.age_rank >= self._newest[scope] for scope in (row.rule, None)):
            return State.SHIELDED
        if row.state is State.OPEN and any(row.rank <= self._over.get(scope, FIRST) for scope in (row.rule, None)):
            return State.OVER
        return row.state

    def _threshold(self, rule: int | None, limits: RetentionLimits, ordering: Ordering) -> Rank:
        """Return the rank of the last entry that a scope's budget deletes; `FIRST` if it deletes none."""
        objects = size = 0
        for _, row in self._staying(rule, ordering):
            objects, size = objects + 1, size + row.size
        last = FIRST
        for state, row in self._staying(rule, ordering):
            if objects <= _or_any(limits.max_objects) and size <= _or_any(limits.max_bytes):
                break
            if state is State.OPEN:
                objects, size, last = objects - 1, size - row.size, row.rank
        return last

    def _staying(self, rule: int | None, ordering: Ordering) -> Iterator[tuple[State, Row]]:
        """Yield the entries of a scope that no earlier rule deletes, least recently used first."""
        for row in ordering.unused_first():
            if rule is None or row.rule == rule:
                state = self.state(row)
                if state not in _DELETED:
                    yield state, row


def _or_any(limit: int | None) -> float:
    return math.inf if limit is None else limit
