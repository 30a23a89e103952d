"""What may be imported by whom: the wheel without extras goes into inference engines."""

import ast
import functools
import graphlib
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("hfbucket_plugin", "warmer", "jobs", "localhub", "demo", "benchmarks", "faults", "tests")
# Downward only. The CLI that starts a local Hub may import it: localhub's own.
MAY_IMPORT = {
    "hfbucket_plugin": {"hfbucket_plugin"},
    "warmer": {"warmer", "hfbucket_plugin"},
    "jobs": {"jobs", "warmer", "hfbucket_plugin"},
    "localhub": {"localhub"},
}
HEAVY = {"ray", "starlette", "uvicorn", "typer", "rich", "fastapi", "pytest", "hypothesis"}


def modules_of(package):
    return sorted((ROOT / package).rglob("*.py"))


def imported_by(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            if node.module == "hfbucket_plugin":
                yield from (f"hfbucket_plugin.{alias.name}" for alias in node.names)
            else:
                yield node.module


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_go_downwards_only(package):
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in modules_of(package)
        for name in imported_by(path)
        if (top := name.split(".")[0]) in PACKAGES and top not in MAY_IMPORT[package]
    ]

    assert wrong == []


def is_command_line(path):
    return path.name == "__main__.py" or "cli" in path.relative_to(ROOT / "hfbucket_plugin").parts


def core():
    """The modules that an engine imports: all of the plugin but its command line."""
    return [path for path in modules_of("hfbucket_plugin") if not is_command_line(path)]


@functools.cache
def rooms():
    """The modules of the plugin, each with those that it imports."""
    return {
        path.stem: {name.split(".")[1] for name in imported_by(path) if name.startswith("hfbucket_plugin.")}
        for path in core()
        if path.stem != "__init__"
    }


def test_nothing_imports_the_command_line():
    assert [
        path.name for path in core() if any(name.startswith("hfbucket_plugin.cli") for name in imported_by(path))
    ] == []


def test_only_the_command_line_needs_its_extra():
    assert [path.name for path in core() if {name.split(".")[0] for name in imported_by(path)} & HEAVY] == []


def below(room):
    """All that a room of the plugin imports, directly or not."""
    found, todo = set(), [room]
    while todo:
        for name in rooms()[todo.pop()] - {"__version__"} - found:
            found.add(name)
            todo.append(name)
    return found


def test_inside_the_plugin_no_two_rooms_import_each_other():
    order = list(graphlib.TopologicalSorter(rooms()).static_order())

    assert order.index("errors") < order.index("bucket") < order.index("chunks") < order.index("connector")


# What a room knows nothing of, as docs and architecture say.
IGNORANT = {
    "errors": {"metrics", "handle", "settings", "keys", "hub", "bucket", "transfer", "chunks", "connector"},
    "metrics": {"hub", "bucket", "settings"},
    "handle": {"settings", "hub", "bucket"},
    "keys": {"bucket", "hub", "settings", "transfer", "handle"},
    "settings": {"hub", "bucket", "transfer", "xet"},
    "transfer": {"keys", "bucket", "chunks", "catalog", "settings"},
    "bucket": {"keys", "chunks", "connector", "adapter", "engine_memory", "catalog"},
    "chunks": {"connector", "adapter", "engine_memory"},
    "catalog": {"chunks", "connector", "adapter"},
}


@pytest.mark.parametrize("room", IGNORANT)
def test_a_room_does_not_know_what_it_need_not(room):
    assert not below(room) & IGNORANT[room]


@pytest.mark.parametrize(
    "module", ["transfer", "bucket", "hub", "xet", "settings", "keys", "handle", "errors", "metrics"]
)
def test_the_lower_rooms_know_nothing_of_lmcache(module):
    names = list(imported_by(ROOT / "hfbucket_plugin" / f"{module}.py"))

    assert not any(name.split(".")[0] in {"lmcache", "torch"} for name in names)


def test_an_engine_that_imports_the_plugin_imports_neither_ray_nor_a_web_server():
    names = [f"hfbucket_plugin.{path.stem}" for path in core() if path.stem != "__init__"]
    script = (
        "import importlib, json, sys\n"
        "import lmcache.v1.storage_backend.connector\n"  # what LMCache itself brings is not ours
        "import lmcache.integration.vllm.utils\n"
        "before = set(sys.modules)\n"
        f"for name in {names!r}:\n"
        "    importlib.import_module(name)\n"
        "print(json.dumps(sorted({name.split('.')[0] for name in set(sys.modules) - before})))\n"
    )

    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=240, check=True, cwd=ROOT
    )

    imported = set(json.loads(done.stdout.splitlines()[-1]))
    assert "hfbucket_plugin" in imported
    assert not imported & (HEAVY | {"warmer", "jobs", "localhub", "demo", "faults"})


def test_the_package_itself_imports_nothing_heavy():
    script = "import sys, hfbucket_plugin; print(sorted({'torch', 'lmcache', 'hf_xet', 'ray'} & set(sys.modules)))"

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)

    assert done.stdout.strip() == "[]"


def requirement(text):
    return re.match(r"[A-Za-z0-9._-]+", text)[0].lower().replace("_", "-")


def test_what_an_engine_installs_holds_neither_ray_nor_a_web_server():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    core = {requirement(text) for text in project["dependencies"]}

    assert not core & HEAVY
    assert {"huggingface-hub", "hf-xet", "lmcache", "pydantic"} <= core


# Distribution names that differ from what is imported.
DISTRIBUTIONS = {"yaml": "pyyaml", "torch": "lmcache"}


def declared_as(modules):
    """The distributions of what is imported."""
    imported = {name.split(".")[0] for path in modules for name in imported_by(path)}
    foreign = imported - set(sys.stdlib_module_names) - {"hfbucket_plugin"}
    return {DISTRIBUTIONS.get(name, name).replace("_", "-") for name in foreign}


def test_what_the_plugin_imports_directly_is_declared_directly():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    engine = {requirement(text) for text in project["dependencies"]}
    tools = {requirement(text) for text in project["optional-dependencies"]["tools"]}

    assert declared_as(core()) <= engine
    assert declared_as(modules_of("hfbucket_plugin")) <= engine | tools
