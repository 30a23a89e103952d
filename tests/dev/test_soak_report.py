"""That the soak's judge finds what is wrong; the soak itself is `make soak`."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest

from dev.faults.report import Ledger
from dev.faults.soak import Moments, judge
from dev.faults.trial import Held

HELD = Held(rss_mib=500.0, threads=50, python_threads=40, descriptors=60, files=0, names={})
MOMENTS = Moments(HELD, HELD, HELD, HELD, warm_secs=100.0)
CALM = SimpleNamespace(seen=Counter({"500": 3}), problem="")


def ledger(**values):
    one = Ledger()
    for operation, outcome in (("lookup", "hit"), ("get", "hit"), ("put", "stored"), ("delete", "deleted")):
        one.note(operation, 10, 8, 0.0)
        one.counted[operation] = Counter({outcome: 8, "transport": 2})
    for name, value in values.items():
        setattr(one, name, value)
    return one


def judged(one=None, *, moments=MOMENTS, random_faults=CALM, back=1.0, healthy=True, leaked=0):
    return judge(one or ledger(), random_faults, moments, back=back, healthy=healthy, leaked=leaked)


def test_a_good_soak_is_passed():
    text, kept = judged()

    assert kept, text
    assert "BAD" not in text


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"one": ledger(wrong=1)}, "wrong chunks"),
        ({"one": ledger(raised=["ValueError: no"])}, "ValueError: no"),
        ({"one": ledger(counted=ledger().counted | {"get": Counter(hit=8, transport=1)})}, "get: failures seen"),
        ({"one": ledger(counted=ledger().counted | {"put": Counter(stored=9)})}, "put: chunks asked"),
        ({"one": ledger(reported=Counter(lookup=8))}, "chunks served"),
        ({"back": None}, "full service"),
        ({"back": 31.0}, "full service"),
        ({"healthy": False}, "health check"),
        ({"leaked": 1}, "engine memory lost"),
        ({"random_faults": SimpleNamespace(seen=Counter(), problem="no Hub")}, "no Hub"),
        ({"moments": replace(MOMENTS, end=replace(HELD, rss_mib=570.0))}, "memory, after"),
        ({"moments": replace(MOMENTS, closed=replace(HELD, rss_mib=800.0))}, "memory, before"),
        ({"moments": replace(MOMENTS, end=replace(HELD, threads=200))}, "threads, warm"),
        ({"moments": replace(MOMENTS, end=replace(HELD, descriptors=200))}, "descriptors, warm"),
        ({"moments": replace(MOMENTS, closed=replace(HELD, threads=60))}, "threads, before"),
        ({"moments": replace(MOMENTS, closed=replace(HELD, descriptors=80))}, "descriptors, before"),
        ({"moments": replace(MOMENTS, closed=replace(HELD, files=1))}, "temporary files"),
    ],
)
def test_what_is_wrong_is_found(values, words):
    text, kept = judged(**values)

    assert not kept
    assert any(words in line for line in text.split("\nok ") if "BAD" in line), text
