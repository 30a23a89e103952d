"""Ray cluster of a run, and the nodes of the cluster."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

import ray
import ray.exceptions

from hfbucket_plugin.errors import ConfigError
from warmer.report.outcomes import ClusterError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_log = logging.getLogger(__name__)

ADDRESS_VARIABLE: Final = "RAY_ADDRESS"
JOB_VARIABLE: Final = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Environment variable that Ray sets for the driver of a submitted job, besides `RAY_ADDRESS`."""

_ANSWER_SECS: Final = 10.0
_LOCAL_STORE_BYTES: Final = 100 * 1024 * 1024
"""Ray's minimum size of an object store, enough for a local Ray, whose one node shares no objects."""


@dataclass(frozen=True, slots=True)
class Node:
    """A node that is alive.

    Attributes:
        id: Ray's unique id.
        name: Name in messages.
        labels: Ray's labels.
        store_bytes: Size of the node's object store in bytes.
    """

    id: str
    name: str
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)
    store_bytes: int = 0


def configured_address(given: str | None) -> str | None:
    """Return the address of the cluster to join; None if none is configured and a local Ray must be started.

    Args:
        given: Value of `--address`; None if not given.

    Raises:
        ConfigError: The address is of a kind that cannot be used.
    """
    address = given or os.environ.get(ADDRESS_VARIABLE) or ("auto" if os.environ.get(JOB_VARIABLE) else None)
    if address is None or address == "local":
        return None
    if "://" in address:
        source = "--address" if given else ADDRESS_VARIABLE
        kind = (
            "the dashboard's, for `ray job submit` and `warmer submit`"
            if address.startswith("http")
            else "Ray Client's"
        )
        raise ConfigError(
            f"{source} {address!r} is {kind}, and this command joins the cluster: set {source} to <host>:<port> of the cluster's "
            f"GCS, as a rule port 6379, or to 'auto' on a node; or unset it and submit the command as a job"
        )
    return address


@contextlib.contextmanager
def joined(given: str | None) -> Iterator[None]:
    """Connect to a Ray cluster: the one that this process is already in, the configured one, or a new local one.

    At the end, only what was connected or started here is disconnected or shut down.

    Args:
        given: Value of `--address`; None if not given.

    Raises:
        ConfigError: The address cannot be used.
        ClusterError: The configured cluster does not answer, or denies access. No local one is started in its place.
    """
    if ray.is_initialized():
        yield
        return
    address = configured_address(given)
    if address is not None and address != "auto":
        _expect_answer(address)
    _init(address)
    try:
        yield
    finally:
        ray.shutdown()


def _expect_answer(address: str) -> None:
    """Check within seconds that a cluster answers, for which `ray.init` would need minutes."""
    parts = urlsplit(f"//{address}")
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or not port:
        raise ConfigError(f"Ray address {address!r} does not read <host>:<port>")
    try:
        socket.create_connection((host, port), _ANSWER_SECS).close()
    except OSError as error:
        raise ClusterError(
            f"the Ray cluster at {address} does not answer: {error}; start it, or fix --address or {ADDRESS_VARIABLE}"
        ) from None


def _init(address: str | None) -> None:
    try:
        if address is not None:
            # By default, Ray writes the output of workers to stdout, which is reserved for results.
            ray.init(address, log_to_driver=False, logging_level=logging.WARNING)
            return
        _log.info("no Ray cluster is configured (--address, RAY_ADDRESS): a local Ray is started, on this machine only")
        _expect_token()
        ray.init(
            "local",
            include_dashboard=False,
            object_store_memory=_LOCAL_STORE_BYTES,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        if address is None:
            raise ClusterError(
                f"a local Ray cannot be started: {_first_line(error)}; it writes to the directory for temporary files, which "
                "TMPDIR or RAY_TMPDIR names"
            ) from None
        raise ClusterError(
            f"the Ray cluster at {address} cannot be joined: {_first_line(error)}; if it asks for a token, set "
            "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
        ) from None


def _expect_token() -> None:
    """Provide a token for a local Ray if `~/.ray/auth_token` can be neither read nor created."""
    if any(os.environ.get(variable) for variable in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")):
        return
    try:
        home = Path.home() / ".ray"
        home.mkdir(parents=True, exist_ok=True)
        usable = os.access(home, os.W_OK | os.X_OK) or os.access(home / "auth_token", os.R_OK)
    except (OSError, RuntimeError):  # the file does not exist, or cannot be written
        usable = False
    if not usable:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split("\n\n", maxsplit=1)[0].split())[:300]


def alive_nodes() -> list[Node]:
    """Return the live nodes of the cluster, ordered by name and id."""
    records = ray.nodes()  # type: ignore[no-untyped-call]
    nodes = [
        Node(
            record["NodeID"],
            record["NodeName"],
            record.get("Labels") or {},
            int(record["Resources"].get("object_store_memory", 0)),
        )
        for record in records
        if record["Alive"]
    ]
    return sorted(nodes, key=lambda node: (node.name, node.id))
