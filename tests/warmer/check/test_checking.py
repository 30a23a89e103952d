"""A look into a tier: every layout, and nothing written."""

import json
import os
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from hfbucket_plugin.config.lmcache_yaml import EngineConfig
from hfbucket_plugin.core.keys import MPKey
from hfbucket_plugin.tools.selection import Selection
from tests.support.buckets import INSTANCE, classic_key, content, mp_key
from warmer.check.gate import CheckReport
from warmer.check.node import CheckConfig, NodeChecker
from warmer.cluster.placement import Assignment
from warmer.cluster.ray import Node
from warmer.node.worker import NodeWarmer
from warmer.plan.build import PlanBuilder
from warmer.report.outcomes import Failed, Missing, Right, Wrong
from warmer.report.summary import Share
from warmer.tiers import NodeInfo, declared_tier, open_tier

HEAD = "remote_storage_plugin.fs.warm."


@pytest.fixture(params=["raw", "headers", "padded"])
def filled(request, warehouse, tmp_path):
    """Chunks in a bucket and in a tier; returns what they are, and the tier's declaration."""
    if request.param == "padded":
        warehouse.put({mp_key(n): content(n, 20_000 + n) for n in range(4)})
        spec = {"type": "fs_native", "base_path": str(warehouse.tier), "use_odirect": True}
        declaration = declared_tier(None, json.dumps(spec))
        chosen = PlanBuilder(Selection.model_validate({"all": True}), MPKey, datetime.now(UTC))
        plan = list(chosen.planned(warehouse.open(), tmp_path / "scratch"))
    else:
        if request.param == "headers":  # a chunk of the shape has 2 * 2 * 16 * 2 * 8 * 2 bytes
            warehouse.extra = {"save_chunk_meta": True, f"{HEAD}kv_shape": "2,2,16,2,8"}
        size = 2048 if request.param == "headers" else 20_000
        warehouse.put({classic_key(n): content(n, size) for n in range(4)})
        declaration, plan = declared_tier(EngineConfig.read(warehouse.config), "fs.warm"), warehouse.plan()
    node = NodeWarmer(warehouse.open(), open_tier(declaration))
    try:
        assert len(node.copy(plan)) == 4
    finally:
        node.close()
    return plan, declaration


def looked_at(declaration, plan, **options):
    return NodeChecker(declaration, **options).copy(plan)


def snapshot(directory: Path):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in [directory, *directory.rglob("*")]}


def test_right_wrong_and_missing(filled):
    plan, declaration = filled
    assert looked_at(declaration, plan) == [Right(chunk.key, chunk.size) for chunk in plan]
    files = [declaration.file(chunk.key) for chunk in plan]
    files[0].unlink()
    with files[1].open("r+b") as out:
        out.truncate(100)
    with files[2].open("r+b") as out:
        out.seek(1000)
        out.write(b"garbage of the right size")
    before = snapshot(files[0].parent)
    found = looked_at(declaration, plan)
    assert [type(one) for one in found] == [Missing, Wrong, Wrong, Right]
    assert "its file has 100 bytes" in found[1].message
    assert "it has the hash" in found[2].message
    assert [type(one) for one in looked_at(declaration, plan, hashes=False)] == [Missing, Wrong, Right, Right]
    assert snapshot(files[0].parent) == before


def test_what_is_no_file_is_wrong_and_what_cannot_be_read_is_unknown(filled, monkeypatch):
    plan, declaration = filled
    files = [declaration.file(chunk.key) for chunk in plan]
    files[0].unlink()
    files[0].mkdir()
    files[1].unlink()
    files[1].symlink_to(files[1])
    found = looked_at(declaration, plan)
    assert [type(one) for one in found] == [Wrong, Failed, Right, Right]
    assert found[1].kind == "tier"


def test_a_chunk_that_vanishes_meanwhile_is_missing_and_no_other(filled, monkeypatch):
    plan, declaration = filled
    stat = os.stat

    def vanishing(path, *arguments, **options):
        found = stat(path, *arguments, **options)
        if str(path) == str(declaration.file(plan[0].key)):
            os.unlink(path)  # noqa: PTH108 - Path's would come back here
        return found

    monkeypatch.setattr(os, "stat", vanishing)
    assert [type(one) for one in looked_at(declaration, plan)] == [Missing, Right, Right, Right]


def test_a_header_of_another_chunk_is_wrong(filled):
    plan, declaration = filled
    if declaration.layout.header is None:
        return
    file = declaration.file(plan[0].key)
    with file.open("r+b") as out:
        out.write(b"\x07")
    assert "header" in looked_at(declaration, plan)[0].message


def test_a_tier_that_is_not_there_misses_all_and_is_not_made(tmp_path, warehouse):
    warehouse.put({classic_key(1): b"chunk"})
    declaration = warehouse.declaration()
    checker = CheckConfig(declaration).open(NodeInfo("name", "id", {}))
    assert [type(one) for one in checker.copy(warehouse.plan())] == [Missing]
    assert not warehouse.tier.exists()
    checker.close()
    (stopped,) = checker.copy(warehouse.plan())
    assert stopped.kind == "interrupted"


def test_keys_that_the_tier_cannot_hold_are_unknown(warehouse):
    warehouse.put({classic_key(1): b"chunk"})
    plan = [replace(warehouse.plan()[0], key=mp_key(1))]
    (found,) = looked_at(warehouse.declaration(), plan)
    assert (type(found), found.kind) == (Failed, "key")


NODES = [Assignment(Node("id-a", "a")), Assignment(Node("id-b", "b"), frozenset({0}))]
SHARES = {"id-a": Share(4, 40), "id-b": Share(2, 20, "0")}


def report(require, *outcomes, lost=None):
    one = CheckReport(require)
    watch = one.watch("fs.warm", NODES, SHARES)
    for node, outcome in outcomes:
        watch.ended(node, outcome)
    if lost:
        watch.lost(lost, "node_lost", "lost in mid-run")
    return one


B_IS_WARM = [("id-b", Right("k", 10))] * 2


def test_a_check_tells_each_nodes_share():
    found = [Right("k1", 10), Right("k2", 10), Wrong("k3", 10, "k3: wrong"), Missing("k4", 10)]
    record = report(1.0, *[("id-a", one) for one in found], *B_IS_WARM).record(stopped=False)
    assert (record["event"], record["result"], record["exit_code"], record["share"]) == ("check", "cold", 3, 0.5)
    assert record["nodes"][0] == {
        "tier": "fs.warm", "id": "id-a", "name": "a", "selected": 4, "ranks": None, "right": 2, "wrong": 1, "missing": 1,
        "unknown": 0, "error": None, "share": 0.5,
    }  # fmt: skip
    assert record["wrong"] == [{"tier": "fs.warm", "node": "id-a", "key": "k3", "message": "k3: wrong"}]
    assert json.loads(json.dumps(record)) == record


@pytest.mark.parametrize(("require", "code"), [(0.0, 0), (0.75, 0), (0.76, 3), (1.0, 3)])
def test_a_gate_opens_only_when_every_node_is_warm_enough(require, code):
    found = [Right("k", 10)] * 3 + [Missing("k", 10)]
    record = report(require, *[("id-a", one) for one in found], *B_IS_WARM).record(stopped=False)
    assert record["exit_code"] == code


def test_a_lost_node_never_opens_the_gate_and_a_stop_is_told_apart():
    unknown = [("id-a", Failed("k", 10, "node_lost", "k: not copied"))] * 4
    record = report(0.0, *unknown, *B_IS_WARM, lost="id-a").record(stopped=False)
    assert (record["exit_code"], record["nodes"][0]["unknown"]) == (3, 4)
    assert record["nodes"][0]["error"] == "node_lost: lost in mid-run"
    assert len(record["unknown"]) == 4
    stopped = report(1.0, ("id-a", Failed("k", 1, "interrupted", "")), *B_IS_WARM).record(stopped=True)
    assert (stopped["result"], stopped["exit_code"]) == ("interrupted", 5)


def test_nothing_to_hold_is_warm():
    one = CheckReport(1.0)
    one.watch("t", NODES[:1], {"id-a": Share(0, 0, "9")})
    assert one.record(stopped=False)["exit_code"] == 0


def test_chunks_that_no_node_takes_never_open_the_gate():
    one = CheckReport(0.0, unassigned=3)
    one.watch("t", NODES[:1], {"id-a": Share(0, 0, "9")})
    record = one.record(stopped=False)
    assert (record["exit_code"], record["for_nobody"]) == (3, 3)


def test_the_configuration_of_a_check_has_no_bucket(warehouse):
    import pickle

    config = CheckConfig(warehouse.declaration())
    assert INSTANCE.encode() not in pickle.dumps(config)
