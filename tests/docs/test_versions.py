"""The oldest versions that are tested are the oldest that are permitted."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
_BOUND = re.compile(r"([A-Za-z0-9_-]+)(?:\[[^]]*\])?>=([0-9.]+)")


def version(text):
    parts = [int(part) for part in text.split(".")]
    while parts and not parts[-1]:
        parts.pop()
    return parts


def test_the_oldest_permitted_versions_are_those_that_are_tested():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [
        *project["dependencies"],
        *(one for name in ("tools", "warmer", "jobs", "localhub") for one in extras[name]),
    ]
    pinned = dict(line.split("==") for line in (ROOT / "constraints-min.txt").read_text().splitlines() if "==" in line)

    bounds = dict(_BOUND.match(one).groups() for one in wanted)

    assert {name: version(pinned[name]) for name in bounds} == {name: version(bound) for name, bound in bounds.items()}


def test_the_version_is_that_of_the_latest_release_in_the_changelog():
    own, localhub = (
        tomllib.loads(path.read_text())["project"]["version"]
        for path in (ROOT / "pyproject.toml", ROOT / "localhub" / "pyproject.toml")
    )
    released = re.findall(r"^## \[([0-9.]+)\] - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)

    assert own == localhub == released[0]
