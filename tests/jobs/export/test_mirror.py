"""Mirrors: what the source does not have goes, by the guards of cleanup, and nothing else does."""

import pytest
from huggingface_hub import HfApi

from hfbucket_plugin.core.keys import encode_name
from jobs.lock.lock import Lock
from localhub.faults import Fault
from tests.support.depot import HOUR, key
from tests.support.lane import Lane, names
from tests.support.plugin_support import noise

KEPT = [key(number) for number in range(12)]
EXTRA = [key(number) for number in range(100, 103)]


@pytest.fixture
def lane(hub, new_bucket, tmp_path, monkeypatch):
    monkeypatch.setattr("jobs.batch.apply._BACKOFF_SECS", 0.01)
    lane = Lane.on(hub, tmp_path, new_bucket(), new_bucket())
    lane.us.put({one: noise(500, number) for number, one in enumerate(KEPT)})
    lane.eu.put({one: noise(500, number) for number, one in enumerate(KEPT[:9])})
    lane.eu.put(EXTRA)
    return lane


def empty(lane, depot):
    found = [path for path in depot.all_paths() if path.startswith(depot.prefix)]
    HfApi(endpoint=lane.hub.endpoint, token=False).batch_bucket_files(depot.bucket_id, delete=found)


def test_a_mirror_deletes_what_the_source_does_not_have(lane):
    lane.eu.put_paths({f"{lane.eu.prefix}/README.md": b"not ours"})
    lane.eu.put({key(200): b"young"}, age=60)

    ran = lane.export("--mirror", "--yes")

    assert ran.code == 0, ran.stderr
    export, mirror = ran.summaries
    assert (export["job"], export["copied"]["objects"]) == ("export", 3)
    assert (mirror["job"], mirror["deleted"]["objects"], mirror["kept"]["too-young"]["objects"]) == ("mirror", 3, 1)
    assert [one["reason"] for one in mirror["by_reason"]] == ["not-at-source"]
    assert lane.listing(lane.eu).keys() == names([*KEPT, key(200)]) | {"README.md"}
    assert not [path for path in lane.eu.all_paths() if "/locks/" in path]
    assert f"{lane.eu.prefix}/.hfbucket/reports/mirror.json" in lane.eu.all_paths()


def test_without_an_order_it_is_only_planned(lane):
    for arguments in (["--mirror"], ["--mirror", "--yes", "--dry-run"]):
        ran = lane.export(*arguments)
        assert ran.code == 0, ran.stderr
        assert ran.summaries[1]["result"] == "planned"
        assert ran.summaries[1]["planned"]["objects"] == 3
        assert names(EXTRA) <= lane.listing(lane.eu).keys()
    plan = ran.summaries[1]["plan"]
    lane.eu.put({EXTRA[0]: b"rewritten meanwhile"}, age=2 * HOUR)

    done = lane.apply(plan, "--yes")

    assert (done.code, done.counts("deleted", "changed")) == (0, [2, 1])
    assert names(EXTRA) & lane.listing(lane.eu).keys() == names(EXTRA[:1])


def test_more_than_may_be_deleted_refuses(lane):
    lane.eu.put([key(number) for number in range(300, 310)])
    ran = lane.export("--mirror", "--yes")
    assert ran.code == 4
    assert ran.summaries[1]["deleted"]["objects"] == 0
    assert "--max-delete" in ran.stderr
    assert names(EXTRA) <= lane.listing(lane.eu).keys()
    assert lane.export("--mirror", "--yes", "--max-delete", "60%").summaries[1]["deleted"]["objects"] == 13


@pytest.mark.parametrize("gone", ["objects", "bucket"])
def test_an_empty_source_deletes_nothing(lane, gone):
    if gone == "bucket":
        lane.us.bucket_id += "-gone"
        lane.us.settings = {"create_bucket_if_missing": True}
    else:
        empty(lane, lane.us)
    before = lane.listing(lane.eu)

    ran = lane.export("--mirror", "--yes", "--max-delete", "100%")

    assert ran.code == (2 if gone == "bucket" else 4)
    assert len(ran.summaries) == 1
    assert lane.listing(lane.eu) == before


def test_nothing_is_deleted_where_not_all_was_copied(lane):
    lane.hub.control.add_fault(Fault(route="batch", items="%40100b%40", items_error="not this"))
    ran = lane.export("--mirror", "--yes")
    assert (ran.code, len(ran.summaries)) == (3, 1)
    assert names(EXTRA) <= lane.listing(lane.eu).keys()


def test_a_mirror_of_a_choice_deletes_within_it_only(lane):
    lane.eu.put([key(1, "org/other"), key(2, "org/other")])
    lane.us.put([key(1, "org/other")])
    ran = lane.export("--mirror", "--yes", "--model", "org/other", "--max-delete", "100%")
    assert ran.code == 0, ran.stderr
    assert ran.summaries[1]["deleted"]["objects"] == 1
    assert names([key(1, "org/other"), *EXTRA]) <= lane.listing(lane.eu).keys()


def test_a_source_that_does_not_answer_deletes_nothing(lane):
    lane.eu.put({one: noise(500, number) for number, one in enumerate(KEPT)})
    lane.hub.control.add_fault(Fault(route="paths-info", path_regex=lane.us.bucket_id, status=503))
    ran = lane.export("--mirror", "--yes")
    assert ran.code in (3, 4)
    assert names(EXTRA) <= lane.listing(lane.eu).keys()


def test_a_mirror_waits_for_no_lock(lane):
    from tests.support.plugin_support import opened

    with opened(lane.hub.endpoint, lane.eu.bucket_id, lane.eu.prefix) as bucket, Lock(bucket, "cleanup").held():
        ran = lane.export("--mirror", "--yes")
    assert (ran.code, "is locked by cleanup" in ran.stderr) == (4, True)
    assert names(EXTRA) <= lane.listing(lane.eu).keys()


def test_a_read_only_source_is_enough(lane):
    lane.us.settings = {"role": "read-only"}
    assert lane.export("--mirror", "--yes").code == 0
    assert lane.listing(lane.eu) == lane.listing(lane.us)
    assert lane.eu.all_paths() >= lane.eu.paths_of(KEPT)


def test_a_plan_asks_the_source_again(lane, tmp_path):
    plan = lane.export("--mirror", "--plan-dir", str(tmp_path / "kept")).summaries[1]["plan"]
    lane.us.put(EXTRA[:1])  # the source has it again; the destination's own is as it was planned

    ran = lane.apply(plan, "--yes")

    assert (ran.code, ran.counts("deleted", "changed")) == (0, [2, 1]), ran.stderr
    assert names(EXTRA) & lane.listing(lane.eu).keys() == names(EXTRA[:1])


def test_the_source_is_asked_just_before_the_delete(lane, monkeypatch):
    """It gets a chunk between the plan and the batch."""
    confirm = Lock.confirm

    def confirmed(lock):
        if encode_name(EXTRA[0]) not in lane.listing(lane.us):
            lane.us.put(EXTRA[:1])
        return confirm(lock)

    monkeypatch.setattr(Lock, "confirm", confirmed)
    ran = lane.export("--mirror", "--yes")
    assert [ran.summaries[1][name]["objects"] for name in ("deleted", "changed")] == [2, 1]
    assert names(EXTRA) & lane.listing(lane.eu).keys() == names(EXTRA[:1])


@pytest.mark.parametrize(("change", "code"), [("empty", 4), ("gone", 2), ("elsewhere", 2), ("silent", 3)])
def test_a_plan_whose_source_is_no_longer_what_it_was_deletes_nothing(lane, tmp_path, change, code):
    plan = lane.export("--mirror", "--plan-dir", str(tmp_path / "kept")).summaries[1]["plan"]
    if change == "empty":
        empty(lane, lane.us)
    elif change == "gone":
        HfApi(endpoint=lane.hub.endpoint, token=False).delete_bucket(lane.us.bucket_id)
    elif change == "elsewhere":
        lane.us.prefix = "kv/other"
        assert lane.config
    else:
        lane.hub.control.add_fault(Fault(route="paths-info", path_regex=lane.us.bucket_id, status=503))

    ran = lane.apply(plan, "--yes")

    assert ran.code == code, ran.stderr
    assert names(EXTRA) <= lane.listing(lane.eu).keys()
