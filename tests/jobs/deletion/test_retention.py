"""Which objects a policy deletes, for any entries and any policy."""

import itertools
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfbucket_plugin.tools.inventory import RetentionEntry
from jobs.retention.order import Reason, decide
from jobs.retention.policy import Models, Policy, Rule

NOW = datetime(2030, 1, 1, tzinfo=UTC)
HOUR = timedelta(hours=1)
MODELS = ("org/a", "org/b", "b")

# Few ages, sizes and models, so that ties and empty scopes are common.
entries = st.lists(
    st.builds(
        lambda model, number, hours, size: RetentionEntry(
            f"{model}@1@0@{number:x}@bfloat16", f"{size:064x}", size, None if hours is None else NOW - hours * HOUR
        ),
        st.sampled_from(MODELS),
        st.integers(0, 30),
        st.one_of(st.none(), st.sampled_from([-1, 0, 1, 2, 5, 5.5, 24, 100])),
        st.integers(0, 4),
    ),
    max_size=30,
    unique_by=lambda entry: entry.key,
)
starts = st.sampled_from(["org/a@", "org/a@1@0@1", "org/", "b@", "nobody"])
limits = {
    "max_age": st.one_of(st.none(), st.sampled_from([HOUR, 5 * HOUR, 48 * HOUR])),
    "max_bytes": st.one_of(st.none(), st.integers(1, 30)),
    "max_objects": st.one_of(st.none(), st.integers(1, 12)),
    "keep_newest": st.integers(0, 4),
}
rules = st.builds(Rule, prefix=starts, **limits) | st.builds(Rule, model=st.sampled_from(MODELS), **limits)
policies = st.builds(
    Policy,
    min_age=st.sampled_from([timedelta(0), HOUR, 5 * HOUR]),
    keep_prefix=st.lists(starts, max_size=1).map(tuple),
    models=st.one_of(st.none(), st.builds(Models, keep=st.lists(st.sampled_from(MODELS), min_size=1).map(tuple))),
    rules=st.lists(rules, max_size=2).map(tuple),
    **limits,
)
examples = settings(deadline=None, max_examples=100)


def rank(entry):
    return entry.uploaded_at, entry.key


def deleted(policy, among):
    return {decision.entry.key: decision.reason for decision in decide(policy, among, NOW) if decision.delete}


def scopes(policy, among):
    """Each set of entries that limits are for, with the limits."""
    for number, rule in enumerate(policy.rules):
        earlier = policy.rules[:number]
        yield rule, [e for e in among if rule.matches(e.key) and not any(one.matches(e.key) for one in earlier)]
    yield policy, among


def newest(limits, among):
    dated = sorted((entry for entry in among if entry.uploaded_at is not None), key=rank)
    return dated[-limits.keep_newest :] if limits.keep_newest else []


@examples
@given(policies, entries)
def test_nothing_shielded_too_young_or_without_a_date_is_ever_planned(policy, among):
    gone = deleted(policy, among)
    for entry in among:
        if entry.uploaded_at is None or NOW - entry.uploaded_at < policy.min_age:
            assert entry.key not in gone
        if any(entry.key.startswith(start) for start in policy.keep_prefix):
            assert entry.key not in gone
    for limits, scope in scopes(policy, among):
        assert not {entry.key for entry in newest(limits, scope)} & gone.keys()


@examples
@given(policies, entries)
def test_budgets_are_met_with_the_oldest_first_or_nothing_is_left_to_give(policy, among):
    decisions = {decision.entry.key: decision for decision in decide(policy, among, NOW)}
    assert decisions.keys() == {entry.key for entry in among}
    for limits, scope in scopes(policy, among):
        left = [entry for entry in scope if not decisions[entry.key].delete]
        may_go = [entry for entry in left if decisions[entry.key].reason is Reason.KEPT]
        met = len(left) <= (limits.max_objects or len(left)) and sum(e.size for e in left) <= (
            limits.max_bytes or sum(e.size for e in left)
        )
        assert met or not may_go
        over = [entry for entry in scope if decisions[entry.key].reason is Reason.OVER_BUDGET]
        if limits is policy and not any(rule.max_bytes or rule.max_objects for rule in policy.rules):
            assert all(rank(one) < rank(other) for one, other in itertools.product(over, may_go))
            back = max(over, key=rank, default=None)
            if back is not None:  # with its youngest victim back in, the budget would be passed: none went in vain
                objects, size = len(left) + 1, sum(e.size for e in left) + back.size
                assert objects > (policy.max_objects or objects) or size > (policy.max_bytes or size)


@examples
@given(policies, entries)
def test_a_rules_budget_takes_the_oldest_of_its_own(policy, among):
    policy = policy.model_copy(update={"max_bytes": None, "max_objects": None})
    decisions = {decision.entry.key: decision.reason for decision in decide(policy, among, NOW)}
    for _, scope in scopes(policy, among):
        over = [entry for entry in scope if decisions[entry.key] is Reason.OVER_BUDGET]
        kept = [entry for entry in scope if decisions[entry.key] is Reason.KEPT]
        if scope is not among:
            assert all(rank(one) < rank(other) for one, other in itertools.product(over, kept))


@examples
@given(policies, entries)
def test_age_and_models_decide_for_all_that_no_shield_keeps(policy, among):
    for decision in decide(policy, among, NOW):
        entry = decision.entry
        if decision.reason in (Reason.NO_DATE, Reason.TOO_YOUNG, Reason.SHIELDED):
            assert not decision.delete
            continue
        retired = policy.models is not None and entry.model not in policy.models.keep
        rule = next((rule for rule in policy.rules if rule.matches(entry.key)), policy)
        expired = rule.max_age is not None and NOW - entry.uploaded_at > rule.max_age
        assert (decision.reason is Reason.MODEL_RETIRED) == retired
        assert (decision.reason is Reason.EXPIRED) == (expired and not retired)
        assert decision.delete == (decision.reason is not Reason.KEPT)


@examples
@given(policies, entries)
def test_twice_is_once(policy, among):
    gone = deleted(policy, among)
    left = [entry for entry in among if entry.key not in gone]
    assert deleted(policy, left) == {}


@examples
@given(policies, entries, st.randoms(use_true_random=False))
def test_the_order_of_the_listing_does_not_matter(policy, among, random):
    shuffled = random.sample(among, len(among))
    # A listing that shifted under its pages names an object twice.
    assert deleted(policy, [*shuffled, *shuffled[:3]]) == deleted(policy, among)


def test_age_rules_stream():
    def endless():
        yield from (RetentionEntry(f"m@1@0@{n:x}@half", "", 1, NOW - 48 * HOUR) for n in itertools.count())

    decisions = decide(Policy(max_age=24 * HOUR), endless(), NOW)

    assert [one.reason for one in itertools.islice(decisions, 3)] == [Reason.EXPIRED] * 3


def test_a_rules_budget_frees_before_the_instances_is_asked():
    old = [RetentionEntry(f"a@1@0@{n:x}@half", "", 1, NOW - (100 - n) * HOUR) for n in range(5)]
    bulky = [RetentionEntry(f"b@1@0@{n:x}@half", "", 10, NOW - (50 - n) * HOUR) for n in range(5)]
    policy = Policy(max_bytes=15, rules=(Rule(model="b", max_bytes=10),))

    gone = deleted(policy, old + bulky)

    assert sorted(gone) == [entry.key for entry in bulky[:4]]


@pytest.mark.parametrize("kept", [2, 20])
def test_the_newest_outlive_their_age(kept):
    among = [RetentionEntry(f"a@1@0@{n:x}@half", "", 1, NOW - (100 - n) * HOUR) for n in range(8)]

    gone = deleted(Policy(max_age=HOUR, keep_newest=kept), among)

    assert sorted(gone) == [entry.key for entry in among[: max(0, 8 - kept)]]
