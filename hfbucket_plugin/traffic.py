"""Online reads go before puts: a request waits for a read, and nobody for a put."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

from hfbucket_plugin import forks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hfbucket_plugin.deadlines import Deadline


class Traffic:
    """Counts reads under way, and lets writers wait until there are none."""

    def __init__(self) -> None:
        self._start_over()
        forks.reset_in_child(self._start_over)

    def _start_over(self) -> None:
        """Count none: at first, and in a forked child, where those of the parent do not go on."""
        self._reads = 0
        self._quiet = threading.Condition()

    @property
    def reads(self) -> int:
        """Reads under way."""
        return self._reads

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Be counted as a read for the length of a `with` block."""
        quiet = self._quiet
        with quiet:
            self._reads += 1
        try:
            yield
        finally:
            if quiet is self._quiet:  # else a fork began anew
                with quiet:
                    self._reads -= 1
                    if not self._reads:
                        quiet.notify_all()

    def let_reads_pass(self, deadline: Deadline) -> None:
        """Wait until no read is under way, at most until a deadline."""
        with self._quiet:
            self._quiet.wait_for(lambda: not self._reads, deadline.remaining())
