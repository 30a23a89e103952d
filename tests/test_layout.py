"""The layout: few names at each level, imports that go downwards, and no circle; see docs/design.md."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("hfbucket_plugin", "warmer", "jobs", "localhub")
MOST_NAMES = 12
LEVELS = [{"errors"}, {"core"}, {"config"}, {"hub"}, {"index", "fingerprint", "tools"}, {"store"}, {"engine"}]
LEVELS += [{"adapter", "l2_adapter"}, {"cli"}]
LEVEL = {name: number for number, names in enumerate(LEVELS) for name in names}
# What warmer and jobs may import, beside what is their own.
PLUGIN = {"hfbucket_plugin." + name for name in ("errors", "core", "config", "hub", "index", "fingerprint", "tools")}
MAY_IMPORT = {
    "warmer": PLUGIN,
    "jobs": PLUGIN | {"warmer.cluster", "warmer.plan.key_files", "warmer.report"},
    "localhub": set(),
}


def name_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}


def imports(module):
    """The modules of ours that a module imports anywhere, those for types only included."""
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            named = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else node.module for name in named if node.module in MODULES)


IMPORTS = {module: set(imports(module)) - {module} for module in MODULES}


def may_import(importer, imported):
    package, imported_package = importer.split(".")[0], imported.split(".")[0]
    if imported in PACKAGES and imported == imported_package:
        return True  # the version
    if package == imported_package == "hfbucket_plugin":
        here, there = (name.split(".")[1] for name in (f"{importer}.cli", imported))
        return here == there or LEVEL[there] < LEVEL.get(here, len(LEVELS))
    return package == imported_package or any(
        imported == allowed or imported.startswith(f"{allowed}.") for allowed in MAY_IMPORT.get(package, ())
    )


def test_imports_go_downwards():
    wrong = [f"{a} imports {b}" for a, names in IMPORTS.items() for b in names if not may_import(a, b)]

    assert sorted(wrong) == []


def test_no_two_modules_import_each_other_in_a_circle():
    graphlib.TopologicalSorter(IMPORTS).prepare()


@pytest.mark.parametrize("package", PACKAGES)
def test_no_level_has_more_than_twelve_names(package):
    levels = [path for path in (ROOT / package).rglob("*") if (path / "__init__.py").exists()] + [ROOT / package]
    names = {
        level: [path.name for path in level.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()]
        for level in levels
    }
    full = {str(level): sorted(set(found) - {"__init__.py", "__main__.py"}) for level, found in names.items()}

    assert {level: found for level, found in full.items() if len(found) > MOST_NAMES} == {}
