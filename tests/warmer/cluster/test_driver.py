"""The driver's loop without a cluster: what it does with nodes that die, hang or join at any moment."""

import pytest
import ray.exceptions

from hfbucket_plugin.errors import RefusedError
from hfbucket_plugin.tools.signals import ShutdownSignal
from tests.support.ray_cluster import FakeRay, RunListener, ends_well
from tests.support.simulated_fleet import MIB, part, plan
from warmer.cluster import driver
from warmer.cluster.driver import Driver, Replacing
from warmer.cluster.ray import Node
from warmer.report.outcomes import Copied, Failed, PlanLostError
from warmer.schedule.cohort import PlanSection
from warmer.schedule.rate import Caps
from warmer.schedule.scheduler import Scheduler
from warmer.schedule.tasks import TaskLimits


def drive(world, chunks=40, caps=None, **options):
    """Carry out a schedule of some chunks on all nodes of a world; returns what its listener saw."""
    names = [node.id for node in world.nodes]
    parts = [part(plan([MIB] * chunks))]
    schedule = Scheduler(dict.fromkeys(names, 10**9), parts, TaskLimits(batch_chunks=4), caps=caps or Caps())
    listener = RunListener()
    Driver(world.nodes, None, listener, ShutdownSignal(), 60.0, **options).run(schedule)
    return listener


def keys_by_node(listener):
    return {
        node: sorted(outcome.key for name, outcome in listener.outcomes if name == node)
        for node in {name for name, _ in listener.outcomes}
    }


def test_a_node_that_dies_just_after_it_had_fetched_for_others(monkeypatch):
    world = FakeRay("abc")

    def answer(call, _now):
        mine = [one for one in world.calls if (one.node, one.method, one.ended) == ("a", "fetch", False)]
        if len(mine) == 2:  # one of its two ends, and it dies: the driver is told of both at once
            ends_well(mine[0])
            mine[1].fail(ray.exceptions.ActorDiedError())
        elif call.node != "a":
            ends_well(call)

    world = world.under(monkeypatch)
    world._answer = answer
    world.alive = world.alive[1:]  # the node, and not its process alone
    listener = drive(world)
    assert {node: kind for node, (kind, _) in listener.errors.items()} == {"a": "node_lost"}
    every = sorted(chunk.key for chunk in plan([MIB] * 40))
    assert keys_by_node(listener) == {"a": every, "b": every, "c": every}


@pytest.mark.parametrize("error", [RefusedError("changed"), PlanLostError("gone")])
def test_what_is_in_progress_is_told_when_the_plan_cannot_be_read_on(monkeypatch, error):
    chunks = plan([MIB] * 200)

    def read(start):
        yield from chunks[start:100]
        raise error

    world = FakeRay("ab").under(monkeypatch)
    schedule = Scheduler(dict.fromkeys("ab", 10**9), [PlanSection(read)], TaskLimits(batch_chunks=4))
    listener = RunListener()
    with pytest.raises(type(error)):
        Driver(world.nodes, None, listener, ShutdownSignal(), 60.0).run(schedule)
    assert {call.node for call in world.calls if call.method == "stop"} == {"a", "b"}
    asked = {chunk.key for call in world.calls if call.method == "fetch" for chunk in call.arguments[0]}
    assert asked
    assert {outcome.key for _, outcome in listener.outcomes} >= asked
    assert {outcome.key for _, outcome in listener.outcomes} <= {chunk.key for chunk in chunks[:100]}
    assert sorted(world.killed) == ["a", "b"]


@pytest.mark.parametrize("method", ["start", "fetch", "receive"])
@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("replacing", [None, Replacing(list, lambda _lost, _node: True, lambda _node: 10**9)])
def test_a_process_that_dies_on_a_node_that_lives_is_started_again(monkeypatch, method, times, replacing):
    died = []

    def answer(call, _now):
        if call.node == "b" and call.method == method and len(died) < times:
            died.append(call)
            call.fail(ray.exceptions.ActorDiedError())
        elif call.method == "start":
            call.end((None, 0.0))
        else:
            ends_well(call)

    world = FakeRay("abc", answer, starts=True)
    listener = drive(world.under(monkeypatch), replacing=replacing)
    assert listener.errors == listener.places == {}
    every = sorted(chunk.key for chunk in plan([MIB] * 40))
    assert keys_by_node(listener) == {"a": every, "b": every, "c": every}
    assert {type(outcome) for _, outcome in listener.outcomes} == {Copied}
    starts = sum(call.method == "start" and call.node == "b" for call in world.calls)
    assert 2 <= starts <= times + 1  # calls that were in progress beside each other die together


def test_a_process_that_dies_again_and_again_is_a_lost_node(monkeypatch):
    dead = ray.exceptions.ActorDiedError()
    world = FakeRay("ab", lambda call, _now: call.fail(dead) if call.node == "b" else ends_well(call)).under(
        monkeypatch
    )
    listener = drive(world)
    kind, message = listener.errors.pop("b")
    assert (kind, "its process died 4 times" in message) == ("node_lost", True)
    assert listener.errors == {}
    every = sorted(chunk.key for chunk in plan([MIB] * 40))
    assert keys_by_node(listener) == {"a": every, "b": every}


def test_a_node_that_turns_out_to_be_dead_when_its_process_is_to_start_again_is_not_waited_for(monkeypatch):
    """The cluster took it for alive a moment longer."""
    world = FakeRay("ab", starts=True).under(monkeypatch)

    def answer(call, _now):
        if call.node == "b" and call.method == "fetch":
            call.fail(ray.exceptions.ActorDiedError())
        elif call.method == "start" and any(one.method == "fetch" and one.node == "b" for one in world.calls):
            world.alive = [node for node in world.alive if node.id == "a"]  # and nobody answers
        elif call.method == "start":
            call.end((None, 0.0))
        else:
            ends_well(call)

    world._answer = answer
    listener = drive(world)
    assert listener.errors == {"b": ("node_lost", "lost in mid-run: the node died")}
    assert world.now < 10


def test_a_node_that_takes_no_part_holds_up_no_other(monkeypatch):
    world = FakeRay("abc", lambda call, _now: None if call.node == "c" else ends_well(call), starts=True)
    start = world._answer
    world._answer = lambda call, now: (
        call.end((None, 0.0)) if call.method == "start" and call.node != "c" else start(call, now)
    )
    listener = drive(world.under(monkeypatch))
    assert listener.errors == {"c": ("node_start", "took no part within 60 s; is it overloaded?")}
    every = sorted(chunk.key for chunk in plan([MIB] * 40))
    assert keys_by_node(listener) == {"a": every, "b": every, "c": every}
    assert {type(outcome) for node, outcome in listener.outcomes if node != "c"} == {Copied}


def test_what_nobody_foresaw_fails_chunks_and_not_the_run(monkeypatch):
    odd = ray.exceptions.RayTaskError("fetch", "", ArithmeticError("odd"))
    world = FakeRay("a", lambda call, _now: call.fail(odd)).under(monkeypatch)
    listener = drive(world)
    assert listener.errors == {}
    assert {outcome.kind for _, outcome in listener.outcomes} == {"internal"}
    assert "ArithmeticError: odd" in listener.outcomes[0][1].message


@pytest.mark.parametrize("method", ["fetch", "receive"])
@pytest.mark.parametrize("chunk_secs", [5.0, 300.0])
def test_a_node_that_answers_nothing_is_lost_after_a_while(monkeypatch, method, chunk_secs):
    world = FakeRay("abc", lambda call, _now: None if (call.node, call.method) == ("c", method) else ends_well(call))
    listener = drive(world.under(monkeypatch), chunk_secs=chunk_secs)
    kind, message = listener.errors.pop("c")
    assert kind == "node_lost"
    assert message.startswith("answered nothing for ")
    assert listener.errors == {}
    assert "c" in world.killed
    every = sorted(chunk.key for chunk in plan([MIB] * 40))
    assert keys_by_node(listener) == {"a": every, "b": every, "c": every}
    assert 60 + 2 * chunk_secs <= world.now <= 90 + 2 * chunk_secs


def test_a_node_that_takes_all_the_time_that_it_may_is_not_lost(monkeypatch):
    """Its chunks fail late, each batch in twice the chunk's time: once on the Hub, and once on its disk."""
    begun = {}

    def answer(call, now):
        begun.setdefault(id(call), now)
        if call.node != "c" or now >= begun[id(call)] + 600:
            ends_well(call)

    listener = drive(FakeRay("abc", answer).under(monkeypatch), chunk_secs=300.0, caps=Caps(node=MIB))
    assert listener.errors == {}
    assert {type(outcome) for _, outcome in listener.outcomes} == {Copied}


def test_an_answer_that_does_not_come_over_is_asked_for_again(monkeypatch):
    world, asked = FakeRay("ab").under(monkeypatch), []
    get = world.get

    def late(ref, timeout):
        asked.append(ref)
        if ref.method == "fetch" and asked.count(ref) < 3:
            raise ray.exceptions.GetTimeoutError
        return get(ref)

    monkeypatch.setattr(world, "get", late)
    assert drive(world).errors == {}


def dies_after_its_part(world):
    """Has node b leave the cluster when all calls have ended; nobody is told."""

    def alive():
        if all(call.ended for call in world.calls):
            world.alive = [node for node in world.alive if node.id != "b"]
        return world.alive

    return alive


def test_a_node_that_dies_after_its_last_chunk_is_noticed(monkeypatch):
    world = FakeRay("ab").under(monkeypatch)
    monkeypatch.setattr(driver, "alive_nodes", dies_after_its_part(world))
    listener = drive(world)
    assert listener.errors == {"b": ("node_lost", "lost after it had ended its part")}
    assert {type(outcome) for _, outcome in listener.outcomes} == {Copied}
    assert len(listener.outcomes) == 2 * 40


def test_a_node_that_dies_after_its_last_chunk_is_replaced(monkeypatch):
    world = FakeRay("ab").under(monkeypatch)
    monkeypatch.setattr(driver, "alive_nodes", dies_after_its_part(world))
    joined = Node("new", "new")

    def candidates():
        world.alive = [*(node for node in world.alive if node != joined), joined]
        return world.alive

    listener = drive(world, replacing=Replacing(candidates, lambda _lost, _node: True, lambda _node: 10**9))
    assert listener.places == {"b": "new"}
    assert len(keys_by_node(listener)["new"]) == 40


class Stopping(RunListener):
    """Tells the run to stop when so many chunks have ended as lost."""

    requested, after, failed = False, None, 0

    def ended(self, node, outcome):
        super().ended(node, outcome)
        self.failed += isinstance(outcome, Failed)
        self.requested = self.requested or self.failed == self.after


def lose_much(monkeypatch, after):
    """A run whose node b dies with all to do, while a fetches for itself."""
    dead = ray.exceptions.ActorDiedError()
    world = FakeRay("ab", lambda call, _now: call.fail(dead) if call.node == "b" else ends_well(call)).under(
        monkeypatch
    )
    listener = Stopping()
    listener.after = after
    schedule = Scheduler(dict.fromkeys("ab", 0), [part(plan([10] * 5000))], direct=True)
    Driver(world.nodes, None, listener, listener, 60.0).run(schedule)
    return listener


def test_a_lost_nodes_chunks_are_named_bit_by_bit_and_a_stop_is_obeyed_meanwhile(monkeypatch):
    listener = lose_much(monkeypatch, after=1500)
    assert 1500 <= sum(node == "b" for node, _ in listener.outcomes) <= 3000


def test_the_others_go_on_while_a_lost_nodes_chunks_are_named(monkeypatch):
    listener = lose_much(monkeypatch, after=None)
    assert len(keys_by_node(listener)["b"]) == len(set(keys_by_node(listener)["b"])) == 5000
    named = [index for index, (node, _) in enumerate(listener.outcomes) if node == "b"]
    assert {node for node, _ in listener.outcomes[named[0] : named[-1]]} == {"a", "b"}
