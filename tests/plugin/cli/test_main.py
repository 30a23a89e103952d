"""The command `hfbucket`, which dispatches to the commands of what is installed."""

import signal
import subprocess
import sys
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import pytest

from hfbucket_plugin import __version__
from hfbucket_plugin.cli.app import app as plugin
from hfbucket_plugin.cli.main import COMMANDS, GROUPS, main
from jobs.cli.app import app as jobs
from warmer.cli.app import app as warmer

SCRIPT = Path(sys.executable).with_name("hfbucket")


def ended(capsys, *arguments):
    """The exit code, stdout and stderr of a command line."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return ended.value.code, *capsys.readouterr()


def names(app):
    groups = {group.name for group in app.registered_groups}
    return groups | {command.name or command.callback.__name__ for command in app.registered_commands}


def test_every_command_of_the_packages_can_be_called():
    assert {point.name for point in entry_points(group=COMMANDS)} == names(plugin) | names(jobs)
    assert {point.load() for point in entry_points(group=GROUPS)} == {warmer}
    assert {point.load() for point in entry_points(group=COMMANDS)} == {plugin, jobs}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["cleanup", "--help"], "Usage: hfbucket cleanup"),
        (["fingerprint", "show", "--help"], "Usage: hfbucket fingerprint show"),
        (["doctor", "--help"], "Usage: hfbucket doctor"),
        (["warm", "plan", "--help"], "Usage: hfbucket warm plan"),
        (["--help"], "  cleanup\n"),
        (["--version"], f"hfbucket {__version__}\n"),
    ],
)
def test_a_command_is_found_by_its_name(capsys, arguments, words):
    code, out, _ = ended(capsys, *arguments)

    assert (code, words in out) == (0, True)


def test_an_unknown_command_names_the_nearest(capsys):
    assert ended(capsys, "claenup") == (
        2,
        "",
        "hfbucket: there is no command 'claenup' (did you mean 'cleanup'?)\n",
    )


def test_an_unknown_command_that_is_near_none_lists_all(capsys):
    code, out, err = ended(capsys, "xyzzy")

    assert (code, out) == (2, "")
    assert err.startswith("hfbucket: there is no command 'xyzzy'; known are apply, cleanup, ")


def test_a_missing_extra_is_named_with_what_to_install(capsys, monkeypatch):
    point = EntryPoint(name="cleanup", group=COMMANDS, value="jobs.cli.app:app")
    monkeypatch.setattr("hfbucket_plugin.cli.main.entry_points", lambda group: [point] if group == COMMANDS else [])
    monkeypatch.delitem(sys.modules, "jobs.cli.app")
    monkeypatch.setitem(sys.modules, "typer", None)

    assert ended(capsys, "cleanup") == (
        2,
        "",
        "hfbucket: cleanup needs typer, which is not installed: pip install 'lmcache-hfbucket[jobs]'\n",
    )


def test_packages_of_the_working_directory_are_not_taken_for_ours(tmp_path):
    package = tmp_path / "jobs"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('the package of the working directory was imported')")

    found = subprocess.run([SCRIPT, "cleanup", "--help"], cwd=tmp_path, capture_output=True, text=True, check=False)

    assert (found.returncode, "Usage: hfbucket cleanup" in found.stdout) == (0, True)


@pytest.mark.parametrize("module", ["__init__.py", "cli.py"])
def test_another_package_of_a_name_of_ours_is_named(tmp_path, monkeypatch, module):
    package = tmp_path / "jobs"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / module).write_text("x = 1")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    found = subprocess.run([SCRIPT, "status"], capture_output=True, text=True, check=False)

    assert (found.returncode, found.stdout) == (2, "")
    assert f"another package of that name at {package} comes before it" in found.stderr
    assert len(found.stderr.splitlines()) == 1


ENDED_WHILE_STARTING = """
import os, runpy, signal, sys

_, module, number, package = sys.argv

class Finder:
    def find_spec(self, name, *_):
        if name == module:
            os.kill(os.getpid(), signal.Signals[number])

sys.meta_path.insert(0, Finder())
sys.argv[1:] = ["--help"]
runpy.run_module(package, run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize(
    ("package", "module", "code"),
    [
        ("warmer", "warmer.cli.app", 5),
        ("jobs", "jobs.cli.app", 5),
        ("hfbucket_plugin", "hfbucket_plugin.cli.app", None),
    ],
)
def test_a_signal_while_a_command_starts_is_no_traceback(package, module, code, name):
    ran = subprocess.run(
        [sys.executable, "-c", ENDED_WHILE_STARTING, module, name, package],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (ran.returncode, ran.stderr) == (code or 128 + signal.Signals[name], "told to stop\n")
    assert ran.stdout == ""
