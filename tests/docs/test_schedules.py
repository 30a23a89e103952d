"""The schedules of `deploy/` run as written: each cron line and unit with the environment that cron and systemd give it.

Paths of the machine (`/opt/lmcache`, `/etc/lmcache`, `/var/…`) are moved below the test's directory; nothing else is changed.
"""

import json
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml
from huggingface_hub import HfApi

ROOT = Path(__file__).parents[2]
CRON = sorted((ROOT / "deploy" / "cron").iterdir())
SERVICES = sorted(path for path in (ROOT / "deploy" / "systemd").glob("*.service") if "@" not in path.name)
MANIFESTS = sorted((ROOT / "deploy" / "kubernetes").iterdir())
INSTANCE = "remote_storage_plugin.hfbucket.us"


class Machine:
    """A machine as the schedules expect it, below a directory; its user has no home."""

    def __init__(self, directory, hub, bucket):
        self.root = directory
        binaries, self.etc = directory / "opt/lmcache/bin", directory / "etc/lmcache"
        for made in (binaries, self.etc, directory / "usr/bin"):
            made.mkdir(parents=True)
        # A link would lead Python to the environment's directory all the same, but not past its `pyvenv.cfg`.
        python = binaries / "python"
        python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        python.chmod(0o755)
        (self.etc / "token.env").write_text("HF_US_TOKEN=hf_loopbackloopback\n")
        extra = {f"{INSTANCE}.bucket_handle": f"hf://buckets/{bucket}/us", f"{INSTANCE}.endpoint": hub.endpoint}
        document = {
            "remote_storage_plugins": ["hfbucket.us"],
            "extra_config": extra | {f"{INSTANCE}.token_env": "HF_US_TOKEN"},
        }
        (self.etc / "lmcache.yaml").write_text(yaml.safe_dump(document))
        (self.etc / "retention.yaml").write_text("instances:\n  hfbucket.us: {max_age: 14d}\n")
        api = HfApi(endpoint=hub.endpoint, token=False)
        api.batch_bucket_files(bucket, add=[(b"chunk", "us/org%2Fmodel%401%400%401%40bfloat16")])

    def moved(self, text):
        """A text whose paths are below the directory."""
        return re.sub(r"(?<![\w/])/(opt/lmcache|etc/lmcache|var/lib|var/log)", rf"{self.root}/\1", text)

    def make(self, *directories):
        """Make directories that a package or an administrator makes."""
        for directory in directories:
            Path(self.moved(directory)).mkdir(parents=True, exist_ok=True)

    def run(self, command, environ, shell):
        """Run a command line with these variables alone, and return the summary that it prints."""
        words = [
            "env",
            "-i",
            *(f"{name}={self.moved(value)}" for name, value in environ.items()),
            shell,
            "-c",
            self.moved(command),
        ]
        ran = subprocess.run(words, cwd="/", capture_output=True, text=True, check=False, timeout=120)
        assert ran.returncode == 0, ran.stderr
        (line,) = ran.stdout.splitlines()
        return json.loads(line)

    def written(self):
        """What was made below the directories that may be written, in their order."""
        return {str(path.relative_to(self.root)) for path in self.root.rglob("*") if path.is_file()}


@pytest.fixture
def machine(tmp_path, hub, bucket):
    return Machine(tmp_path, hub, bucket)


def crontab(path):
    """The variables of a file of /etc/cron.d, and its command lines; see crontab(5)."""
    environ, commands = {}, []
    for line in path.read_text().splitlines():
        if (found := re.fullmatch(r"(\w+)\s*=\s*(.*)", line)) is not None:
            environ[found[1]] = found[2]
        elif line and not line.startswith("#"):
            *times, user, command = line.split(maxsplit=6)
            assert (len(times), user) == (5, "lmcache")
            # cron ends the command at the first percent sign without a backslash; the rest is its standard input.
            commands.append(re.split(r"(?<!\\)%", command, maxsplit=1)[0].replace("\\%", "%"))
    return environ, commands


def unit(path):
    """The `[Service]` section of a unit."""
    parser = ConfigParser(interpolation=None, strict=False)
    parser.optionxform = str
    parser.read_string(path.read_text())
    return parser["Service"]


@pytest.mark.parametrize(
    ("path", "number"), [(path, number) for path in CRON for number in range(len(crontab(path)[1]))], ids=str
)
def test_a_cron_line_runs_as_cron_runs_it(machine, path, number):
    environ, commands = crontab(path)
    made = re.search(r"^#\s+install -d -o lmcache (.*)$", path.read_text(), re.MULTILINE)[1].split()
    machine.make(*made)
    before = machine.written()

    given = {"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "LOGNAME": "lmcache", "SHELL": environ["SHELL"]} | environ
    if "--verify" in commands[number]:
        machine.run(commands[number].replace(" --verify", "").replace("_verify.prom", ".prom"), given, environ["SHELL"])
    summary = machine.run(commands[number], given, environ["SHELL"])

    assert (summary["instance"], summary["result"]) == ("hfbucket.us", "complete")
    assert any(name.endswith(".prom") for name in machine.written() - before)


@pytest.mark.parametrize("path", SERVICES, ids=lambda path: path.name)
def test_a_unit_runs_as_systemd_runs_it(machine, path):
    service = unit(path)
    machine.make(
        *(f"/var/lib/{name}" for name in service["StateDirectory"].split()), f"/var/log/{service['LogsDirectory']}"
    )
    tokens = dict(line.split("=") for line in Path(machine.moved(service["EnvironmentFile"])).read_text().splitlines())
    given = {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin",
        "HOME": "/nonexistent",
        "USER": service["User"],
    }
    given |= dict([service["Environment"].split("=")]) | tokens

    summary = machine.run(
        f"cd {service['WorkingDirectory']}; {service['ExecStart'].replace('%%', '%')}", given, "/bin/sh"
    )

    assert (summary["instance"], summary["result"]) == ("hfbucket.us", "complete")


@pytest.mark.parametrize("path", [*CRON, *SERVICES], ids=lambda path: path.name)
def test_percent_signs_are_escaped(path):
    commands = crontab(path)[1] if path in CRON else [unit(path)["ExecStart"]]
    text = path.read_text()

    assert not re.search(r"[^\\#]%" if path in CRON else r"(?<!%)%(?![%n])", "\n".join(commands))
    assert ("\\%" if path in CRON else "%%") in text, "how it is written is said where it may be needed"


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_pods_write_to_volumes_alone(path):
    for pod in pods(list(yaml.safe_load_all(path.read_text()))):
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        for container in pod["containers"]:
            environ = {one["name"]: one.get("value") for one in container["env"]}
            if "HF_US_TOKEN" not in environ:
                continue  # it only submits
            mounted = {
                mount["mountPath"] for mount in container["volumeMounts"] if "emptyDir" in volumes[mount["name"]]
            }
            assert {str(Path(environ["HF_HOME"]).parent), environ["TMPDIR"]} <= mounted


def pods(value):
    """The pods of manifests."""
    if isinstance(value, dict):
        if "containers" in value:
            yield value
        for inner in value.values():
            yield from pods(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from pods(inner)
