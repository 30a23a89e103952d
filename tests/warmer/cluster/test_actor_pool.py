"""Nodes of actor tasks whose processes die: started again where the node lives, with the pieces that they had."""

import pytest
import ray.exceptions

from hfbucket_plugin.tools.signals import ShutdownSignal
from tests.support.ray_cluster import FakeRay
from warmer.cluster import actor_pool
from warmer.cluster.actor_pool import ActorPool, Failure


def carried_out(monkeypatch, answer, pieces=5, names="ab"):
    """What became of each piece on each node; and the calls."""
    world = FakeRay(names, answer, starts=True)
    world.put = lambda piece: piece
    monkeypatch.setattr(actor_pool, "ray", world)
    monkeypatch.setattr(actor_pool, "alive_nodes", lambda: world.alive)
    reported = []
    call = world.call

    def all_calls_wait(node, method, arguments):
        one = call(node, method, arguments)
        one.ended = False
        return one

    world.call = all_calls_wait
    with ActorPool(dict.fromkeys(world.nodes), ShutdownSignal()) as running:
        found = running.begin(60.0)
        running.work(lambda number: f"piece {number}", pieces, lambda *one: reported.append(one), 60.0)
    return found, reported, world


def dying(method, times):
    died = []

    def answer(call, _now):
        if call.node == "b" and call.method == method and len(died) < times:
            died.append(call)
            call.fail(ray.exceptions.ActorDiedError())
        else:
            call.end("found" if call.method == "start" else f"{call.arguments[0]} of {call.node}")

    return answer


@pytest.mark.parametrize("method", ["start", "work"])
@pytest.mark.parametrize("times", [0, 1, 3])
def test_a_process_that_dies_on_a_node_that_lives_is_started_again_with_its_pieces(monkeypatch, method, times):
    found, reported, world = carried_out(monkeypatch, dying(method, times))
    assert found == {"a": "found", "b": "found"}
    every = sorted((name, number, f"piece {number} of {name}") for name in "ab" for number in range(5))
    assert sorted(reported) == every  # each once
    begun = [call for call in world.calls if (call.node, call.method) == ("b", "start")]
    assert len(begun) == (times + 1 if method == "start" else len(begun))
    assert (len(begun) > 1) == (times > 0)


def test_a_process_that_dies_again_and_again_is_a_lost_node(monkeypatch):
    found, reported, _ = carried_out(monkeypatch, dying("work", 10**6))
    assert found == {"a": "found", "b": "found"}
    (lost,) = [result for name, _, result in reported if name == "b"]
    assert isinstance(lost, Failure)
    assert lost.kind == "node_lost"
    assert sum(name == "a" for name, _, _ in reported) == 5


def test_a_node_that_turns_out_to_be_dead_when_its_process_is_to_start_again_is_not_waited_for(monkeypatch):
    """The cluster took it for alive a moment longer."""
    begun = []

    def answer(call, _now):
        if call.node == "b":
            begun.append(call)
            if len({id(one) for one in begun}) == 1:
                call.fail(ray.exceptions.ActorDiedError())
            else:
                monkeypatch.setattr(actor_pool, "alive_nodes", list)  # and nobody answers
        else:
            call.end("found" if call.method == "start" else f"{call.arguments[0]} of {call.node}")

    found, reported, _ = carried_out(monkeypatch, answer)
    assert (found["b"].kind, found["b"].message) == ("node_lost", "lost in mid-run: the node died")
    assert len(reported) == 5
