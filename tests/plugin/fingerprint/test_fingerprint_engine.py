"""Fingerprints of real engines that meet in one bucket."""

import asyncio
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from localhub.faults import Fault
from tests.support.buckets import download, upload
from tests.support.lmcache_engine import CHUNK, MODEL, PREFIX, RECORD, Fleet
from tests.support.waiting import eventually

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[3]


@pytest.fixture
def fleet(hub, bucket, tmp_path, monkeypatch):
    made = Fleet(hub, bucket, tmp_path, monkeypatch)
    yield made
    hub.control.clear_faults()
    made.close()


def lines(caplog, *words):
    """The lines of the log about a fingerprint that hold some words."""
    reported = [record.getMessage() for record in caplog.records if " fingerprint: " in record.getMessage()]
    return [line for line in reported if all(word in line for word in words)]


# --- the first writer ----------------------------------------------------------------------------------------------


def test_who_stores_first_records_what_it_is_and_those_like_it_agree(fleet):
    first = fleet.engine(model_revision="abc123")
    first.becomes("unrecorded")
    assert fleet.paths() == [], "who only starts writes nothing"

    kv = first.store(1)

    first.becomes("agrees")
    (recorded,) = fleet.recorded().variants
    assert recorded.model == MODEL
    assert (recorded.mode, recorded.world_size, recorded.dtype) == ("classic", 1, "bfloat16")
    assert (recorded.model_revision, recorded.chunk_size, recorded.hash_algorithm) == ("abc123", CHUNK, "builtin")
    assert str(recorded.layout) == f"2x2x{CHUNK}x16 bfloat16"
    assert recorded.lmcache_version == "0.5.6"
    assert recorded.hash_check is not None
    assert recorded.recorded_at is not None
    assert fleet.claims() == [recorded]

    second = fleet.engine(model_revision="abc123", fingerprint="enforce")
    second.becomes("agrees")
    assert second.lookup(1) == 2
    hit, found = second.retrieve(1)
    assert hit == 2
    assert torch.equal(found, kv)
    second.store(2)
    assert len(fleet.chunks()) == 4
    assert fleet.recorded().variants == (recorded,), "nothing is written again"


def test_an_engine_that_ends_right_after_its_first_store_has_recorded_itself(fleet):
    first = fleet.engine(model_revision="abc123")
    first.store(1)

    fleet.close()

    assert fleet.record() is not None


def test_another_dtype_or_world_size_has_keys_of_its_own_and_no_conflict(fleet):
    first = fleet.engine(fingerprint="enforce")
    first.lookup(1)
    first.store(1, wait=False)
    first.becomes("agrees")

    other = fleet.engine(options={"world_size": 2, "layers": 4}, chunk_size=2 * CHUNK, fingerprint="enforce")
    other.store(1, wait=False)
    other.becomes("agrees")

    assert sorted(variant.world_size for variant in fleet.recorded().variants) == [1, 2]
    assert {variant.chunk_size for variant in fleet.recorded().variants} == {CHUNK, 2 * CHUNK}
    assert first.state() == "agrees"


def test_an_engine_that_knows_more_completes_what_is_recorded(fleet):
    first = fleet.engine()
    first.store(1)
    first.becomes("agrees")
    assert fleet.recorded().variants[0].model_revision is None

    second = fleet.engine(model_revision="abc123")
    second.store(2)

    eventually(lambda: fleet.recorded().variants[0].model_revision == "abc123")
    assert len(fleet.recorded().variants) == 1


# --- conflicts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs", "words"),
    [
        ({"model_revision": "v1"}, {"model_revision": "v2"}, "model_revision is v1 in the bucket and v2 here"),
        (
            {},
            {"options": {"layers": 4, "hidden": 8}},
            "layout is 2x2x64x16 bfloat16 in the bucket and 2x4x64x8 bfloat16 here",
        ),
    ],
)
def test_under_enforce_nothing_crosses(fleet, caplog, ours, theirs, words):
    first = fleet.engine(fingerprint="enforce", **ours)
    first.lookup(1)
    first.store(1, wait=False)
    first.becomes("agrees")
    kv = first.store(1)
    before = fleet.chunks()

    second = fleet.engine(fingerprint="enforce", **theirs)
    assert second.lookup(1) == 0, "while it is not known either"
    second.becomes("conflict")
    assert second.lookup(1) == 0
    assert second.retrieve(1)[0] == 0
    second.store(2, wait=False)
    eventually(lambda: second.outcome("put", "fingerprint") == 2)

    assert fleet.chunks() == before
    assert second.outcome("lookup", "fingerprint") >= 1
    assert second.outcome("lookup", "hit") == second.outcome("put", "stored") == 0
    assert second.conflicts(words.split()[0]) == 1
    (line,) = lines(caplog, words)
    assert MODEL in line
    assert "nothing is served from it or stored there (fingerprint: enforce)" in line
    eventually(lambda: len(fleet.claims()) == 2)
    assert first.lookup(1) == 2
    assert torch.equal(first.retrieve(1)[1], kv)


def test_a_get_and_a_delete_without_a_lookup_do_not_cross_either(fleet):
    first = fleet.engine(model_revision="v1")
    first.store(1)
    first.becomes("agrees")
    second = fleet.engine(model_revision="v2", fingerprint="enforce")
    second.lookup(1)
    second.becomes("conflict")
    (remote,) = second.engine.remotes
    key = second.engine.keys(second.tokens(1, 2))[0]

    assert remote.get_blocking(key) is None
    assert not remote.connection.remove_sync(key)

    assert second.outcome("get", "fingerprint") == 1
    assert second.outcome("delete", "fingerprint") == 1
    assert first.lookup(1) == 2


def test_under_warn_all_is_used_and_one_line_says_what_differs(fleet, caplog):
    first = fleet.engine(model_revision="v1")
    kv = first.store(1)
    first.becomes("agrees")

    second = fleet.engine(model_revision="v2", chunk_size=CHUNK, fingerprint_refresh_secs=0.1)
    second.becomes("conflict")
    for _ in range(5):
        assert second.lookup(1) == 2
    assert torch.equal(second.retrieve(1)[1], kv)
    second.store(2)

    assert second.outcome("put", "stored") == 2
    assert second.conflicts("model_revision") == 1
    (line,) = lines(caplog, "model_revision is v1 in the bucket and v2 here")
    assert "it is used all the same (fingerprint: warn)" in line
    assert "docs/fingerprint.md" in line


def test_another_chunk_size_is_named_by_tokens_and_by_layout(fleet, caplog):
    fleet.engine().store(1)
    fleet.recorded()

    second = fleet.engine(chunk_size=2 * CHUNK)
    second.lookup(1)
    second.becomes("conflict")

    eventually(lambda: lines(caplog, "chunk_size is 64 in the bucket and 128 here", "layout is 2x2x64x16"))


def test_off_asks_and_writes_nothing(fleet, hub):
    fleet.engine(model_revision="v1").store(1)
    fleet.recorded()
    engine = fleet.engine(model_revision="v2", fingerprint="off")
    engine.store(2)

    assert engine.lookup(1) == 2
    assert engine.state() == "none"
    assert len(fleet.claims()) == 1


def test_a_read_only_engine_records_nothing(fleet, caplog):
    fleet.engine(fingerprint="off").store(1)
    reader = fleet.engine(role="read-only", model_revision="v1")
    assert reader.lookup(1) == 2
    reader.store(2, wait=False)
    reader.becomes("unrecorded")
    assert fleet.record() is None

    fleet.engine(model_revision="v2").store(3)
    fleet.recorded()
    another = fleet.engine(role="read-only", model_revision="v1")
    another.lookup(1)
    another.becomes("conflict")
    assert len(lines(caplog, "model_revision")) == 1
    assert len(fleet.claims()) == 1, "nor does it leave a trace"


def test_a_strict_reader_serves_nothing_that_nobody_recorded(fleet):
    fleet.engine(fingerprint="off").store(1)
    reader = fleet.engine(role="read-only", fingerprint="enforce")
    reader.becomes("unrecorded")

    assert reader.lookup(1) == 0
    assert reader.outcome("lookup", "fingerprint_unknown") >= 1


def test_what_an_operator_accepts_is_seen_without_a_restart(fleet):
    first = fleet.engine(model_revision="v1")
    first.store(1)
    first.becomes("agrees")
    second = fleet.engine(model_revision="v2", fingerprint="enforce", fingerprint_refresh_secs=0.5)
    second.lookup(1)
    second.becomes("conflict")
    record = fleet.recorded()

    accepted = record.having(record.variants[0].model_copy(update={"model_revision": "v2"}))
    upload(fleet.hub.endpoint, fleet.bucket, {RECORD: accepted.to_json()})

    eventually(lambda: second.lookup(1) == 2)


# --- the Hub ------------------------------------------------------------------------------------------------------


def test_a_hub_that_does_not_answer_keeps_no_engine_from_starting(fleet):
    fleet.engine(model_revision="v1").store(1)
    fleet.recorded()
    fleet.hub.control.add_fault(Fault(route="paths-info", status=500))
    loose = fleet.engine(model_revision="v2")
    strict = fleet.engine(model_revision="v1", fingerprint="enforce")
    assert strict.lookup(1) == 0
    assert {loose.state(), strict.state()} <= {"none", "unknown"}

    fleet.hub.control.clear_faults()

    eventually(lambda: strict.lookup(1) == 2)
    eventually(lambda: loose.lookup(1) + 1 and loose.state() == "conflict")


@pytest.mark.parametrize("fault", [{"items": ".hfbucket/"}, {"status": 403}])
def test_who_may_not_record_works_all_the_same(fleet, caplog, fault):
    fleet.engine(fingerprint="off").store(1)
    fleet.hub.control.add_fault(Fault(route="batch", **fault))
    engine = fleet.engine()

    engine.store(2, wait="items" in fault)
    eventually(lambda: lines(caplog, "was not recorded"))

    assert engine.lookup(1) == 2
    assert engine.retrieve(1)[0] == 2
    engine.becomes("unrecorded")
    assert fleet.record() is None


def test_under_enforce_who_may_not_record_stores_nothing(fleet, caplog):
    fleet.hub.control.add_fault(Fault(route="batch", items=".hfbucket/"))
    engine = fleet.engine(fingerprint="enforce")

    engine.store(1, wait=False)
    eventually(lambda: lines(caplog, "was not recorded", "so nothing is served or stored"))

    eventually(lambda: engine.outcome("put", "fingerprint_unknown") == 2)
    assert fleet.chunks() == []


@pytest.mark.parametrize("garbage", [b"garbage", b'{"schema": 9}', b""])
def test_garbage_in_the_place_of_a_record_is_said_and_left_alone(fleet, caplog, garbage):
    upload(fleet.hub.endpoint, fleet.bucket, {RECORD: garbage})
    loose = fleet.engine()
    loose.store(1)
    loose.becomes("unreadable")
    strict = fleet.engine(fingerprint="enforce")
    strict.becomes("unreadable")

    assert loose.lookup(1) == 2
    assert strict.lookup(1) == 0
    assert strict.outcome("lookup", "fingerprint_unknown") >= 1
    assert lines(caplog, loose.name, RECORD)
    assert download(fleet.hub.endpoint, fleet.bucket, RECORD) == garbage


def test_a_bucket_that_is_not_there_is_made_by_the_first_put_under_enforce_too(fleet):
    fleet.bucket = f"{fleet.bucket}-new"
    engine = fleet.engine(create_bucket_if_missing=True, fingerprint="enforce")
    engine.store(1, wait=False)
    engine.becomes("agrees")

    engine.store(1)

    assert len(fleet.chunks()) == 2


# --- beside others ---------------------------------------------------------------------------------------------------


def test_the_built_in_backend_lists_and_reads_the_same_prefix(fleet, tmp_path, monkeypatch):
    from huggingface_hub import constants
    from lmcache.v1.storage_backend.connector.hfbucket_connector import HFBucketConnector as BuiltIn

    from tests.support.lmcache_engine import CpuEngine

    first = fleet.engine(model_revision="v1")
    kv = first.store(1)
    eventually(lambda: len(fleet.claims()) == 1)  # of two that are made at one time one is lost until the next look
    fleet.engine(model_revision="v2").lookup(1)
    eventually(lambda: len(fleet.claims()) == 2)
    monkeypatch.setattr(constants, "ENDPOINT", fleet.hub.endpoint)
    path = fleet.config("hfbucket.built_in")
    path.write_text(path.read_text().replace("hfbucket_plugin.adapter", "").replace("HFBucketConnectorAdapter", ""))
    built_in = CpuEngine("built-in", path, layers=2, hidden=16, model=MODEL)
    try:
        (remote,) = built_in.remotes
        assert type(remote.connection._connector) is BuiltIn
        tokens = first.tokens(1, 2)
        assert built_in.lookup(tokens) == len(tokens)
        hit, found = built_in.retrieve(tokens)
        assert hit == len(tokens)
        assert torch.equal(found, kv)
        listed = asyncio.run_coroutine_threadsafe(remote.connection.list(), remote.loop).result(30)
        assert sorted(listed) == sorted(key.to_string() for key in built_in.keys(tokens))
    finally:
        built_in.close()


# vLLM's own way to a hash function and to the first hash of a chain (vllm/utils/hashing.py, vllm/v1/core/kv_cache_utils.py),
# which is where LMCache takes the seed from; vLLM itself is not installed here.
VLLM = {
    "vllm/utils/hashing.py": """
        import hashlib, pickle
        def sha256(value):
            return int.from_bytes(hashlib.sha256(pickle.dumps(value, protocol=5)).digest()[:8], "big")
        def get_hash_fn_by_name(name):
            if name == "builtin":
                return hash
            if name == "sha256":
                return sha256
            raise ValueError(name)
    """,
    "vllm/v1/core/kv_cache_utils.py": """
        import os
        NONE_HASH = None
        def init_none_hash(function):
            global NONE_HASH
            seed = os.getenv("PYTHONHASHSEED")
            NONE_HASH = int.from_bytes(os.urandom(7), "big") if seed is None else function(seed)
    """,
}

SEEDED = """
import pathlib, sys, time
sys.path[:0] = [{root!r}]
from tests.support.lmcache_engine import CpuEngine
from hfbucket_plugin.core.telemetry import CHUNKS, FINGERPRINT_STATE, MemorySink
tally = MemorySink()
import hfbucket_plugin.engine.classic as connector
connector.default_sink = lambda: tally
from tests.support.lmcache_engine import prompt
engine = CpuEngine("seeded", pathlib.Path(sys.argv[1]), layers=2, hidden=16, model={model!r})
first = engine.keys(prompt(1, 64))[0].to_string()
tokens = prompt(1, 128)
def state():
    return {{s for s in ("agrees", "conflict") if tally.get(FINGERPRINT_STATE, state=s)}}
end = time.monotonic() + 60
while not state() and time.monotonic() < end:
    engine.store(tokens, engine.random_kv(len(tokens), 1))
    engine.forget_local()
    time.sleep(0.05)
assert first == engine.keys(prompt(1, 64))[0].to_string(), "the engine's own hashes changed"
stored = tally.get(CHUNKS, operation="put", outcome="stored")
print("RESULT", *state(), int(stored), engine.lookup(tokens))
engine.close()
"""


def test_engines_with_other_hash_seeds_are_told_apart_and_nothing_crosses(fleet, tmp_path):
    for name, text in VLLM.items():
        path = tmp_path / "vllm-stub" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
        for parent in list(path.parents)[: name.count("/")]:
            (parent / "__init__.py").touch()
    script = SEEDED.format(root=str(ROOT), model=MODEL)
    config = fleet.config("hfbucket.seeded", fingerprint="enforce")
    found = []
    for seed in ("1", "2"):
        env = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": f"{tmp_path / 'vllm-stub'}:{ROOT}"}
        done = subprocess.run(
            [sys.executable, "-c", script, str(config)],
            capture_output=True,
            text=True,
            timeout=240,
            check=True,
            env=env,
        )
        found.append(next(line for line in done.stdout.splitlines() if line.startswith("RESULT")).split()[1:])
        reported = [line for line in (done.stdout + done.stderr).splitlines() if "fingerprint:" in line]

    assert found[0][0] == "agrees"
    assert found[1] == ["conflict", "0", "0"]
    assert any("hash_check (the seed, PYTHONHASHSEED) is" in line for line in reported)
    recorded, other = fleet.claims()
    assert {recorded.hash_seed_pinned, other.hash_seed_pinned} == {True}
    assert recorded.hash_check != other.hash_check
    assert PREFIX in RECORD
