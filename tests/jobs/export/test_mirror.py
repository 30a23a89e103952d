"""Mirrors: what the source does not have goes, by the guards of cleanup, and nothing else does."""

import pytest
from huggingface_hub import HfApi

from hfbucket_plugin.core.keys import encode_name
from jobs.lock.lock import BucketLock
from localhub.faults import Fault
from tests.support.buckets import HOUR, ExportRig, key, names, noise

KEPT = [key(number) for number in range(12)]
EXTRA = [key(number) for number in range(100, 103)]


@pytest.fixture
def rig(hub, new_bucket, tmp_path, monkeypatch):
    monkeypatch.setattr("jobs.batch.apply._BACKOFF_SECS", 0.01)
    rig = ExportRig.on(hub, tmp_path, new_bucket(), new_bucket())
    rig.us.put({one: noise(500, number) for number, one in enumerate(KEPT)})
    rig.eu.put({one: noise(500, number) for number, one in enumerate(KEPT[:9])})
    rig.eu.put(EXTRA)
    return rig


def empty(rig, depot):
    found = [path for path in depot.all_paths() if path.startswith(depot.prefix)]
    HfApi(endpoint=rig.hub.endpoint, token=False).batch_bucket_files(depot.bucket_id, delete=found)


def test_a_mirror_deletes_what_the_source_does_not_have(rig):
    rig.eu.put_paths({f"{rig.eu.prefix}/README.md": b"not ours"})
    rig.eu.put({key(200): b"young"}, age=60)

    ran = rig.export("--mirror", "--yes")

    assert ran.code == 0, ran.stderr
    export, mirror = ran.lines
    assert (export["job"], export["copied"]["objects"]) == ("export", 3)
    assert (mirror["job"], mirror["deleted"]["objects"], mirror["kept"]["too-young"]["objects"]) == ("mirror", 3, 1)
    assert [one["reason"] for one in mirror["by_reason"]] == ["not-at-source"]
    assert rig.listing(rig.eu).keys() == names([*KEPT, key(200)]) | {"README.md"}
    assert not [path for path in rig.eu.all_paths() if "/locks/" in path]
    assert f"{rig.eu.prefix}/.hfbucket/reports/mirror.json" in rig.eu.all_paths()


def test_without_an_order_it_is_only_planned(rig):
    for arguments in (["--mirror"], ["--mirror", "--yes", "--dry-run"]):
        ran = rig.export(*arguments)
        assert ran.code == 0, ran.stderr
        assert ran.lines[1]["result"] == "planned"
        assert ran.lines[1]["planned"]["objects"] == 3
        assert names(EXTRA) <= rig.listing(rig.eu).keys()
    plan = ran.lines[1]["plan"]
    rig.eu.put({EXTRA[0]: b"rewritten meanwhile"}, age=2 * HOUR)

    done = rig.apply(plan, "--yes")

    assert (done.code, done.counts("deleted", "changed")) == (0, [2, 1])
    assert names(EXTRA) & rig.listing(rig.eu).keys() == names(EXTRA[:1])


def test_more_than_may_be_deleted_refuses(rig):
    rig.eu.put([key(number) for number in range(300, 310)])
    ran = rig.export("--mirror", "--yes")
    assert ran.code == 4
    assert ran.lines[1]["deleted"]["objects"] == 0
    assert "--max-delete" in ran.stderr
    assert names(EXTRA) <= rig.listing(rig.eu).keys()
    assert rig.export("--mirror", "--yes", "--max-delete", "60%").lines[1]["deleted"]["objects"] == 13


@pytest.mark.parametrize("gone", ["objects", "bucket"])
def test_an_empty_source_deletes_nothing(rig, gone):
    if gone == "bucket":
        rig.us.bucket_id += "-gone"
        rig.us.settings = {"create_bucket_if_missing": True}
    else:
        empty(rig, rig.us)
    before = rig.listing(rig.eu)

    ran = rig.export("--mirror", "--yes", "--max-delete", "100%")

    assert ran.code == (2 if gone == "bucket" else 4)
    assert len(ran.lines) == 1
    assert rig.listing(rig.eu) == before


def test_nothing_is_deleted_where_not_all_was_copied(rig):
    rig.hub.control.add_fault(Fault(route="batch", items="%40100b%40", items_error="not this"))
    ran = rig.export("--mirror", "--yes")
    assert (ran.code, len(ran.lines)) == (3, 1)
    assert names(EXTRA) <= rig.listing(rig.eu).keys()


def test_a_mirror_of_a_selection_deletes_within_it_only(rig):
    rig.eu.put([key(1, "org/other"), key(2, "org/other")])
    rig.us.put([key(1, "org/other")])
    ran = rig.export("--mirror", "--yes", "--model", "org/other", "--max-delete", "100%")
    assert ran.code == 0, ran.stderr
    assert ran.lines[1]["deleted"]["objects"] == 1
    assert names([key(1, "org/other"), *EXTRA]) <= rig.listing(rig.eu).keys()


def test_a_source_that_does_not_answer_deletes_nothing(rig):
    rig.eu.put({one: noise(500, number) for number, one in enumerate(KEPT)})
    rig.hub.control.add_fault(Fault(route="paths-info", path_regex=rig.us.bucket_id, status=503))
    ran = rig.export("--mirror", "--yes")
    assert ran.code in (3, 4)
    assert names(EXTRA) <= rig.listing(rig.eu).keys()


def test_a_mirror_waits_for_no_lock(rig):
    from tests.support.buckets import opened

    with opened(rig.hub.endpoint, rig.eu.bucket_id, rig.eu.prefix) as bucket, BucketLock(bucket, "cleanup").held():
        ran = rig.export("--mirror", "--yes")
    assert (ran.code, "is locked by cleanup" in ran.stderr) == (4, True)
    assert names(EXTRA) <= rig.listing(rig.eu).keys()


def test_a_read_only_source_is_enough(rig):
    rig.us.settings = {"role": "read-only"}
    assert rig.export("--mirror", "--yes").code == 0
    assert rig.listing(rig.eu) == rig.listing(rig.us)
    assert rig.eu.all_paths() >= rig.eu.paths_of(KEPT)


def test_a_plan_asks_the_source_again(rig, tmp_path):
    plan = rig.export("--mirror", "--plan-dir", str(tmp_path / "kept")).lines[1]["plan"]
    rig.us.put(EXTRA[:1])  # the source has it again; the destination's own is as it was planned

    ran = rig.apply(plan, "--yes")

    assert (ran.code, ran.counts("deleted", "changed")) == (0, [2, 1]), ran.stderr
    assert names(EXTRA) & rig.listing(rig.eu).keys() == names(EXTRA[:1])


def test_the_source_is_asked_just_before_the_delete(rig, monkeypatch):
    """It gets a chunk between the plan and the batch."""
    confirm = BucketLock.confirm

    def confirmed(lock):
        if encode_name(EXTRA[0]) not in rig.listing(rig.us):
            rig.us.put(EXTRA[:1])
        return confirm(lock)

    monkeypatch.setattr(BucketLock, "confirm", confirmed)
    ran = rig.export("--mirror", "--yes")
    assert [ran.lines[1][name]["objects"] for name in ("deleted", "changed")] == [2, 1]
    assert names(EXTRA) & rig.listing(rig.eu).keys() == names(EXTRA[:1])


@pytest.mark.parametrize(("change", "code"), [("empty", 4), ("gone", 2), ("elsewhere", 2), ("silent", 3)])
def test_a_plan_whose_source_is_no_longer_what_it_was_deletes_nothing(rig, tmp_path, change, code):
    plan = rig.export("--mirror", "--plan-dir", str(tmp_path / "kept")).lines[1]["plan"]
    if change == "empty":
        empty(rig, rig.us)
    elif change == "gone":
        HfApi(endpoint=rig.hub.endpoint, token=False).delete_bucket(rig.us.bucket_id)
    elif change == "elsewhere":
        rig.us.prefix = "kv/other"
        assert rig.config
    else:
        rig.hub.control.add_fault(Fault(route="paths-info", path_regex=rig.us.bucket_id, status=503))

    ran = rig.apply(plan, "--yes")

    assert ran.code == code, ran.stderr
    assert names(EXTRA) <= rig.listing(rig.eu).keys()
