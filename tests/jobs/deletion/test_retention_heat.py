"""What reads change of what a policy deletes, for any entries; and that nothing is changed where they are not known."""

import itertools
from dataclasses import replace
from datetime import timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.retention.order import BY_USE, Reason
from jobs.retention.policy import from_values
from tests.jobs.deletion.test_retention import HOUR, NOW, Policy, RetentionEntry, decide, limits, policies
from tests.jobs.deletion.test_retention import entries as unread

examples = settings(deadline=None, max_examples=100)
ages = st.one_of(st.none(), st.sampled_from([-1, 0, 1, 3, 24, 100, 500]).map(lambda hours: NOW - hours * HOUR))
since = st.one_of(st.none(), st.sampled_from([0, 4, 48, 1000]).map(lambda hours: NOW - hours * HOUR))
idle = st.one_of(st.none(), st.sampled_from([HOUR, 5 * HOUR, 48 * HOUR]))


@st.composite
def entries(draw):
    counted = draw(since)
    hits = draw(ages) if counted is not None else None
    return [
        replace(entry, last_hit=hits if hits is None else draw(ages), counted_since=counted) for entry in draw(unread)
    ]


@st.composite
def idle_policies(draw):
    policy = draw(policies)
    return policy.model_copy(
        update={
            "max_idle": draw(idle),
            "rules": tuple(rule.model_copy(update={"max_idle": draw(idle)}) for rule in policy.rules),
        }
    )


def decided(policy, among):
    return {decision.entry.key: decision for decision in decide(policy, among, NOW)}


def rule_of(policy, entry):
    return next((rule for rule in policy.rules if rule.matches(entry.key)), policy)


@examples
@given(idle_policies(), entries())
def test_nothing_is_idle_that_was_used_or_not_counted_for_so_long(policy, among):
    decisions = decided(policy, among)
    for entry in among:
        reason, limit = decisions[entry.key].reason, rule_of(policy, entry).max_idle
        known = [at for at in (entry.uploaded_at, entry.last_hit, entry.counted_since) if at is not None]
        idle = limit is not None and entry.uploaded_at is not None and NOW - max(known) > limit
        if reason is Reason.IDLE:
            assert idle
        elif idle:  # something before it had its say
            assert reason in {Reason.TOO_YOUNG, Reason.SHIELDED, Reason.MODEL_RETIRED, Reason.EXPIRED}


@examples
@given(idle_policies(), entries())
def test_nothing_young_shielded_or_among_the_last_puts_goes_however_cold(policy, among):
    decisions = decided(policy, among)
    dated = sorted((e for e in among if e.uploaded_at is not None), key=lambda e: (e.uploaded_at, e.key))
    newest = {entry.key for entry in dated[len(dated) - policy.keep_newest :]} if policy.keep_newest else set()
    for entry in among:
        if not decisions[entry.key].delete:
            continue
        assert entry.uploaded_at is not None
        assert NOW - entry.uploaded_at >= policy.min_age
        assert not entry.key.startswith(policy.keep_prefix)
        assert entry.key not in newest


@examples
@given(st.builds(Policy, min_age=st.just(timedelta(0)), **limits | {"max_age": st.none()}), entries())
def test_a_budget_takes_what_is_longest_unused(policy, among):
    decisions = decided(policy, among)
    over = [e for e in among if decisions[e.key].reason is Reason.OVER_BUDGET]
    kept = [e for e in among if decisions[e.key].reason is Reason.KEPT]
    assert all((one.last_used, one.key) < (other.last_used, other.key) for one, other in itertools.product(over, kept))
    left = [entry for entry in among if not decisions[entry.key].delete]
    met = len(left) <= (policy.max_objects or len(left)) and sum(e.size for e in left) <= (policy.max_bytes or 10**9)
    assert met or not kept


@examples
@given(policies, unread, idle)
def test_where_reads_are_not_known_a_put_is_the_last_use(policy, among, limit):
    """A limit of idleness is then one of age, and budgets go by age as they always did."""
    policy = policy.model_copy(update={"max_age": None, "rules": ()})
    by_idle = decided(policy.model_copy(update={"max_idle": limit}), among)
    by_age = decided(policy.model_copy(update={"max_age": limit}), among)

    same = {Reason.EXPIRED: Reason.IDLE}
    assert {key: one.reason for key, one in by_idle.items()} == {
        key: same.get(one.reason, one.reason) for key, one in by_age.items()
    }


def test_hot_old_chunks_outlive_cold_new_ones():
    old = [
        RetentionEntry(f"m@1@0@{n:x}@half", "", 1, NOW - 1000 * HOUR, NOW - HOUR, NOW - 900 * HOUR) for n in range(3)
    ]
    new = [RetentionEntry(f"m@1@0@1{n:x}@half", "", 1, NOW - 50 * HOUR, None, NOW - 900 * HOUR) for n in range(3)]
    policy = Policy(max_objects=3)

    assert {one.entry.key for one in decide(policy, old + new, NOW) if one.delete} == {entry.key for entry in new}
    cold = [replace(entry, last_hit=None, counted_since=None) for entry in old + new]
    assert {one.entry.key for one in decide(policy, cold, NOW) if one.delete} == {entry.key for entry in old}


def test_the_newest_are_those_that_were_put_last_not_those_that_were_read_last():
    read = RetentionEntry("m@1@0@1@half", "", 1, NOW - 100 * HOUR, NOW - HOUR, NOW - 200 * HOUR)
    put = RetentionEntry("m@1@0@2@half", "", 1, NOW - 50 * HOUR, None, NOW - 200 * HOUR)

    found = {one.entry.key: one.reason for one in decide(Policy(max_age=HOUR, keep_newest=1), [read, put], NOW)}

    assert found == {read.key: Reason.EXPIRED, put.key: Reason.SHIELDED}


def test_both_go_by_use():
    assert {Reason.IDLE, Reason.OVER_BUDGET} == BY_USE


@pytest.mark.parametrize(
    ("values", "needs"),
    [
        ({"max_age": "1d"}, False),
        ({"max_idle": "1d"}, True),
        ({"max_bytes": "1GiB"}, True),
        ({"max_age": "1d", "rules": [{"model": "m", "max_idle": "2d"}]}, True),
        ({"max_age": "1d", "keep_newest": 5}, False),
    ],
)
def test_which_policies_go_by_reads(values, needs):
    assert from_values(values, "it").goes_by_use is needs
