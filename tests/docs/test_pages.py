"""What the pages say is true: settings, links, configurations, commands."""

import ast
import re
from pathlib import Path

import pytest
import yaml

from hfbucket_plugin.config import settings
from hfbucket_plugin.core import telemetry

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
LONGEST = 260
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page, language):
    return [text for found, text in BLOCK.findall(page.read_text(encoding="utf-8")) if found == language]


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            linked = page.parent / target if target else page
            assert linked.exists(), target
            assert not anchor or anchor in anchors(linked), f"{target}#{anchor}"


@pytest.mark.parametrize("name", ["README.md", "docs/configure.md"])
def test_configurations_load(name):
    loaded = 0
    for text in blocks(REPOSITORY / name, "yaml"):
        document = yaml.safe_load(text)
        for instance in document.get("remote_storage_plugins", []):
            own = settings.load(document["extra_config"], instance, document["remote_storage_plugins"])
            assert own.bucket_handle.bucket == "lmcache-kv"
            loaded += 1

    assert loaded


def test_make_targets_and_scripts_that_are_shown_exist():
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    for page in PAGES:
        for command in blocks(page, "bash"):
            for target in re.findall(r"^make ([\w-]+)", command, re.MULTILINE):
                assert f"\n{target}:" in makefile, target
            for script in re.findall(r"python (dev/benchmarks/\S+\.py)", command):
                assert (REPOSITORY / script).exists(), script


def test_every_metric_is_described():
    page = (REPOSITORY / "docs" / "metrics.md").read_text(encoding="utf-8")
    names = [value for name, value in vars(telemetry).items() if name.isupper() and isinstance(value, str)]
    assert len(names) >= 12
    for name in names:
        assert f"`{name}`" in page


def test_the_files_that_the_design_names_exist():
    text = (REPOSITORY / "docs" / "design.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:[\w-]+/)+(?:[\w-]+\.py)?)`", text))
    bases = (REPOSITORY, REPOSITORY / "hfbucket_plugin", REPOSITORY / "hfbucket_plugin" / "index")

    assert len(named) > 30
    assert [name for name in sorted(named) if not any((base / name).exists() for base in bases)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_page_is_too_long_to_read(page):
    assert len(page.read_text(encoding="utf-8").splitlines()) <= LONGEST


OF_LMCACHE = {"Failed to initialize/re-establish remote connection", "Creating HFBucket connector for plugin"}


def texts_of_the_code():
    """All texts in the packages, with an ellipsis for each value that is put into them."""
    for package in ("hfbucket_plugin", "warmer", "jobs"):
        for path in (REPOSITORY / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value


def test_the_messages_that_symptoms_quote_are_those_of_the_code():
    page = (REPOSITORY / "docs" / "troubleshoot.md").read_text(encoding="utf-8")
    bold = " ".join(re.findall(r"\*\*(.+?)\*\*", page, re.DOTALL))
    logged = re.findall(r"(?:log says|log line)\s+`([^`]+)`|\(`([^`]+)`;", page)
    quoted = {*re.findall(r"`([^`]+)`", bold), *(one for pair in logged for one in pair if one)}
    parts = {part.strip() for text in quoted if " " in text for part in " ".join(text.split()).split("…")}
    known = "\n".join(" ".join(text.split()) for text in texts_of_the_code())

    assert len(parts) > 10
    assert {part for part in parts if part not in known} - OF_LMCACHE == {"check --canary"}
