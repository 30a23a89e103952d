"""`doctor` and fingerprints."""

import pytest

from hfbucket_plugin.fingerprint.model import Fingerprint, FingerprintClaim, Record
from tests.support.buckets import PREFIX, Desk, key, noise, well_kept

NAME = ".hfbucket/fingerprints/org%2Fmodel"


@pytest.fixture
def desk(hub, new_bucket, tmp_path, monkeypatch):
    """An instance with a fingerprint that fits its configuration."""
    well_kept(monkeypatch)
    desk = Desk(hub.endpoint, new_bucket(private=True, region="eu"), tmp_path)
    desk.put({key(1): noise(5000, 1)})
    desk.put_objects({f"{NAME}.json": Record(model="org/model").having(engine()).to_json()})
    return desk


def engine(**values):
    known = {
        "mode": "classic", "model": "org/model", "world_size": 2, "dtype": "bfloat16", "chunk_size": 256,
        "hash_algorithm": "builtin", "hash_check": "1f", "written_by": "host-a",
    }  # fmt: skip
    return Fingerprint(**known | values)


def test_a_configuration_that_agrees(desk):
    ran = desk.doctor()

    assert ran.code == 0
    assert ran.reported("fingerprint") == "ok: of 1 model: the configuration agrees, as far as it says; "


def test_none_recorded(desk, hub, new_bucket):
    desk.bucket_id = new_bucket(private=True, region="eu")

    assert desk.doctor().reported("fingerprint") == "ok: none is recorded yet; "


def test_a_claim_counts_where_nothing_is_recorded_yet(desk, new_bucket):
    desk.bucket_id = new_bucket(private=True, region="eu")
    desk.put_objects({f"{NAME}/{engine().digest}.json": FingerprintClaim.to_json(engine())})

    assert desk.doctor().reported("fingerprint") == "ok: of 1 model: the configuration agrees, as far as it says; "
    desk.engine = {"chunk_size": 128}
    assert (
        desk.doctor()
        .reported("fingerprint")
        .startswith(
            "warning: org/model (classic, world size 2, bfloat16, claimed and not recorded yet): chunk_size is 256 in the bucket"
        )
    )


def test_what_engines_of_the_other_mode_recorded_is_no_agreement(desk):
    mp = engine(mode="mp", dtype=None)
    desk.put_objects({f"{NAME}.json": Record(model="org/model").having(mp).to_json()})

    assert desk.doctor().reported("fingerprint") == (
        "ok: of 1 model: nothing is recorded yet of classic engines, so there is nothing to compare with; "
    )


@pytest.mark.parametrize(("fingerprint", "severity"), [("warn", "warning"), ("enforce", "error")])
def test_a_configuration_of_other_engines(desk, fingerprint, severity):
    desk.engine = {"chunk_size": 128, "pre_caching_hash_algorithm": "sha256_cbor"}
    desk.settings = {"fingerprint": fingerprint}
    reported = desk.doctor().reported("fingerprint")

    assert reported.startswith(
        f"{severity}: org/model (classic, world size 2, bfloat16): chunk_size is 256 in the bucket and 128 in this "
        "configuration; hash_algorithm is builtin in the bucket and sha256_cbor in this configuration"
    )
    assert "python -m jobs fingerprint show" in reported


def test_two_fleets_are_named_with_what_tells_them_apart(desk):
    other = engine(hash_check="2e", hash_seed_pinned=True, written_by="host-b")
    desk.put_objects({f"{NAME}/{one.digest}.json": FingerprintClaim.to_json(one) for one in (engine(), other)})
    reported = desk.doctor().reported("fingerprint")

    assert reported.startswith(
        "warning: org/model (classic, world size 2, bfloat16): two fleets are not alike, host-a and host-b"
    )
    assert "hash_check (the seed, PYTHONHASHSEED) is 1f in the bucket and 2e there" in reported


def test_a_bucket_of_several_models_with_a_configuration_of_one(desk):
    other = engine(model="org/other", chunk_size=512, model_revision="w2")
    desk.put_objects({".hfbucket/fingerprints/org%2Fother.json": Record(model="org/other").having(other).to_json()})
    desk.settings = {"fingerprint": "enforce", "model_revision": "w1"}
    reported = desk.doctor().reported("fingerprint")

    assert reported.startswith(
        "note: of 2 models: the configuration agrees with that of org/model, and not with others"
    )
    assert "org/other (classic, world size 2, bfloat16): model_revision is w2 in the bucket and w1 in this" in reported

    desk.settings["model_revision"] = "w2"
    desk.put_objects({f"{NAME}.json": Record(model="org/model").having(engine(model_revision="w1")).to_json()})
    assert desk.doctor().reported("fingerprint").startswith("error: "), "it agrees with none"


def test_one_that_cannot_be_read(desk):
    desk.put_objects({f"{NAME}.json": b"garbage"})

    reported = desk.doctor().reported("fingerprint")

    assert reported.startswith(f"warning: {PREFIX}/{NAME}.json: not a valid fingerprint: not JSON")


def test_engines_that_do_not_look(desk):
    desk.settings = {"fingerprint": "off"}

    assert "engines do not look at it" in desk.doctor().reported("fingerprint")


def test_one_whose_seed_nobody_set(desk):
    desk.put_objects({f"{NAME}.json": Record(model="org/model").having(engine(hash_seed_pinned=False)).to_json()})

    reported = desk.doctor().reported("fingerprint")

    assert reported.startswith("note: ")
    assert "org/model (classic, world size 2, bfloat16) was recorded by an engine whose PYTHONHASHSEED" in reported
