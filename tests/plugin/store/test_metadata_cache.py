import threading
import time
from concurrent.futures import TimeoutError as FutureTimeoutError

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfbucket_plugin.core.keys import ContentId
from hfbucket_plugin.errors import DeadlineError
from hfbucket_plugin.store.metadata_cache import MetadataCache
from tests.support.models import untimed
from tests.support.waiting import Clock, in_threads

A, B = ContentId("a" * 64, 1), ContentId("b" * 64, 2)


def cache(entries=100, hit_secs=30.0, miss_secs=5.0, clock=None):
    return MetadataCache(entries, hit_secs, miss_secs, clock or Clock())


def ask_and_answer(one, keys, found):
    _, lookup, _ = one.ask(keys)
    return one.answer(lookup, found)


def test_hits_and_misses_have_lifetimes_of_their_own():
    clock = Clock()
    one = cache(clock=clock)
    ask_and_answer(one, ["hit", "miss"], {"hit": A})

    assert one.get("hit") == (True, A)
    assert one.get("miss") == (True, None)
    clock.now += 4.9
    assert one.get("miss") == (True, None)
    clock.now += 0.2
    assert one.get("miss") == (False, None)
    assert one.get("hit") == (True, A)
    clock.now += 24.8
    assert one.get("hit") == (True, A)
    clock.now += 0.2
    assert one.get("hit") == (False, None)


def test_with_no_lifetime_nothing_is_kept_and_questions_are_still_answered():
    one = cache(hit_secs=0, miss_secs=0)

    assert ask_and_answer(one, ["a", "b"], {"a": A}) == {"a": A, "b": None}
    assert one.get("a") == (False, None)
    one.put("a", A)
    assert ask_and_answer(one, ["a"], {"a": B}) == {"a": B}


def test_a_deletion_without_a_lifetime_replaces_what_was_known():
    one = cache(hit_secs=30.0, miss_secs=0.0)
    one.put("k", A)

    one.put("k", None)

    assert one.get("k") == (False, None)


def test_an_answer_without_a_lifetime_replaces_what_became_known_meanwhile():
    one = cache(hit_secs=30.0, miss_secs=0.0)
    _, lookup, _ = one.ask(["k"])
    with one._locked():
        one._set("k", A)

    one.answer(lookup, {})

    assert one.get("k") == (False, None)


def test_it_is_bounded_and_forgets_what_was_used_least_recently():
    one = cache(entries=3)
    for key in "abc":
        one.put(key, A)
    one.get("a")
    for key in "de":
        one.put(key, A)

    assert len(one) == 3
    assert [key for key in "abcde" if one.get(key)[0]] == ["a", "d", "e"]


@untimed
@given(st.integers(1, 8), st.lists(st.integers(0, 30), min_size=1, max_size=60))
def test_it_never_passes_its_bound(entries, keys):
    one = cache(entries=entries)
    for key in keys:
        known, lookup, others = one.ask([str(key)])
        assert not others
        assert (lookup is None) == (str(key) in known)
        if lookup is not None:
            one.answer(lookup, {str(key): A} if key % 2 else {})
        assert len(one) <= entries


def test_a_batch_larger_than_the_cache_is_answered_in_full():
    one = cache(entries=2)
    keys = [str(number) for number in range(10)]

    assert ask_and_answer(one, keys, dict.fromkeys(keys, A)) == dict.fromkeys(keys, A)


def test_a_question_is_asked_once_and_all_who_want_it_wait_for_it():
    one = cache()
    known, lookup, others = one.ask(["a", "b"])
    assert (known, others) == ({}, {})

    known, second, others = one.ask(["b", "c", "b"])
    assert known == {}
    assert list(second.keys) == ["c"]
    assert others == {"b": lookup}
    assert not lookup.future.done()

    one.answer(lookup, {"a": A})
    assert lookup.future.result(0) == {"a": A, "b": None}
    assert one.ask(["a", "b"]) == ({"a": A, "b": None}, None, {})


def test_many_threads_ask_each_key_once():
    one = cache()
    asked = []

    def run(_number):
        known, lookup, others = one.ask([str(key) for key in range(50)])
        if lookup is not None:
            asked.append(list(lookup.keys))
        return known, others

    in_threads(16, run)

    assert sorted(key for keys in asked for key in keys) == sorted(str(key) for key in range(50))


def test_a_failure_reaches_everyone_and_is_not_kept():
    one = cache()
    _, lookup, _ = one.ask(["a"])
    _, none, others = one.ask(["a"])
    assert none is None

    one.fail(lookup, DeadlineError("late"))

    with pytest.raises(DeadlineError, match="late"):
        others["a"].future.result(0)
    assert one.get("a") == (False, None)
    assert one.ask(["a"])[1] is not None


def test_own_writes_and_deletes_overtake_an_older_question():
    one = cache()
    _, lookup, _ = one.ask(["written", "deleted", "other"])

    one.put("written", A)
    one.put("deleted", None)
    answer = one.answer(lookup, {"deleted": B})

    assert answer == {"written": A, "deleted": None, "other": None}
    assert one.get("written") == (True, A)
    assert one.get("deleted") == (True, None)


def test_what_was_found_to_be_wrong_is_not_noted_again_by_an_older_question():
    one = cache()
    _, lookup, _ = one.ask(["a"])

    one.drop("a")
    one.answer(lookup, {"a": A})

    assert one.get("a") == (False, None)


def test_an_older_question_does_not_count_against_the_next_one():
    one = cache()
    _, first, _ = one.ask(["a"])
    one.put("a", A)
    one.drop("a")
    _, second, others = one.ask(["a"])
    assert second is None
    assert others == {"a": first}
    one.answer(first, {})
    one.drop("a")

    assert ask_and_answer(one, ["a"], {"a": B}) == {"a": B}


@pytest.mark.parametrize("step", [0.1, 0.3, 0.5, 0.9, 1.0])
def test_an_entry_that_ends_while_somebody_looks_is_no_error(step):
    # Time passes between any two looks at the clock, so that entries end in the middle of whatever is being done.
    one = cache(hit_secs=1.0, miss_secs=1.0, clock=Clock(step))

    for _ in range(20):
        known, lookup, others = one.ask(["a", "b"])
        assert others == {}
        if lookup is not None:
            one.put("a", A)
            answer = one.answer(lookup, {"a": B, "b": B})
            assert set(answer) == set(lookup.keys)
            assert lookup.future.done()
        one.get("a")
        assert set(known) | set(lookup.keys if lookup else ()) == {"a", "b"}


def test_clear_forgets_answers_and_leaves_questions_to_be_answered():
    one = cache()
    one.put("a", A)
    _, lookup, _ = one.ask(["b"])

    one.clear()

    assert len(one) == 0
    waiting = threading.Thread(target=lookup.future.result, args=(30,))
    waiting.start()
    one.answer(lookup, {"b": B})
    waiting.join()
    assert lookup.future.result(0) == {"b": B}


def test_a_question_that_nobody_answers_stays_open():
    _, lookup, _ = cache().ask(["a"])

    with pytest.raises(FutureTimeoutError):
        lookup.future.result(0.01)


def test_a_question_that_should_have_ended_is_asked_again_and_its_late_answer_is_not_believed():
    one = cache()
    _, hung, _ = one.ask(["key"], until=time.monotonic() - 1)

    _, fresh, others = one.ask(["key"], until=time.monotonic() + 60)

    assert fresh is not None
    assert not others
    one.answer(hung, {})
    assert one.get("key") == (False, None)
    one.answer(fresh, {"key": A})
    assert one.get("key") == (True, A)
