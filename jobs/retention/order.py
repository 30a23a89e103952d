"""A policy and entries → what is kept and what goes, each with its reason. Pure but for a spill file; knows no network.

The order of the reasons is the order of the questions: what nobody knows the age of, what is too young and what is
shielded is kept before any rule is asked. Budgets delete what was not used for longest first, ties by key, and count everything
that is there, what they may not delete included. A use is a put or a read; where reads are not known, it is the put.
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
    """Why an object is kept or deleted. The values stand in plans and reports."""

    EXPIRED = "expired"
    IDLE = "idle"
    OVER_BUDGET = "over-budget"
    MODEL_RETIRED = "model-retired"
    FOREIGN = "foreign"
    ASKED = "asked"  # by `rm`
    NOT_AT_SOURCE = "not-at-source"  # of a mirror
    NO_DATE = "no-date"
    TOO_YOUNG = "too-young"
    SHIELDED = "shielded"
    KEPT = "kept"


BY_USE: Final = frozenset({Reason.IDLE, Reason.OVER_BUDGET})
"""Reasons that a read makes void."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What is to become of an entry.

    Attributes:
        entry: The entry.
        reason: Why.
        delete: Whether it goes.
    """

    entry: RetentionEntry
    reason: Reason
    delete: bool


def decide(
    policy: Policy, entries: Iterable[RetentionEntry], now: datetime, directory: Path | None = None
) -> Iterator[Decision]:
    """Decide upon each entry.

    Age and idle rules stream. Where budgets or `keep_newest` need an order, what they need of the entries is spilled to disk, and
    decisions come longest unused first: memory does not grow with the number of entries in either case.

    Args:
        policy: Of the instance.
        entries: In any order.
        now: By the clock that `uploaded_at` goes by.
        directory: Where to spill; None for the system's directory of temporary files.
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
    """What can be said of an entry by itself."""

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
    """What can be said of entries beside all others.

    Only ranks are kept: from which age on the entries of a scope are its newest, and up to which use the open ones go.

    Args:
        policy: Of the instance.
        ordering: All of its entries.
    """

    def __init__(self, policy: Policy, ordering: Ordering) -> None:
        # A rule's budget before the instance's, which would else delete for what a rule is about to free.
        scopes: dict[int | None, RetentionLimits] = {**dict(enumerate(policy.rules)), None: policy}
        self._newest = {
            rule: ordering.newest(limits.keep_newest, rule) for rule, limits in scopes.items() if limits.keep_newest
        }
        self._over: dict[int | None, Rank] = {}
        for rule, limits in scopes.items():
            if limits.max_bytes is not None or limits.max_objects is not None:
                self._over[rule] = self._threshold(rule, limits, ordering)

    def state(self, row: Row) -> State:
        """The state of an entry beside all others."""
        if row.state <= State.SHIELDED:
            return row.state
        if any(scope in self._newest and row.age_rank >= self._newest[scope] for scope in (row.rule, None)):
            return State.SHIELDED
        if row.state is State.OPEN and any(row.rank <= self._over.get(scope, FIRST) for scope in (row.rule, None)):
            return State.OVER
        return row.state

    def _threshold(self, rule: int | None, limits: RetentionLimits, ordering: Ordering) -> Rank:
        """The rank of the last entry that the budget of a scope makes go; `FIRST` when it makes none."""
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
        """The entries of a scope that nothing before it makes go, longest unused first."""
        for row in ordering.unused_first():
            if rule is None or row.rule == rule:
                state = self.state(row)
                if state not in _DELETED:
                    yield state, row


def _or_any(limit: int | None) -> float:
    return math.inf if limit is None else limit
