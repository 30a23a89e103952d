"""`deploy/kuberay/`: manifests whose commands are taken, whose configuration holds together, and that carry no token."""

import re
import shlex
from pathlib import Path

import pytest
import typer.main
import yaml

from warmer.cli.app import app
from warmer.request.resolve import resolve_request
from warmer.request.warm_file import load_request

DIRECTORY = Path(__file__).parents[2] / "deploy" / "kuberay"
RAYJOB = list(yaml.safe_load_all((DIRECTORY / "warm-rayjob.yaml").read_text()))
JOB = list(yaml.safe_load_all((DIRECTORY / "warm-job.yaml").read_text()))
COMMANDS = typer.main.get_command(app)


def containers(pod):
    return pod.get("initContainers", []) + pod["containers"]


def taken(arguments):
    """The name and options of a command line, which the real command has read."""
    name, *rest = arguments
    with COMMANDS.make_context("warmer", [], resilient_parsing=True) as root:
        context = COMMANDS.commands[name].make_context(name, rest, parent=root)
        return name, context.params


def submitted(container):
    """What a container submits."""
    words = container["command"] + container["args"]
    assert words[:4] == ["python", "-m", "warmer", "submit"]
    name, options = taken(words[3:])
    assert name == "submit"
    return options, taken(options["command"])


def test_the_ray_job_uses_a_cluster_that_is_there():
    spec = RAYJOB[1]["spec"]
    assert spec["clusterSelector"] == {"ray.io/cluster": "serving"}
    # KubeRay refuses these beside a clusterSelector, or passes them by.
    refused = {"rayClusterSpec", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "backoffLimit", "suspend"}
    assert not refused & spec.keys()
    words = shlex.split(spec["entrypoint"])
    assert words[:3] == ["python", "-m", "warmer"]
    name, options = taken(words[3:])
    assert (name, str(options["config"])) == ("run", "warm.yaml")


def test_the_configuration_travels_with_the_ray_job():
    spec = RAYJOB[1]["spec"]
    (container,) = spec["submitterPodTemplate"]["spec"]["containers"]
    assert yaml.safe_load(spec["runtimeEnvYAML"]) == {"working_dir": container["volumeMounts"][0]["mountPath"]}
    assert spec["submissionMode"] == "K8sJobMode"


def test_the_job_warms_what_was_planned_and_then_checks_that():
    plan, warm, gate = containers(JOB[1]["spec"]["template"]["spec"])
    made = shlex.split(plan["args"][0])
    name, planned = taken(made[made.index("warmer") + 1 :])
    assert (plan["command"], name, str(planned["config"])) == (["sh", "-c"], "plan", "warm.yaml")
    out = Path(plan["workingDir"]) / planned["out"]
    options, (name, run) = submitted(warm)
    assert (name, options["submission_id"]) == ("apply", "warm-$(ROLLOUT)")
    assert "ROLLOUT" in {variable["name"] for variable in warm["env"]}
    also, (checking, check) = submitted(gate)
    assert (checking, check["require"], check["verify"]) == ("check", 0.98, "length")
    for one, given in ((options, run), (also, check)):
        assert Path(one["working_dir"]) / given["plan"] == out
    for container in (plan, warm, gate):
        assert out.parent in {Path(mount["mountPath"]) for mount in container["volumeMounts"]}
    assert JOB[1]["spec"]["backoffLimit"] == 0


@pytest.mark.parametrize("documents", [RAYJOB, JOB], ids=["rayjob", "job"])
def test_the_configuration_holds_together(documents, tmp_path, monkeypatch):
    for name, text in documents[0]["data"].items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    resolved = resolve_request(load_request(Path("warm.yaml"), {}))
    assert (resolved.instance.name, [tier.name for tier in resolved.tiers]) == ("hfbucket.us", ["fs.warm"])
    assert resolved.request.choose.given
    spec = documents[1]["spec"]
    pod = spec["submitterPodTemplate"]["spec"] if "submitterPodTemplate" in spec else spec["template"]["spec"]
    assert pod["volumes"][0] == {"name": "config", "configMap": {"name": documents[0]["metadata"]["name"]}}
    assert resolved.request.limits.max_duration < spec["activeDeadlineSeconds"]


def test_both_have_one_configuration():
    assert RAYJOB[0] == JOB[0]


@pytest.mark.parametrize("path", sorted(DIRECTORY.iterdir()), ids=lambda path: path.name)
def test_tokens_come_from_secrets(path):
    text = path.read_text()
    assert not re.search(r"\bhf_\w{8,}", text)
    for document in yaml.safe_load_all(text):
        for variable in variables(document):
            if variable["name"].endswith("TOKEN"):
                assert variable.keys() == {"name", "valueFrom"}
                assert variable["valueFrom"].keys() == {"secretKeyRef"}


def variables(value):
    """The environment variables of all containers in a document."""
    if isinstance(value, dict):
        yield from value["env"] if isinstance(value.get("env"), list) else []
        for inner in value.values():
            yield from variables(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from variables(inner)
