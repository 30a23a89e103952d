"""What the two wheels of this repository contain and require."""

import re
import sys
import tomllib
import zipfile
from email.parser import Parser
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import NamedTuple

import pytest
from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
SERVERS_AND_CLUSTERS = {"aiohttp", "httptools", "ray", "starlette", "uvicorn"}


class Wheel(NamedTuple):
    files: frozenset[str]
    name: str
    requirements: tuple[Requirement, ...]

    @property
    def packages(self):
        return {file.split("/")[0] for file in self.files if ".dist-info/" not in file}

    def required(self, extra=""):
        return {
            canonicalize_name(one.name)
            for one in self.requirements
            if one.marker is None or one.marker.evaluate({"extra": extra})
        }


def build(source, directory, kind="standard"):
    """Build a wheel of the project in `source` and return its path."""
    return Path(next(WheelBuilder(str(source)).build(directory=str(directory), versions=[kind])))


def read(path):
    with zipfile.ZipFile(path) as wheel:
        files = frozenset(wheel.namelist())
        (described,) = (name for name in files if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(wheel.read(described).decode())
        (licence,) = (name for name in files if name.endswith("/LICENSE"))
        assert wheel.read(licence) == (ROOT / "LICENSE").read_bytes()
    requirements = tuple(Requirement(one) for one in metadata.get_all("Requires-Dist"))
    return Wheel(files, canonicalize_name(metadata["Name"]), requirements)


@pytest.fixture(scope="module")
def engine_wheel(tmp_path_factory):
    return read(build(ROOT, tmp_path_factory.mktemp("dist")))


@pytest.fixture(scope="module")
def localhub_wheel(tmp_path_factory):
    return read(build(ROOT / "localhub", tmp_path_factory.mktemp("dist")))


def test_each_wheel_holds_its_packages_and_no_other(engine_wheel, localhub_wheel):
    assert engine_wheel.packages == {"hfbucket_plugin", "warmer", "jobs"}
    assert localhub_wheel.packages == {"localhub"}
    for wheel in engine_wheel, localhub_wheel:
        modules = {str(path.relative_to(ROOT)) for package in wheel.packages for path in (ROOT / package).rglob("*.py")}
        typed = {f"{package}/py.typed" for package in wheel.packages}
        assert {file for file in wheel.files if ".dist-info/" not in file} == modules | typed


def test_an_engine_needs_neither_ray_nor_a_web_server(engine_wheel):
    needed = engine_wheel.required()
    assert "lmcache" in needed
    assert not needed & SERVERS_AND_CLUSTERS


def test_no_wheel_requires_a_distribution_of_this_repository(engine_wheel, localhub_wheel):
    ours = {engine_wheel.name, localhub_wheel.name}
    assert len(ours) == 2
    for wheel in engine_wheel, localhub_wheel:
        assert not {canonicalize_name(one.name) for one in wheel.requirements} & ours


def test_the_extra_brings_what_localhub_requires(engine_wheel, localhub_wheel):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    base = {str(one) for one in engine_wheel.requirements if one.marker is None}
    required = {str(one) for one in localhub_wheel.requirements}
    assert required - base == {str(Requirement(one)) for one in extras["localhub"]}


def test_localhub_requires_what_it_imports(localhub_wheel):
    imported = {
        module
        for path in (ROOT / "localhub").rglob("*.py")
        for module in re.findall(r"^ *(?:from|import) (\w+)", path.read_text(), re.MULTILINE)
    }
    distributions = packages_distributions()
    needed = {
        canonicalize_name(distributions[name][0]) for name in imported - set(sys.stdlib_module_names) - {"localhub"}
    }
    assert needed <= localhub_wheel.required()
    assert localhub_wheel.required() - needed == {"httptools"}  # for uvicorn


def test_an_editable_install_finds_localhub_in_the_checkout(tmp_path):
    with zipfile.ZipFile(build(ROOT, tmp_path, "editable")) as wheel:
        (link,) = (name for name in wheel.namelist() if name.endswith(".pth"))
        assert wheel.read(link).decode().split() == [str(ROOT)]
