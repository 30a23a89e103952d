"""What comes late: looks that have become old, locks that ended meanwhile, actors that do not answer, errors beside batches."""

from concurrent.futures import Future
from datetime import timedelta
from threading import Timer
from types import SimpleNamespace

import pytest

from hfbucket_plugin.core.deadline import Deadline
from hfbucket_plugin.core.keys import ContentId
from hfbucket_plugin.errors import RefusedError, TransportError
from hfbucket_plugin.hub.bucket import ObjectInfo
from jobs.batch.apply import Applier
from jobs.batch.model import ItemBatch, ItemOutcome, Outcome, Result
from jobs.deletion.attempt import attempt
from jobs.lock.lock import BucketLock, LockLostError
from tests.jobs.deletion.test_plan import AT, ITEMS, FakeBucket, outcomes
from tests.support.buckets import DAY, key, opened


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr("jobs.deletion.attempt.monotonic", lambda: self.now)


class SlowBucket(FakeBucket):
    """A bucket whose first looks take a while, in which an object is rewritten."""

    def __init__(self, items, clock, *seconds, date=None):
        super().__init__(items)
        self.clock, self.seconds, self.date, self.looks = clock, list(seconds), date, 0

    def stat(self, paths, deadline, *, patient):
        found = super().stat(paths, deadline, patient=patient)
        self.looks += 1
        if self.seconds:
            seconds = self.seconds.pop(0)
            if isinstance(seconds, Exception):
                raise seconds
            self.clock.now += seconds
            path = ITEMS[0].path
            self.objects[path] = ObjectInfo(path, ContentId("f" * 64, 1), AT)
        return found

    def stat_dated(self, paths, deadline):
        return self.stat(paths, deadline, patient=False), self.date


@pytest.mark.parametrize(("seconds", "first", "looks"), [(4, Outcome.CHANGED, 2), (2, Outcome.DELETED, 1)])
def test_nothing_is_deleted_by_an_old_look(monkeypatch, seconds, first, looks):
    fake = SlowBucket(ITEMS, Clock(monkeypatch), seconds)

    result = attempt(fake, ItemBatch(tuple(ITEMS)), AT, Deadline.after(60))

    assert (outcomes(result)[ITEMS[0].path], fake.looks, result.left) == (first, looks, None)


def test_looks_that_are_always_old_end_with_the_time_of_the_try(monkeypatch):
    fake = SlowBucket(ITEMS, Clock(monkeypatch), 4, 4, TransportError("its time was over"))

    result = attempt(fake, ItemBatch(tuple(ITEMS)), AT, Deadline.after(60))

    assert (fake.deletes, result.left.tries) == ([], 1)


@pytest.mark.parametrize(
    ("date", "deletes"),
    [(None, 0), (AT, 0), (AT - timedelta(seconds=1), 0), (AT - timedelta(seconds=30), 1)],
)
def test_an_order_that_comes_when_the_lock_has_ended_deletes_nothing(monkeypatch, date, deletes):
    fake = SlowBucket(ITEMS, Clock(monkeypatch), date=date)

    result = attempt(fake, ItemBatch(tuple(ITEMS)), AT, Deadline.after(60), AT)

    assert len(fake.deletes) == deletes
    assert (result.left is None) == bool(deletes)


class Executor:
    """Tries that end as a test says."""

    width = 2

    def __init__(self, *answers, after=None):
        self.answers, self.after = list(answers), after
        self.lost = []
        self.lock_end = []

    def submit(self, batch, not_after, seconds, lock_end):
        future = Future()
        self.lock_end.append(lock_end)
        answer = self.answers.pop(0) if self.answers else done(batch)
        if answer == "late":
            Timer(0.1, future.set_result, [done(batch)]).start()
        elif answer != "never":
            future.set_result(answer)
        future.batch = batch
        return future

    def lose(self, future):
        self.lost.append(future)
        if self.after is not None:
            future.set_result(self.after(future.batch))

    def close(self):
        pass


def done(batch):
    return Result(tuple(ItemOutcome(item, Outcome.DELETED) for item in batch.items))


def applier(executor, reported, **options):
    own = {"confirm": lambda: 0.0, "not_after": AT, "on_end": reported, "until": Deadline.after(60), "batch_size": 2}
    return Applier(executor, stop=SimpleNamespace(requested=False), **(own | options))


def test_a_try_that_does_not_answer_is_lost_and_the_lock_is_kept_meanwhile(monkeypatch):
    monkeypatch.setattr("jobs.batch.apply._LOST_SECS", 0.0)
    executor, reported, kept = Executor("never", after=lambda batch: Result((), batch)), [], []

    end = applier(executor, reported.append, keep=lambda: kept.append(1), lock_end=lambda: AT).run(iter(ITEMS))

    assert (end.why, len(reported), len(executor.lost)) == (None, 5, 1)
    assert kept
    assert set(executor.lock_end) == {AT}


def test_a_lock_that_is_lost_while_a_batch_is_in_progress_begins_no_more():
    def lost():
        raise LockLostError("it went")

    reported = []
    end = applier(Executor("late"), reported.append, keep=lost).run(iter(ITEMS * 4))

    assert isinstance(end.why, LockLostError)
    assert 2 <= len(reported) < 20


def test_an_error_waits_for_what_is_in_progress_and_counts_it():
    reported = []

    def failing(ended):
        reported.append(ended)
        if len(reported) == 1:
            raise OSError(28, "No space left on device")

    one = applier(Executor(done(ItemBatch(tuple(ITEMS[:2]))), "late"), failing)
    with pytest.raises(OSError, match="No space"):
        one.run(iter(ITEMS))

    assert [ended.item for ended in reported[-2:]] == ITEMS[2:4]
    assert not one.undrained


def changed():
    """The items of a plan that was changed meanwhile."""
    yield from ITEMS[:2]
    raise RefusedError("it was changed")


def test_a_plan_that_ends_in_an_error_waits_too():
    reported = []
    with pytest.raises(RefusedError):
        applier(Executor("late"), reported.append).run(changed())
    assert len(reported) == 2


def test_what_cannot_be_waited_for_is_told(monkeypatch):
    monkeypatch.setattr("jobs.batch.apply._LOST_SECS", 0.0)
    one = applier(Executor("never"), lambda _: None, attempt_secs=0.0)
    with pytest.raises(RefusedError):
        one.run(changed())
    assert one.undrained


def test_the_lock_stays_while_batches_are_in_progress_that_nobody_waits_for(depot, monkeypatch):
    depot.put([key(number) for number in range(4)], age=20 * DAY)

    def run(self, _items):
        self.undrained = True
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Applier, "run", run)
    ran = depot.cleanup("--max-age", "14d", "--yes", "--max-delete", "100%")

    assert (ran.code, "No space" in ran.stderr) == (3, True)
    assert [path for path in depot.all_paths() if "/locks/" in path]
    with (
        opened(depot.hub.endpoint, depot.bucket_id, depot.prefix) as bucket,
        pytest.raises(RefusedError, match="locked"),
    ):
        BucketLock(bucket, "rm").held().__enter__()


class Actor:
    """An actor whose answers a test gives."""

    def __init__(self):
        self.answer = Future()
        self.attempt = SimpleNamespace(remote=lambda *_: SimpleNamespace(future=lambda: self.answer))


@pytest.fixture
def on_actors(monkeypatch):
    """The driver's side of actors, without a cluster."""
    import threading

    from jobs.batch import ray_pool
    from jobs.deletion.ray import DeletionActors

    one = object.__new__(DeletionActors)
    killed = []
    monkeypatch.setattr(ray_pool.ray, "kill", killed.append)
    one._mutex, one._busy, one._idle = threading.Lock(), {}, [Actor()]
    one._dead, one._unproven, one.width = [], [], 1
    one._start, one._failed, one._counts = Actor, Outcome.FAILED, SimpleNamespace(add=lambda _: None)
    return one, killed


def test_an_actor_that_does_not_answer_is_ended_and_replaced(on_actors):
    one, killed = on_actors
    (actor,) = one._idle
    future = one.submit(ItemBatch(tuple(ITEMS)), AT, 9.0, AT)
    assert one._idle == []

    one.lose(future)
    actor.answer.set_result(done(ItemBatch(tuple(ITEMS))))  # too late

    assert killed == [actor]
    assert len(one._idle) == 1
    assert actor not in one._idle
    result = future.result(timeout=0)
    assert (result.ended, result.left.tries) == ((), 1)
    assert result.left.asked == {item.path for item in ITEMS}


def test_an_actor_that_died_is_replaced_and_its_batch_tried_by_another_one(on_actors):
    import ray.exceptions

    one, killed = on_actors
    healthy = Actor()
    one._idle.append(healthy)
    dead, batch = one._idle[0], ItemBatch(tuple(ITEMS), tries=3)

    future = one.submit(batch, AT, 9.0, AT)
    dead.answer.set_exception(ray.exceptions.ActorDiedError())
    left = future.result(timeout=0).left

    assert one._idle == [healthy, dead]
    assert (left.items, left.tries, left.losses) == (tuple(ITEMS), 3, 1)
    assert left.asked == {item.path for item in ITEMS}

    future = one.submit(left, AT, 9.0, AT)
    healthy.answer.set_result(done(left))
    assert future.result(timeout=0).left is None

    future = one.submit(batch, AT, 9.0, AT)
    (new, _) = one._busy[future]
    assert killed == [dead]
    assert new not in {dead, healthy}
    new.answer.set_result(done(batch))
    assert one._idle == [healthy, new]


def test_nothing_is_asked_of_ray_on_its_own_thread(on_actors):
    """`ray.kill` there waits for ever for that thread, and so does every later call to Ray."""
    import threading

    import ray.exceptions

    one, killed = on_actors
    (dead,) = one._idle
    starts = []
    one._start = lambda: starts.append(threading.current_thread()) or Actor()
    future = one.submit(ItemBatch(tuple(ITEMS)), AT, 9.0, AT)
    rays = threading.Thread(target=dead.answer.set_exception, args=[ray.exceptions.ActorDiedError()])
    rays.start()
    rays.join()
    left = future.result(timeout=0).left

    assert (killed, starts) == ([], [])
    one.submit(left, AT, 9.0, AT)
    assert (killed, starts) == ([dead], [threading.current_thread()])


def test_an_actor_that_cannot_be_started_in_the_place_of_a_dead_one_is_told(on_actors):
    import ray.exceptions

    one, _ = on_actors
    (dead,) = one._idle
    future = one.submit(ItemBatch(tuple(ITEMS)), AT, 9.0, AT)
    dead.answer.set_exception(ray.exceptions.ActorDiedError())
    one._start = lambda: 1 / 0

    assert isinstance(one.submit(future.result(timeout=0).left, AT, 9.0, AT).exception(timeout=0), ZeroDivisionError)


def test_a_batch_that_kills_its_actors_fails_and_the_actors_are_there_again(on_actors):
    import ray.exceptions

    one, killed = on_actors
    batch = ItemBatch(tuple(ITEMS))
    while batch is not None:
        future = one.submit(batch, AT, 9.0, AT)
        (actor, _) = one._busy[future]
        actor.answer.set_exception(ray.exceptions.ActorDiedError())
        result = future.result(timeout=0)
        batch = result.left
    assert len(killed) == 2
    assert [ended.outcome for ended in result.ended] == [Outcome.FAILED] * len(ITEMS)
    assert "actors that tried it died 3 times" in result.ended[0].message
    assert len(one._idle) == 1
    one.submit(ItemBatch(tuple(ITEMS)), AT, 9.0, AT)
    assert len(killed) == 3


def test_whatever_an_actor_answers_is_told(on_actors):
    one, _ = on_actors
    one._counts = SimpleNamespace(add=lambda _: 1 / 0)
    for answer in (done(ItemBatch(tuple(ITEMS))), "nonsense"):
        (actor,) = one._idle
        actor.answer = Future()
        future = one.submit(ItemBatch(tuple(ITEMS)), AT, 9.0, AT)
        actor.answer.set_result(answer)
        assert future.exception(timeout=0) is not None
