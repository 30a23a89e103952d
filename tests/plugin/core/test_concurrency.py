"""Threads with bounds: bytes that are held, reads that go first, and pools of workers."""

import gc
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import wait

import pytest

from hfbucket_plugin.core.concurrency import ByteSemaphore, FairPool, ReadPriority, WorkerPool
from hfbucket_plugin.core.deadline import Deadline
from hfbucket_plugin.errors import DeadlineError, UnsentError
from tests.support.waiting import eventually, in_threads


def soon(seconds=30.0):
    return Deadline.after(seconds)


def test_what_is_held_at_one_time_stays_within_the_limit():
    semaphore, lock = ByteSemaphore(100), threading.Lock()
    held, most = 0, 0

    def use(number):
        nonlocal held, most
        for amount in (10 * (number % 10) + 1, 100, 3):
            with semaphore.hold(amount, soon(), "x"):
                with lock:
                    held += amount
                    most = max(most, held)
                with lock:
                    held -= amount

    assert in_threads(20, use) == [None] * 20
    assert 0 < most <= 100


def test_several_are_let_in_as_long_as_there_is_room():
    semaphore = ByteSemaphore(100)

    def one_more():
        with semaphore.hold(1, soon(0.05), "k"):
            pass

    with semaphore.hold(60, soon(), "x"), semaphore.hold(40, soon(), "x"), semaphore.hold(0, soon(), "x"):
        assert semaphore._held == 100
        with pytest.raises(DeadlineError, match=r"k: no room within 0\.05 s"):
            one_more()
    with semaphore.hold(100, soon(0), "x"):
        pass


def test_one_that_wants_more_than_all_is_let_in_alone():
    semaphore, inside = ByteSemaphore(100), threading.Event()
    release = threading.Event()

    def hold():
        with semaphore.hold(1000, soon(), "x"):
            inside.set()
            release.wait(30)

    with semaphore.hold(1, soon(), "x"):
        holder = threading.Thread(target=hold)
        holder.start()
        assert not inside.wait(0.05)
    assert inside.wait(30)
    with pytest.raises(DeadlineError), semaphore.hold(1, soon(0.05), "x"):
        pass
    release.set()
    holder.join()
    with semaphore.hold(100, soon(), "x"):
        pass


def test_an_error_inside_gives_the_room_back():
    semaphore = ByteSemaphore(100)

    for _ in range(5):
        with pytest.raises(KeyError), semaphore.hold(80, soon(1), "x"):
            raise KeyError


def test_those_who_wait_come_in_when_there_is_room():
    semaphore, came = ByteSemaphore(100), []

    def wait(number):
        with semaphore.hold(50, soon(), "x"):
            came.append(number)

    with semaphore.hold(100, soon(), "x"):
        threads = [threading.Thread(target=wait, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        assert came == []
    eventually(lambda: sorted(came) == [0, 1, 2, 3])
    for thread in threads:
        thread.join()


def test_one_that_wants_all_of_it_is_not_passed_by_small_ones_for_ever():
    semaphore, came = ByteSemaphore(100), []

    def wait(amount):
        with semaphore.hold(amount, soon(), "x"):
            came.append(amount)

    with semaphore.hold(1, soon(), "x"):
        threads = []
        for amount in (100, 2, 3):
            threads.append(threading.Thread(target=wait, args=(amount,)))
            threads[-1].start()
            eventually(lambda: len(semaphore._queue) == len(threads))
        assert came == [], "there is room for the small ones, but one came before them"
    for thread in threads:
        thread.join(30)

    assert came[0] == 100
    assert sorted(came) == [2, 3, 100]


def test_one_that_gives_up_lets_those_behind_it_in():
    semaphore, came = ByteSemaphore(100), threading.Event()

    def wait_in_vain():
        with pytest.raises(UnsentError), semaphore.hold(100, soon(0.3), "x"):
            pass

    def wait():
        with semaphore.hold(5, soon(), "x"):
            came.set()

    with semaphore.hold(50, soon(), "x"):
        first = threading.Thread(target=wait_in_vain)
        first.start()
        eventually(lambda: semaphore._queue)
        second = threading.Thread(target=wait)
        second.start()
        assert came.wait(30)
        first.join(30)
    second.join(30)


def test_without_reads_nobody_waits():
    read_priority = ReadPriority()
    started = time.monotonic()

    read_priority.let_reads_pass(soon(600))

    assert time.monotonic() - started < 5
    assert read_priority.reads == 0


def test_a_writer_waits_until_the_last_read_has_ended():
    read_priority, events = ReadPriority(), []
    first, second = read_priority.reading(), read_priority.reading()
    first.__enter__()
    second.__enter__()
    writer = threading.Thread(
        target=lambda: (read_priority.let_reads_pass(soon(600)), events.append("passed")), daemon=True
    )
    writer.start()
    assert read_priority.reads == 2

    first.__exit__(None, None, None)
    assert read_priority.reads == 1
    writer.join(0.05)
    assert events == []
    second.__exit__(None, None, None)

    writer.join(30)
    assert events == ["passed"]


def test_a_writer_does_not_wait_longer_than_its_deadline():
    read_priority = ReadPriority()
    with read_priority.reading():
        started = time.monotonic()
        read_priority.let_reads_pass(Deadline.after(0.05))
        assert 0.04 < time.monotonic() - started < 5
        read_priority.let_reads_pass(Deadline.after(0))


def test_a_read_that_raises_has_ended_too():
    read_priority = ReadPriority()
    with pytest.raises(ValueError), read_priority.reading():
        raise ValueError

    assert read_priority.reads == 0
    read_priority.let_reads_pass(soon(600))


def test_all_writers_go_on_together():
    read_priority, passed = ReadPriority(), []
    reading = read_priority.reading()
    reading.__enter__()
    threads = [
        threading.Thread(target=lambda: (read_priority.let_reads_pass(soon(600)), passed.append(1)), daemon=True)
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    eventually(lambda: len(read_priority._quiet._waiters) == 4)

    reading.__exit__(None, None, None)
    for thread in threads:
        thread.join(30)

    assert len(passed) == 4


def test_the_count_is_right_among_threads():
    read_priority = ReadPriority()

    def read(_number):
        for _ in range(200):
            with read_priority.reading():
                assert read_priority.reads >= 1

    assert in_threads(8, read) == [None] * 8
    assert read_priority.reads == 0


def threads_of(name):
    return [thread for thread in threading.enumerate() if thread.name.startswith(f"{name}-")]


def test_tasks_run_in_their_order():
    pool = WorkerPool("order", 1)
    seen = []

    wait([pool.submit(seen.append, number) for number in range(100)], 30)

    assert seen == list(range(100))
    pool.close()


def test_results_and_errors_of_every_kind_reach_the_future():
    pool = WorkerPool("results", 2)

    assert pool.submit(int, "5", base=6).result(30) == 5
    with pytest.raises(ValueError, match="invalid literal"):
        pool.submit(int, "x").result(30)
    with pytest.raises(SystemExit):
        pool.submit(sys.exit, 3).result(30)
    assert pool.submit(lambda: "still there").result(30) == "still there"
    pool.close()


def test_no_more_threads_than_its_size_and_none_before_they_are_needed():
    pool = WorkerPool("size", 3)
    assert threads_of("size") == []

    release = threading.Event()
    running = threading.Semaphore(0)

    def task():
        running.release()
        release.wait(30)

    first = pool.submit(task)
    assert running.acquire(timeout=30)
    assert len(threads_of("size")) == 2  # the busy one, and one that is ready
    rest = [pool.submit(task) for _ in range(5)]
    for _ in range(2):
        assert running.acquire(timeout=30)
    assert len(threads_of("size")) == 3
    assert not running.acquire(timeout=0.05)
    release.set()
    assert not wait([first, *rest], 30).not_done
    pool.close()


def test_a_free_thread_is_used_before_another_is_started():
    pool = WorkerPool("reuse", 8)

    for _ in range(50):
        pool.submit(int).result(30)
        eventually(lambda: pool._idle == len(threads_of("reuse")))

    assert len(threads_of("reuse")) == 2  # one that is busy at times, and one that is ready meanwhile
    pool.close()


def test_who_submits_starts_no_thread_once_the_pool_is_prepared(monkeypatch):
    starters = set()
    started = threading.Thread.start

    def start(thread):
        starters.add(threading.get_ident())
        started(thread)

    pool = WorkerPool("prepared", 6)
    pool.prepare()
    monkeypatch.setattr(threading.Thread, "start", start)
    barrier = threading.Barrier(6)
    futures = [pool.submit(barrier.wait, 30) for _ in range(6)]  # done only when all six run at one time

    assert not wait(futures, 30).not_done
    assert starters
    assert threading.get_ident() not in starters
    pool.close()


@pytest.mark.parametrize("round_", range(20))
def test_a_backlog_takes_what_was_promised_and_no_more(round_):
    # Right from the start: threads that have not picked up their first task yet do not count as waiting tasks.
    pool = WorkerPool("backlog", 2, backlog=3)
    release = threading.Event()
    try:
        futures = [pool.submit(release.wait, 30) for _ in range(5)]
        with pytest.raises(RuntimeError, match=r"backlog.*takes no more"):
            pool.submit(int)
    finally:
        release.set()

    assert not wait(futures, 30).not_done
    assert eventually(lambda: pool.submit(int)).result(30) == 0
    pool.close()


def test_a_task_that_was_cancelled_before_it_began_never_runs():
    pool = WorkerPool("cancel", 1)
    release, ran = threading.Event(), []
    blocking = pool.submit(release.wait, 30)
    cancelled = pool.submit(ran.append, 1)

    assert cancelled.cancel()
    release.set()
    assert blocking.result(30)
    assert pool.submit(int).result(30) == 0
    assert ran == []
    pool.close()


def test_a_closed_pool_refuses_and_its_threads_end():
    pool = WorkerPool("closed", 2)
    wait([pool.submit(int) for _ in range(10)], 30)

    pool.close()
    pool.close()

    with pytest.raises(RuntimeError, match="closed"):
        pool.submit(int)
    eventually(lambda: not threads_of("closed"))


def test_close_does_not_wait_and_what_was_taken_is_still_answered():
    pool = WorkerPool("closing", 1)
    release = threading.Event()
    futures = [pool.submit(release.wait, 30), pool.submit(int)]

    pool.close()

    assert not futures[0].done()
    release.set()
    assert not wait(futures, 30).not_done
    eventually(lambda: not threads_of("closing"))


def test_a_pool_that_was_never_used_closes():
    WorkerPool("unused", 1).close()


def test_a_system_without_threads_left_refuses_and_recovers(monkeypatch):
    pool = WorkerPool("starved", 2, backlog=1)

    def start(_thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start)
        for _ in range(5):
            with pytest.raises(RuntimeError, match="can't start new thread"):
                pool.submit(int)

    release = threading.Event()
    futures = [pool.submit(release.wait, 30) for _ in range(3)]
    release.set()
    assert not wait(futures, 30).not_done
    pool.close()


def test_what_lives_until_the_interpreter_ends_ends_without_a_word():
    """Objects that are there at the end are taken away with the modules that know them."""
    code = "from hfbucket_plugin.store.metadata_cache import MetadataCache; kept = MetadataCache(100, 30.0, 0.0)"

    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)

    assert ended.stderr == ""


def test_a_forked_child_has_threads_of_its_own():
    script = (
        "import os\n"
        "from hfbucket_plugin.core.concurrency import FairPool, WorkerPool\n"
        "pool = WorkerPool('forked', 2, backlog=2)\n"
        "print(pool.submit(int, 1).result(30), flush=True)\n"
        "child = os.fork()\n"
        "print(pool.submit(int, 2).result(30), flush=True)\n"
        "if child:\n"
        "    os.waitpid(child, 0)\n"
    )

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100, check=True)

    assert (done.stdout, done.stderr) == ("1\n2\n2\n", "")


def test_an_idle_thread_does_not_keep_the_last_task_alive():
    class Big:
        pass

    pool = WorkerPool("memory", 1)
    big = Big()
    gone = weakref.ref(big)
    pool.submit(lambda _big: None, big).result(30)
    del big

    def collected():
        gc.collect()
        return gone() is None

    eventually(collected)
    pool.close()


def test_a_blocked_worker_does_not_keep_the_interpreter_from_ending():
    script = (
        "import threading\n"
        "from hfbucket_plugin.core.concurrency import FairPool, WorkerPool\n"
        "started = threading.Event()\n"
        "def block():\n"
        "    started.set()\n"
        "    threading.Event().wait()\n"
        "pool = WorkerPool('blocked', 2)\n"
        "pool.submit(block)\n"
        "pool.submit(block)\n"
        "started.wait()\n"
        "print('leaving', flush=True)\n"
    )

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)

    assert (done.stdout, done.stderr) == ("leaving\n", "")


# --- requests that share threads ------------------------------------------------------------------------------------------


@pytest.fixture
def shared():
    """Makes pools whose tasks hold their thread until they are let go."""
    gates, pools = [], []

    def make(size, background=None):
        pool = FairPool("shared", size, background)
        pools.append(pool)
        began = []

        def hold(name, request=None, *, behind=False):
            gate = threading.Event()
            gates.append(gate)

            def task():
                began.append(name)
                assert gate.wait(30)

            future = pool.submit_for(request or object(), behind, task)
            future.let_go = gate.set
            return future

        return pool, began, hold

    yield make
    for gate in gates:
        gate.set()
    for pool in pools:
        pool.close()


def test_requests_take_turns_however_many_tasks_each_has(shared):
    pool, began, hold = shared(1)
    first = hold("first")
    eventually(lambda: began)
    large, small = object(), object()
    tasks = [pool.submit_for(large, False, began.append, f"large {n}") for n in range(4)]
    tasks += [pool.submit_for(small, False, began.append, f"small {n}") for n in range(2)]
    tasks.append(pool.submit(began.append, "alone"))

    first.let_go()
    wait(tasks, 30)

    assert began[1:] == ["large 0", "small 0", "alone", "large 1", "small 1", "large 2", "large 3"]


def test_what_somebody_waits_for_goes_before_the_background(shared):
    pool, began, hold = shared(1)
    first = hold("first")
    eventually(lambda: began)
    tasks = [pool.submit_for(began, True, began.append, f"behind {n}") for n in range(3)]
    tasks.append(pool.submit_for(object(), False, began.append, "online"))

    first.let_go()
    wait(tasks, 30)

    assert began[1:] == ["online", "behind 0", "behind 1", "behind 2"]


def test_the_background_never_holds_all_threads_and_few_while_others_run(shared):
    _, began, hold = shared(4, background=1)
    behind = [hold(n, behind=True) for n in range(6)]
    eventually(lambda: sorted(began) == [0, 1, 2])

    online = hold("online")
    eventually(lambda: began[3:] == ["online"])
    for future in behind[:2]:
        future.let_go()
    wait(behind[:2], 30)
    second = hold("second")
    eventually(lambda: began[4:] == ["second"])
    assert not any(future.running() for future in behind[3:]), "one of them runs, and that is all they may"

    for future in (online, second):
        future.let_go()
    eventually(lambda: sorted(began[5:]) == [3, 4])


def test_a_task_in_the_background_that_was_cancelled_keeps_no_room(shared):
    pool, began, hold = shared(2, background=1)
    first = hold("first", behind=True)
    eventually(lambda: began)
    assert all(hold("never", behind=True).cancel() for _ in range(5))
    last = pool.submit_for(object(), True, int, "7")
    first.let_go()

    assert last.result(30) == 7
    assert began == ["first"]


def test_a_closed_pool_of_requests_does_what_it_has_taken(shared):
    pool, began, hold = shared(2, background=1)
    gates = [hold(n, behind=n % 2 == 0) for n in range(6)]
    pool.close()

    for future in gates:
        future.let_go()
    wait(gates, 30)

    assert sorted(began) == list(range(6))
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit_for(object(), True, int)
    eventually(lambda: not threads_of("shared"))
