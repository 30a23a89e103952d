"""Who takes the place of a lost node."""

from warmer.cluster.placement import NodeSlots, assigned
from warmer.cluster.ray import Node
from warmer.request.model import NodeOptions

ALIVE = [
    Node("id-a", "a", {"pool": "serving", "lmcache.workers": "0-3"}),
    Node("id-b", "b", {"pool": "serving", "lmcache.workers": "4-7"}),
    Node("id-c", "c", {"pool": "batch"}),
]


def places(**wanted):
    nodes = NodeOptions(**wanted)
    return NodeSlots(assigned(ALIVE, nodes), nodes)


def joined(name="new", **labels):
    return Node(f"id-{name}", name, {label.replace("_", "."): value for label, value in labels.items()})


def test_who_joins_needs_the_labels_and_the_names_that_were_asked_for():
    new, other = joined(pool="serving"), joined("other", pool="batch")
    assert places(selector="pool=serving").candidates([new, other]) == [new]
    assert places(names="a,b").candidates([new, other]) == []
    again = Node("id-a2", "a", {})
    assert places(names="a,b").candidates([new, again]) == [again]


def test_who_joins_takes_a_place_with_its_own_workers_or_any_when_it_has_none():
    one = places()
    fitting = joined(lmcache_workers="4-7")
    assert [one.fits(lost, fitting) for lost in ("id-a", "id-b", "id-c")] == [False, True, False]
    assert all(one.fits(lost, joined()) for lost in ("id-a", "id-b", "id-c"))
    assert not one.fits("id-a", joined(lmcache_workers="some"))
    assert places(ranks={"new": "0-3"}).fits("id-a", fitting)


def test_who_took_a_place_keeps_it_with_its_workers_chunks():
    one = places(selector="pool=serving")
    new = joined(pool="serving")
    one.take("id-a", new)
    assert [(held.node.id, held.ranks) for held in one.nodes] == [("id-new", {0, 1, 2, 3}), ("id-b", {4, 5, 6, 7})]
    assert one.fits("id-new", joined("newer", lmcache_workers="0-3"))


def test_who_names_its_workers_is_asked_before_those_that_take_any():
    any_one, fitting, unreadable = (
        joined("any"),
        joined("fitting", lmcache_workers="0-3"),
        joined("x", lmcache_workers="?"),
    )
    assert places().candidates([any_one, unreadable, fitting]) == [fitting, any_one, unreadable]
    assert places(ranks={"any": "4-7"}).candidates([unreadable, any_one]) == [any_one, unreadable]
