"""Stands in for Ray under a `Fleet`: actors are functions, and time goes on only where the driver waits."""

from types import SimpleNamespace

import ray.exceptions

from warmer.cluster import actor_pool, driver
from warmer.cluster.ray import Node
from warmer.report.outcomes import Copied


class Call:
    """A call of an actor: it has ended when it has a result or an error."""

    def __init__(self, node, method, arguments):
        self.node, self.method, self.arguments = node, method, arguments
        self.ended, self.result, self.error = False, None, None

    def end(self, result=None):
        self.ended, self.result = True, result

    def fail(self, error):
        self.ended, self.error = True, error


class FakeRay:
    """Nodes that do everything well and at once, but for what `answer` does with a call.

    Args:
        names: Of the nodes.
        answer: Is given each call when it is made, and then whenever the driver waits, until it has ended; and the time.
        starts: Whether it is given the calls that start a node, too.
    """

    def __init__(self, names, answer=None, *, starts=False):
        self._starts = starts
        self.nodes = [Node(name, name) for name in names]
        self.alive = list(self.nodes)
        self.now = 0.0
        self.calls, self.killed = [], []
        self._answer = answer or (lambda call, _now: well(call))
        self.exceptions = ray.exceptions

    def under(self, monkeypatch):
        for module in (driver, actor_pool):
            monkeypatch.setattr(module, "ray", self)
            monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now, sleep=self._sleep))
            monkeypatch.setattr(module, "alive_nodes", lambda: self.alive)
        return self

    def _sleep(self, secs):
        self.now += secs

    def remote(self, _actor_class):
        def made(label_selector, **_):
            return SimpleNamespace(remote=lambda: Actor(self, label_selector["ray.io/node-id"]))

        return SimpleNamespace(options=made)

    def call(self, node, method, arguments):
        one = Call(node, method, arguments)
        self.calls.append(one)
        if method not in ("fetch", "receive") and not (self._starts and method == "start"):
            one.end((None, 0.0) if method == "start" else None)
        return one

    def wait(self, refs, *, num_returns, timeout, fetch_local):
        assert not fetch_local
        for one in refs:
            if not one.ended:
                self._answer(one, self.now)
        ended = [one for one in refs if one.ended]
        if timeout and not ended:
            self.now += timeout
        return ended, [one for one in refs if not one.ended]

    def get(self, ref, timeout=None):
        if ref.error is not None:
            raise ref.error
        return ref.result

    def kill(self, actor):
        self.killed.append(actor.node)


class Actor:
    def __init__(self, world, node):
        self._world, self.node = world, node

    def __getattr__(self, method):
        return SimpleNamespace(remote=lambda *arguments, **_: self._world.call(self.node, method, arguments))


def well(call):
    """A call ends well."""
    results = [Copied(chunk.key, chunk.size, received=call.method == "receive") for chunk in call.arguments[0]]
    call.end((results, [f"object of {call.node}"] if call.method == "fetch" else False))


class RunListener:
    def __init__(self):
        self.outcomes, self.errors, self.places = [], {}, {}

    def ended(self, node, outcome):
        self.outcomes.append((node, outcome))

    def started(self, node, start_secs, open_secs):
        assert start_secs + open_secs >= 0 <= open_secs

    def lost(self, node, kind, message):
        self.errors[node] = (kind, message)

    def replaced(self, node, by):
        self.places[node] = by.id

    def tick(self):
        pass
