"""The pages `docs/warm*.md` say what is so."""

import dataclasses
import io
import json
import re
import shlex
from pathlib import Path

import pytest
import typer.main
import yaml
from ray.util.metrics import Counter, Metric

from hfbucket_plugin.config.lmcache_yaml import EngineConfig
from hfbucket_plugin.errors import ConfigError
from hfbucket_plugin.tools import exit_codes
from warmer.check.canary import EngineFound
from warmer.check.gate import CheckReport, NodeCheck
from warmer.cli.app import app
from warmer.cluster.ray import Node
from warmer.report import outcomes
from warmer.report.metrics import PREFIX, CountedBytes, RunMetrics
from warmer.report.progress import JsonLines
from warmer.report.summary import FailureLog, NodeReport, RunReport, TierRun
from warmer.request.model import FLAGS
from warmer.request.warm_file import load_request
from warmer.tiers import ENGINE_KINDS, TierOptions, declared_tier

ROOT = Path(__file__).parents[2]
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").glob("warm*.md")))


def section_of(title):
    """The text of a section, on whichever page it is."""
    return TEXT.split(f"\n## {title}\n")[1].split("\n## ")[0].split("\n# ")[0]


def named(section):
    """What stands in backquotes in the first column of the tables of a section."""
    text = section_of(section)
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| ")]
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


def test_every_option_is_described():
    options = {
        option
        for command in typer.main.get_command(app).commands.values()
        for parameter in command.params
        for option in parameter.opts
        if option.startswith("--") and option != "--help"
    }
    assert {name.split()[0] for name in named("Options") if name.startswith("--")} == options


def shown_yaml(section):
    text = section_of(section)
    (shown,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    return shown


def test_the_warm_yaml_shown_loads_and_has_every_setting(tmp_path):
    path = tmp_path / "warm.yaml"
    path.write_text(shown_yaml("warm.yaml"))
    wanted = load_request(path, {})
    assert wanted.choose.max_bytes == 50 * 2**30
    assert wanted.nodes.ranks["gpu-b"] == {4, 5, 6, 7}
    said = yaml.safe_load(path.read_text())
    for place in (flag.place for flag in FLAGS):
        value = said
        for step in place:
            value = value.get(step)
        assert value is not None or f"# {place[-1]}: " in path.read_text() or place[-1] == "l2_adapter", place


def test_every_field_of_a_check_is_described():
    text = section_of("Checking")
    names = {field.name for field in dataclasses.fields(NodeCheck)} | set(CheckReport(1.0).record(stopped=False))
    assert [name for name in names if f"`{name}`" not in text] == []


def test_every_reason_for_passing_by_is_described():
    text = section_of("The summary")
    source = "".join(path.read_text() for path in (ROOT / "warmer").rglob("*.py"))
    reasons = set(re.findall(r'skipped\["(\w+)"\]', source))
    assert len(reasons) >= 5
    assert [reason for reason in reasons if f"`{reason}`" not in text] == []


def test_every_field_of_the_summary_is_described():
    task = TierRun("i", "b", "t", {"prefix": ["p"]}, 1, 1)
    summary = RunReport(task, [Node("id", "name")], FailureLog(None)).summary(stopped=False)
    assert set(summary) <= named("The summary")
    assert all(f"`{field.name}`" in TEXT for field in dataclasses.fields(NodeReport))
    kinds = {outcomes.NODE_LOST, outcomes.NODE_START, outcomes.INTERNAL}
    assert kinds <= named("The summary")


def test_every_exit_code_is_described():
    codes = set(exit_codes.RESULTS)
    assert {int(code) for code in re.findall(r"^\| (\d) \|", TEXT, re.MULTILINE)} == codes


def test_the_configuration_shown_is_one_that_works(tmp_path):
    shown = shown_yaml("What the YAML must say")
    path = tmp_path / "lmcache.yaml"
    path.write_text(shown)
    config = EngineConfig.read(path)
    assert config.instance("hfbucket.us").bucket_handle.bucket_id == "my-org/lmcache-kv"
    assert declared_tier(config, "fs.warm").base_paths == (Path("/mnt/nvme/lmcache"),)
    assert set(yaml.safe_load(shown)) >= {"remote_storage_plugins", "extra_config"}


def test_the_tiers_shown_are_taken_and_those_named_as_impossible_refused():
    text = section_of("Tiers")
    for kind in ENGINE_KINDS:
        assert f"`{kind}`" in text
    (shown,) = re.findall(r"--l2-adapter '(\{.*?\})'", text)
    declared = declared_tier(None, shown)
    assert (declared.name, declared.layout.alignment) == ("fs_native:/mnt/nvme/kv", 4096)

    (line,) = re.findall(r"^  (remote_storage_plugin\.fs\.warm\.kv_shape: .*)$", text, re.MULTILINE)
    extra = yaml.safe_load(line) | {"remote_storage_plugin.fs.warm.base_path": "/mnt/kv"}
    header = declared_tier(EngineConfig("lmcache.yaml", ("fs.warm",), extra), "fs.warm").layout.header
    assert header.size == 28

    (impossible,) = re.findall(r"; MP (.*?) \|", text)
    for kind in re.findall(r"`(\w+)", impossible.replace("nixl_*", "nixl_store")):
        with pytest.raises(ConfigError, match="cannot be filled from outside"):
            declared_tier(None, json.dumps({"type": kind}))


def test_every_option_of_a_tier_is_described():
    options = {field.name for field in dataclasses.fields(TierOptions)}
    assert [name for name in options if f"`{name}`" not in TEXT and f"`--{name}`" not in TEXT] == []


def test_the_commands_shown_take_their_options():
    commands = re.findall(r"python -m warmer (plan|apply|check) ([^\n`]*)", TEXT)
    assert {name for name, _ in commands} == {"plan", "apply", "check"}
    known = typer.main.get_command(app).commands
    for name, arguments in commands:
        options = {option for parameter in known[name].params for option in parameter.opts}
        assert set(re.findall(r"--[a-z0-9-]+", arguments)) <= options


RUN = (
    {"--lmcache-config", "--instance", "--prefix", "--tier"},  # test_warmer_job, test_warmer_fleet
    {"--l2-adapter", "--prompts", "--world-size", "--chunk-size", "--tier"},  # test_warmer_l1_runs
    {"--config"},  # test_warmer_job
)


def test_the_commands_shown_are_those_that_the_tests_run():
    commands = re.findall(r"python -m warmer run [^\n]*", TEXT)
    assert len(commands) >= 2
    for command in commands:
        options = set(re.findall(r"--[a-z0-9-]+", command))
        assert options in RUN


def test_the_jobs_shown_are_commands():
    text = TEXT.replace("\\\n", " ")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    submitted = re.findall(r"^python -m warmer submit ([^\n`]*)", text + readme, re.MULTILINE)
    jobs = re.findall(r"^ray job submit [^\n]*-- +python -m warmer ([^\n`]*)", text, re.MULTILINE)
    checks = re.findall(r"^python -m warmer (check --config [^\n`]*)", text + readme, re.MULTILINE)
    assert (len(submitted), len(jobs), len(checks)) == (2, 2, 3)
    known = typer.main.get_command(app).commands
    for line in submitted:
        with known["submit"].make_context("submit", shlex.split(line)) as context:
            jobs.append(shlex.join(context.params["command"]))
    for line in [*jobs, *checks]:
        name, *rest = shlex.split(line)
        with known[name].make_context(name, rest) as context:
            assert context.params


def test_every_field_of_a_line_of_progress_is_described():
    out = io.StringIO()
    JsonLines(out, every_secs=0).show(
        RunReport(TierRun("i", "b", "t", {}, 1, 1), [Node("id", "name")], FailureLog(None))
    )
    assert json.loads(out.getvalue()).keys() <= named("Watching a run")


def test_every_field_of_a_canary_is_described():
    text = section_of("A gate for pipelines")
    names = {field.name for field in dataclasses.fields(EngineFound)} | {"require", "prompt"}
    assert [name for name in names if f"`{name}`" not in text] == []


def test_every_metric_of_a_run_is_described():
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(ray_warmer_\w+)` \| (\w+) \|", page, re.MULTILINE))
    made = [value for value in vars(RunMetrics()).values() if isinstance(value, (Metric, CountedBytes, dict))]
    flat = [one for value in made for one in (value.values() if isinstance(value, dict) else [value])]
    pairs = [one for value in flat for one in (vars(value).values() if isinstance(value, CountedBytes) else [value])]
    metrics = [one for one in pairs if isinstance(one, Metric)]
    reported = {
        f"{PREFIX}{one.info['name']}" + "_total" * isinstance(one, Counter): type(one).__name__.lower()
        for one in metrics
    }
    assert len(reported) == 11
    assert rows == reported
