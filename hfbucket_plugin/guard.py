"""The breakers of one instance: fed by its work, probed in the background, told to the log and the metrics.

Three, since the parts fail apart: `lookup` (the Hub's API), `read` (the store's downloads), `write` (uploads, and naming
them). While one is open, its work fails at once with `BreakerOpenError` instead of waiting for a deadline each time.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Final, Literal

from hfbucket_plugin import metrics
from hfbucket_plugin.breaker import Breaker
from hfbucket_plugin.errors import (
    BreakerOpenError,
    BudgetError,
    HFBucketError,
    MissingError,
    RevokedError,
    ThrottledError,
    TransportError,
    UnsentError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from hfbucket_plugin.settings import InstanceSettings

_log = logging.getLogger(__name__)

Part = Literal["lookup", "read", "write"]
PARTS: Final[tuple[Part, ...]] = ("lookup", "read", "write")


class Guard:
    """Opens and closes the breakers of one instance.

    Args:
        settings: The instance's.
        instance: Its name.
        sink: Where states are told.
        probes: What tells whether a part works: returns, or raises an `HFBucketError` within its own deadline.
    """

    def __init__(
        self,
        settings: InstanceSettings,
        instance: str,
        sink: metrics.Sink,
        probes: Mapping[Part, Callable[[], None]],
    ) -> None:
        self._instance = instance
        self._sink = sink
        self._probes = probes
        self._breakers = {
            part: Breaker(settings.breaker_failures, settings.breaker_probe_secs, settings.breaker_max_probe_secs)
            for part in PARTS
        }
        self._reasons: dict[Part, str] = {}
        self._lock = threading.Lock()
        self._prober: threading.Thread | None = None
        self._wake = threading.Event()
        self._closed = False
        for part in PARTS:
            sink.gauge(metrics.BREAKER_OPEN, 0, instance=instance, part=part)

    def is_open(self, part: Part) -> bool:
        """Whether a part's work should not be tried."""
        return self._breakers[part].is_open

    def check(self, part: Part) -> None:
        """Stop here while a part's breaker is open.

        Raises:
            BreakerOpenError: It is open; the message tells why it opened and when it is probed next.
        """
        if self.is_open(part):
            if not self._breakers[part].probe_in or self._prober is None or not self._prober.is_alive():
                # Due, and perhaps nobody's: no thread was left, or this is a fork.
                self._start_prober()
            raise BreakerOpenError(
                f"instance {self._instance!r}: {part}: not tried, since {self.reason(part)}; probed again in "
                f"{self._breakers[part].probe_in:.1f} s"
            )

    def reason(self, part: Part) -> str:
        """Why a part's breaker opened last, in words."""
        return self._reasons.get(part, "it failed repeatedly")

    def succeeded(self, part: Part) -> None:
        """Note that some work of a part was done."""
        self._breakers[part].succeeded()

    def failed(self, part: Part, error: HFBucketError) -> None:
        """Note that some work of a part failed for no reason of its own. What was never sent says nothing about the part."""
        if self._closed or isinstance(error, UnsentError):
            return
        self._reasons.setdefault(part, str(error))
        if not self._breakers[part].is_open:
            self._reasons[part] = str(error)
        if self._breakers[part].failed():
            self._tell(part, "open", str(error))
            self._start_prober()

    def ended(self, part: Part, error: HFBucketError | None) -> None:
        """Note how some work of a part ended: only failures in transport speak against the part."""
        if isinstance(error, TransportError):
            self.failed(part, error)
        elif not isinstance(error, (BudgetError, BreakerOpenError, RevokedError)):
            self.succeeded(part)

    def _tell(self, part: Part, to: Literal["open", "closed"], why: str) -> None:
        self._sink.gauge(metrics.BREAKER_OPEN, float(to == "open"), instance=self._instance, part=part)
        self._sink.count(metrics.BREAKER_CHANGES, instance=self._instance, part=part, to=to)
        if to == "open":
            _log.warning(
                "[%s] breaker: %s is given up for now and probed in the background: %s", self._instance, part, why
            )
        else:
            _log.warning("[%s] breaker: %s works again", self._instance, part)

    # --- probing --------------------------------------------------------------------------------------------------

    def _start_prober(self) -> None:
        with self._lock:
            self._wake.set()
            if self._closed or (self._prober is not None and self._prober.is_alive()):
                return
            thread = threading.Thread(target=self._probe_all, name=f"hfbucket-probe-{self._instance}", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # no thread left: whoever asks next tries again
                return
            self._prober = thread

    def _probe_all(self) -> None:
        """Probe what is open when it is due, until nothing is."""
        while True:
            with self._lock:
                waiting = [part for part in PARTS if self.is_open(part)]
                if self._closed or not waiting:
                    self._prober = None
                    return
                self._wake.clear()
            self._wake.wait(min(self._breakers[part].probe_in for part in waiting))
            for part in waiting:
                if self.is_open(part) and not self._breakers[part].probe_in:
                    self._probe(part)

    def _probe(self, part: Part) -> None:
        if self._closed:
            return
        try:
            self._probes[part]()
        except (TransportError, ThrottledError, BreakerOpenError) as error:
            self._reasons[part] = str(error)
            self._breakers[part].probed(well=False)
        except HFBucketError as error:
            if part == "read" and not isinstance(error, MissingError):  # what opened it: nothing would be served
                self._reasons[part] = str(error)
                self._breakers[part].probed(well=False)
            else:
                self._close(part)  # an answer, if a refusal: work is refused at once too, and told as what it is
        except BaseException as error:  # noqa: BLE001 - hf_xet's panics too; the prober must live
            self._reasons[part] = f"the probe failed: {type(error).__name__}: {error}"
            self._breakers[part].probed(well=False)
        else:
            self._close(part)

    def _close(self, part: Part) -> None:
        self._breakers[part].probed(well=True)
        self._reasons.pop(part, None)
        self._tell(part, "closed", "")

    def status(self) -> dict[str, str]:
        """Why each open part is open, in words; empty when all work."""
        return {part: self.reason(part) for part in PARTS if self.is_open(part)}

    def close(self) -> None:
        """Probe no more."""
        self._closed = True
        self._wake.set()
