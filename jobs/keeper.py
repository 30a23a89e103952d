"""Keeps a lock while the main thread is in something long, such as the upload of a snapshot."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Final, Self

from hfbucket_plugin.errors import HFBucketError
from jobs.lock import LockLostError

if TYPE_CHECKING:
    from jobs.lock import Lock

_log = logging.getLogger(__name__)

_LOOK_SECS: Final = 5.0
_LOOKS: Final = 20
"""Looks while a renewal holds, where it does not hold for long."""


class Keeper:
    """A thread that renews a lock where that is due. Use it as a context manager, within that of the lock.

    Args:
        lock: The lock, held.
        seconds: For how long each renewal of it holds.
    """

    def __init__(self, lock: Lock, seconds: float) -> None:
        self._lock = lock
        self._every = min(_LOOK_SECS, seconds / _LOOKS)
        self._over = threading.Event()
        self._lost: LockLostError | None = None
        self._thread = threading.Thread(target=self._run, name="jobs-keeper", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()  # a renewal that is under way ends by its deadline; the lock is released after it

    def check(self) -> None:
        """Stop here when the lock is lost; asks nobody.

        Raises:
            LockLostError: It is.
        """
        if self._lost is not None:
            raise self._lost

    def _run(self) -> None:
        while not self._over.wait(self._every):
            try:
                self._lock.keep()
            except LockLostError as error:
                self._lost = error
                return
            except HFBucketError as error:  # whoever needs the lock asks for it again
                _log.warning("the lock could not be renewed yet: %s", error)
