"""Every command and every example of docs/localhub.md is run, in their order, in one directory."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from localhub.app import Options, make_app

PAGE = Path(__file__).parents[2] / "docs" / "localhub.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return str(listener.getsockname()[1])


@pytest.fixture
def run_block(tmp_path):
    """Runs a block of the page; a server is left running until the test ends."""
    ports = {port: free_port() for port in ("4321", "4322")}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    place = {"cwd": tmp_path, "env": os.environ | {"PATH": path, "HF_HOME": str(tmp_path / "hf-home")}}
    serving: list[subprocess.Popen[str]] = []

    def run(language: str, text: str) -> str:
        text = re.sub("|".join(ports), lambda shown: ports[shown[0]], text)
        if language == "yaml":
            (tmp_path / "tokens.yaml").write_text(text)
            return text
        if text.startswith("python -m localhub serve"):
            command = ["bash", "-c", f"exec {text}"]
            serving.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **place))
            return serving[-1].stdout.readline()
        command = [sys.executable, "-c", text] if language == "python" else ["bash", "-euo", "pipefail", "-c", text]
        done = subprocess.run(command, capture_output=True, text=True, check=False, **place)
        assert done.returncode == 0, done.stderr
        return done.stdout

    yield run
    for process in serving:
        with process:
            process.terminate()
        assert process.returncode == 0


def test_the_page_does_what_it_says(run_block):
    blocks = BLOCK.findall(PAGE.read_text())
    assert {language for language, _ in blocks} == {"bash", "python", "yaml"}
    outputs = [run_block(language, text) for language, text in blocks]
    assert '"endpoint": "http://127.0.0.1:' in outputs[0]
    assert "greetings/hello.txt" in outputs[1]
    assert outputs[2] == "['hello.txt']\n"
    assert '"status":503' in outputs[5]
    assert outputs[5].endswith('{"cleared":1}')
    assert '"total":' in outputs[7]


def test_the_page_names_every_route(tmp_path):
    text = PAGE.read_text()
    app = make_app(Options(root=tmp_path / "root"))
    names = {route.name for route in app.routes if route.name and not route.path.startswith("/_control")}
    assert len(names) == 17
    assert [name for name in sorted(names) if f"`{name}`" not in text] == []


def test_the_page_names_every_option(capsys):
    from localhub.__main__ import main

    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    shown = capsys.readouterr().out
    options = set(re.findall(r"--[a-z-]+", shown)) - {"--help"}
    assert [option for option in sorted(options) if f"`{option}" not in PAGE.read_text()] == []
