"""`stat` on mixed keys."""

import json
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfbucket_plugin.core.keys import BucketHandle, ContentId, encode_name
from hfbucket_plugin.hub.bucket import ObjectInfo
from hfbucket_plugin.tools.inventory import Classifier, ObjectKind, rows, summarised
from tests.support.buckets import INSTANCE, PREFIX, Desk, key, l2_key, run, well_kept
from tests.support.models import untimed

BUCKET = SimpleNamespace(handle=BucketHandle("org", "bucket", PREFIX))
NOW = datetime(2025, 6, 1, tzinfo=UTC)


@pytest.fixture(autouse=True)
def _well_kept(monkeypatch):
    well_kept(monkeypatch)


@pytest.fixture
def desk(hub, new_bucket, tmp_path):
    desk = Desk(hub.endpoint, new_bucket(), tmp_path)
    desk.put({key(number, worker=number % 2): bytes(100) for number in range(5)})
    desk.put({l2_key(1): bytes(7), "test@1@0@0@half": bytes(3), key(1, model="b"): bytes(1000)})
    desk.put({key(9): b"another prefix"}, prefix=f"{PREFIX}0")
    desk.put_objects({"README.md": b"xy", ".hfbucket/bad/r": b"x"})
    return desk


def amounts(record):
    return record["objects"], record["bytes"]


def test_the_document(desk):
    ran = desk.run("stat", "--json")

    assert ran.code == 0
    assert ran.stderr == ""
    (instance,) = ran.summary["instances"]
    assert (instance["instance"], instance["mode"]) == (INSTANCE, "classic")
    assert [
        (group["model"], group["kind"], group["world_size"], group["worker"], *amounts(group))
        for group in instance["groups"]
    ] == [
        ("b", "classic", 2, 0, 1, 1000),
        ("org/model", "classic", 2, 0, 3, 300),
        ("org/model", "mp", 2, 0, 1, 7),
        ("org/model", "classic", 2, 1, 2, 200),
    ]
    assert {name: amounts(instance[name]) for name in ("chunks", "probe", "own", "foreign")} == {
        "chunks": (7, 1507),
        "probe": (1, 3),
        "own": (1, 1),
        "foreign": (1, 2),
    }
    oldest, newest = (datetime.fromisoformat(instance["chunks"][name]) for name in ("oldest", "newest"))
    assert oldest <= newest <= datetime.now(UTC) + timedelta(hours=1)


def test_lines_where_stdout_is_no_terminal(desk):
    lines = desk.run("stat").stdout.splitlines()

    assert len(lines) == 8
    assert lines[1].startswith(
        f"{INSTANCE}: org/model: kind classic, world 2, worker 0, objects 3, bytes 300 B, oldest "
    )
    assert lines[4].startswith(f"{INSTANCE}: all chunks: objects 7, bytes 1.5 KiB, ")
    assert [line.split(": ")[1] for line in lines[5:]] == ["LMCache's probe", ".hfbucket/", "foreign"]


def test_a_table_where_stdout_is_a_terminal(desk, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    shown = desk.run("stat").stdout

    assert f"{INSTANCE}  hf://buckets/" in shown
    assert "world" in shown
    assert "org/model" in shown


def test_one_model(desk):
    (instance,) = desk.run("stat", "--json", "--model", "b").summary["instances"]

    assert amounts(instance["chunks"]) == (1, 1000)
    assert amounts(instance["foreign"]) == amounts(instance["own"]) == (0, 0)


def test_one_worker(desk):
    (instance,) = desk.run("stat", "--json", "--prefix", "org/model@2@1@").summary["instances"]

    assert [group["worker"] for group in instance["groups"]] == [1]


def test_an_empty_instance(hub, bucket, tmp_path):
    ran = run("stat", "--json", "--l2-adapter", Desk(hub.endpoint, bucket, tmp_path).adapter)

    assert ran.code == 0
    (instance,) = ran.summary["instances"]
    assert instance["groups"] == []
    assert instance["chunks"] == {"objects": 0, "bytes": 0, "oldest": None, "newest": None}


def test_several_instances_in_one_document(desk):
    ran = desk.run("stat", "--json", "--l2-adapter", desk.adapter)

    assert [one["mode"] for one in ran.summary["instances"]] == ["classic", "mp"]
    assert ran.summary["instances"][0]["groups"] == ran.summary["instances"][1]["groups"]
    assert json.loads(ran.stdout)


names = st.sampled_from([key(1), key(1, worker=1), key(1, model="b"), l2_key(1), "test@1@0@0@half", "no key", "@"])
objects = st.lists(st.tuples(names, st.integers(0, 2**40), st.none() | st.integers(0, 10**9)))


@untimed
@given(objects)
def test_nothing_is_counted_twice_or_left_out(found):
    listed = [
        Classifier(BUCKET).classify(
            ObjectInfo(
                f"{PREFIX}/{encode_name(name)}",
                ContentId("0" * 64, size),
                None if age is None else NOW - timedelta(seconds=age),
            ),
        )
        for name, size, age in found
    ]
    summary = summarised(listed)
    everything = [*summary.groups.values(), *summary.others.values()]

    assert sum(amount.objects for amount in everything) == len(found)
    assert sum(amount.bytes for amount in everything) == sum(size for _, size, _ in found)
    assert summary.empty is (not found)
    times = [
        one.info.uploaded_at
        for one in listed
        if one.info.uploaded_at and one.kind in (ObjectKind.CLASSIC, ObjectKind.MP)
    ]
    assert summary.chunks.oldest == min(times, default=None)
    assert summary.chunks.newest == max(times, default=None)
    shown = rows(summary, NOW)
    assert len(shown) == len(summary.groups) + 1 + sum(bool(amount.objects) for amount in summary.others.values())
