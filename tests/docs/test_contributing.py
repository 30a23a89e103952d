"""`CONTRIBUTING.md` names files that exist and commands that work."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
COMMANDS = [
    line.partition("#")[0].strip()
    for block in re.findall(r"^```bash\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
]
LAYOUT = re.search(r"^```text\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)[1]


def test_every_file_that_is_named_exists():
    named = set(re.findall(r"`((?:[\w.-]+/)+[\w.-]*)`", TEXT)) - {"docs/decisions/NNNN-what-was-decided.md"}

    assert len(named) > 10
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_the_layout_is_that_of_the_packages():
    directories, package = {}, ""
    for line in LAYOUT.splitlines():
        name = line.split()[0].rstrip("/")
        if line.startswith(" "):
            name = f"{package}/{name}"
        else:
            package = name
        directories[name] = line
    packages = {path.parent.name for path in (ROOT / "hfbucket_plugin").glob("*/__init__.py")}

    assert [name for name in directories if not (ROOT / name).is_dir()] == []
    assert {name.rpartition("/")[2] for name in directories if name.startswith("hfbucket_plugin/")} == packages
    for package in ("warmer", "jobs"):
        for name in re.findall(r"(\w+)/ ", f"{directories[package]} "):
            assert (ROOT / package / name).is_dir() or name == package, name
    assert len(LAYOUT.splitlines()) <= 20


@pytest.mark.parametrize("command", [command for command in COMMANDS if " pytest " in command])
def test_the_tests_that_it_shows_are_found(command):
    words = shlex.split(command)
    assert words[:3] == [".venv/bin/python", "-m", "pytest"]
    arguments = [word for word in words[3:] if word != "-q"]
    paths = [word for word in arguments if word.startswith("tests/")]

    assert paths
    assert all((ROOT / path).exists() for path in paths)
    if "-k" in arguments:
        wanted = arguments[arguments.index("-k") + 1]
        assert any(wanted in path.name for path in (ROOT / paths[0]).rglob("test_*.py"))


def test_the_targets_of_make_that_it_shows_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"`?make ([a-z-]+)", TEXT))

    assert {"test", "lint", "docs"} <= targets
    assert [target for target in targets if f"\n{target}:" not in makefile] == []
    listed = subprocess.run(["make", "-n", "docs"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "dev.metrics_table" in listed.stdout
