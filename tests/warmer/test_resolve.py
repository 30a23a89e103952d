"""What plans and runs make of fingerprints: told in the header, warned of, refused under `enforce`."""

import json

import pytest
from huggingface_hub import HfApi
from typer.testing import CliRunner

from hfbucket_plugin.fingerprint.detect import classic_check, mp_check
from hfbucket_plugin.fingerprint.model import Fingerprint, FingerprintClaim, Record
from localhub.faults import Fault
from tests.support.buckets import INSTANCE, KEY_PREFIX, MODEL, SECRET, classic_key, content, mp_key
from warmer.cli.app import app

SETTING = f"remote_storage_plugin.{INSTANCE}.fingerprint"


class Desk:
    """A bucket with chunks of a model, what is recorded of it, and the command."""

    def __init__(self, warehouse, directory, caplog):
        self.warehouse = warehouse
        self._caplog = caplog
        self.out = directory / "plan.jsonl"
        self.prompts = directory / "prompts.jsonl"
        self.prompts.write_text(json.dumps({"token_ids": list(range(256)), "model": MODEL}))

    def record(self, *fingerprints, data=None):
        record = Record(model=MODEL)
        for one in fingerprints:
            record = record.having(one)
        path = f"{self.warehouse.prefix}/.hfbucket/fingerprints/org%2Fmodel.json"
        api = HfApi(endpoint=self.warehouse.endpoint, token=False)
        api.batch_bucket_files(self.warehouse.bucket_id, add=[(data or record.to_json(), path)])

    def plan(self, *more):
        config = ["--lmcache-config", str(self.warehouse.config), "--tier", "fs.warm"]
        return self.run(*config, *more)

    def run(self, *more):
        """The exit code, and what is told: by the log, which is pytest's in this process, and at the end."""
        self._caplog.clear()
        done = CliRunner().invoke(app, ["plan", "--out", str(self.out), *map(str, more)])
        return done.exit_code, self._caplog.text + done.stderr

    @property
    def header(self):
        return json.loads(self.out.read_text().splitlines()[0])


@pytest.fixture
def desk(warehouse, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WARM_TEST_TOKEN", SECRET)
    warehouse.put({classic_key(n): content(n, 100) for n in range(3)})
    return Desk(warehouse, tmp_path, caplog)


def engine(**values):
    known = {"mode": "classic", "model": MODEL, "world_size": 1, "dtype": "bfloat16", "chunk_size": 256}
    return Fingerprint(**known | {"hash_algorithm": "builtin", "model_revision": "v1"} | values)


@pytest.mark.parametrize("selection", [("--model", MODEL), ("--prefix", KEY_PREFIX), ("--all",)])
def test_the_header_tells_what_is_recorded(desk, selection):
    desk.record(engine(), engine(world_size=2, mode="mp", dtype=None))

    assert desk.plan(*selection)[0] == 0

    (reported,) = desk.header["fingerprints"]
    assert reported == {
        "model": MODEL,
        "of": "classic, world size 1, bfloat16",
        "digest": engine().digest,
        "model_revision": "v1",
        "chunk_size": "256",
        "hash_algorithm": "builtin",
    }


def test_without_a_record_nothing_is_told(desk):
    assert desk.plan("--model", MODEL)[0] == 0
    assert "fingerprints" not in desk.header


def test_a_claim_stands_for_the_record_that_is_not_there_yet(desk):
    claim = engine(chunk_size=512)
    path = f"{desk.warehouse.prefix}/.hfbucket/fingerprints/org%2Fmodel/{claim.digest}.json"
    api = HfApi(endpoint=desk.warehouse.endpoint, token=False)
    api.batch_bucket_files(desk.warehouse.bucket_id, add=[(FingerprintClaim.to_json(claim), path)])

    code, reported = desk.plan("--model", MODEL)

    assert code == 0
    assert "chunk_size is 512 in the bucket and 256 in this configuration" in reported


def test_another_chunk_size_is_a_warning_and_under_enforce_a_refusal(desk):
    desk.record(engine(chunk_size=512))
    words = f"the fingerprint of {MODEL} (classic, world size 1, bfloat16): chunk_size is 512 in the bucket and 256 in this configuration"

    code, reported = desk.plan("--model", MODEL)
    assert code == 0
    assert words in reported
    assert desk.header["fingerprints"][0]["differs"] in words

    desk.warehouse.extra = {SETTING: "enforce"}
    code, reported = desk.plan("--model", MODEL)
    assert code == 4
    assert words in reported
    desk.record(engine(chunk_size=512), engine(world_size=2))
    assert desk.plan("--model", MODEL)[0] == 0, "some of it would be served"

    desk.warehouse.extra = {SETTING: "off"}
    code, reported = desk.plan("--model", MODEL)
    assert (code, words in reported) == (0, False)


def test_prompts_that_are_hashed_otherwise_are_named_before_nothing_is_found(desk):
    desk.record(engine(hash_check="1f", hash_seed_pinned=True))
    here = classic_check("builtin")
    words = f"hash_check (the seed, PYTHONHASHSEED) is 1f in the bucket and {here} where this command runs"

    code, reported = desk.plan("--prompts", desk.prompts)
    assert code == 4
    assert words in reported
    assert "nothing selected" in reported

    desk.warehouse.extra = {SETTING: "enforce"}
    code, reported = desk.plan("--prompts", desk.prompts)
    assert code == 4
    assert words in reported
    assert "fingerprint: enforce" in reported
    assert "nothing selected" not in reported

    desk.record(engine(hash_check=here))
    _, reported = desk.plan("--prompts", desk.prompts)
    assert "hash_check" not in reported


def test_prompts_in_mp_mode(desk):
    desk.warehouse.put({mp_key(n): content(n, 50) for n in range(2)})
    right = engine(mode="mp", dtype=None, hash_algorithm="blake3", hash_check=mp_check("blake3"))
    tier = ["--tier", json.dumps({"type": "fs", "base_path": str(desk.warehouse.tier)})]
    source = json.dumps(
        {
            "type": "hfbucket",
            "bucket_handle": f"hf://buckets/{desk.warehouse.bucket_id}/{desk.warehouse.prefix}",
            "endpoint": desk.warehouse.endpoint,
            "token_env": "WARM_TEST_TOKEN",
        }
    )

    def plan():
        return desk.run("--prompts", desk.prompts, "--l2-adapter", source, *tier)[1]

    desk.record(right)
    assert "the fingerprint of" not in plan()
    desk.record(right.model_copy(update={"hash_check": "00"}))
    assert "hash_check (the seed, PYTHONHASHSEED) is 00 in the bucket and" in plan()


def test_what_cannot_be_read_is_a_warning_and_under_enforce_an_error(desk, hub):
    desk.record(data=b"garbage")
    code, reported = desk.plan("--model", MODEL)
    assert code == 0
    assert "the fingerprints of the chosen models are not known" in reported
    assert "not JSON" in reported

    desk.warehouse.extra = {SETTING: "enforce"}
    assert desk.plan("--model", MODEL)[0] == 2
    hub.control.add_fault(Fault(route="paths-info", status=403))
    assert desk.plan("--model", MODEL)[0] == 2
