"""How a first writer's fingerprint comes to count, on a real Hub."""

import pytest

from hfbucket_plugin.core.deadline import Deadline
from hfbucket_plugin.errors import HFBucketError, IntegrityError, RefusedError
from hfbucket_plugin.fingerprint.model import MAX_VARIANTS, Fingerprint, FingerprintClaim, Record, differences
from hfbucket_plugin.fingerprint.store import MAX_BYTES, MAX_CLAIMS, FingerprintStore
from hfbucket_plugin.hub.records import RecordStore
from localhub.faults import Fault
from tests.support.buckets import all_paths, download, opened, upload
from tests.support.waiting import in_threads

HEAD = "kv/.hfbucket/fingerprints"


def engine(chunk_size=256, model="org/model", **values):
    return Fingerprint(mode="classic", model=model, world_size=1, dtype="half", chunk_size=chunk_size, **values)


def soon():
    return Deadline.after(60)


@pytest.fixture
def store(hub, bucket):
    with opened(hub.endpoint, bucket, "kv") as bucket_client:
        made = FingerprintStore(bucket_client, "hfbucket")
        yield made
        made.close()


def test_nothing_is_there_at_first(store):
    assert store.read("org/model", soon()) is None
    assert store.claims("org/model", soon()) == []
    assert list(store.models(30)) == []


def test_a_record_is_read_once_and_known_by_its_hash(store, hub):
    found = store.record_first(engine(), soon())
    hub.control.reset_counters()

    assert store.read("org/model", soon(), found) is found
    assert store.read("org/model", soon(), None) == found
    assert hub.control.counters().route("paths-info").requests == 2


@pytest.mark.parametrize("model", ["org/model", "päth with spaces", ".", "a%2Fb"])
def test_a_models_name_is_encoded_as_in_keys(store, hub, bucket, model):
    store.record_first(engine(model=model), soon())

    assert list(store.models(30)) == [model]
    assert all(path.startswith(f"{HEAD}/") for path in all_paths(hub.endpoint, bucket))
    assert len(all_paths(hub.endpoint, bucket)) == 2


def test_of_those_that_begin_together_one_counts_for_all(store, hub, bucket):
    sizes = (64, 128, 256, 512)
    for number in range(3):
        model = f"org/model-{number}"
        with opened(hub.endpoint, bucket, "kv") as bucket_client:
            other = FingerprintStore(bucket_client, "other")

            def begin(index, model=model, other=other):
                one = store if index % 2 else other
                return one.record_first(engine(sizes[index], model), soon())

            found = in_threads(len(sizes), begin)
            other.close()

        assert not [one for one in found if isinstance(one, Exception)]
        (first, *_) = store.claims(model, soon())
        (variant,) = store.read(model, soon()).record.variants
        assert [one.record.variants for one in found] == [(variant,)] * len(sizes)
        assert variant == first.fingerprint, "whom the Hub took first"


def test_who_claimed_first_counts_although_the_other_one_writes(store):
    """Engine A has claimed and is slow; B comes later, and must not make the record its own."""
    store.claim(engine(64), soon())

    found = store.record_first(engine(128), soon())

    assert found.record.variants == (engine(64),)
    assert store.record_first(engine(64), soon()).record == found.record
    assert [claim.fingerprint.chunk_size for claim in store.claims("org/model", soon())] == [64, 128]


def test_variants_recorded_together_all_stay(store):
    found = in_threads(
        6, lambda index: store.record_first(engine().model_copy(update={"world_size": index}), Deadline.after(120))
    )

    assert not [one for one in found if isinstance(one, Exception) and not isinstance(one, HFBucketError)]
    for index in range(6):  # one that was overwritten meanwhile is there after the next look, at the latest
        store.record_first(engine().model_copy(update={"world_size": index}), soon())
    worlds = sorted(variant.world_size for variant in store.read("org/model", soon()).record.variants)
    assert worlds == list(range(6))


def test_a_record_is_completed_and_never_contradicted(store):
    store.record_first(engine(), soon())

    more = store.record_first(engine(model_revision="v1"), soon())
    same = store.record_first(engine(model_revision="v2"), soon())

    assert [variant.model_revision for variant in more.record.variants] == ["v1"]
    assert same == more
    assert differences(same.record.variants[0], engine(model_revision="v2"))


def test_claims_are_bounded(store):
    kept = [store.claim(engine(chunk_size=number), soon()) for number in range(MAX_CLAIMS + 2)]

    assert kept == [True] * MAX_CLAIMS + [False] * 2
    assert store.claim(engine(chunk_size=0), soon()), "it is there already"
    assert len(store.claims("org/model", soon())) == MAX_CLAIMS


def test_variants_are_bounded(store):
    record = Record(model="org/model")
    for number in range(MAX_VARIANTS):
        record = record.having(engine().model_copy(update={"world_size": number}))
    store.write(record, soon())

    with pytest.raises(RefusedError, match="64 fingerprints already"):
        store.record_first(engine().model_copy(update={"world_size": 999}), soon())


def test_what_cannot_be_read_is_named_and_not_overwritten(store, hub, bucket):
    path = f"{HEAD}/org%2Fmodel.json"
    upload(hub.endpoint, bucket, {path: b"garbage"})

    with pytest.raises(IntegrityError, match=path):
        store.record_first(engine(), soon())

    assert download(hub.endpoint, bucket, path) == b"garbage"


def test_claims_that_cannot_be_read_are_told_one_by_one(store, hub, bucket):
    store.claim(engine(), soon())
    upload(
        hub.endpoint,
        bucket,
        {
            f"{HEAD}/org%2Fmodel/{'0' * 16}.json": b"garbage",
            f"{HEAD}/org%2Fmodel/{'1' * 16}.json": FingerprintClaim.to_json(engine(model="org/other")),
            f"{HEAD}/org%2Fmodel/{'2' * 16}.json": b" " * (MAX_BYTES + 1),
            f"{HEAD}/org%2Fmodel/notes.txt": b"somebody's",
        },
    )

    claims = {claim.path.rpartition("/")[2][0]: claim for claim in store.claims("org/model", soon())}

    assert len(claims) == 4
    assert "not JSON" in claims["0"].why
    assert "org/other" in claims["1"].why
    assert "are no fingerprint" in claims["2"].why
    assert [claim.fingerprint for claim in claims.values() if claim.fingerprint] == [engine()]


def test_claims_are_in_memory_a_few_at_a_time(store, hub, bucket, monkeypatch):
    put = {f"{HEAD}/org%2Fmodel/{number:016x}.json": b" " * 1000 + str(number).encode() for number in range(40)}
    upload(hub.endpoint, bucket, put)
    batches = []
    read = RecordStore.read

    def counted(own, objects, deadline):
        batches.append(len(objects))
        return read(own, objects, deadline)

    monkeypatch.setattr(RecordStore, "read", counted)

    assert len(store.claims("org/model", soon())) == 40
    assert max(batches) <= MAX_CLAIMS


def test_a_record_that_is_refused_is_a_failure(store, hub):
    hub.control.add_fault(Fault(route="batch", items=".json"))

    with pytest.raises(HFBucketError, match="injected"):
        store.record_first(engine(), soon())
