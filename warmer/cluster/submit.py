"""Command `submit`: run the same command as a Ray job, follow the job, and exit with its code."""

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
"""Commands that can be submitted."""

_POLL_SECS: Final = 2.0
_DRAIN_SECS: Final = 10.0
"""Seconds to wait for the rest of the log after a job has ended."""

_SILENCE_SECS: Final = 120.0
"""Maximum seconds without a status of a running job: a head that restarts needs a minute."""

_STOP_SECS: Final = 15.0
"""Seconds to wait for a job to stop: Ray kills it 3 s after SIGTERM, and then updates its records."""

_ARRIVAL_SECS: Final = 5.0
"""Seconds to wait, after a stop, for a job that was being submitted, in order to stop it too."""

_NAME: Final = re.compile(r"[^\s/?#%]+")
_RECORDS: Final = frozenset({"summary", "plan", "check"})


@dataclass(frozen=True, slots=True)
class Submission:
    """Job to be submitted.

    Attributes:
        command: Arguments of `python -m warmer`.
        runtime_env: Ray's runtime environment.
        submission_id: Name of the job, which can be used only once; generated if none is given.
        wait: Whether to follow the job to its end.
        detach: Whether the job continues if this process is told to stop.

    Raises:
        ConfigError: The name is invalid.
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
        """The command line for the shell that Ray starts."""
        return shlex.join(["python", "-m", "warmer", *self.command])


def expect_command(context: Context, command: Sequence[str]) -> None:
    """Check that the job's own command line is valid, before anything is uploaded for it.

    Args:
        context: Context of the submitting command.
        command: Arguments of `python -m warmer`.

    Raises:
        ClickException: The command line is invalid; the message is that of the command itself.
    """
    name, *rest = command
    if name not in COMMANDS:
        raise BadParameter(f"{name!r} is none of {', '.join(COMMANDS)}: give what follows `python -m warmer`", context)
    known: Any = context.find_root().command
    known.commands[name].make_context(name, rest, parent=context.parent).close()


def submit(api: JobsAPI, wanted: Submission, out: IO[str]) -> dict[str, Any]:
    """Submit a job, and follow it to its end.

    Args:
        api: Jobs of the cluster.
        wanted: Job to submit.
        out: Destination of the job's log.

    Returns:
        The record, ready for JSON; its fields are described in `docs/warm.md`.

    Raises:
        NothingToDoError: A job of this name was submitted before.
        ConfigError: The cluster refuses the job.
        ClusterError: The cluster does not answer.
        Interrupted: A stop was requested before the job was submitted.
    """
    _refuse_again(api, wanted.submission_id)
    log = Log(out)
    try:
        try:
            api.submit(wanted.entrypoint, wanted.submission_id, dict(wanted.runtime_env))
        except HFBucketError:
            _refuse_again(api, wanted.submission_id)  # another process may have submitted it first
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
    """Return the exit code for a job that has ended, and a message about it.

    Args:
        details: Details of the job; None if the cluster no longer reports the job.
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
    if status == "STOPPED":  # for which Ray records no exit code
        return exit_codes.INTERRUPTED, "it was stopped; running again moves only what is missing"
    return _broken(details)


def _broken(details: JobDetails) -> tuple[int, str]:
    """Return the exit code and the message for a job that ended without an exit code of the command."""
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
    """Forward the log of a job until the job ends; return None if the cluster stops answering or no longer knows the job."""
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
        elif time.monotonic() - answered > _SILENCE_SECS:  # a head that restarts without its records has lost the job
            return None
        if details is not None and details.status.is_terminal():
            _drain(tail, log)
            return details
        if tail.ended:  # the log comes from the job's node through the head, and either may be absent for a while
            time.sleep(_POLL_SECS)
            log.from_start()
            tail = api.follow(submission_id)


def _drain(tail: Tail, log: Log) -> None:
    """Forward the rest of the log of a job that has ended."""
    end = time.monotonic() + _DRAIN_SECS
    while not tail.ended and time.monotonic() < end:
        log.add(tail.next(_POLL_SECS / 4))


def _stopped(api: JobsAPI, submission_id: str) -> JobDetails | None:
    """Stop a job; return its details, which may show success if the job ended first."""
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
"""Text after the last space, unless it is too long for a token."""

_LONGEST_RECORD: Final = 16 * 1024 * 1024
"""Maximum characters of a record, which names at most a thousand chunks."""


class Log:
    """Forwards the log of a job, and finds the last record that the command printed.

    Args:
        out: Destination of the log.

    Attributes:
        record: The record; None if none was found.
    """

    def __init__(self, out: IO[str]) -> None:
        self._out = out
        self._held = ""
        self._line = ""
        self._passed_on = 0
        self._again = 0
        self.record: dict[str, Any] | None = None

    def from_start(self) -> None:
        """Expect the log from its start again: text that was already forwarded is not forwarded again."""
        self._again = self._passed_on

    def add(self, piece: str) -> None:
        """Forward a piece of the log."""
        skipped = min(self._again, len(piece))
        self._again -= skipped
        new = piece[skipped:]
        if not new:
            return
        self._passed_on += len(new)
        text = self._held + new
        # Hold back a word that may continue, because half of a token would not be recognized as a secret.
        word = _LAST_WORD.search(text)
        cut = len(text) if word is None else word.start()
        self._write(text[:cut])
        self._held = text[cut:]
        *lines, self._line = (self._line + new).split("\n")
        for line in lines:
            self._look_at(line)
        if len(self._line) > _LONGEST_RECORD:
            self._line = "…"  # too long for a record, whatever follows

    def _write(self, text: str) -> None:
        self._out.write(texts.shown_lines(text))  # escaped, as any process in the cluster may write to the log
        self._out.flush()

    def close(self) -> None:
        """Forward what was held back; no more text will come."""
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
