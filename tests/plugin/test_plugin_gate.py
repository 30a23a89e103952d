import threading

import pytest

from hfbucket_plugin.deadlines import Deadline
from hfbucket_plugin.errors import DeadlineError
from hfbucket_plugin.gate import ByteGate


def test_what_is_held_together_stays_within_the_limit():
    gate = ByteGate(100)
    lock = threading.Lock()
    held, peak = 0, 0

    def work(amount):
        nonlocal held, peak
        with gate.hold(amount, Deadline.after(30), "work"):
            with lock:
                held += amount
                peak = max(peak, held)
            threading.Event().wait(0.002)
            with lock:
                held -= amount

    threads = [threading.Thread(target=work, args=(amount,)) for amount in (40, 60, 30, 100, 10) * 6]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert 0 < peak <= 100
    assert held == 0


def test_more_than_the_limit_is_let_in_alone():
    gate = ByteGate(10)

    with (
        gate.hold(50, Deadline.after(5), "large"),
        pytest.raises(DeadlineError, match="small: no room"),
        gate.hold(1, Deadline.after(0.01), "small"),
    ):
        pytest.fail("there was no room")

    with gate.hold(10, Deadline.after(5), "after"):
        pass


def test_one_that_found_no_room_holds_nothing():
    gate = ByteGate(10)
    with gate.hold(10, Deadline.after(5), "first"):
        for _ in range(3):
            with pytest.raises(DeadlineError), gate.hold(5, Deadline.after(0), "late"):
                pass

    with gate.hold(10, Deadline.after(1), "again"):
        pass
