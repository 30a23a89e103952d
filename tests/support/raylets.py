"""Several raylets on this machine, private to one test module: their own directory, each with its own object store."""

import atexit
import contextlib
import shutil
import tempfile
from pathlib import Path

import psutil

from tests.support.warming import SECRET

STORE_BYTES = 80 * 1024 * 1024
NOTICES_DEATHS_SOON = {
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 4000,  # of one that is alive, but slow
    "health_check_failure_threshold": 4,
}


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
