"""The command fills a directory of a real `lmcache server`, and then has it load its own memory, with the Hub gone."""

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from huggingface_hub import HfApi
from typer.testing import CliRunner

from hfbucket_plugin.tools.signals import ShutdownSignal
from tests.support.buckets import command, environment
from tests.support.hubs import start_on_fresh_port
from tests.support.lmcache_engine import prompt
from tests.support.lmcache_server import MPClient, MPServer
from tests.support.ray_cluster import actors
from tests.support.waiting import eventually, free_ports
from warmer.cli.app import app
from warmer.cluster.actor_pool import ActorPool
from warmer.cluster.ray import Node, joined

pytestmark = pytest.mark.engine

MODEL = "org/tiny model"
CHUNK = 32
CHUNKS = 6
TOKENS = prompt(11, CHUNKS * CHUNK + 5)
SHAPE = {"layers": 3, "hidden": 65, "tokens": len(TOKENS)}
BUCKET = "tests/l1-runs"


class Stocked:
    """A bucket and a directory into which a server has stored a prompt, on a Hub that can be stopped."""

    def __init__(self, hub, directory):
        self.hub, self.tier = hub, {"type": "fs", "base_path": str(directory)}
        api = HfApi(endpoint=hub.endpoint, token=False)
        api.create_bucket(BUCKET)
        self.adapter = {
            "type": "plugin",
            "module_path": "hfbucket_plugin.l2_adapter",
            "class_name": "HFBucketL2Adapter",
            "adapter_params": {"bucket_handle": f"hf://buckets/{BUCKET}/kv", "endpoint": hub.endpoint},
        }
        with MPServer([self.tier, self.adapter], chunk_size=CHUNK) as server, self.client(server) as client:
            client.store(TOKENS, client.random_kv(len(TOKENS), seed=7))
            self.chunk_bytes = client.chunk_bytes
            eventually(lambda: self._stored(api, directory), 60, "chunks in the bucket and in the directory")

    @staticmethod
    def _stored(api, directory):
        stored = len([*api.list_bucket_tree(BUCKET, recursive=True)]), len([*directory.glob("*.data")])
        return min(stored) >= CHUNKS

    @staticmethod
    def client(server, model=MODEL):
        return MPClient(server.address, model=model, **SHAPE)


@pytest.fixture(scope="module")
def stocked(tmp_path_factory):
    with start_on_fresh_port(tmp_path_factory.mktemp("hub")) as hub:
        yield Stocked(hub, tmp_path_factory.mktemp("stored"))


@pytest.fixture
def prompts(tmp_path):
    """A file of prompts: one whole, its start again, and one of another model."""
    path = tmp_path / "prompts.jsonl"
    records = [
        {"token_ids": TOKENS, "model": MODEL},
        {"token_ids": TOKENS[: 2 * CHUNK], "model": MODEL},
        {"token_ids": TOKENS[:5], "model": MODEL},
    ]
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n\n")
    return path


@pytest.fixture
def chosen(stocked, prompts):
    return [
        *("--l2-adapter", json.dumps(stocked.adapter), "--prompts", str(prompts)),
        *("--chunk-size", str(CHUNK), "--world-size", "1"),
    ]


def l1(http):
    return json.dumps({"type": "l1", "http": http})


def refused(*arguments):
    """What a command says that ends before it needs Ray."""
    done = CliRunner().invoke(app, list(arguments))
    assert (done.exit_code, done.stdout) == (2, "")
    return done.stderr


def test_a_directory_and_then_l1_with_the_bucket_gone(stocked, cluster, chosen, tmp_path):
    directory = {"type": "fs", "base_path": str(tmp_path / "tier")}
    there = ["--address", cluster.address, "--node-selector", "pool=batch"]
    with MPServer([directory], chunk_size=CHUNK) as server, stocked.client(server) as client:
        tiers = ["--tier", json.dumps(directory), "--tier", l1(server.http)]

        both = command("run", *chosen, *tiers, *there)

        assert both.code == 0, both.stderr
        files, memory = both.summary["tiers"]
        assert (files["copied"], files["bytes"]) == (CHUNKS, CHUNKS * stocked.chunk_bytes)
        # The start of the prompt counts again, and was there: two chunks of eight.
        assert (memory["tier"], memory["copied"], memory["present"]) == (f"l1:{server.http}", CHUNKS, 2)
        assert memory["bytes"] == server.status()["storage_manager"]["l1_usage"][0] > 0
        assert (memory["fetched"], memory["failed"], memory["nodes"][0]["selected"]) == (0, 0, CHUNKS + 2)

        # What is loaded by a plan, or by a run, needs no Hub.
        plan = tmp_path / "plan.jsonl"
        made = CliRunner().invoke(app, ["plan", *chosen, "--tier", l1(server.http), "--out", str(plan)])
        assert made.exit_code == 0, made.stderr
        server.clear_l1()
        stocked.hub.stop()
        dry = json.loads(CliRunner().invoke(app, ["apply", str(plan), "--dry-run"]).stdout)
        assert (dry["selected"], dry["prompts"]) == (CHUNKS + 2, {"prompts": 3, "chunks": CHUNKS + 2})
        applied = command("apply", str(plan), *there)
        assert applied.code == 0, applied.stderr
        assert (applied.summary["copied"], applied.summary["present"]) == (CHUNKS, 2)
        again = command("run", *chosen, "--tier", l1(server.http), *there)
        assert (again.summary["copied"], again.summary["present"]) == (0, CHUNKS + 2)

        for file in (tmp_path / "tier").glob("*.data"):
            file.unlink()
        hit, kv = client.retrieve(TOKENS)
        assert hit == CHUNKS * CHUNK
        assert torch.equal(kv[:, :, :hit], client.random_kv(len(TOKENS), seed=7)[:, :, :hit])
        eventually(
            lambda: server.count("lmcache_mp_lookup_hit_l1_tokens_total", model_name=MODEL) == hit, 60, "hits in L1"
        )
        assert server.count("lmcache_mp_lookup_hit_l2_tokens_total", model_name=MODEL) == 0

        # What the server's own tiers do not hold any more is missing, prompt by prompt.
        server.clear_l1()
        lacking = command("run", *chosen, "--tier", l1(server.http), *there)
        assert (lacking.code, lacking.summary["failed_by_kind"]) == (3, {"missing": CHUNKS + 2})
        first, second = lacking.summary["failures"]
        assert (first["key"], first["node"], first["kind"]) == (None, lacking.summary["nodes"][0]["id"], "missing")
        assert "prompt in line 1: 6 of 6 chunks" in first["message"]
        assert "prompt in line 2: 2 of 2 chunks" in second["message"]

        with (tmp_path / "prompts.jsonl").open("a") as more:
            more.write("\n")
        assert "is not the file any more of which plan" in refused("apply", str(plan))


def test_a_server_that_is_not_there_fails_its_node(cluster, chosen):
    (port,) = free_ports(1)
    http = f"http://127.0.0.1:{port}"
    where = ["--wait-engine", "1s", "--address", cluster.address, "--node-selector", "pool=serving"]

    ran = command("run", *chosen, "--tier", l1(http), *where)

    assert ran.code == 3, ran.stderr
    assert ran.summary["failed_by_kind"] == {"engine": CHUNKS + 2, "config": CHUNKS + 2}
    other, one = sorted(ran.summary["nodes"], key=lambda node: node["error"])
    assert one["error"].startswith("engine: waited in vain")
    assert http in one["error"]
    assert one["failed"] == CHUNKS + 2
    assert f"node {one['name']}: engine: waited in vain" in ran.stderr
    # It takes the chunks of workers 2 and 3 only.
    assert "config: a server loads the chunks of all 1 workers at once" in other["error"]


@contextlib.contextmanager
def waiting(cluster, chosen):
    """A run that waits for a server which takes the question and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        http = f"http://127.0.0.1:{listener.getsockname()[1]}"
        more = [
            "--tier",
            l1(http),
            "--wait-engine",
            "1h",
            "--address",
            cluster.address,
            "--node-selector",
            "pool=batch",
        ]
        arguments = [sys.executable, "-m", "warmer", "run", *chosen, *more]
        with subprocess.Popen(
            arguments, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            try:
                listener.settimeout(120)
                connection, _ = listener.accept()
                with connection:
                    yield process
            finally:
                process.kill()


def test_an_order_to_stop_is_obeyed_while_an_engine_is_waited_for(cluster, chosen):
    with waiting(cluster, chosen) as process:
        process.send_signal(signal.SIGTERM)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 5, stderr
    summary = json.loads(stdout)
    assert (summary["result"], summary["unfinished"], summary["failed"]) == ("interrupted", CHUNKS + 2, 0)


def test_a_node_that_is_lost_meanwhile_is_told(cluster, chosen):
    with waiting(cluster, chosen) as process:
        killed = set()
        while len(killed) < 4 and process.poll() is None:  # three times its process is started again
            for actor in actors(cluster, "TaskActor"):
                if actor.pid not in killed:
                    killed.add(actor.pid)
                    actor.kill()
            time.sleep(0.05)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 3, stderr
    summary = json.loads(stdout)
    assert summary["nodes"][0]["error"].startswith("node_lost: ")
    assert summary["failed_by_kind"] == {"node_lost": CHUNKS + 2}


def test_a_node_that_is_gone_before_is_not_waited_for(cluster):
    """As one is that was lost while a tier before was filled."""
    with joined(cluster.address), ActorPool({Node("f" * 56, "gone"): None}, ShutdownSignal()) as tasks:
        (gone,) = tasks.begin(600.0).values()
        assert (gone.kind, tasks.nodes) == ("node_lost", [])
