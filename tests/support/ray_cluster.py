"""Real Ray: nodes with labels that share this machine, and a head node that `ray start` made; and a stand-in for it."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Self

import psutil
import ray.exceptions

from tests.support.buckets import SECRET, environment
from tests.support.waiting import eventually, free_ports
from warmer.cluster import actor_pool, driver
from warmer.cluster.ray import Node
from warmer.report.outcomes import Copied

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

STORE_BYTES = 80 * 1024 * 1024
NOTICES_DEATHS_SOON = {
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 4000,  # of one that is alive, but slow
    "health_check_failure_threshold": 4,
}
_START_SECS = 120.0
_STOP_SECS = 20.0
_UP = "Ray runtime started"
_BIN = Path(sys.executable).parent


class RayCluster:
    """A head node that was started with `ray start`.

    Attributes:
        dashboard: Where jobs are submitted to.
        environment: Of its processes, and of those that submit to it.
    """

    def __init__(
        self, directory: Path, environment: Mapping[str, str], *, serves_jobs: bool = True, cpus: int = 2
    ) -> None:
        dashboard, agent, client = free_ports(3)
        self.dashboard = f"http://127.0.0.1:{dashboard}"
        self.environment = environment
        self._log = directory / "ray-start.log"
        command = [
            str(_BIN / "ray"), "start", "--head", "--block", "--port=0", f"--dashboard-port={dashboard}",
            f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}",
            "--min-worker-port=0", "--max-worker-port=0", f"--temp-dir={directory}", f"--num-cpus={cpus}",
            f"--object-store-memory={STORE_BYTES}", "--disable-usage-stats", f"--include-dashboard={serves_jobs}",
        ]  # fmt: skip
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait_until_up(self) -> None:
        """Wait for the cluster.

        Raises:
            RuntimeError: It did not come up; the message ends with what it said.
        """
        with contextlib.suppress(TimeoutError):
            eventually(lambda: self._process.poll() is not None or _UP in self._said(), _START_SECS)
        if _UP not in self._said():
            raise RuntimeError(f"Ray did not come up:\n{self._said()[-3000:]}")

    @property
    def address(self) -> str:
        """Where drivers join it: `<host>:<port>`."""
        found = re.search(r"ray start --address='(.+)'", self._said())
        if found is None:
            raise RuntimeError(f"Ray does not say where it is:\n{self._said()[-3000:]}")
        return found[1]

    def _said(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    def submit(self, command: Sequence[str], *options: str) -> subprocess.CompletedProcess[str]:
        """Submit a job as a user does, and wait for it; its output is on stdout, between Ray's own lines."""
        return subprocess.run(
            [str(_BIN / "ray"), "job", "submit", "--address", self.dashboard, *options, "--", *command],
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def stop(self, patience_secs: float = _STOP_SECS) -> None:
        """End what was started, and nothing else on the machine: not `ray stop`, which ends every cluster."""
        if self._process.poll() is None:
            self._process.terminate()  # `ray start --block` ends its processes in turn
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(patience_secs)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # our own session: whatever is left of it
        self._process.wait()


class PrivateRay(RayCluster):
    """A cluster of one test. Like one that operators secure, it lets in only who knows its token.

    Use it as a context manager.

    Args:
        variables: In the environment of the cluster, and in that of no job's submission.

    Attributes:
        access: Variables with which a client is let in.
    """

    def __init__(self, **variables: str) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="rs-"))  # short: Ray puts sockets below it
        # `ray start` and `ray job submit` know the token; the token of the Hub is only in the cluster's environment.
        self.access = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        super().__init__(self.directory, self.client_environment(**variables), cpus=1)
        self.environment = self.client_environment()

    def client_environment(self, **variables: str) -> dict[str, str]:
        """The environment of a process that may join the cluster."""
        return environment(PATH=f"{_BIN}{os.pathsep}{os.environ['PATH']}", **self.access, **variables)

    def __enter__(self) -> Self:
        self.wait_until_up()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop(0)
        shutil.rmtree(self.directory, ignore_errors=True)

    def metrics(self) -> str:
        """What the metrics agents of the cluster tell."""
        (found,) = self.directory.glob("prom_metrics_service_discovery.json")
        reported = []
        for target in {target for one in json.loads(found.read_text()) for target in one["targets"]}:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{target}/metrics", timeout=5) as answer:
                reported.append(answer.read().decode())
        return "".join(reported)


@contextlib.contextmanager
def ray_cluster(directory: Path, environment: Mapping[str, str], *, serves_jobs: bool = True) -> Iterator[RayCluster]:
    """A running cluster, ended with the block.

    Args:
        directory: For Ray's files.
        environment: Of its processes.
        serves_jobs: Whether jobs can be submitted, for which a head runs a dashboard; a node that is warmed has none.

    Raises:
        RuntimeError: It did not come up.
    """
    cluster = RayCluster(directory, environment, serves_jobs=serves_jobs)
    try:
        cluster.wait_until_up()
        yield cluster
    finally:
        cluster.stop()


def node_options(labels=None, **variables):
    """Of a raylet without a CPU to give, as those of nodes full of engines; with these variables in its environment."""
    return {"num_cpus": 0, "object_store_memory": STORE_BYTES, "env_vars": variables or None, "labels": labels}


@contextlib.contextmanager
def raylets(labels):
    """A cluster of nodes with these labels, each with the token's variable."""
    from ray._private.utils import get_ray_address_file
    from ray.cluster_utils import Cluster

    # Ray notes a cluster's address there, and does not make the directory on a machine that never ran it.
    Path(get_ray_address_file(None)).parent.mkdir(parents=True, exist_ok=True)
    directory = tempfile.mkdtemp(prefix="rc-")  # short: Ray puts sockets below it, whose paths are limited
    atexit.register(shutil.rmtree, directory, ignore_errors=True)  # after Ray's own handlers, which make it again
    head = {"include_dashboard": False, "temp_dir": directory, "_system_config": NOTICES_DEATHS_SOON}
    cluster = Cluster(initialize_head=True, head_node_args=node_options(labels[0], WARM_TEST_TOKEN=SECRET) | head)
    try:
        for one in labels[1:]:
            cluster.add_node(**node_options(one, WARM_TEST_TOKEN=SECRET))
        yield cluster
    finally:
        cluster.shutdown()
        shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def as_it_was(cluster):
    """Lend a cluster: once nodes that died before are gone from its view; and without those that are added meanwhile."""
    cluster.wait_for_nodes(60)
    own = cluster.list_all_nodes()
    yield cluster
    for node in set(cluster.list_all_nodes()).difference(own):
        cluster.remove_node(node, allow_graceful=False)


def raylet(node):
    return node.all_processes["raylet"][0].process


def actors(cluster, kind="NodeActor"):
    """The processes of the warmer's actors on a cluster."""
    found = []
    for node in cluster.list_all_nodes():
        with contextlib.suppress(psutil.Error, KeyError):
            children = psutil.Process(raylet(node).pid).children(recursive=True)
            found += [child for child in children if kind in " ".join(child.cmdline())]
    return found


def memory_bytes(process):
    """The peak of a process's memory; and what is its own of it now, without the pages of files and object stores."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
    if "VmHWM" not in fields:  # it has ended
        return 0, 0
    return tuple(int(fields[name].split()[0]) * 1024 for name in ("VmHWM", "RssAnon"))


class Call:
    """A call of an actor: it has ended when it has a result or an error."""

    def __init__(self, node, method, arguments):
        self.node, self.method, self.arguments = node, method, arguments
        self.ended, self.result, self.error = False, None, None

    def end(self, result=None):
        self.ended, self.result = True, result

    def fail(self, error):
        self.ended, self.error = True, error


class FakeRay:
    """Nodes that do everything well and at once, but for what `answer` does with a call.

    Args:
        names: Of the nodes.
        answer: Is given each call when it is made, and then whenever the driver waits, until it has ended; and the time.
        starts: Whether it is given the calls that start a node, too.
    """

    def __init__(self, names, answer=None, *, starts=False):
        self._starts = starts
        self.nodes = [Node(name, name) for name in names]
        self.alive = list(self.nodes)
        self.now = 0.0
        self.calls, self.killed = [], []
        self._answer = answer or (lambda call, _now: ends_well(call))
        self.exceptions = ray.exceptions

    def under(self, monkeypatch):
        for module in (driver, actor_pool):
            monkeypatch.setattr(module, "ray", self)
            monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now, sleep=self._sleep))
            monkeypatch.setattr(module, "alive_nodes", lambda: self.alive)
        return self

    def _sleep(self, secs):
        self.now += secs

    def remote(self, _actor_class):
        def made(label_selector, **_):
            return SimpleNamespace(remote=lambda: Actor(self, label_selector["ray.io/node-id"]))

        return SimpleNamespace(options=made)

    def call(self, node, method, arguments):
        one = Call(node, method, arguments)
        self.calls.append(one)
        if method not in ("fetch", "receive") and not (self._starts and method == "start"):
            one.end((None, 0.0) if method == "start" else None)
        return one

    def wait(self, refs, *, num_returns, timeout, fetch_local):
        assert not fetch_local
        for one in refs:
            if not one.ended:
                self._answer(one, self.now)
        ended = [one for one in refs if one.ended]
        if timeout and not ended:
            self.now += timeout
        return ended, [one for one in refs if not one.ended]

    def get(self, ref, timeout=None):
        if ref.error is not None:
            raise ref.error
        return ref.result

    def kill(self, actor):
        self.killed.append(actor.node)


class Actor:
    def __init__(self, world, node):
        self._world, self.node = world, node

    def __getattr__(self, method):
        return SimpleNamespace(remote=lambda *arguments, **_: self._world.call(self.node, method, arguments))


def ends_well(call):
    """A call ends well."""
    results = [Copied(chunk.key, chunk.size, received=call.method == "receive") for chunk in call.arguments[0]]
    call.end((results, [f"object of {call.node}"] if call.method == "fetch" else False))


class RunListener:
    def __init__(self):
        self.outcomes, self.errors, self.places = [], {}, {}

    def ended(self, node, outcome):
        self.outcomes.append((node, outcome))

    def started(self, node, start_secs, open_secs):
        assert start_secs + open_secs >= 0 <= open_secs

    def lost(self, node, kind, message):
        self.errors[node] = (kind, message)

    def replaced(self, node, by):
        self.places[node] = by.id

    def tick(self):
        pass
