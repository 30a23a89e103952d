"""What makes a plan or a listing suspicious, and what is never deleted."""

from datetime import UTC, datetime
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfbucket_plugin.core.keys import BucketHandle, ContentId
from hfbucket_plugin.core.units import Extent
from hfbucket_plugin.errors import ConfigError, SafetyError
from hfbucket_plugin.hub.bucket import ObjectInfo
from hfbucket_plugin.tools.inventory import Classifier, ObjectKind
from jobs.deletion.guards import MaxDelete, check_listing, check_not_more
from tests.support.models import untimed

AT = datetime(2030, 1, 1, tzinfo=UTC)


def kind(path, handle="hf://buckets/org/kv/kv/us", neighbours=()):
    bucket = SimpleNamespace(handle=BucketHandle.parse(handle))
    listed = Classifier(bucket, [BucketHandle.parse(one) for one in neighbours]).classify(
        ObjectInfo(path, ContentId("0" * 64, 1), AT)
    )
    return None if listed is None else listed.kind


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("kv/us/org%2Fmodel%402%400%401a%40bfloat16", ObjectKind.CLASSIC),
        ("kv/us/org%2Fmodel%4001000100%401%400a0b", ObjectKind.MP),
        ("kv/us/test%401%400%400%40bfloat16", ObjectKind.PROBE),
        ("kv/us/README.md", ObjectKind.FOREIGN),
        ("kv/us/org/model@2@0@1a@bfloat16", ObjectKind.FOREIGN),
        ("kv/us/org%2Fmodel%40v2%402%400%401a%40bfloat16", ObjectKind.CLASSIC),
        (
            "kv/us/deeper/org%2Fmodel%402%400%401a%40bfloat16",
            ObjectKind.NEIGHBOUR,
        ),  # an engine with that prefix reads it
        ("kv/us/deeper/test%401%400%400%40bfloat16", ObjectKind.NEIGHBOUR),
        ("kv/us/org%2Fmodel%402%400%401a%40float4", ObjectKind.UNKNOWN),  # a dtype of tomorrow
        ("kv/us/deeper/README.md", ObjectKind.FOREIGN),
        ("kv/us/.hfbucket/locks/x", ObjectKind.OWN),
        ("kv/us/.hfbucket", ObjectKind.OWN),
        ("kv/us/deeper/.hfbucket/reports/cleanup.json", ObjectKind.OWN),
        ("kv/us-east/org%2Fmodel%402%400%401a%40bfloat16", None),
        ("kv/other", None),
    ],
)
def test_kinds(path, expected):
    assert kind(path) is expected


def test_what_another_instance_has_below_this_ones_prefix_is_its_own():
    whole, part = "hf://buckets/org/kv", "hf://buckets/org/kv/eu"

    assert kind("eu/m%402%400%401a%40half", whole, [whole, part]) is ObjectKind.NEIGHBOUR
    assert kind("eu/notes.txt", whole, [whole, part]) is ObjectKind.NEIGHBOUR
    assert kind("eu/notes.txt", whole, [whole]) is ObjectKind.FOREIGN
    assert kind("eu/notes.txt", whole, [whole, "hf://buckets/Org/KV/eu"]) is ObjectKind.NEIGHBOUR
    assert kind("eu/m%402%400%401a%40half", part, [whole, part]) is ObjectKind.CLASSIC
    assert kind("eu/x/y", part, [whole, part]) is ObjectKind.FOREIGN


@pytest.mark.parametrize(
    ("texts", "limits"),
    [
        ([], MaxDelete(percent=30.0)),
        (["5000"], MaxDelete(objects=5000)),
        (["2.5%", "1TiB", "7"], MaxDelete(7, 2.5, 1 << 40)),
        (["0"], MaxDelete(objects=0)),
    ],
)
def test_limits_are_read(texts, limits):
    assert MaxDelete.parse(texts) == limits
    assert MaxDelete.from_record(limits.record()) == limits


@pytest.mark.parametrize("texts", [["many"], ["101%"], ["-1"], [""], ["1", "2"], ["1.5"]])
def test_limits_that_are_none(texts):
    with pytest.raises(ConfigError, match="--max-delete"):
        MaxDelete.parse(texts)


@pytest.mark.parametrize("record", [None, {}, {"objects": "7"}, {"objects": -1}, {"all": 1}])
def test_a_record_that_limits_nothing_is_refused(record):
    with pytest.raises(ValueError, match="max_delete"):
        MaxDelete.from_record(record)


@untimed
@given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 100), st.integers(0, 50), st.integers(0, 50))
def test_no_limit_is_ever_passed(planned, listed, percent, objects, size):
    limits = MaxDelete(objects, percent, size)
    fits = planned <= objects and planned * 100 <= listed * percent and planned <= size
    try:
        limits.check(Extent(planned, planned), Extent(listed, listed))
        allowed = True
    except SafetyError:
        allowed = False
    assert allowed == fits


@pytest.mark.parametrize(
    ("listed", "seen", "in_bucket", "last", "reported"),
    [
        (0, 0, None, None, "empty"),
        (0, 5, 5, None, "empty"),
        (80, 80, 100, None, "truncated"),
        (4, 9, None, 9, "less than half of the 9"),
    ],
)
def test_suspicious_listings(listed, seen, in_bucket, last, reported):
    with pytest.raises(SafetyError, match=reported):
        check_listing(Extent(listed, 1), seen, in_bucket=in_bucket, last=None if last is None else Extent(last, 1))


@pytest.mark.parametrize(
    ("listed", "seen", "in_bucket", "last"),
    [(1, 1, None, None), (95, 95, 100, None), (110, 110, 100, 100), (5, 9, None, 10)],
)
def test_listings_that_are_believed(listed, seen, in_bucket, last):
    check_listing(Extent(listed, 1), seen, in_bucket=in_bucket, last=None if last is None else Extent(last, 1))


@pytest.mark.parametrize(("listed", "distinct", "in_bucket"), [(24, 6, 6), (12, 12, 6), (111, 111, 100), (1, 1, 0)])
def test_a_listing_of_more_than_there_is_is_suspicious(listed, distinct, in_bucket):
    with pytest.raises(SafetyError, match="the listing shows"):
        check_not_more(listed, distinct, in_bucket)


@pytest.mark.parametrize(("listed", "distinct", "in_bucket"), [(6, 6, 6), (110, 100, 100), (110, 110, 100), (1, 1, 90)])
def test_a_page_that_is_shown_again_is_not(listed, distinct, in_bucket):
    check_not_more(listed, distinct, in_bucket)
