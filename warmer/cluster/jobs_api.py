"""Client of a Ray cluster's Jobs API: Ray's own client, with a deadline for each call, which it lacks."""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import re
from typing import TYPE_CHECKING, Any, Final, ParamSpec, TypeVar

import aiohttp
import ray.exceptions
import requests
from ray.job_submission import JobSubmissionClient

from hfbucket_plugin.core.concurrency import WorkerPool
from hfbucket_plugin.errors import ConfigError
from warmer.cluster.job_env import ADDRESS_VARIABLES
from warmer.report.outcomes import ClusterError

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from ray.job_submission import JobDetails

_ANSWER_SECS: Final = 30.0
_UPLOAD_SECS: Final = 600.0
"""Maximum seconds of a submission, which includes the upload of a working directory of up to 100 MiB."""

_THREADS: Final = 4

_OWN_FAULT: Final = re.compile(r"status code 5\d\d")
"""Answer of a head that has just restarted, or of a proxy before it, which says nothing about the request."""

_P = ParamSpec("_P")
_T = TypeVar("_T")


class NoSuchJobError(ClusterError):
    """The cluster knows no job of this name."""


class JobsAPI:
    """Jobs of one cluster.

    Args:
        address: Address of the cluster's dashboard.

    Raises:
        ClusterError: The cluster does not answer, or denies access.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self._pool = WorkerPool("jobs-api", _THREADS)
        # Ray's client prefers this variable to the address that it is given.
        variable = ADDRESS_VARIABLES[0]
        before = os.environ.get(variable)
        os.environ[variable] = address
        try:
            self._client: JobSubmissionClient = self._ask(_ANSWER_SECS, JobSubmissionClient, address)
        finally:
            if before is None:
                del os.environ[variable]
            else:
                os.environ[variable] = before

    def find(self, submission_id: str) -> JobDetails | None:
        """Return the details of a job; None if the cluster knows no job of this name.

        Raises:
            ClusterError: The cluster does not answer.
        """
        try:
            return self._ask(_ANSWER_SECS, self._client.get_job_info, submission_id)
        except NoSuchJobError:
            return None

    def submit(self, entrypoint: str, submission_id: str, runtime_env: dict[str, Any]) -> None:
        """Submit a job, and upload its working directory.

        Raises:
            ConfigError: The cluster refuses the runtime environment, or the name is taken.
            ClusterError: The cluster does not answer.
        """
        self._ask(
            _UPLOAD_SECS,
            self._client.submit_job,
            entrypoint=entrypoint,
            submission_id=submission_id,
            runtime_env=runtime_env,
        )

    def stop(self, submission_id: str) -> None:
        """Request that a job stops.

        Raises:
            ClusterError: The cluster does not answer.
        """
        self._ask(_ANSWER_SECS, self._client.stop_job, submission_id)

    def follow(self, submission_id: str) -> Tail:
        """Start to read the log of a job from its beginning."""
        return Tail(self._client, submission_id, self._pool)

    def _ask(self, secs: float, call: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        where = f"the Ray cluster at {self.address}"
        try:
            return self._pool.submit(call, *args, **kwargs).result(secs)
        except TimeoutError:
            raise ClusterError(f"{where} does not answer: nothing within {secs:g} s") from None
        except ray.exceptions.AuthenticationError as error:
            raise ClusterError(
                f"{where} does not let us in: {_first_line(error)}; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or "
                "RAY_AUTH_TOKEN_PATH"
            ) from None
        except (ConnectionError, requests.exceptions.RequestException) as error:
            raise ClusterError(f"{where} does not answer: {_first_line(error)}; look at --address") from None
        except RuntimeError as error:
            words = _first_line(error)
            if "status code 404" in words and "does not exist" in words:
                raise NoSuchJobError(words) from None
            if _OWN_FAULT.search(words):
                raise ClusterError(f"{where} cannot answer: {words}") from None
            if "status code" in words:
                raise ConfigError(f"{where} refuses it: {words}") from None
            raise ClusterError(f"{where} cannot take jobs: {words}") from None
        except (ValueError, TypeError, OSError) as error:
            raise ConfigError(f"the job cannot be submitted: {_first_line(error)}") from None


class Tail:
    """Growing log of a job, read by a thread of its own.

    Args:
        client: Client of the cluster.
        submission_id: Name of the job.
        pool: Pool of the thread.
    """

    def __init__(self, client: JobSubmissionClient, submission_id: str, pool: WorkerPool) -> None:
        self._pieces: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._done: Future[None] = pool.submit(asyncio.run, self._read(client, submission_id))

    async def _read(self, client: JobSubmissionClient, submission_id: str) -> None:
        with contextlib.suppress(aiohttp.ClientError, OSError, RuntimeError, ray.exceptions.RayError):
            async for piece in client.tail_job_logs(submission_id):
                self._pieces.put(piece)

    @property
    def ended(self) -> bool:
        """Whether no more text will come; the job may still run."""
        return self._done.done() and self._pieces.empty()

    def next(self, secs: float) -> str:
        """Return the next text; empty if none arrives within `secs` seconds or no more will come."""
        try:
            return self._pieces.get(timeout=secs)
        except queue.Empty:
            return ""


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split("\n\n", maxsplit=1)[0].split())[:300]
