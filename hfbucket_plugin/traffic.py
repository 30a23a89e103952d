"""Online reads go before puts: a request waits for a read, and nobody for a put."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hfbucket_plugin.deadlines import Deadline


class Traffic:
    """Counts reads under way, and lets writers wait until there are none."""

    def __init__(self) -> None:
        self._reads = 0
        self._quiet = threading.Condition()

    @property
    def reads(self) -> int:
        """Reads under way."""
        return self._reads

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Be counted as a read for the length of a `with` block."""
        with self._quiet:
            self._reads += 1
        try:
            yield
        finally:
            with self._quiet:
                self._reads -= 1
                if not self._reads:
                    self._quiet.notify_all()

    def let_reads_pass(self, deadline: Deadline) -> None:
        """Wait until no read is under way, at most until a deadline."""
        with self._quiet:
            self._quiet.wait_for(lambda: not self._reads, deadline.remaining())
