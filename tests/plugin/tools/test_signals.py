import signal
import threading

import pytest

from hfbucket_plugin.errors import Interrupted
from hfbucket_plugin.tools.signals import ShutdownSignal


@pytest.mark.parametrize("order", [signal.SIGTERM, signal.SIGINT])
def test_an_order_raises_where_nothing_is_to_be_ended(order):
    stop = ShutdownSignal()
    with stop.listening(), pytest.raises(Interrupted):
        signal.raise_signal(order)
    assert stop.requested


@pytest.mark.parametrize("order", [signal.SIGTERM, signal.SIGINT])
def test_an_order_only_asks_where_things_are_ended_in_order_and_the_second_raises(order):
    stop = ShutdownSignal()
    with stop.listening(), stop.orderly():
        assert not stop.requested
        signal.raise_signal(order)
        assert stop.requested
        with pytest.raises(Interrupted):
            signal.raise_signal(order)


def test_the_handlers_that_were_there_are_given_back():
    before = signal.getsignal(signal.SIGTERM)
    with ShutdownSignal().listening():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


def test_in_another_thread_nothing_is_taken():
    seen = []

    def listen():
        with ShutdownSignal().listening():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]
