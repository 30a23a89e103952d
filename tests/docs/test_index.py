"""`docs/index.md` and the schedules of the key index in `deploy/` say what is so; every command that the page shows is run."""

import re
import shlex
from configparser import ConfigParser
from pathlib import Path

import pytest
import typer.main
import yaml

from hfbucket_plugin.config.instances import named_instances
from hfbucket_plugin.core.units import format_duration
from hfbucket_plugin.tools import exit_codes
from jobs.cli.app import app
from jobs.index.build import IndexOrder
from jobs.index.report import IndexBuild, IndexSummary
from jobs.index.verify import Differences
from jobs.options import IndexOptions
from jobs.report import GAUGES
from tests.support.buckets import Depot, key

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
COMMAND = typer.main.get_command(app).commands["index"]
CRON = (ROOT / "deploy/cron/lmcache-index").read_text()
SERVICE = (ROOT / "deploy/systemd/lmcache-index.service").read_text()
CRONJOB = list(yaml.safe_load_all((ROOT / "deploy/kubernetes/index-cronjob.yaml").read_text()))
RAYCRONJOB = list(yaml.safe_load_all((ROOT / "deploy/kubernetes/index-raycronjob.yaml").read_text()))


def shown(text):
    """The options of the commands in a text."""
    return [shlex.split(found)[4:] for found in re.findall(r"python -m jobs index --[^`|\n]*", text)]


def container():
    (one,) = CRONJOB[1]["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    return one


def entrypoint():
    return shlex.split(RAYCRONJOB[1]["spec"]["jobTemplate"]["entrypoint"])


@pytest.mark.parametrize(
    "arguments", [*shown(CRON), *shown(SERVICE), container()["args"], entrypoint()[4:]], ids=" ".join
)
def test_commands_of_schedules_are_taken(arguments):
    with COMMAND.make_context("index", list(arguments)) as context:
        assert context.params["all_instances"]


def test_there_are_commands_in_every_file():
    assert [len(shown(text)) for text in (CRON, SERVICE)] == [2, 1]
    assert container()["command"] == entrypoint()[:4] == ["python", "-m", "jobs", "index"]
    assert container()["args"] == entrypoint()[4:]


def test_commands_of_the_page_do_what_it_says(hub, bucket, tmp_path):
    depot = Depot(hub, bucket, tmp_path)
    depot.put([key(number) for number in range(3)])
    commands = shown(TEXT)
    assert len(commands) == 4
    for arguments in commands:
        ran = depot.run("index", *arguments[arguments.index("lmcache.yaml") + 1 :])
        assert ran.code == 0, ran.stderr
        assert ran.summary["job"] == "index"


def test_the_cronjob_and_the_raycronjob_are_one(tmp_path):
    path = tmp_path / "lmcache.yaml"
    path.write_text(CRONJOB[0]["data"]["lmcache.yaml"])
    assert [one.name for one in named_instances(path)] == ["hfbucket.us"]
    assert CRONJOB[1]["spec"]["concurrencyPolicy"] == "Forbid"
    template = RAYCRONJOB[1]["spec"]["jobTemplate"]
    assert RAYCRONJOB[0] == CRONJOB[0]
    assert RAYCRONJOB[1]["spec"]["schedule"] == CRONJOB[1]["spec"]["schedule"]
    assert (template["backoffLimit"], template["shutdownAfterJobFinishes"]) == (0, True)
    (head,) = template["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
    assert head["env"] == container()["env"]
    assert head["volumeMounts"] == container()["volumeMounts"]


def test_units_hold_together():
    units = {}
    for path in (ROOT / "deploy" / "systemd").glob("lmcache-index*"):
        units[path.name] = ConfigParser(interpolation=None, strict=False)
        units[path.name].optionxform = str
        units[path.name].read_string(path.read_text())
    assert units["lmcache-index.timer"]["Timer"]["OnCalendar"]
    assert units["lmcache-index.service"]["Unit"]["OnFailure"].split("@")[0] + "@.service" in units


@pytest.mark.parametrize("name", [name for name in GAUGES if "_index_" in name])
def test_metrics_are_described(name):
    assert f"`{name}`" in TEXT


def test_every_field_of_the_summary_is_described():
    from hfbucket_plugin.core.units import Extent

    made = IndexBuild("journals", "", Extent(), None, 0, same=False, journals=0, garbage=0)
    record = IndexSummary("hfbucket.us", "", 0, made=made, differences=Differences()).record()

    assert [name for name in record if f"`{name}`" not in TEXT] == []
    assert [
        name for name in record["differences"] if name not in ("keys", "listed", "examples") and f"`{name}`" not in TEXT
    ] == []


def test_every_exit_code_is_described():
    assert [int(code) for code in re.findall(r"^\| (\d) \|", TEXT, re.MULTILINE)] == sorted(exit_codes.RESULTS)


def test_defaults_are_those_of_the_page():
    order, request = IndexOrder(), IndexOptions()
    assert "`--full-every` (24h:" in TEXT
    assert f"`--keep` ({request.keep}," in TEXT
    assert f"`--grace` ({format_duration(request.grace)})" in TEXT
    assert (request.full_every.total_seconds(), request.keep, request.grace.total_seconds()) == (86400, 2, 3600)
    assert (order.full_every_secs, order.keep, order.grace) == (86400, request.keep, request.grace)
