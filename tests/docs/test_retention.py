"""`docs/retention.md` and `deploy/` say what is so."""

import re
import shlex
from configparser import ConfigParser
from pathlib import Path

import pytest
import typer.main
import yaml

from hfbucket_plugin.tools import exit_codes
from hfbucket_plugin.tools.inventory import ObjectKind
from jobs.batch.model import Outcome
from jobs.cli.app import app
from jobs.report import GAUGES
from jobs.retention import policy
from jobs.retention.order import Reason

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "retention.md"
TEXT = PAGE.read_text(encoding="utf-8")
COMMANDS = typer.main.get_command(app).commands
CRONJOB = list(yaml.safe_load_all((ROOT / "deploy/kubernetes/retention-cronjob.yaml").read_text()))
RAYCRONJOB = list(yaml.safe_load_all((ROOT / "deploy/kubernetes/retention-raycronjob.yaml").read_text()))
SERVICE = ROOT / "deploy" / "systemd" / "lmcache-retention.service"


def shown(text):
    """The commands in a text, as lists of arguments from their name on."""
    return [
        shlex.split(found)[3:] for found in re.findall(r"python -m jobs (?:cleanup|rm|status|apply) [^`|\n]*", text)
    ]


def in_cronjob():
    (container,) = CRONJOB[1]["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    return container["command"] + container["args"]


def every_command():
    texts = [TEXT, SERVICE.read_text(), (ROOT / "deploy/cron/lmcache-retention").read_text()]
    commands = [command for text in texts for command in shown(text)]
    line, entrypoint = in_cronjob(), shlex.split(RAYCRONJOB[1]["spec"]["jobTemplate"]["entrypoint"])
    return [*commands, line[line.index("jobs") + 1 :], entrypoint[3:]]


@pytest.mark.parametrize("arguments", every_command(), ids=" ".join)
def test_commands_are_taken(arguments):
    name, *rest = arguments
    command = COMMANDS[name]
    with command.make_context(name, [one for one in rest if one != "PLAN"] + ["plan"] * ("PLAN" in rest)) as context:
        assert context.params


def test_there_are_commands_in_every_file():
    assert [len(shown(path.read_text())) for path in (SERVICE, ROOT / "deploy/cron/lmcache-retention")] == [1, 1]
    assert len(shown(TEXT)) >= 5
    assert in_cronjob()[:3] == ["ray", "job", "submit"]


def test_policies_are_taken(tmp_path):
    shown_policies = re.findall(r"^```yaml\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    shown_policies += [files[0]["data"]["retention.yaml"] for files in (CRONJOB, RAYCRONJOB)]
    assert len(shown_policies) == 3
    for text in shown_policies:
        path = tmp_path / "retention.yaml"
        path.write_text(text)
        assert policy.read(path, "hfbucket.us").max_age.days == 14


def test_the_cronjob_names_an_instance_that_its_policy_has(tmp_path):
    from hfbucket_plugin.config.instances import named_instances

    path = tmp_path / "lmcache.yaml"
    path.write_text(CRONJOB[0]["data"]["lmcache.yaml"])
    assert CRONJOB[1]["spec"]["concurrencyPolicy"] == "Forbid"
    assert [one.name for one in named_instances(path)] == ["hfbucket.us"]


def test_the_raycronjob_is_the_cronjob_without_a_cluster():
    template = RAYCRONJOB[1]["spec"]["jobTemplate"]
    assert RAYCRONJOB[0] == CRONJOB[0]
    assert RAYCRONJOB[1]["spec"]["schedule"] == CRONJOB[1]["spec"]["schedule"]
    assert (template["backoffLimit"], template["shutdownAfterJobFinishes"]) == (0, True)
    (head,) = template["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
    assert [one["name"] for one in head["env"]] == ["HF_US_TOKEN", "HF_HOME", "TMPDIR"]
    assert {"name": "config", "mountPath": "/config"} in head["volumeMounts"]


def test_units_hold_together():
    units = {}
    for path in (ROOT / "deploy" / "systemd").iterdir():
        units[path.name] = ConfigParser(interpolation=None, strict=False)
        units[path.name].optionxform = str
        units[path.name].read_string(path.read_text())
    assert units["lmcache-retention.timer"]["Timer"]["OnCalendar"]
    assert units["lmcache-retention.service"]["Unit"]["OnFailure"].split("@")[0] + "@.service" in units


@pytest.mark.parametrize(
    "name",
    [
        *map(str, Reason),
        *map(str, Outcome),
        *(str(kind) for kind in ObjectKind if not kind.is_chunk),
        *GAUGES,
        *sorted(policy.Policy.model_fields.keys() - {"models"}),
    ],
)
def test_every_name_is_described(name):
    assert f"`{name}`" in TEXT


def test_every_exit_code_is_described():
    rows = re.findall(r"^\| (\d) \|", TEXT, re.MULTILINE)

    assert [int(code) for code in rows] == sorted(exit_codes.RESULTS)


def test_the_arithmetic_is_right():
    number = r"\| ([\d,]+) "
    rows = re.findall(rf"^\| [^|]+ {number * 5}\| ([\d]+) MiB \|", TEXT, re.MULTILINE)
    assert len(rows) == 4
    for cells in rows:
        layers, heads, size, dtype, token, chunk = (int(cell.replace(",", "")) for cell in cells)
        assert token == 2 * layers * heads * size * dtype
        assert chunk * 1024 * 1024 == token * 256
    new = 50_000_000 // 5
    assert f"{new * 131_072:,} bytes ({new * 131_072 / 2**40:.2f} TiB)" in TEXT
    assert f"{new // 256:,} objects" in TEXT
    assert f"{14 * new * 131_072 / 2**40:.1f} TiB and {14 * (new // 256):,} objects" in TEXT
    listing, batches = -(-14 * (new // 256) // 1000), -(-(new // 256) // 1000)
    assert f"{listing} calls to list" in TEXT
    assert f"{batches} batches of three calls (lock, look-up, delete): {listing + 3 * batches}" in TEXT
