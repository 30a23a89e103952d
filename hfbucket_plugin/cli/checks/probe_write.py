"""Check of `--probe-write`: store a small object, read it back and delete it; nothing is left, even after an error."""

from __future__ import annotations

import secrets
import time
from typing import TYPE_CHECKING, Final

from hfbucket_plugin.cli.checks.bucket import PROBES
from hfbucket_plugin.cli.findings import Finding, error, from_error, ok, warning
from hfbucket_plugin.core.units import size
from hfbucket_plugin.errors import DeadlineError, HFBucketError, IntegrityError, ObjectMissingError, TransportError
from hfbucket_plugin.hub.records import fetch
from hfbucket_plugin.hub.transfer import Upload
from hfbucket_plugin.tools import console
from hfbucket_plugin.tools.signals import EndingSignals

if TYPE_CHECKING:
    from hfbucket_plugin.cli.context import CheckContext
    from hfbucket_plugin.config.instances import InstanceConfig
    from hfbucket_plugin.core.deadline import Deadline
    from hfbucket_plugin.core.keys import ContentId
    from hfbucket_plugin.errors import ItemFailure

NAME: Final = "probe"

_BYTES: Final = 64 * 1024
_DELETE_TRIES: Final = 3


def refusal(named: InstanceConfig) -> Finding:
    """Return the finding of `--probe-write` for an instance that stores nothing."""
    return warning(
        NAME,
        f"refused: role is {named.settings.role}, so nothing is stored through this instance",
        f"leave --probe-write out, or look at {named.setting('role')}",
    )


def check(case: CheckContext, *, read_back: bool) -> Finding:
    """Store an object, read it back, compare it, and delete it.

    Args:
        case: The instance.
        read_back: Whether the token may read.
    """
    probe = _Probe(case)
    started = time.monotonic()
    failure: HFBucketError | None = None
    left: HFBucketError | None = None
    with EndingSignals() as signals:
        reported = False
        try:
            content = probe.upload()
            with signals.held():  # a delete must not overtake the naming
                probe.name(content)
            if read_back:
                probe.compare()
            reported = True
        except HFBucketError as caught:
            failure, reported = caught, True
        finally:
            with signals.held():
                left = probe.remove()
                if left is not None and not reported:  # the process ends, so a finding would not be shown
                    console.print_error(f"{probe.path} is left in the bucket: {left}")
    return _judge(probe, failure, left, read_back=read_back, seconds=time.monotonic() - started)


def _judge(
    probe: _Probe, failure: HFBucketError | None, left: HFBucketError | None, *, read_back: bool, seconds: float
) -> Finding:
    case = probe.case
    if left is not None:
        before = f"{probe.step} failed: {failure}; and " if failure is not None else ""
        return error(NAME, f"{before}it could not be deleted: {left}", f"delete {probe.path} yourself")
    if failure is not None:
        finding = from_error(NAME, failure, case.named)
        found = f"{probe.step} failed: {finding.found}"
        if probe.unsure:  # an abandoned request may still be carried out
            return error(NAME, found, f"{finding.fix}; should {probe.path} appear later, delete it")
        return error(NAME, found, finding.fix)
    done = "stored, read back, compared and deleted" if read_back else "stored and deleted, not read back"
    return ok(NAME, f"{size(_BYTES)} {done} in {seconds:.1f} s")


class _Probe:
    """Probe object, from its upload to its removal.

    Attributes:
        path: Path of the object.
        step: Current step, for errors.
        unsure: Whether it may be stored without a confirmation.
    """

    def __init__(self, case: CheckContext) -> None:
        self.case = case
        self.path = case.bucket.handle.join(f"{PROBES}{secrets.token_hex(8)}")
        self.step = "upload"
        self.unsure = False
        self._named = False
        self._data = secrets.token_bytes(_BYTES)  # random, so that the store cannot have a copy

    def upload(self) -> ContentId:
        """Upload the bytes to the store. They are not in a bucket yet.

        Raises:
            HFBucketError: If the upload fails.
        """
        transfer, upload = self.case.bucket.transfer, Upload()
        try:
            (content,) = self.case.ask("upload", lambda deadline: transfer.upload([self._data], deadline, upload))
        except DeadlineError:
            transfer.abandon(upload)  # frees the thread if it still waits for the store
            raise
        return content

    def name(self, content: ContentId) -> None:
        """Name the bytes in the bucket.

        Raises:
            HFBucketError: If the naming fails, or its outcome is unknown.
        """
        self.step, self._named = "naming it in the bucket", True
        try:
            failed = self.case.ask("batch", lambda deadline: self.case.bucket.add({self.path: content}, deadline))
        except TransportError:
            self.unsure = True
            raise
        _raise_failed(failed)

    def compare(self) -> None:
        """Look up the object, and read it back.

        Raises:
            IntegrityError: If the bytes differ.
            HFBucketError: If the object does not exist or cannot be read.
        """
        self.step = "reading it back"
        if self.case.ask("read", self._fetch) != self._data:
            raise IntegrityError(f"{self.path}: other bytes came back than were stored")

    def _fetch(self, deadline: Deadline) -> bytes:
        bucket = self.case.bucket
        info = bucket.stat([self.path], deadline).get(self.path)
        if info is None:
            raise ObjectMissingError(f"{self.path}: stored, and then not found")
        return bytes(fetch(bucket, self.path, info.content, deadline).data)

    def remove(self) -> HFBucketError | None:
        """Delete the object if it was or may have been named; return the error if that fails."""
        problem: HFBucketError | None = None
        for _ in range(_DELETE_TRIES if self._named else 0):
            try:
                failed = self.case.ask("delete", lambda deadline: self.case.bucket.delete([self.path], deadline))
                _raise_failed(failed)
            except HFBucketError as caught:
                problem = caught
                if not isinstance(caught, TransportError):
                    break
            else:
                return None
        return problem


def _raise_failed(failed: dict[str, ItemFailure]) -> None:
    for failure in failed.values():
        raise HFBucketError(f"{failure.item}: {failure.message}")
