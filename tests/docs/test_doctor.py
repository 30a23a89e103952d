"""`docs/doctor.md` says what is so, and every command that it shows is run."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
from huggingface_hub import HfApi

from hfbucket_plugin.cli import doctor
from hfbucket_plugin.cli.app import app
from hfbucket_plugin.cli.checks import access, engine, environment, metadata, probe_write
from hfbucket_plugin.cli.findings import Severity
from hfbucket_plugin.tools import exit_codes

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "doctor.md"
TEXT = PAGE.read_text(encoding="utf-8")
COMMANDS = [
    command
    for block in re.findall(r"^```bash\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    for command in re.split(r"\n(?=python)", block.strip())
]


def table(section):
    """The rows of the last table of a section, as lists of cells."""
    text = TEXT.split(f"## {section}\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row] for row in rows[1:]]


@pytest.fixture
def place(hub_factory, tmp_path):
    """A directory with the configuration of `configure.md`, and the variables of an engine beside a Hub with its bucket."""
    hub = hub_factory()
    api = HfApi(endpoint=hub.endpoint, token=False)
    api.create_bucket("my-org/lmcache-kv", private=True)
    names = [f"us/org%2Fmodel%408%40{worker}%40{number:x}%40bfloat16" for worker in range(2) for number in range(1, 4)]
    names += ["eu/org%2Fmodel%408%400%401%40bfloat16", "us/README.md"]
    api.batch_bucket_files("my-org/lmcache-kv", add=[(name.encode(), name) for name in names])
    shown = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "docs" / "configure.md").read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "lmcache.yaml").write_text(next(text for text in shown if "hfbucket.us.bucket_handle" in text))
    tokens = dict.fromkeys(("HF_TOKEN", "HF_US_TOKEN", "HF_EU_TOKEN"), "hf_of-a-local-hub")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    own = {"HF_ENDPOINT": hub.endpoint, "PYTHONHASHSEED": "0", "PYTHONPATH": str(ROOT), "PATH": path}
    return tmp_path, os.environ | tokens | own


def test_every_command_does_what_the_page_says(place):
    directory, environment = place
    written = {}
    for command in COMMANDS:
        if command.startswith("pip install"):
            assert command == "pip install 'lmcache-hfbucket[tools]'"
            continue
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=directory, env=environment, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        written[command] = done.stdout

    assert len(written) == len(COMMANDS) - 1 == 9
    findings = json.loads((directory / "findings.json").read_text())
    assert [one["instance"] for one in findings["instances"]] == ["hfbucket.us", "hfbucket.eu"]
    keys = [json.loads(line) for line in (directory / "keys.jsonl").read_text().splitlines()]
    assert len(keys) == 7
    assert set(keys[0]) <= set(re.findall(r"`([^`\n]+)`", TEXT))


def test_every_check_is_described():
    names = {
        engine.CONFIG,
        engine.ENGINE,
        engine.HASH_SEED,
        access.NAME,
        engine.NAME,
        metadata.INDEX,
        probe_write.NAME,
        *doctor.OF_THE_HUB,
        *(name for name, _ in environment.CHECKS),
    }

    assert {cells[0].strip("`") for cells in table("What it says")} == names


def test_every_severity_is_described():
    assert all(f"`{severity}`" in TEXT for severity in Severity)


def test_every_exit_code_is_described():
    codes = {exit_codes.OK, exit_codes.WARNINGS, exit_codes.USAGE, exit_codes.ERRORS}

    assert {int(cells[0]) for cells in table("Exit codes")} == codes


def test_every_option_is_described_where_it_belongs():
    commands = typer.main.get_command(app).commands
    given = {
        name: {option for parameter in command.params for option in parameter.opts} - {"--help"}
        for name, command in commands.items()
    }
    described = {
        name: {
            cells[0].strip("`").split()[0]
            for cells in table("Options")
            if cells[2] == "all" or name in re.findall(r"`(\w+)`", cells[2])
        }
        for name in commands
    }

    assert described == given


def test_every_command_shown_anywhere_exists():
    commands = typer.main.get_command(app).commands
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for line in re.findall(r"python -m hfbucket_plugin (\w+[^\n|>`]*)", page.read_text(encoding="utf-8")):
            name, *arguments = shlex.split(line.split(" '{")[0])
            options = {option for parameter in commands[name].params for option in parameter.opts}
            assert {argument for argument in arguments if argument.startswith("--")} <= options, line
