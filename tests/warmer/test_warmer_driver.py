"""The driver's loop without a cluster: what it does with nodes that die, hang or join at any moment."""

import ray.exceptions
from fake_ray import FakeRay, Witness, well
from scheduling import MIB, part, plan

from warmer.fleet import Fleet
from warmer.interrupt import StopSwitch
from warmer.orders import Window
from warmer.schedule import Schedule


def drive(world, chunks=40, **options):
    """Carry out a schedule of some chunks on all nodes of a world; returns what its witness saw."""
    names = [node.id for node in world.nodes]
    schedule = Schedule(dict.fromkeys(names, 10**9), [part(plan([MIB] * chunks))], Window(batch_chunks=4))
    witness = Witness()
    Fleet(world.nodes, None, witness, StopSwitch(), 60.0, **options).run(schedule)
    return witness


def keys_by_node(witness):
    return {
        node: sorted(outcome.key for name, outcome in witness.outcomes if name == node)
        for node in {name for name, _ in witness.outcomes}
    }


def test_a_node_that_dies_just_after_it_had_fetched_for_others(monkeypatch):
    world = FakeRay("abc")

    def answer(call, _now):
        mine = [one for one in world.calls if (one.node, one.method, one.ended) == ("a", "fetch", False)]
        if len(mine) == 2:  # one of its two ends, and it dies: the driver is told of both at once
            well(mine[0])
            mine[1].fail(ray.exceptions.ActorDiedError())
        elif call.node != "a":
            well(call)

    world = world.under(monkeypatch)
    world._answer = answer
    witness = drive(world)
    assert {node: kind for node, (kind, _) in witness.errors.items()} == {"a": "node_lost"}
    every = sorted(chunk.key for chunk in plan([MIB] * 40))
    assert keys_by_node(witness) == {"a": every, "b": every, "c": every}
