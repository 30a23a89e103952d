"""`docs/fingerprint.md` says what is so, and every command that it shows is run."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from huggingface_hub import HfApi

from hfbucket_plugin.config import settings
from hfbucket_plugin.fingerprint import watch
from hfbucket_plugin.fingerprint.model import COMPARED, Fingerprint, FingerprintClaim, Record

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "fingerprint.md").read_text(encoding="utf-8")
COMMANDS = [
    command
    for block in re.findall(r"^```bash\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    for command in block.strip().splitlines()
]
HEAD = "us/.hfbucket/fingerprints/org%2Fmodel"
RECORDED = Fingerprint(mode="classic", model="org/model", world_size=8, dtype="bfloat16", model_revision="v1")
NEW = RECORDED.model_copy(update={"model_revision": "v2"})


@pytest.fixture
def place(hub_factory, tmp_path):
    """A directory with the configuration of `configure.md`, beside a Hub on which two fleets met."""
    hub = hub_factory()
    api = HfApi(endpoint=hub.endpoint, token=False)
    api.create_bucket("my-org/lmcache-kv", private=True)
    objects = {
        f"{HEAD}.json": Record(model="org/model").having(RECORDED).to_json(),
        f"{HEAD}/{RECORDED.digest}.json": FingerprintClaim.to_json(RECORDED),
        f"{HEAD}/{NEW.digest}.json": FingerprintClaim.to_json(NEW),
    } | {f"us/org%2Fmodel%408%400%40{number:x}%40bfloat16": b"chunk" for number in range(1, 4)}
    api.batch_bucket_files("my-org/lmcache-kv", add=[(data, path) for path, data in objects.items()])
    shown = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "docs" / "configure.md").read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "lmcache.yaml").write_text(next(text for text in shown if "hfbucket.us.bucket_handle" in text))
    tokens = dict.fromkeys(("HF_TOKEN", "HF_US_TOKEN", "HF_EU_TOKEN"), "hf_of-a-local-hub")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    own = {"HF_ENDPOINT": hub.endpoint, "PYTHONPATH": str(ROOT), "PATH": path}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return api, tmp_path, inherited | tokens | own


def test_every_command_does_what_the_page_says(place):
    api, directory, environment = place
    assert len(COMMANDS) == 4
    for command in COMMANDS:
        fitting = command.replace(" 89ab ", f" {NEW.digest[:4]} ")
        assert shlex.split(fitting)[:3] == ["python", "-m", "jobs"]
        done = subprocess.run(
            ["bash", "-c", fitting],
            cwd=directory,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr

    rows = [json.loads(line) for line in (directory / "fingerprints.jsonl").read_text().splitlines()]
    assert [(row["kind"], row["digest"]) for row in rows] == [("recorded", RECORDED.digest), ("claimed", NEW.digest)]
    left = sorted(
        item.path for item in api.list_bucket_tree("my-org/lmcache-kv", recursive=True) if item.type == "file"
    )
    assert [path for path in left if path.startswith(HEAD)] == [f"{HEAD}.json", f"{HEAD}/{NEW.digest}.json"]
    assert not [path for path in left if "/.hfbucket/" not in path]


def test_the_configuration_that_it_shows_loads():
    (text,) = re.findall(r"^```yaml\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    document = yaml.safe_load(text)
    own = settings.load(document["extra_config"], "hfbucket.us", document["remote_storage_plugins"])

    assert own.fingerprint == "enforce"
    assert own.model_revision


def test_every_field_and_state_is_described():
    for name in (*COMPARED, *set(Fingerprint.model_fields) - {"model"}):
        assert f"`{name}`" in TEXT, name
    for state in watch.STATES:
        assert f"`{state}`" in TEXT, state
