"""The command itself: how it starts, what it refuses, and what it says of itself."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hfbucket_plugin.tools import exit_codes
from tests.support.buckets import SECRET, Desk, run, well_kept

ROOT = Path(__file__).parents[3]
COMMANDS = ["doctor", "ls", "stat"]


@pytest.fixture(autouse=True)
def _well_kept(monkeypatch):
    well_kept(monkeypatch)


def started(*arguments, program=("-m", "hfbucket_plugin"), **variables):
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    return subprocess.run(
        [sys.executable, *program, *arguments], capture_output=True, text=True, timeout=60, check=False, env=environment
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_the_exit_codes(command):
    ran = run(command, "--help")

    assert ran.code == 0
    assert "Exits 0" in ran.stdout


def test_it_starts_as_a_module(hub, bucket, tmp_path):
    done = started("stat", "--json", "--lmcache-config", str(Desk(hub.endpoint, bucket, tmp_path).config))

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["instances"][0]["groups"] == []


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_its_extra_it_says_what_to_install(missing):
    script = (
        f"import sys, runpy; sys.modules[{missing!r}] = None; runpy.run_module('hfbucket_plugin', run_name='__main__')"
    )
    done = started(program=("-c", script))

    assert done.returncode == exit_codes.USAGE
    assert done.stdout == ""
    assert done.stderr == "hfbucket: the command line needs typer and rich: pip install 'lmcache-hfbucket[tools]'\n"


def test_another_module_that_is_missing_is_not_blamed_on_the_extra():
    script = "import sys, runpy; sys.modules['hf_xet'] = None; runpy.run_module('hfbucket_plugin', run_name='__main__')"
    done = started(program=("-c", script))

    assert "ModuleNotFoundError" in done.stderr
    assert "lmcache-hfbucket[tools]" not in done.stderr


def test_it_imports_neither_lmcache_nor_torch():
    script = "import sys, hfbucket_plugin.cli.app; print(sorted({'torch', 'lmcache', 'ray'} & set(sys.modules)))"

    assert started(program=("-c", script)).stdout.strip() == "[]"


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--lmcache-config FILE, or --l2-adapter JSON"),
        (["--instance", "hfbucket.us"], "name a configuration: --lmcache-config FILE"),
        (["--lmcache-config", "/no/such/file.yaml"], "cannot be read"),
        (["--l2-adapter", SECRET], "not valid JSON"),
        (["--l2-adapter", '{"type": "s3"}'], "not a bucket adapter"),
    ],
)
def test_what_names_no_instance(command, arguments, words):
    ran = run(command, *arguments)

    assert (ran.code, ran.stdout) == (exit_codes.USAGE, "")
    assert words in ran.stderr
    assert len(ran.stderr.splitlines()) == 1


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("timeout", ["0", "-1", "nan", "inf", "soon"])
def test_a_timeout_that_is_none(command, timeout, tmp_path):
    ran = run(command, "--l2-adapter", Desk("http://hub", "o/b", tmp_path).adapter, "--timeout", timeout)

    assert (ran.code, ran.stdout) == (exit_codes.USAGE, "")
    assert "--timeout" in ran.stderr


def test_an_instance_that_is_not_declared(tmp_path):
    ran = Desk("http://hub", "o/b", tmp_path).run("ls", "--instance", "hfbucket.eu")

    assert ran.code == exit_codes.USAGE
    assert "declares hfbucket.us" in ran.stderr
