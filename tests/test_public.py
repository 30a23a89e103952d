"""The names that may be imported, and what an import of them does to a process."""

import importlib
import json
import pkgutil
import subprocess
import sys

import pytest

import hfbucket_plugin
import jobs
import warmer
from tests.docs.examples import PAGE

PACKAGES = (hfbucket_plugin, warmer, jobs)
HEAVY = {"ray", "torch", "typer", "lmcache", "hf_xet", "matplotlib"}


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_public_names_are_sorted_and_can_be_imported(package):
    assert package.__all__ == sorted(package.__all__)
    assert all(getattr(package, name) is not None for name in package.__all__)
    assert set(package.__all__) <= set(dir(package))


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_no_public_name_is_that_of_a_module(package):
    modules = {found.name for found in pkgutil.iter_modules(package.__path__)}

    assert not modules & set(package.__all__)


@pytest.mark.parametrize("package", ["warmer", "jobs"])
def test_a_name_that_is_not_public_is_refused_in_pythons_words(package):
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'warm_down'"):
        importlib.import_module(package).warm_down  # noqa: B018 - the access is what is tested


def test_importing_the_packages_changes_no_process():
    script = (
        "import json, logging, signal, sys\n"
        "handlers = lambda: [str(signal.getsignal(one)) for one in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]\n"
        "before = handlers()\n"
        "import hfbucket_plugin, warmer, jobs\n"
        "logs = [logging.getLogger(name) for name in (None, 'hfbucket_plugin', 'warmer', 'jobs')]\n"
        "print(json.dumps({'loaded': [name.split('.')[0] for name in sys.modules], 'same': handlers() == before,\n"
        "    'logs': [len(log.handlers) + log.level * (log.name != 'root') for log in logs]}))\n"
    )

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)

    found = json.loads(done.stdout)
    assert (found["same"], found["logs"]) == (True, [0, 0, 0, 0])
    assert not HEAVY & set(found["loaded"])


def test_calls_are_documented():
    text = PAGE.read_text(encoding="utf-8")
    calls = {name for package in (warmer, jobs) for name in package.__all__ if name.islower()}

    assert {name for name in calls if f".{name}" not in text} == set()
