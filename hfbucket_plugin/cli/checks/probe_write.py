"""`--probe-write`: one small object is stored, read back and deleted, and nothing is left whatever happens."""

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
    """What `--probe-write` says to an instance that stores nothing."""
    return warning(
        NAME,
        f"refused: role is {named.settings.role}, so nothing is stored through this instance",
        f"leave --probe-write out, or look at {named.setting('role')}",
    )


def check(case: CheckContext, *, read_back: bool) -> Finding:
    """Store, read back, compare, delete.

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
            with signals.held():  # a delete must not overtake it
                probe.name(content)
            if read_back:
                probe.compare()
            reported = True
        except HFBucketError as caught:
            failure, reported = caught, True
        finally:
            with signals.held():
                left = probe.remove()
                if left is not None and not reported:  # the process ends, and nobody will read a finding
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
        if probe.unsure:  # a request that nobody waits for any more may still be carried out
            return error(NAME, found, f"{finding.fix}; should {probe.path} appear later, delete it")
        return error(NAME, found, finding.fix)
    done = "stored, read back, compared and deleted" if read_back else "stored and deleted, not read back"
    return ok(NAME, f"{size(_BYTES)} {done} in {seconds:.1f} s")


class _Probe:
    """One object, from its upload to its end.

    Attributes:
        path: Where it is stored.
        step: What is being done, for errors.
        unsure: Whether it may be stored although nobody said so.
    """

    def __init__(self, case: CheckContext) -> None:
        self.case = case
        self.path = case.bucket.handle.join(f"{PROBES}{secrets.token_hex(8)}")
        self.step = "upload"
        self.unsure = False
        self._named = False
        self._data = secrets.token_bytes(_BYTES)  # of which the store cannot have a copy

    def upload(self) -> ContentId:
        """Send the bytes to the store. They are in no bucket yet.

        Raises:
            HFBucketError: It did not take them.
        """
        transfer, upload = self.case.bucket.transfer, Upload()
        try:
            (content,) = self.case.ask("upload", lambda deadline: transfer.upload([self._data], deadline, upload))
        except DeadlineError:
            transfer.abandon(upload)  # frees the thread, should it still wait for the store
            raise
        return content

    def name(self, content: ContentId) -> None:
        """Give them their name in the bucket.

        Raises:
            HFBucketError: They have none, or nobody knows.
        """
        self.step, self._named = "naming it in the bucket", True
        try:
            failed = self.case.ask("batch", lambda deadline: self.case.bucket.add({self.path: content}, deadline))
        except TransportError:
            self.unsure = True
            raise
        _raise_failed(failed)

    def compare(self) -> None:
        """Look it up, and read it back.

        Raises:
            IntegrityError: Other bytes came back.
            HFBucketError: It is not there, or did not arrive.
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
        """Delete it if it was named, or may have been; say why where that cannot be done."""
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
