"""The harness that runs `lmcache server`: what comes up goes down, and leaves nothing."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.support import lmcache_server
from tests.support.lmcache_server import MPServer, MPServerError

pytestmark = pytest.mark.engine

STARTS_AND_CRASHES = """\
import os
from tests.support.lmcache_server import MPServer
print(MPServer().pid, flush=True)
os.kill(os.getpid(), 9)
"""


@pytest.fixture(autouse=True)
def own_temporary_directory(tmp_path, monkeypatch):
    """Where every server of this file has its directory."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def shared_memory(directory):
    """That of the only server whose directory lies in this one."""
    (home,) = directory.glob("mp-server-*")
    return list(Path("/dev/shm").glob(f"*{home.name}*"))  # noqa: S108 - where POSIX shared memory is


def test_a_server_starts_answers_and_leaves_nothing(tmp_path):
    adapter = {"type": "fs", "base_path": str(tmp_path / "tier")}
    with MPServer([adapter], chunk_size=64, l1_mib=32, shared_memory=True) as server:
        process = psutil.Process(server.pid)
        helpers = process.children(recursive=True)
        (memory,) = shared_memory(tmp_path)
        status = server.status()

        assert status["chunk_size"] == 64
        assert status["storage_manager"]["l1_usage"] == [0, 32 * 2**20]
        assert [one["type"] for one in status["storage_manager"]["l2_adapters"]] == ["FSL2Adapter"]
        assert server.count("lmcache_mp_l2_store_adapters") == 1
        assert server.count("lmcache_mp_l2_store_adapters", state="draining") == 0
        assert server.count("no_such_metric") == 0
        server.clear_l1()

        assert server.stop() == -signal.SIGTERM
        assert server.stop() is None
    assert "FSL2Adapter closed" in server.log
    assert not process.is_running()
    assert psutil.wait_procs(helpers, timeout=60)[1] == []
    assert not memory.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["tier"]
    with pytest.raises(RuntimeError, match="stopped"):
        _ = server.pid


def test_a_killed_server_leaves_nothing_either_and_a_taken_port_is_no_obstacle(tmp_path, monkeypatch):
    with socket.create_server((lmcache_server.HOST, 0)) as listener:
        taken = listener.getsockname()[1]
        free_ports = lmcache_server.free_ports
        offers = [[taken, *free_ports(1)]]
        monkeypatch.setattr(lmcache_server, "free_ports", lambda count: offers.pop() if offers else free_ports(count))
        server = MPServer(shared_memory=True)
    assert offers == []
    assert server.port != taken
    process = psutil.Process(server.pid)
    (memory,) = shared_memory(tmp_path)

    server.kill()

    assert not process.is_running()
    assert not memory.exists()
    assert list(tmp_path.iterdir()) == []
    assert "MPCacheServer closed" not in server.log


def test_a_server_that_cannot_start_says_why_and_leaves_nothing(tmp_path):
    with pytest.raises(MPServerError, match="bucket_handle must be a non-empty string"):
        MPServer([{"type": "hfbucket"}])

    assert list(tmp_path.iterdir()) == []


def test_a_server_does_not_outlive_the_process_that_started_it(tmp_path):
    command = [sys.executable, "-c", STARTS_AND_CRASHES]
    env = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(lmcache_server.REPOSITORY)}
    started = subprocess.run(command, capture_output=True, text=True, env=env, check=False)

    assert started.returncode == -signal.SIGKILL, started.stderr
    # The process that inherits it may be slow to collect it, or never do.
    with suppress(psutil.NoSuchProcess):
        server = psutil.Process(int(started.stdout))
        while server.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.05)
