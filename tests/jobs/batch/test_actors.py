"""Places of actors, with actors of the test's own in place of Ray's."""

import threading
from concurrent.futures import Future
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest
import ray

from jobs.batch.model import TRIES, ItemBatch, Outcome, Result
from jobs.batch.ray_pool import ActorExecutor

NOW = datetime(2026, 1, 1, tzinfo=UTC)
ITEM = SimpleNamespace(path="kv/a")


class Actor:
    """Answers as it is told to; one that was never made never answers."""

    def __init__(self, *, answers):
        self.asked = []
        self.attempt = SimpleNamespace(remote=lambda batch, *_: SimpleNamespace(future=lambda: self._future(batch)))
        self._answers = answers

    def _future(self, batch):
        future = Future()
        self.asked.append(batch)
        if self._answers:
            future.set_result(Result(()))
        return future


@pytest.fixture
def places(monkeypatch):
    """Two places, one of an actor that answers nothing, in which none can be made again."""
    monkeypatch.setattr(ray, "kill", lambda _: None)
    executor = ActorExecutor.__new__(ActorExecutor)
    executor.width, executor._failed, executor._mutex = 2, Outcome.FAILED, threading.Lock()
    executor._busy, executor._unproven, executor._dead = {}, [], []
    executor._counts = SimpleNamespace(add=lambda _: None)
    executor._start = lambda: Actor(answers=False)
    executor._idle = [Actor(answers=False), Actor(answers=True)]
    return executor


def test_a_place_in_which_no_actor_can_be_made_is_given_up_and_its_batch_is_tried_elsewhere(places):
    hung = places.submit(ItemBatch((ITEM,)), NOW, 1.0, None)
    places.lose(hung)
    again = hung.result().left
    assert (again.tries, places.width, len(places._idle)) == (1, 2, 2), "the first actor was there: that was a try"

    assert places.submit(ItemBatch((ITEM,)), NOW, 1.0, None).done(), "by the one that is well"
    hung = places.submit(again, NOW, 1.0, None)
    places.lose(hung)

    left = hung.result().left
    assert (left.tries, left.asked) == (1, {"kv/a"}), "no try of its objects"
    assert (places.width, len(places._idle)) == (1, 1)
    assert places.submit(left, NOW, 1.0, None).result() == Result(())


def test_the_last_place_is_kept(places):
    places.width, places._idle = 1, [Actor(answers=False)]
    batch = ItemBatch((ITEM,))
    for _ in range(TRIES):
        hung = places.submit(batch, NOW, 1.0, None)
        places.lose(hung)
        batch = hung.result().left or batch

    (ended,) = hung.result().ended
    assert (ended.outcome, places.width) == (Outcome.FAILED, 1)
