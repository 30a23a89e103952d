"""What may be imported by whom: the wheel without extras goes into inference engines."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
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


def is_command_line(path):
    return path.name == "__main__.py" or path.relative_to(ROOT / "hfbucket_plugin").parts[0] in {"cli", "tools"}


def core():
    """The modules that an engine imports: all of the plugin but its command line."""
    return [path for path in modules_of("hfbucket_plugin") if not is_command_line(path)]


def test_only_the_command_line_needs_its_extra():
    assert [path.name for path in core() if {name.split(".")[0] for name in imported_by(path)} & HEAVY] == []


@pytest.mark.parametrize("package", ["core", "hub", "index", "store"])
def test_what_engines_and_commands_share_knows_nothing_of_lmcache(package):
    names = {name.split(".")[0] for path in modules_of(f"hfbucket_plugin/{package}") for name in imported_by(path)}

    assert not names & {"lmcache", "torch"}


def test_an_engine_that_imports_the_plugin_imports_neither_ray_nor_a_web_server():
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in core()]
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
    assert not imported & (HEAVY | {"warmer", "jobs", "localhub", "dev"})


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
    extras = project["optional-dependencies"]
    tools = {requirement(text) for text in [*extras["tools"], *extras["warmer"]]}  # pages of the warmer have plots

    assert declared_as(core()) <= engine
    assert declared_as(modules_of("hfbucket_plugin")) <= engine | tools
