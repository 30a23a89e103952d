import logging

import pytest

from hfbucket_plugin.errors import ConfigError
from hfbucket_plugin.tools.selection import ChunkRef
from warmer.cluster.placement import Assignment, Selector, assigned, unassigned_chunks, unknown_ranks
from warmer.cluster.ray import Node
from warmer.plan.plan_file import WarmPlanFile
from warmer.report.outcomes import NothingToDoError
from warmer.request.model import NodeOptions

A = Node("id-a", "gpu-1", {"pool": "serving", "zone": "x", "lmcache.workers": "0-3"})
B = Node("id-b", "gpu-1", {"pool": "serving", "zone": "y", "lmcache.workers": "4-5_7"})
C = Node("id-c", "cpu-1", {"pool": "batch", "ray.io/node-id": "id-c"})
ALIVE = [A, B, C]


def chosen(**wanted):
    return [one.node for one in assigned(ALIVE, NodeOptions(**wanted))]


@pytest.mark.parametrize(
    ("selector", "nodes"),
    [
        ((), [A, B, C]),
        ("pool=serving", [A, B]),
        (["pool=serving", "zone=y"], [B]),
        ({"pool": "serving", "zone": "x"}, [A]),
        ("zone=!x", [B, C]),
        ("zone=in(x, z)", [A]),
        ("zone = !in(x,y)", [C]),
    ],
)
def test_nodes_by_label(selector, nodes):
    assert chosen(selector=selector) == nodes


@pytest.mark.parametrize("text", ["pool", "=x", "pool=", "pool=a,zone=b", "pool=in()", "pool=in(a,)", "pool=!!a", ""])
def test_what_is_no_selector(text):
    with pytest.raises(ConfigError, match="--node-selector"):
        Selector.parse(text)


def test_no_node_with_the_label_is_refused_with_those_there_are():
    with pytest.raises(NothingToDoError, match=r"pool=other.*gpu-1 \(id-a: .*pool=serving, zone=x\).*cpu-1") as raised:
        chosen(selector="pool=other")
    assert "ray.io/" not in str(raised.value)
    with pytest.raises(NothingToDoError, match="no node that is alive"):
        assigned([], NodeOptions())


def test_nodes_by_name_or_id():
    assert chosen(names="id-b,cpu-1") == [B, C]
    assert chosen(names=["gpu-1"]) == [A, B]
    assert chosen(names="gpu-1", selector="zone=x") == [A]


def test_an_unknown_name_is_an_error_that_names_the_nodes():
    with pytest.raises(ConfigError, match=r"--nodes gpu-9: .*gpu-1 \(id-a\), gpu-1 \(id-b\), cpu-1 \(id-c\)"):
        chosen(names="gpu-1,gpu-9")
    many = [Node(f"id-{n}", f"n-{n}") for n in range(50)]
    with pytest.raises(ConfigError, match="and 30 more"):
        assigned(many, NodeOptions(names="x"))


def ranks(**wanted):
    return [one.ranks for one in assigned(ALIVE, NodeOptions(**wanted))]


def test_ranks_from_the_label_and_from_the_file():
    assert ranks() == [{0, 1, 2, 3}, {4, 5, 7}, None]
    assert ranks(ranks={"id-b": "4", "cpu-1": "0-1"}) == [{0, 1, 2, 3}, {4}, {0, 1}]
    assert ranks(ranks_label="none") == [None, None, None]
    assert unknown_ranks(ALIVE, NodeOptions(ranks={"gpu-1": 0, "gpu-9": "1"})) == ["gpu-9"]


def test_a_label_that_holds_no_ranks_is_an_error_that_names_the_node():
    with pytest.raises(ConfigError, match=r"node gpu-1 \(id-a\): label pool: 'serving'"):
        ranks(ranks_label="pool")


@pytest.mark.parametrize(("ranks", "count"), [(None, 0), ({0, 1, 2, 3}, 0), ({1, 9}, 9)])
def test_chunks_that_no_node_takes_are_counted(tmp_path, caplog, ranks, count):
    plan = WarmPlanFile.write(tmp_path / "p", (ChunkRef(f"k{n}", "p", "00", 1, worker=n % 4) for n in range(12)))
    nodes = [Assignment(A, ranks if ranks is None else frozenset(ranks)), Assignment(B, frozenset({1}))]
    with caplog.at_level(logging.WARNING):
        assert unassigned_chunks(plan, nodes) == count
    assert ("9 of 12 chunks are for no node: the plan has those of workers 0-3" in caplog.text) == bool(count)


def test_chunks_of_which_no_node_takes_any_are_refused(tmp_path):
    plan = WarmPlanFile.write(tmp_path / "p", (ChunkRef(f"k{n}", "p", "00", 1, worker=n % 4) for n in range(12)))
    with pytest.raises(NothingToDoError, match=r"any of the 12 chunks: .* workers 0-3, nodes take those of 8-11"):
        unassigned_chunks(plan, [Assignment(A, frozenset(range(8, 12)))])
