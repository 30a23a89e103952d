"""`submit`: the same command as a Ray job, followed to its end, with the code that the job itself ended with."""

from __future__ import annotations

import json
import logging
import re
import secrets
import shlex
import time
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any, Final

from typer import BadParameter

from hfbucket_plugin.core import texts
from hfbucket_plugin.errors import ConfigError, HFBucketError, Interrupted
from hfbucket_plugin.tools import exit_codes
from warmer.report.outcomes import ClusterError, NothingToDoError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ray.job_submission import JobDetails
    from typer import Context

    from warmer.cluster.jobs_api import JobsAPI, Tail

_log = logging.getLogger(__name__)

COMMANDS: Final = ("run", "plan", "apply", "check")
"""What can be submitted."""

_POLL_SECS: Final = 2.0
_DRAIN_SECS: Final = 10.0
"""How long the rest of the log of a job that is over is waited for."""

_SILENCE_SECS: Final = 120.0
"""How long a cluster may not tell of a job that runs: a head that restarts takes a minute."""

_STOP_SECS: Final = 15.0
"""Ray kills a job 3 s after SIGTERM; the rest is for its records."""

_ARRIVAL_SECS: Final = 5.0
"""How long a job that was being submitted when the order came is waited for, to be stopped."""

_NAME: Final = re.compile(r"[^\s/?#%]+")
_RECORDS: Final = frozenset({"summary", "plan", "check"})


@dataclass(frozen=True, slots=True)
class Submission:
    """A job that is to be submitted.

    Attributes:
        command: What follows `python -m warmer`.
        runtime_env: Ray's.
        submission_id: Its name, by which it runs once; one of our own making where none is given.
        wait: Whether to follow it to its end.
        detach: Whether it goes on when we are told to stop.

    Raises:
        ConfigError: The name could be none.
    """

    command: Sequence[str]
    runtime_env: Mapping[str, Any]
    submission_id: str = field(default_factory=lambda: f"warmer-{secrets.token_hex(8)}")
    wait: bool = True
    detach: bool = False

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.submission_id):
            raise ConfigError(f"--submission-id {self.submission_id!r} is no name: it is part of addresses")

    @property
    def entrypoint(self) -> str:
        """The command as Ray's shell gets it."""
        return shlex.join(["python", "-m", "warmer", *self.command])


def expect_command(context: Context, command: Sequence[str]) -> None:
    """Make sure that the job's own command line is one, before anything is uploaded for it.

    Args:
        context: Of the command that submits.
        command: What follows `python -m warmer`.

    Raises:
        ClickException: It is none; in the words of the command itself.
    """
    name, *rest = command
    if name not in COMMANDS:
        raise BadParameter(f"{name!r} is none of {', '.join(COMMANDS)}: give what follows `python -m warmer`", context)
    known: Any = context.find_root().command
    known.commands[name].make_context(name, rest, parent=context.parent).close()


def submit(api: JobsAPI, wanted: Submission, out: IO[str]) -> dict[str, Any]:
    """Submit a job, and follow it to its end.

    Args:
        api: Of the cluster.
        wanted: The job.
        out: Where its log goes.

    Returns:
        The record, ready for JSON; its fields are described in `docs/warm.md`.

    Raises:
        NothingToDoError: A job of this name was submitted before.
        ConfigError: The cluster refuses it.
        ClusterError: The cluster does not answer.
        Interrupted: Told to stop before the job was submitted.
    """
    _refuse_again(api, wanted.submission_id)
    log = Log(out)
    try:
        try:
            api.submit(wanted.entrypoint, wanted.submission_id, dict(wanted.runtime_env))
        except HFBucketError:
            _refuse_again(api, wanted.submission_id)  # somebody else was faster
            raise
        _log.info("job %s is submitted to %s", wanted.submission_id, api.address)
        if not wanted.wait:
            return _record(wanted, "PENDING", None, exit_codes.COMPLETE, None)
        details = _followed(api, wanted.submission_id, log)
    except Interrupted:
        if wanted.detach:
            _log.warning("job %s goes on; its log: ray job logs %s", wanted.submission_id, wanted.submission_id)
            return _record(wanted, "DETACHED", None, exit_codes.INTERRUPTED, log.record)
        details = _stopped(api, wanted.submission_id)
    finally:
        log.close()
    code, words = outcome(details)
    if words:
        _log.warning("job %s: %s", wanted.submission_id, words)
    status = details.status.value if details is not None else "UNKNOWN"
    return _record(wanted, status, details.driver_exit_code if details is not None else None, code, log.record)


def _record(wanted: Submission, status: str, driver_exit_code: int | None, code: int, record: Any) -> dict[str, Any]:
    return {
        "event": "submit",
        "exit_code": code,
        "submission_id": wanted.submission_id,
        "status": status,
        "driver_exit_code": driver_exit_code,
        "record": record,
    }


def _refuse_again(api: JobsAPI, submission_id: str) -> None:
    found = api.find(submission_id)
    if found is None:
        return
    ended = "" if found.driver_exit_code is None else f", exit code {found.driver_exit_code}"
    raise NothingToDoError(
        f"--submission-id {submission_id!r} was submitted before ({found.status.value}{ended}): a job runs once under its "
        f"name; its log: ray job logs {submission_id}"
    )


def outcome(details: JobDetails | None) -> tuple[int, str]:
    """The exit code that stands for a job that is over, and what there is to say of it.

    Args:
        details: Of the job; None where the cluster tells of it no more.
    """
    if details is None:
        return exit_codes.FAILED, (
            f"the cluster has not told of it for {_SILENCE_SECS:g} s; the job may go on without us, or be lost with it"
        )
    code, status = details.driver_exit_code, details.status.value
    if code is not None and code >= 0:
        return code, ""
    if status == "SUCCEEDED":
        return exit_codes.COMPLETE, ""
    if status == "STOPPED":  # Ray notes no exit code then
        return exit_codes.INTERRUPTED, "it was stopped; running again moves only what is missing"
    return _broken(details)


def _broken(details: JobDetails) -> tuple[int, str]:
    """The same of a job that ended in no way of its own."""
    if details.driver_exit_code is not None:
        return (
            exit_codes.FAILED,
            f"it was killed by signal {-details.driver_exit_code}; running again moves only what is missing",
        )
    words = texts.shown(" ".join((details.message or "").split()))[:1000]
    if "RUNTIME_ENV" in str(details.error_type or ""):
        return exit_codes.USAGE, f"its runtime environment could not be set up: {words}"
    return exit_codes.FAILED, f"it did not end by itself: {words}"


def _followed(api: JobsAPI, submission_id: str, log: Log) -> JobDetails | None:
    """Pass on the log of a job until it is over; None where the cluster answers no more, or knows of no such job any more."""
    tail, answered = api.follow(submission_id), time.monotonic()
    next_look = 0.0
    while True:
        log.add(tail.next(_POLL_SECS / 4))
        now = time.monotonic()
        if now < next_look and not tail.ended:
            continue
        next_look = now + _POLL_SECS
        try:
            details = api.find(submission_id)
        except ClusterError as error:
            if time.monotonic() - answered > _SILENCE_SECS:
                return None
            _log.warning("%s; asking again", error)
            time.sleep(_POLL_SECS)
            continue
        if details is not None:
            answered = time.monotonic()
        elif time.monotonic() - answered > _SILENCE_SECS:  # a head that restarts without its records has lost them
            return None
        if details is not None and details.status.is_terminal():
            _drain(tail, log)
            return details
        if tail.ended:  # the log is passed on by the job's node, through the head: either may be gone for a while
            time.sleep(_POLL_SECS)
            log.from_start()
            tail = api.follow(submission_id)


def _drain(tail: Tail, log: Log) -> None:
    """Pass on what is left of the log of a job that is over."""
    end = time.monotonic() + _DRAIN_SECS
    while not tail.ended and time.monotonic() < end:
        log.add(tail.next(_POLL_SECS / 4))


def _stopped(api: JobsAPI, submission_id: str) -> JobDetails | None:
    """Stop a job; how it ended, which may be well, where it was quicker."""
    _log.warning("told to stop: job %s is stopped", submission_id)
    end = time.monotonic() + _STOP_SECS
    details = None
    try:
        while api.find(submission_id) is None and time.monotonic() < end - _STOP_SECS + _ARRIVAL_SECS:
            time.sleep(_POLL_SECS / 4)
        api.stop(submission_id)
        while time.monotonic() < end:
            details = api.find(submission_id)
            if details is not None and details.status.is_terminal():
                break
            time.sleep(_POLL_SECS / 4)
    except HFBucketError as error:
        _log.warning("job %s may still run: %s", submission_id, error)
    if details is None or not details.status.is_terminal():
        raise Interrupted
    return details


_LAST_WORD: Final = re.compile(r"(?<!\S)\S{1,4096}\Z")
"""What stands behind the last space, unless it is too long for any token."""

_LONGEST_RECORD: Final = 16 * 1024 * 1024
"""Characters of a record, which names a thousand chunks at most."""


class Log:
    """Passes on the log of a job, and finds the record in it that the command printed last.

    Args:
        out: Where to.

    Attributes:
        record: What was found; None for nothing.
    """

    def __init__(self, out: IO[str]) -> None:
        self._out = out
        self._held = ""
        self._line = ""
        self._passed_on = 0
        self._again = 0
        self.record: dict[str, Any] | None = None

    def from_start(self) -> None:
        """What comes next begins at the start of the log again: what was passed on is not passed on twice."""
        self._again = self._passed_on

    def add(self, piece: str) -> None:
        """Pass on what has come."""
        skipped = min(self._again, len(piece))
        self._again -= skipped
        new = piece[skipped:]
        if not new:
            return
        self._passed_on += len(new)
        text = self._held + new
        # A word that may go on waits for its end: half of a token would not be known for one.
        word = _LAST_WORD.search(text)
        cut = len(text) if word is None else word.start()
        self._write(text[:cut])
        self._held = text[cut:]
        *lines, self._line = (self._line + new).split("\n")
        for line in lines:
            self._look_at(line)
        if len(self._line) > _LONGEST_RECORD:
            self._line = "…"  # no record any more, whatever follows

    def _write(self, text: str) -> None:
        self._out.write(texts.shown_lines(text))  # any process in the cluster may write there
        self._out.flush()

    def close(self) -> None:
        """No more will come."""
        self._write(self._held)
        self._held = ""
        if self._line:
            self._look_at(self._line)
            self._out.write("\n")
            self._line = ""

    def _look_at(self, line: str) -> None:
        if not line.startswith('{"event"'):
            return
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            return
        if found.get("event") in _RECORDS:
            self.record = found
