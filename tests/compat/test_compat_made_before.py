"""What release 0.1 wrote, before the packages had their present layout, is read by this one.

`made_by_0_1` holds the objects of an instance and the files of its jobs, byte for byte: written by that release's engines (classic
and MP), commands and locks against a local Hub, whose clock stood at the `hub_time` of `objects.json`. Here the Hub's clock stands
there again, so that nothing of it has become old.
"""

import json
import os
import re
import shutil
import sqlite3
from contextlib import closing
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from urllib.parse import quote, unquote

import httpx2
import pytest
import yaml
from huggingface_hub import HfApi
from typer.testing import CliRunner

from hfbucket_plugin.cli.app import app as plugin_app
from jobs.cli.app import app as jobs_app
from tests.support.hubs import start_on_fresh_port
from tests.support.lmcache_classic import OURS, Rig, engine_config, engine_metadata, key, running_loop, taken
from tests.support.lmcache_mp import MP, content_of, layout, load, lookup, mp_key
from tests.support.surface import Limits
from tests.support.waiting import eventually
from warmer.cli.app import app as warmer_app

MADE = Path(__file__).parent / "made_by_0_1"
OBJECTS = json.loads((MADE / "objects.json").read_text())
HUB_TIME = datetime.fromisoformat(OBJECTS["hub_time"])
ENDPOINT, BUCKET, PREFIX = "http://hub.test", "team/kv", "kv/us"
"""As its plans name them."""

US, EU = "hfbucket.us", "hfbucket.eu"
CHUNKS = sorted(path for path in OBJECTS["uploaded_at"] if "/" not in path)
SIZE = 512
CLASSIC, MP_KEY = "org/model@1@0@{}@bfloat16", "org/model@01000000@0@000000000000000{}"
APPS = {"jobs": jobs_app, "warmer": warmer_app, "hfbucket_plugin": plugin_app}

# In the process of a Hub: objects are stamped by another clock.
CLOCK = """
import os, time
_ahead, _now = int(os.environ["HUB_AHEAD_NS"]), time.time_ns
time.time_ns = lambda: _now() + _ahead
"""


@pytest.fixture(scope="module")
def dated_hub(tmp_path_factory):
    """A Hub at `ENDPOINT` whose clock went on from `HUB_TIME` when it started."""
    directory = tmp_path_factory.mktemp("dated")
    (directory / "sitecustomize.py").write_text(CLOCK)
    ahead = HUB_TIME - datetime.now(UTC)
    send = httpx2.Client.send

    def sent(client, request, **more):
        if request.url.host == "hub.test":
            request.url = httpx2.URL(hub.endpoint + request.url.raw_path.decode())
            request.headers["host"] = hub.endpoint.removeprefix("http://")
        answer = send(client, request, **more)
        answer.headers["date"] = format_datetime(datetime.now(UTC) + ahead, usegmt=True)
        return answer

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HUB_AHEAD_NS", str(int(ahead.total_seconds() * 1e9)))
        patch.setenv(
            "PYTHONPATH", os.pathsep.join([str(directory), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)
        )
        hub = start_on_fresh_port(directory / "hub")
        patch.undo()
        patch.setattr(httpx2.Client, "send", sent)
        hub.ahead = ahead
        with hub:
            yield hub


class Instance:
    """The instance of release 0.1, and commands on it."""

    def __init__(self, hub, directory):
        self.hub = hub
        self.directory = directory
        self.api = HfApi(endpoint=hub.endpoint, token=False)
        self.config = directory / "lmcache.yaml"
        extra = self.values(US, PREFIX) | self.values(EU, "kv/eu")
        extra |= {"remote_storage_plugin.fs.warm.base_path": str(directory / "tier"), "save_chunk_meta": False}
        document = {"chunk_size": 16, "remote_storage_plugins": ["fs.warm", US, EU], "extra_config": extra}
        self.config.write_text(json.dumps(document))  # JSON is YAML

    @staticmethod
    def values(name, prefix, **more):
        values = {
            "bucket_handle": f"hf://buckets/{BUCKET}/{prefix}",
            "endpoint": ENDPOINT,
            "token_env": "COMPAT_TOKEN",
            "index": "snapshot",
        } | more
        return {f"remote_storage_plugin.{name}.{option}": value for option, value in values.items()}

    def upload(self, directory, at=None):
        """Put the objects of a directory there, as the Hub took them once, or at another time."""
        files = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}
        self.api.batch_bucket_files(
            BUCKET, add=[(path.read_bytes(), f"{PREFIX}/{name}") for name, path in files.items()]
        )
        times = {name: at or datetime.fromisoformat(OBJECTS["uploaded_at"][name]) for name in files}
        with closing(sqlite3.connect(self.hub.root / "hub.sqlite", timeout=30)) as base, base:
            base.executemany(
                "UPDATE files SET uploaded_ms = ? WHERE path = ?",
                [(round(one.timestamp() * 1000), f"{PREFIX}/{name}") for name, one in times.items()],
            )

    def upload_one(self, directory, text):
        name = quote(text, safe="")
        self.api.batch_bucket_files(BUCKET, add=[((directory / name).read_bytes(), f"{PREFIX}/{name}")])

    def names(self, prefix=PREFIX):
        listed = self.api.list_bucket_tree(BUCKET, prefix=f"{prefix}/", recursive=True)
        return sorted(item.path.removeprefix(f"{prefix}/") for item in listed if item.type == "file")

    def chunks(self, prefix=PREFIX):
        return [name for name in self.names(prefix) if "/" not in name]

    def run(self, package, command, *more, code=0):
        """Run a command; its stdout and stderr."""
        done = CliRunner().invoke(
            APPS[package], [*command.split(), "--lmcache-config", str(self.config), *map(str, more)]
        )
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        assert done.exit_code == code, done.output
        return done

    def summary(self, package, command, *more, code=0):
        return json.loads(self.run(package, command, *more, code=code).stdout.splitlines()[-1])

    def rows(self, package, command, code=0):
        """What a command says to programs."""
        done = self.run(package, command, "--instance", US, "--json", code=code)
        return [json.loads(line) for line in done.stdout.splitlines() if line]

    def plan(self, *more, code=0):
        return self.run("warmer", "plan", "--instance", US, "--tier", "fs.warm", *more, code=code)

    @staticmethod
    def keys_of(plan):
        return [json.loads(line)["key"] for line in plan.read_text().splitlines()[1:]]

    @property
    def now(self):
        """The time at the Hub."""
        return datetime.now(UTC) + self.hub.ahead

    def requests(self, route):
        routes = self.hub.control.counters().routes
        return routes[route].requests if route in routes else 0


@pytest.fixture
def made(dated_hub, tmp_path, monkeypatch):
    """The instance, in a bucket that holds nothing else."""
    for name in ("RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    instance = Instance(dated_hub, tmp_path)
    instance.api.create_bucket(BUCKET)
    instance.upload(MADE / "bucket")
    dated_hub.control.reset_counters()
    yield instance
    instance.api.delete_bucket(BUCKET)


@pytest.fixture
def engine(made):
    """Makes classic engines on it."""
    engines = []
    with running_loop() as loop:

        def make(chunk_size=16, **values):
            own = made.values(
                US, PREFIX, **OURS, download_tmp_dir=str(made.directory), lookup_timeout_secs=20, **values
            )
            document = {
                "chunk_size": chunk_size,
                "local_cpu": False,
                "save_unfull_chunk": False,
                "max_local_cpu_size": 0.05,
                "blocking_timeout_secs": 60,
                "remote_storage_plugins": [US],
                "extra_config": own,
            }
            path = made.directory / f"engine{len(engines)}.yaml"
            metadata = engine_metadata(layers=1, hidden=8, chunk_size=chunk_size)
            engines.append(Rig(engine_config(path, yaml.safe_dump(document)), US, loop, metadata=metadata))
            return engines[-1]

        yield make
        for one in engines:
            one.close()


def test_a_classic_engine_finds_by_the_index_and_reads_what_was_put(made, engine, caplog):
    caplog.set_level("INFO", "hfbucket_plugin")
    rig = engine(fingerprint="off")
    eventually(lambda: "key index: in use, 12 keys" in caplog.text)
    made.hub.control.reset_counters()

    present, reported, deleted = [1, 2, 3, 4, 5], 7, 6
    assert rig.connector.batched_contains([key(number) for number in (*present, reported, deleted)]) == 6
    assert rig.connector.batched_contains([key(deleted)]) == 0
    contents = taken(rig.run(rig.connection.batched_get([key(number) for number in (*present, reported)])))

    assert contents == [
        (MADE / "bucket" / f"org%2Fmodel%401%400%40{n}%40bfloat16").read_bytes() for n in (*present, reported)
    ]
    assert made.requests("paths-info") == 0


def test_the_mp_server_finds_by_the_index_and_loads_what_was_put(made, caplog):
    caplog.set_level("INFO", "hfbucket_plugin")
    mp = MP(
        US, made.directory, handle=f"hf://buckets/{BUCKET}/{PREFIX}", endpoint=ENDPOINT, limits=Limits(20, 20, 30),
        index="snapshot",
    )  # fmt: skip
    try:
        eventually(lambda: "key index: in use, 12 keys" in caplog.text)
        made.hub.control.reset_counters()
        keys = [mp_key(1), mp_key(2, salt="tenant"), mp_key(3)]

        assert lookup(mp, keys, {0: layout(SIZE)}) == [True, True, True]
        assert lookup(mp, [mp_key(9)], {0: layout(SIZE)}) == [False]
        assert load(mp, keys, SIZE) == [content_of(one, SIZE) for one in keys]
        assert made.requests("paths-info") == 0
    finally:
        mp.close()


def test_an_engine_of_another_kind_is_kept_out_by_the_fingerprint(made, engine, caplog):
    rig = engine(chunk_size=32, fingerprint="enforce")
    eventually(lambda: "chunk_size is 16 in the bucket and 32" in caplog.text)

    assert rig.connector.batched_contains([key(1)]) == 0
    (recorded,) = [one for one in made.rows("jobs", "fingerprint show") if one["kind"] == "recorded"]
    record = json.loads((MADE / "bucket/.hfbucket/fingerprints/org%2Fmodel.json").read_text())
    assert recorded["fingerprint"] == record["variants"][0]


def test_the_index_is_verified_and_goes_on_from_its_snapshot_and_journals(made):
    pointer = json.loads((MADE / "bucket/.hfbucket/index/current.json").read_text())
    verified = made.summary("jobs", "index", "--instance", US, "--verify")["differences"]
    assert (verified["keys"], verified["listed"], verified["examples"]) == (9, 9, {})

    built = made.summary("jobs", "index", "--instance", US)

    assert (built["made_of"], built["left"]["objects"]) == ("journals", 9)
    assert datetime.fromisoformat(built["heat_since"]).timestamp() == pointer["heat_since"]
    assert made.summary("jobs", "index", "--instance", US, "--verify")["differences"]["examples"] == {}


def test_what_was_read_is_warmed_first(made):
    plan = made.directory / "plan.jsonl"
    # With `--since` the Hub's clock counts.
    made.plan("--all", "--since", "30d", "--hottest", 2, "--out", plan)
    assert made.keys_of(plan) == [CLASSIC.format(1), CLASSIC.format(2)]


def test_status_tells_of_reads_of_the_last_run_and_of_the_index(made):
    (found,) = made.rows("jobs", "status")

    assert found["chunks"] == {"objects": 9, "bytes": 9 * SIZE}
    assert [(one["younger_than"], one["objects"]) for one in found["ages"]] == [("1h", 3), ("7d", 6)]
    assert [(one["read_within"], one["objects"]) for one in found["reads"]] == [("1d", 3), ("never", 6)]
    assert (found["last_run"]["job"], found["last_run"]["left"]["objects"]) == ("cleanup", 9)
    assert (found["last_run_trouble"], found["growth"]["objects"]) == ("", 0)
    index = found["index"]
    assert (index["keys"], index["snapshots"], index["journals_waiting"], index["strange"]) == (12, 2, 4, 0)
    assert (index["trouble"], found["index_trouble"]) == ("", "")


def test_a_cleanup_judges_its_listing_by_the_report_of_the_last_one(made):
    made.api.batch_bucket_files(BUCKET, delete=[f"{PREFIX}/{name}" for name in CHUNKS[:7]])

    refused = made.run("jobs", "cleanup", "--instance", US, "--max-age", "36h", "--yes", code=4)

    assert re.search(r"\b2 objects\b.*\b9\b.*--accept-shrunk", refused.stderr)
    assert len(made.chunks()) == 2


def test_the_tools_list_count_and_examine_what_is_there(made):
    assert sorted(one["key"] for one in made.rows("hfbucket_plugin", "ls")) == sorted(map(unquote, CHUNKS))
    (counted,) = made.rows("hfbucket_plugin", "stat")[0]["instances"]
    own = len(OBJECTS["uploaded_at"]) - len(CHUNKS)
    assert [counted[kind]["objects"] for kind in ("chunks", "own", "foreign")] == [len(CHUNKS), own, 0]
    (examined,) = made.rows("hfbucket_plugin", "doctor", code=1)[0]["instances"]
    found = {one["check"]: one["found"] for one in examined["findings"]}
    assert found["records"].startswith("1 record of bad objects")
    assert found["index"].startswith("12 keys")
    assert found["fingerprint"].startswith("of 1 model")


@pytest.mark.parametrize(
    ("lock", "command"), [("locks", "cleanup --max-age 36h --max-delete 100% --yes"), ("index-locks", "index --full")]
)
def test_a_lock_holds_while_it_lives_and_is_passed_over_when_it_has_ended(made, lock, command):
    made.upload(MADE / "locks", at=made.now - timedelta(minutes=5))
    refused = made.run("jobs", command, "--instance", US, code=4)
    assert f"is locked by {command.split()[0]} on node-1 pid" in refused.stderr

    made.upload(MADE / "locks", at=made.now - timedelta(minutes=20))
    made.run("jobs", command, "--instance", US)

    assert not [name for name in made.names() if name.startswith(f".hfbucket/{lock}/")]


def test_a_directory_is_imported_and_an_export_to_it_goes_on_by_its_manifest(made):
    directory = made.directory / "copy"
    shutil.copytree(MADE / "directory", directory)
    files = sorted(path.name for path in directory.iterdir() if path.name != "MANIFEST.jsonl")

    went_on = made.summary("jobs", "export", "--from", US, "--to", f"{directory}/", "--model", "org/model", "--local")
    assert (went_on["there_already"]["objects"], went_on["streamed"]["objects"]) == (8, 1)
    assert sorted({*files, *CHUNKS}) == sorted(
        path.name for path in directory.iterdir() if path.name != "MANIFEST.jsonl"
    )

    imported = made.summary("jobs", "export", "--from", f"{MADE / 'directory'}/", "--to", EU, "--local")
    assert imported["streamed"]["objects"] == len(files) == 9
    assert made.chunks("kv/eu") == files


def test_keys_are_taken_from_its_reports(made):
    plan = made.directory / "plan.jsonl"
    gone = CLASSIC.format(6)
    made.upload_one(MADE / "directory", gone)

    made.plan("--keys-from", MADE / "files/warm-report.jsonl", "--out", plan)
    assert made.keys_of(plan) == [gone], "what failed"
    made.plan("--keys-from", MADE / "files/export-report.jsonl", "--out", plan)
    assert made.keys_of(plan) == [CLASSIC.format(number) for number in range(1, 7)]
    made.plan("--keys-from", MADE / "files/cleanup-report.jsonl", "--out", plan, code=4)  # the bucket has none of them


# --- plans ----------------------------------------------------------------------------------------------------------


def test_a_plan_of_a_cleanup_is_carried_out(made):
    done = made.summary("jobs", "apply", MADE / "files/cleanup-plan.jsonl", "--yes")

    assert done["deleted"]["objects"] == 6
    assert sorted(map(unquote, made.chunks())) == sorted([CLASSIC.format(5), CLASSIC.format(7), MP_KEY.format(3)])


def test_a_plan_of_an_export_is_carried_out(made):
    done = made.summary("jobs", "apply", MADE / "files/export-plan.jsonl", "--local")

    assert done["copied"]["objects"] + done["streamed"]["objects"] == 9
    assert made.chunks("kv/eu") == CHUNKS


def test_a_plan_of_a_warm_up_is_read(made):
    planned = made.summary("warmer", "apply", MADE / "files/warm-plan.jsonl", "--dry-run")

    assert (planned["selected"], planned["tiers"]) == (6, ["fs.warm"])
    assert [one["chunk_size"] for one in planned["fingerprints"]] == ["16"]
