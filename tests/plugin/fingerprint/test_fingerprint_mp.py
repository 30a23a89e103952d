"""Fingerprints of MP mode: what an L2 adapter learns from keys and layouts, and what it does by them."""

import pytest
import torch
from lmcache.v1.distributed.api import MemoryLayoutDesc

from hfbucket_plugin.core.telemetry import CHUNKS, FINGERPRINT_CONFLICTS, FINGERPRINT_STATE, MemorySink
from hfbucket_plugin.fingerprint.model import Record
from tests.support.buckets import all_paths, download
from tests.support.lmcache_engine import HEAD
from tests.support.lmcache_mp import SIZE, content_of, load, lookup, mp_key, put, there
from tests.support.waiting import eventually

RECORD = "v1/.hfbucket/fingerprints/org%2Fmodel.json"


@pytest.fixture
def adapters(l2_adapters, monkeypatch):
    """Makes adapters, each with a tally of its own."""

    def make(**values):
        tally = MemorySink()
        monkeypatch.setattr("hfbucket_plugin.engine.mp.default_sink", lambda: tally)
        one = l2_adapters(**{"fingerprint": "warn"} | values)
        one.tally = tally
        return one

    return make


@pytest.fixture
def held(hub, bucket):
    """Says which of some keys the bucket holds."""
    return lambda keys: there(hub, bucket, keys)


def layout(*shape, dtype=torch.uint8):
    return {0: MemoryLayoutDesc([torch.Size(shape)], [dtype])}


def becomes(one, state, count=1):
    eventually(lambda: one.tally.get(FINGERPRINT_STATE, state=state) == count)


def outcome(one, operation, what):
    return one.tally.get(CHUNKS, operation=operation, outcome=what)


def recorded(hub, bucket):
    eventually(lambda: RECORD in all_paths(hub.endpoint, bucket))
    return Record.from_json(download(hub.endpoint, bucket, RECORD), "org/model", RECORD)


def recorded_now(hub, bucket):
    return RECORD in all_paths(hub.endpoint, bucket)


def filled(adapters, **values):
    """An adapter that has stored two objects under the layout of one row."""
    first = adapters(**values)
    lookup(first, [mp_key(1), mp_key(2)], layout(2, 2, 16, SIZE // 64))
    put(first, [mp_key(9)])  # who is strict stores nothing before it is known
    becomes(first, "agrees")
    put(first, [mp_key(1), mp_key(2)])
    return first


def test_an_adapter_records_what_it_can_know(adapters, hub, bucket):
    first = filled(adapters, model_revision="v1", server_hash_algorithm="blake3", server_chunk_size=16)

    (variant,) = recorded(hub, bucket).variants

    assert (variant.mode, variant.world_size, variant.local_world_size, variant.dtype) == ("mp", 1, 0, None)
    assert str(variant.layout) == f"2x2x16x{SIZE // 64} uint8"
    assert (variant.model_revision, variant.chunk_size, variant.hash_algorithm) == ("v1", 16, "blake3")
    assert len(bytes.fromhex(variant.hash_check)) == 32
    assert variant.hash_bytes == 8
    assert first.adapter.report_status()["reasons"] == []


@pytest.mark.parametrize(
    ("field", "values", "descs"),
    [
        ("layout", {}, layout(2, 2, 32, SIZE // 128)),
        ("layout", {}, layout(2, 2, 16, SIZE // 64, dtype=torch.int8)),
        ("model_revision", {"model_revision": "v2"}, layout(2, 2, 16, SIZE // 64)),
        ("hash_check", {"server_hash_algorithm": "builtin"}, layout(2, 2, 16, SIZE // 64)),
    ],
)
def test_under_enforce_nothing_crosses(adapters, held, field, values, descs):
    keys = [mp_key(1), mp_key(2)]
    first = filled(adapters, model_revision="v1", server_hash_algorithm="blake3")
    second = adapters(fingerprint="enforce", **values)

    assert lookup(second, keys, descs) == [False, False]
    becomes(second, "conflict")
    assert lookup(second, keys, descs) == [False, False]
    assert load(second, keys) == [None, None]
    assert not put(second, [mp_key(3)]).is_successful()
    second.adapter.delete(keys)

    assert outcome(second, "lookup", "fingerprint") == 2
    assert outcome(second, "lookup", "fingerprint_unknown") == 2
    assert outcome(second, "get", "fingerprint") == 2
    assert outcome(second, "put", "fingerprint") == 1
    assert outcome(second, "delete", "fingerprint") == 2
    assert second.tally.get(FINGERPRINT_CONFLICTS, field=field) == 1
    status = second.adapter.report_status()
    assert not status["is_healthy"]
    assert field in str(status["reasons"])
    assert held([mp_key(3)]) == []
    assert load(first, keys) == [content_of(key) for key in keys]


def test_under_warn_all_is_used(adapters):
    filled(adapters, model_revision="v1")
    second = adapters(model_revision="v2")

    assert lookup(second, [mp_key(1)], layout(2, 2, 16, SIZE // 64)) == [True]
    becomes(second, "conflict")

    assert load(second, [mp_key(1)]) == [content_of(mp_key(1))]
    assert put(second, [mp_key(3)]).is_successful()
    status = second.adapter.report_status()
    assert status["is_healthy"]
    assert "model_revision is v1 in the bucket and v2 here" in str(status["reasons"])


def test_another_model_of_the_same_server_is_not_kept_out(adapters, hub, bucket):
    filled(adapters, model_revision="v1")
    second = adapters(fingerprint="enforce", model_revision="v2")
    other = mp_key(1, model="org/other")
    lookup(second, [mp_key(1)], layout(2, 2, 16, SIZE // 64))
    lookup(second, [other], layout(2, 2, 16, SIZE // 64))
    put(second, [other])
    becomes(second, "conflict")
    becomes(second, "agrees")

    assert put(second, [other]).is_successful()
    assert lookup(second, [other], layout(2, 2, 16, SIZE // 64)) == [True]
    second.adapter.submit_unlock([other])
    second.adapter.delete([mp_key(1), other])
    assert there(hub, bucket, [mp_key(1), other]) == [mp_key(1)]


def test_a_layout_that_changes_is_compared_again(adapters):
    first = filled(adapters, fingerprint="enforce")

    assert lookup(first, [mp_key(1)], layout(2, 2, 32, SIZE // 128)) == [False]
    becomes(first, "conflict")
    lookup(first, [mp_key(1)], layout(2, 2, 16, SIZE // 64))
    becomes(first, "agrees")

    assert lookup(first, [mp_key(1)], layout(2, 2, 16, SIZE // 64)) == [True]
    assert HEAD.endswith("/.hfbucket/fingerprints")


def test_a_store_before_any_lookup_tells_the_layout_too(adapters, hub, bucket):
    first = adapters()
    assert put(first, [mp_key(1)]).is_successful()
    becomes(first, "agrees")

    assert str(recorded(hub, bucket).variants[0].layout) == f"{SIZE} uint8"


def test_object_groups_become_known_one_by_one(adapters, hub, bucket):
    first = adapters()
    put(first, [mp_key(1)])
    becomes(first, "agrees")
    put(first, [mp_key(1, group=1)])
    eventually(lambda: len(recorded(hub, bucket).variants[0].layout.groups) == 2)
    second = adapters(fingerprint="enforce")
    put(second, [mp_key(2, group=1)])
    becomes(second, "agrees")

    assert put(second, [mp_key(2, group=1)]).is_successful()
    assert first.tally.get(FINGERPRINT_CONFLICTS, field="layout") == 0


@pytest.mark.parametrize("fingerprint", ["warn", "off"])
def test_a_layout_that_is_none_stops_nothing(adapters, fingerprint):
    first = adapters(fingerprint=fingerprint, object_sizes="any")
    put(first, [mp_key(1)])

    assert lookup(first, [mp_key(1)], {0: object()}) == [True]
    assert lookup(first, [], {}) == []


def test_requests_that_name_some_groups_each_leave_what_is_known_alone(adapters):
    both = {index: MemoryLayoutDesc([torch.Size((2, 2, 16, SIZE // 64))], [torch.uint8]) for index in (0, 1)}
    one = filled(adapters, fingerprint="enforce")
    eventually(lambda: lookup(one, [mp_key(1)], both) == [True])  # the new group has been compared
    unknown = outcome(one, "lookup", "fingerprint_unknown")
    revision = one.adapter._fingerprints._of([mp_key(1)])[0].subject.revision

    for descs in [{0: both[0]}, {1: both[1]}, both] * 3:
        assert lookup(one, [mp_key(1)], descs) == [True]

    assert one.adapter._fingerprints._of([mp_key(1)])[0].subject.revision == revision
    assert outcome(one, "lookup", "fingerprint_unknown") == unknown


def test_a_group_that_changes_its_layout_is_compared_again(adapters):
    one = filled(adapters, fingerprint="enforce")

    lookup(one, [mp_key(1)], layout(2, 2, 32, SIZE // 128))

    becomes(one, "conflict")


def test_an_adapter_that_is_closed_right_after_its_first_store_has_recorded_itself(adapters, hub, bucket):
    one = adapters()
    assert put(one, [mp_key(1)]).is_successful()

    one.adapter.close()

    assert recorded_now(hub, bucket)
