"""A call that is waited for up to a deadline, whatever it does."""

from __future__ import annotations

from concurrent.futures import wait
from typing import TYPE_CHECKING, Final, TypeVar

from hfbucket_plugin.deadlines import Deadline
from hfbucket_plugin.errors import DeadlineError
from hfbucket_plugin.workers import WorkerPool

if TYPE_CHECKING:
    from collections.abc import Callable

_T = TypeVar("_T")

_GRACE_SECS: Final = 0.5
"""A call that notices its deadline itself says better what it was waiting for: it gets so much longer to say it."""


def bounded(what: str, function: Callable[[Deadline], _T], seconds: float) -> _T:
    """Call a function with a deadline, on a thread of its own that never keeps the process from ending.

    A client's timeout does not bound everything: resolving a name has none, and neither have hf_xet's uploads.

    Args:
        what: Names the call in errors.
        function: Given the deadline.
        seconds: How long it may take.

    Raises:
        DeadlineError: It did not end in time. Its thread goes on, and nobody hears of what it does.
        BaseException: What the function raised.
    """
    pool = WorkerPool("hfbucket-cli", 1)
    try:
        future = pool.submit(function, Deadline.after(seconds))
        wait([future], timeout=seconds + _GRACE_SECS)
        if not future.done():
            raise DeadlineError(f"{what}: no answer within {seconds:g} s; the call was abandoned")
        return future.result()
    finally:
        pool.close()
