"""Fingerprints, without a bucket: what is compared, in which words, and what is read back."""

import dataclasses
import json
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfbucket_plugin.errors import IntegrityError
from hfbucket_plugin.fingerprint import detect
from hfbucket_plugin.fingerprint.model import (
    COMPARED,
    MAX_VARIANTS,
    SCHEMA,
    ChunkLayout,
    Fingerprint,
    FingerprintClaim,
    LayerGroup,
    Record,
    as_text,
    differences,
)
from tests.support.models import any_text

WHERE = "kv/.hfbucket/fingerprints/org%2Fmodel.json"
GROUP = LayerGroup(shape=(2, 32, 256, 1024), dtype="bfloat16")

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
groups = st.builds(
    LayerGroup,
    shape=st.lists(st.integers(0, 3), min_size=1, max_size=5).map(tuple),
    dtype=texts,
    object_group=st.integers(0, 3),
)
layouts = st.builds(
    ChunkLayout, groups=st.lists(groups, min_size=1, max_size=3).map(tuple), worker=st.none() | st.integers(0, 3)
)
fingerprints = st.builds(
    Fingerprint,
    mode=st.sampled_from(["classic", "mp"]),
    model=st.just("org/model") | texts,
    world_size=st.integers(0, 8),
    local_world_size=st.none() | st.integers(0, 8),
    dtype=st.none() | texts,
    model_revision=st.none() | texts,
    chunk_size=st.none() | st.integers(0, 512),
    layout=st.none() | layouts,
    hash_algorithm=st.none() | texts,
    hash_check=st.none() | texts,
    hash_bytes=st.none() | st.integers(0, 64),
    hash_seed_pinned=st.none() | st.booleans(),
    lmcache_version=st.none() | texts,
    written_by=st.none() | texts,
    recorded_at=st.none() | st.datetimes(timezones=st.just(UTC)),
)


def with_stages(fingerprint, more):
    """A fingerprint with the layouts of further workers beside its own, where its own names a worker."""
    if fingerprint.layout is None or fingerprint.layout.worker is None:
        return fingerprint
    others = tuple(one.model_copy(update={"worker": 4 + number}) for number, one in enumerate(more))
    return fingerprint.model_copy(update={"layouts": others})


fingerprints = st.builds(with_stages, fingerprints, st.lists(layouts, max_size=2))


def engine(**values):
    known = {
        "mode": "classic", "model": "org/model", "world_size": 2, "dtype": "bfloat16", "model_revision": "abc123",
        "chunk_size": 256, "layout": ChunkLayout(groups=(GROUP,), worker=0), "hash_algorithm": "sha256_cbor",
        "hash_check": "1234", "hash_seed_pinned": True, "lmcache_version": "0.5.6",
    }  # fmt: skip
    return Fingerprint(**known | values)


# --- what differs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model_revision": "def456"}, "model_revision is abc123 in the bucket and def456 here"),
        ({"chunk_size": 128}, "chunk_size is 256 in the bucket and 128 here"),
        (
            {"hash_check": "-5f"},
            "hash_check (the seed, PYTHONHASHSEED) is 1234 in the bucket and -5f here",
        ),
        (
            {"layout": ChunkLayout(groups=(LayerGroup(shape=(2, 40, 256, 1024), dtype="bfloat16"),), worker=0)},
            "layout is 2x32x256x1024 bfloat16 in the bucket and 2x40x256x1024 bfloat16 here",
        ),
        (
            {"layout": ChunkLayout(groups=(LayerGroup(shape=(1, 32, 256, 2048), dtype="bfloat16"),), worker=1)},
            "layout is 2x32x256x1024 bfloat16 in the bucket and 1x32x256x2048 bfloat16 here",
        ),
    ],
)
def test_what_differs_is_said_exactly(values, words):
    assert as_text(differences(engine(), engine(**values))) == words


def test_all_that_differs_is_said():
    found = differences(engine(), engine(chunk_size=128, hash_algorithm="builtin", hash_check="9"))

    assert [one.field for one in found] == ["chunk_size", "hash_algorithm", "hash_check"]


@pytest.mark.parametrize(
    "values",
    [
        {"world_size": 4, "chunk_size": 128},
        {"dtype": "half", "chunk_size": 128},
        {"mode": "mp", "dtype": None, "chunk_size": 128},
        {"model": "org/other", "chunk_size": 128},
    ],
)
def test_engines_whose_keys_cannot_be_equal_do_not_differ(values):
    assert differences(engine(), engine(**values)) == []


@pytest.mark.parametrize("field", ["lmcache_version", "written_by", "hash_seed_pinned"])
def test_who_and_with_what_makes_no_difference(field):
    other = engine(**{field: False if field == "hash_seed_pinned" else "other"})

    assert differences(engine(), other) == []


def test_two_names_of_one_hash_are_none_of_two_hashes():
    named = engine(hash_algorithm="sha256_cbor_64bit")

    assert differences(engine(), named) == []
    assert [d.field for d in differences(engine(hash_check=None), named)] == ["hash_algorithm"]


def test_stages_of_a_pipeline_may_have_other_numbers_of_layers():
    stage = ChunkLayout(groups=(LayerGroup(shape=(2, 31, 256, 1024), dtype="bfloat16"),), worker=1)

    assert differences(engine(), engine(layout=stage)) == []
    assert differences(engine(), engine(layout=stage.model_copy(update={"worker": 0})))


def stage(worker, *hidden):
    groups = tuple(LayerGroup(shape=(2, 8, 256, size), dtype="bfloat16") for size in hidden)
    return engine(layout=ChunkLayout(groups=groups, worker=worker))


def test_stages_of_a_pipeline_with_other_heads_are_recorded_side_by_side():
    first, second = stage(0, 1024, 512), stage(1, 512, 256)

    both = first.completed(second)

    assert differences(first, second) == []
    assert (both.layout, both.layouts) == (first.layout, (second.layout,))
    assert both.completed(second) == both
    assert Record.from_json(Record(model="org/model", variants=(both,)).to_json(), "org/model", WHERE).variants == (
        both,
    )


def test_each_stage_is_compared_with_its_own_record():
    both = stage(0, 1024, 512).completed(stage(1, 512, 256)).completed(stage(7, 64))

    assert [differences(both, stage(0, 1024, 512)), differences(both, stage(1, 512, 256))] == [[], []]
    (found,) = differences(both, stage(1, 1024, 512))
    assert (found.field, found.recorded) == ("layout", "2x8x256x512 bfloat16, 2x8x256x256 bfloat16")
    assert both.completed(stage(1, 1024, 512)) == both


def test_two_layouts_of_one_worker_are_no_record():
    document = stage(0, 1024).completed(stage(1, 512)).model_dump(mode="json", exclude_none=True)
    document["layouts"][0]["worker"] = 0

    with pytest.raises(IntegrityError, match="each layout must name a worker of its own"):
        FingerprintClaim.from_json(json.dumps({"fingerprint": document}).encode(), WHERE)


def test_an_earlier_release_reads_the_layout_of_the_first_worker():
    both = stage(0, 1024).completed(stage(1, 512))

    written = json.loads(Record(model="org/model", variants=(both,)).to_json())["variants"][0]

    assert written["layout"] == {
        "groups": [{"shape": [2, 8, 256, 1024], "dtype": "bfloat16", "object_group": 0}],
        "worker": 0,
    }


def test_layouts_of_mp_mode_are_compared_and_completed_by_object_group():
    first, second = (LayerGroup(shape=(2, layers, 16, 64), dtype="bfloat16", object_group=layers) for layers in (1, 2))
    other = LayerGroup(shape=(2, 1, 16, 32), dtype="bfloat16", object_group=1)
    one = engine(layout=ChunkLayout(groups=(second,)))
    both = one.completed(engine(layout=ChunkLayout(groups=(first,))))

    assert both.layout == ChunkLayout(groups=(first, second))
    assert differences(one, both) == differences(both, one) == []
    assert [found.field for found in differences(both, engine(layout=ChunkLayout(groups=(other,))))] == ["layout"]


@given(fingerprints, st.data())
def test_what_one_of_two_does_not_know_makes_no_difference(one, data):
    forgotten = data.draw(st.sets(st.sampled_from(COMPARED)))
    other = one.model_copy(update=dict.fromkeys(forgotten))

    assert differences(one, other) == differences(other, one) == []
    assert differences(one, other.completed(one)) == []
    assert all(getattr(other.completed(one), name) == getattr(one, name) for name in COMPARED)


@given(fingerprints, fingerprints)
def test_a_difference_is_one_from_both_sides_and_names_both_values(one, other):
    found, back = differences(one, other), differences(other, one)

    assert [d.field for d in found] == [d.field for d in back]
    assert [(d.recorded, d.here) for d in found] == [(d.here, d.recorded) for d in back]
    assert not found or (one.space == other.space and one.model == other.model)


@given(fingerprints, fingerprints)
def test_those_with_one_digest_do_not_differ(one, other):
    if one.digest == other.digest:
        assert [d for d in differences(one, other) if d.field != "layout"] == []
    if one.model == other.model and one.space == other.space and differences(one, other):
        assert one.digest != other.digest or one.layout != other.layout


def test_texts_of_others_stay_on_one_line():
    (found,) = differences(engine(), engine(model_revision="a\nb\x1b[31m"))

    assert str(found).isprintable()


# --- read back ---------------------------------------------------------------------------------------------------


@given(fingerprints)
def test_a_claim_comes_back(one):
    assert FingerprintClaim.from_json(FingerprintClaim.to_json(one), WHERE) == one


@given(st.lists(fingerprints.map(lambda one: one.model_copy(update={"model": "org/model"})), max_size=5))
def test_a_record_comes_back_with_the_last_fingerprint_of_each_space(variants):
    record = Record(model="org/model")
    for one in variants:
        record = record.having(one)

    assert Record.from_json(record.to_json(), "org/model", WHERE) == record
    assert {one.space: one for one in record.variants} == {one.space: one for one in variants}
    assert all(record.of(one.space) == one for one in record.variants)


@given(any_text | st.binary().map(repr))
def test_what_is_no_record_is_said_to_be_none(text):
    with pytest.raises(IntegrityError, match=r"kv/\.hfbucket/fingerprints"):
        Record.from_json(text.encode(), "org/model", WHERE)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema": SCHEMA + 1, "variants": 7}, "is of version 2, and this release knows 1"),
        ({"model": "org/other"}, "is the fingerprint of 'org/other', not of 'org/model'"),
        ({"variants": [{"mode": "classic", "model": "org/model", "world_size": -1}]}, "variants.0.world_size"),
        ({"variants": [{"mode": "new", "model": "org/model", "world_size": 1}]}, "variants.0.mode"),
        ({"variants": [{"mode": "mp", "model": "org/model", "world_size": 1}] * 2}, "two fingerprints of the same"),
        ({"variants": [{"mode": "mp", "model": "org/model", "world_size": n} for n in range(MAX_VARIANTS + 1)]}, "64"),
    ],
)
def test_what_is_wrong_with_a_record_is_named(change, words):
    document = json.loads(Record(model="org/model").to_json()) | change

    with pytest.raises(IntegrityError, match=words):
        Record.from_json(json.dumps(document).encode(), "org/model", WHERE)


def test_a_later_release_may_say_more():
    document = json.loads(Record(model="org/model").having(engine()).to_json())
    document["variants"][0]["quantization"] = "fp8"
    document["more"] = 1

    assert Record.from_json(json.dumps(document).encode(), "org/model", WHERE).of(engine().space) == engine()


def test_the_facts_are_told_in_words():
    reported = engine(recorded_at=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)).facts()

    assert reported["layout"] == "2x32x256x1024 bfloat16"
    assert reported["hash_seed_pinned"] == "yes"
    assert reported["recorded_at"] == "2026-01-02T03:04:05+00:00"
    assert "hash_bytes" not in reported
    assert dataclasses.asdict(differences(engine(), engine(chunk_size=1))[0]) == {
        "field": "chunk_size",
        "recorded": "256",
        "here": "1",
    }


def test_a_hash_that_lmcache_does_not_tell_is_said_once_a_while(caplog, monkeypatch):
    def missing(*_):
        raise AttributeError("another LMCache")

    monkeypatch.setattr(detect, "_looked_up", missing)

    assert [detect.classic_check("a hash of its own") for _ in range(3)] == [None] * 3
    assert caplog.text.count("LMCache's hash of 'a hash of its own' is not known: AttributeError: another LMCache") == 1
