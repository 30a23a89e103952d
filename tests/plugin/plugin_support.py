"""What several tests of the plugin share."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

if TYPE_CHECKING:
    from collections.abc import Callable

SECRET = "hf_Zq8yLw3VbN5tRk2XsJ7mPd4cGf6hT9aQ"

untimed = hypothesis_settings(deadline=None)
"""For property tests: how long an example takes is no matter of theirs."""

any_text = st.text(st.characters(exclude_categories=["Cs"]))
field_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="@"), min_size=1)
"""What may stand between two '@' of a key."""


class Clock:
    """Seconds that pass when a test says so, or, with `step`, whenever somebody looks."""

    def __init__(self, step: float = 0.0) -> None:
        self.now = 1000.0
        self.step = step

    def __call__(self) -> float:
        self.now += self.step
        return self.now


def eventually(condition: Callable[[], Any], seconds: float = 30.0) -> Any:
    """Wait until a condition holds, and return its value."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"not within {seconds} s: {condition}"
        time.sleep(0.01)
    return value


def in_threads(count: int, function: Callable[[int], Any]) -> list[Any]:
    """Call a function with 0, 1, … in as many threads at once, and return what it returned or raised."""
    results: list[Any] = [None] * count
    start = threading.Barrier(count)

    def run(number: int) -> None:
        start.wait()
        try:
            results[number] = function(number)
        except Exception as error:  # noqa: BLE001 - handed to the test
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
