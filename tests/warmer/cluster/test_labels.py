"""Nodes chosen by their labels, each with its own workers' chunks, several tiers, plans and checks, on real raylets."""

import json

import pytest

from tests.support.buckets import MODEL, SECRET, command, content

ALL = {f"{MODEL}@4@{worker}@{0xA0 + number:x}@half" for worker in range(4) for number in range(6)}
SHARED = f"{MODEL}@1@0@ff@half"


@pytest.fixture
def stocked(warehouse):
    """A bucket, and a YAML with two tiers, each in a directory of its own on each node."""
    warehouse.put({key: content(number, 30_000) for number, key in enumerate(sorted(ALL | {SHARED}))})
    head = "remote_storage_plugin.fs."
    warehouse.extra = {f"{head}{name}.base_path": f"{warehouse.tier}/{name}/{{node_id}}" for name in ("warm", "cold")}
    document = json.loads(warehouse.config.read_text())
    document["remote_storage_plugins"].append("fs.cold")
    path = warehouse.directory / "two.yaml"
    path.write_text(json.dumps(document))
    return warehouse, path


@pytest.fixture
def warmer(cluster):
    def run(*arguments):
        ran = command(*map(str, arguments), "--address", cluster.address, WARM_TEST_TOKEN=SECRET)
        assert SECRET not in ran.stdout + ran.stderr
        return ran

    return run


def held(warehouse, name, node):
    return set(warehouse.in_tier(warehouse.tier / name / node))


def of_workers(*workers):
    return {key for key in ALL if int(key.split("@")[2]) in workers}


def test_chosen_nodes_get_their_workers_chunks_in_every_tier(hub, cluster, stocked, warmer):
    warehouse, config = stocked
    plan, report = warehouse.directory / "plan.jsonl", warehouse.directory / "report.jsonl"
    chosen = ["--lmcache-config", config, "--model", MODEL, "--tier", "fs.warm", "--tier", "fs.cold"]
    assert command(*map(str, ["plan", *chosen, "--node-selector", "pool=serving", "--out", plan])).code == 0

    first = warmer("apply", plan, "--report", report)
    assert first.code == 0, first.stderr
    summary = first.summary
    # Twelve of its workers and one that all share, on each of two nodes, in each of two tiers.
    assert (summary["copied"], summary["present"], summary["tier"]) == (52, 0, ["fs.warm", "fs.cold"])
    # Into the second tier they come from the first.
    assert (summary["fetched"], summary["received"], summary["reused"]) == (25, 1, 26)
    assert [tier["reused"] for tier in summary["tiers"]] == [0, 26]
    by_ranks = {node["ranks"]: node for node in summary["tiers"][0]["nodes"]}
    assert by_ranks.keys() == {"0-1", "2-3"}
    assert all(node["selected"] == 13 for node in by_ranks.values())
    for name in ("warm", "cold"):
        assert held(warehouse, name, by_ranks["0-1"]["id"]) == of_workers(0, 1) | {SHARED}
        assert held(warehouse, name, by_ranks["2-3"]["id"]) == of_workers(2, 3) | {SHARED}
        assert len(list((warehouse.tier / name).iterdir())) == 2
    assert '"event": "summary"' in report.read_text()

    hub.control.reset_counters()
    again = warmer("apply", plan).summary
    assert (again["copied"], again["present"], again["bytes"]) == (0, 52, 0)
    assert hub.control.counters().route("xorb-data").requests == 0

    # A gate: one file is removed, and one holds other bytes.
    files = sorted((warehouse.tier / "cold" / by_ranks["2-3"]["id"]).glob("*.data"))
    files[0].unlink()
    files[1].write_bytes(bytes(30_000))
    checked = warmer("check", plan, "--require", "0.9")
    assert checked.code == 3, checked.stderr
    assert "1 chunks are wrong by the plan of 2" in checked.stderr
    record = checked.summary
    assert record["compared_with"] == {"with": "plan", "at": record["compared_with"]["at"], "plan": str(plan)}
    assert record["share"] == round(11 / 13, 6)
    found = {(node["tier"], node["ranks"]): (node["right"], node["wrong"], node["missing"]) for node in record["nodes"]}
    assert found[("fs.cold", "2-3")] == (11, 1, 1)
    assert found[("fs.warm", "2-3")] == found[("fs.warm", "0-1")] == found[("fs.cold", "0-1")] == (13, 0, 0)
    assert [one["tier"] for one in record["wrong"]] == ["fs.cold"]
    assert warmer("check", plan, "--verify", "length", "--require", "0.9").code == 0
    assert not files[0].exists()

    # By name, with ranks of its own, a node that the label leaves out: without room for any of it.
    batch = next(node["NodeID"] for node in nodes_of(cluster) if node["Labels"].get("pool") == "batch")
    other = ["apply", plan, "--node-selector", "pool=!serving", "--nodes", batch, "--ranks", f"{batch}=3"]
    ran = warmer(*other, "--tier", "fs.cold", "--tier-max-bytes", "9KiB")
    assert ran.code == 4, ran.stderr
    assert (ran.summary["result"], ran.summary["failed_by_kind"]) == ("refused", {"no_room": 7})

    # A gate stays closed where chunks are for nobody: here those of the workers 0-2.
    checked = warmer("check", *other[1:], "--tier", "fs.warm", "--require", "0")
    assert (checked.code, checked.summary["for_nobody"]) == (3, 18), checked.stderr

    # What has gone from the bucket is named.
    warehouse.delete(SHARED)
    ran = warmer(*other, "--tier", "fs.warm")
    assert ran.code == 3, ran.stderr
    assert [(failure["key"], failure["kind"]) for failure in ran.summary["failures"]] == [(SHARED, "missing")]
    assert ran.summary["for_nobody"] == 18
    assert held(warehouse, "warm", batch) == of_workers(3)


def test_what_a_check_finds_wrong_is_replaced_where_that_is_asked_for(stocked, warmer):
    warehouse, config = stocked
    chosen = ["--lmcache-config", config, "--model", MODEL, "--tier", "fs.cold", "--node-selector", "pool=serving"]
    assert warmer("run", *chosen).code == 0
    file = next((warehouse.tier / "cold").glob("*/*.data"))
    right = file.read_bytes()
    file.write_bytes(bytes(30_000))
    assert warmer("run", *chosen).summary["repaired"] == 0
    assert warmer("check", *chosen).code == 3
    repaired = warmer("run", *chosen, "--verify-present")
    assert (repaired.summary["copied"], repaired.summary["repaired"]) == (1, 1), repaired.stderr
    assert "held something else in its place, which was replaced" in repaired.stderr
    assert file.read_bytes() == right
    checked = warmer("check", *chosen)
    assert (checked.code, checked.summary["compared_with"]["with"]) == (0, "bucket"), checked.stderr


def nodes_of(cluster):
    import ray

    from warmer.cluster.ray import joined

    with joined(cluster.address):
        return ray.nodes()


def test_no_such_node_is_refused(stocked, warmer):
    _, config = stocked
    chosen = ["run", "--lmcache-config", config, "--model", MODEL, "--tier", "fs.warm"]
    none = warmer(*chosen, "--node-selector", "pool=other")
    assert none.code == 4
    assert "pool=serving" in none.stderr
    unknown = warmer(*chosen, "--nodes", "gpu-17")
    assert unknown.code == 2
    assert "gpu-17" in unknown.stderr
    assert unknown.stdout == ""
