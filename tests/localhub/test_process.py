import json
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest

from localhub.__main__ import main
from localhub.client import HubControl
from localhub.process import HubStartError, start
from localhub.server import _listen


def test_a_hub_starts_serves_and_ends_cleanly(hub_factory, tmp_path):
    running = hub_factory(tmp_path / "root")
    endpoint = running.endpoint
    assert running.control.counters().total.requests == 0
    running.restart()
    assert running.endpoint == endpoint
    assert running.stop() == 0
    assert running.stop() is None
    with pytest.raises(RuntimeError, match="stopped"):
        _ = running.pid


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_says_where_it_listens_and_ends_on_signals(tmp_path, number):
    command = [sys.executable, "-m", "localhub", "serve", "--root", str(tmp_path / "root")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        announced = json.loads(process.stdout.readline())
        assert announced["pid"] == process.pid
        assert announced["root"] == str(tmp_path / "root")
        assert HubControl(announced["endpoint"]).counters().total.requests == 0
        process.send_signal(number)
        assert process.wait(20) == 0
        assert (process.stdout.read(), process.stderr.read()) == (b"", b"")


def test_a_hub_does_not_outlive_the_process_that_started_it(tmp_path):
    script = (
        "import os, sys; from pathlib import Path; from localhub.process import start; "
        "print(start(Path(sys.argv[1])).pid, flush=True); os.kill(os.getpid(), 9)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "root")]
    started = subprocess.run(command, capture_output=True, text=True, check=False)
    assert started.returncode == -9
    # The process that inherits it may collect it late, or never.
    with suppress(psutil.NoSuchProcess):
        hub = psutil.Process(int(started.stdout))
        while hub.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.05)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (lambda hub: {"port": hub.port}, "Address already in use"),
        (lambda _: {"start_timeout_s": 0.0}, "did not start: nothing on stderr"),
        (lambda hub: {"tokens": hub.root / "missing.yaml"}, "No such file"),
    ],
)
def test_a_hub_that_does_not_start(hub, tmp_path, options, words):
    with pytest.raises(HubStartError, match=words):
        start(tmp_path / "root", **options(hub))


def test_a_root_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["serve", "--root", str(tmp_path / "file" / "root")]) == 1
    assert "localhub: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [[], ["serve"], ["serve", "--root", "x", "--page-size", "0"], ["serve", "--root", "x", "--port", "65536"]],
)
def test_wrong_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: localhub" in capsys.readouterr().err


def test_answers_do_not_wait_for_acknowledgements():
    # asyncio turns Nagle's algorithm off for sockets of this protocol only; with it, every answer takes 40 ms.
    with _listen("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP
