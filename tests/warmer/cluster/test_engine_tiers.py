"""Tiers in the memory of engines as users name them: what is taken, and what is refused with the reason."""

import json
import os
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from hfbucket_plugin.config.lmcache_yaml import EngineConfig
from hfbucket_plugin.core.keys import ClassicKey, MPKey
from hfbucket_plugin.errors import ConfigError, RefusedError
from hfbucket_plugin.tools.selection import ChunkRef
from warmer.cli.app import app
from warmer.node.engine_memory import StagingDirectory
from warmer.node.prompts import BATCH_PROMPTS, PromptFile, digest_of
from warmer.tiers import NodeInfo, named_tier
from warmer.tiers.local_cpu import EngineWorker, Loaded
from warmer.tiers.run_files import RunFiles

ADAPTER = json.dumps(
    {
        "type": "plugin",
        "module_path": "hfbucket_plugin.l2_adapter",
        "adapter_params": {"bucket_handle": "hf://buckets/org/kv"},
    }
)
HEAD = "remote_storage_plugin."
PLACE = NodeInfo("gpu-a", "id-1", {"port": "9000"})


def engine(extra=None, plugins=("fs.warm",), **engine):
    values = {"save_chunk_meta": False, f"{HEAD}fs.warm.base_path": "/mnt/{node_id}", **(extra or {})}
    return EngineConfig("lmcache.yaml", plugins, values, engine={"internal_api_server_enabled": True, **engine})


def test_l1_is_found_where_the_server_listens_by_default():
    tier = named_tier(None, "l1")
    assert (tier.name, tier.takes, tier.address(PLACE)) == ("l1:http://127.0.0.1:8080", MPKey, "http://127.0.0.1:8080")
    tier = named_tier(None, '{"type": "l1", "http": "http://{node_name}:{label:port}"}')
    assert tier.address(PLACE) == "http://gpu-a:9000"
    with pytest.raises(ConfigError, match="has no value for"):
        tier.address(NodeInfo("gpu-b"))


def test_workers_are_found_where_the_yaml_has_them():
    tier = named_tier(engine(), "local_cpu")
    assert (tier.takes, tier.address(PLACE, 0), tier.keep_staging) == (ClassicKey, "http://127.0.0.1:7000", False)
    # The only directory that engines are known to see, and a place of the worker's own in it.
    assert tier.staging_of(PLACE, 3).base_paths == (Path("/mnt/id-1/worker-3"),)
    tier = named_tier(
        engine(internal_api_server_port_start=8000, internal_api_server_host="0.0.0.0"),  # noqa: S104 - as users write it
        '{"type": "local_cpu", "staging": "/dev/shm/{worker}/{node_name}", "keep_staging": true}',
    )
    assert (tier.address(PLACE, 1), tier.keep_staging) == ("http://127.0.0.1:8002", True)
    assert tier.staging_of(PLACE, 1).base_paths == (Path("/dev/shm/1/gpu-a"),)  # noqa: S108 - nothing is written
    shaped = '{"type": "local_cpu", "staging": "/x", "kv_shape": "4,2,64,1,128", "host": "{node_name}"}'
    tier = named_tier(engine({"save_chunk_meta": True}), shaped)
    assert (tier.staging.layout.header.size, tier.address(PLACE, 0)) == (28, "http://gpu-a:7000")


@pytest.mark.parametrize(
    ("config", "text", "said"),
    [
        (None, '{"type": "l1", "htpp": "http://x"}', "unknown option 'htpp' .did you mean 'http'"),
        (None, '{"type": "l1", "http": "127.0.0.1:8080"}', "http must be the address"),
        (None, '{"type": "l1", "http": "http://{node}:80"}', "is no placeholder"),
        (None, "local_cpu", "no LMCache YAML is given"),
        (
            engine(internal_api_server_enabled=False),
            "local_cpu",
            "internal_api_server_enabled is not true in lmcache.yaml",
        ),
        (engine(local_cpu=False), "local_cpu", "local_cpu is off"),
        (engine(internal_api_server_socket_path_prefix="/run/x"), "local_cpu", "listen on no port"),
        (engine(internal_api_server_port_start="7"), "local_cpu", "must be a number"),
        (engine(plugins=()), "local_cpu", "declares 0 fs plugins"),
        (engine(plugins=("fs.a", "fs.b")), "local_cpu", "declares 2 fs plugins"),
        (engine({f"{HEAD}fs.warm.base_path": "/a,/b"}), "local_cpu", "several directories"),
        (engine(), '{"type": "local_cpu", "staging": "stage"}', "not absolute"),
        (engine(), '{"type": "local_cpu", "staging": ["/x"]}', "staging must be"),
        (engine(), '{"type": "local_cpu", "keep_staging": "no"}', "keep_staging must be"),
        (engine({"save_chunk_meta": True}), "local_cpu", "kv_shape"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(config, text, said):
    with pytest.raises(ConfigError, match=said):
        named_tier(config, text)


@pytest.fixture
def warmer(tmp_path, monkeypatch):
    """Runs a command that ends before Ray is needed, and returns what it says."""
    for variable in ("RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
        monkeypatch.delenv(variable, raising=False)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"token_ids": [1, 2, 3]}\n')
    extra = {
        "save_chunk_meta": False,
        f"{HEAD}fs.warm.base_path": "/mnt/kv",
        f"{HEAD}hfbucket.bucket_handle": "hf://buckets/org/kv",
    }
    yaml = {
        "remote_storage_plugins": ["fs.warm", "hfbucket"],
        "internal_api_server_enabled": True,
        "extra_config": extra,
    }
    (tmp_path / "lmcache.yaml").write_text(json.dumps(yaml))

    def run(name, *arguments, code=2):
        known = {"PROMPTS": str(prompts), "YAML": str(tmp_path / "lmcache.yaml"), "ADAPTER": ADAPTER}
        done = CliRunner().invoke(app, [name, *(known.get(one, one) for one in arguments)])
        assert done.exit_code == code, done.stderr
        assert (done.stdout == "") == (code != 0)
        return done.stderr if code else json.loads(done.stdout)

    return run


ASKED = ("--l2-adapter", "ADAPTER", "--tier", "l1", "--prompts", "PROMPTS")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--l2-adapter", "ADAPTER", "--tier", "l1", "--all", "--world-size", "1"), "give --prompts"),
        (ASKED, "give --world-size"),
        ((*ASKED, "--world-size", "1"), "line 1: an engine is asked for prompts of its model, and this one names none"),
        (("--lmcache-config", "YAML", *ASKED[2:], "--world-size", "1"), "an instance of the classic engine"),
        (("--lmcache-config", "YAML", "--tier", "fs.warm", *ASKED[2:], "--world-size", "1"), "fill them apart"),
        (("--l2-adapter", "ADAPTER", "--tier", "local_cpu", "--all"), "give --lmcache-config"),
        ((*ASKED, "--world-size", "1", "--wait-engine", "10"), "--wait-engine (limits.wait_engine): invalid duration '10'"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["run", "plan"])
def test_what_does_not_fit_is_refused(warmer, tmp_path, name, arguments, said):
    more = ("--out", str(tmp_path / "plan.jsonl")) if name == "plan" else ()
    assert said in warmer(name, *arguments, *more)


def test_what_engines_do_not_tell_cannot_be_checked(warmer):
    assert "cannot be checked" in warmer("check", *ASKED, "--world-size", "1", "--model", "m")
    assert "cannot be checked" in warmer("check", "--lmcache-config", "YAML", "--tier", "local_cpu", "--all")


def test_prompts_without_a_full_chunk_are_nothing_to_do(warmer):
    said = warmer("run", *ASKED, "--world-size", "1", "--model", "m", code=4)
    assert "1 prompts of the models that are asked for, and none of them a full chunk of 256 tokens" in said


def test_a_plan_of_prompts_tells_how_much_it_is_about(warmer):
    record = warmer("run", *ASKED, "--world-size", "1", "--model", "m", "--chunk-size", "1", "--dry-run", code=0)
    assert (record["selected"], record["prompts"]) == (3, {"prompts": 1, "chunks": 3})
    assert record["prompts_file"]["sha256"] == digest_of(Path(record["prompts_file"]["path"]))


def test_a_plan_that_does_not_know_its_prompts_is_not_loaded_by(warmer, tmp_path):
    choose = {"choose": {"prompts": str(tmp_path / "prompts.jsonl"), "world_size": 1, "model": ["m"]}}
    header = {"warmer_plan": 1, "takes": "mp", "warm_up": choose | {"source": {"l2_adapter": ADAPTER}}}
    plan = tmp_path / "plan.jsonl"
    plan.write_text(json.dumps(header) + "\n")
    assert "does not say of which prompts it was made" in warmer("apply", str(plan), "--tier", "l1")
    classic = header | {"takes": "classic", "prompts_file": {"sha256": digest_of(tmp_path / "prompts.jsonl")}}
    plan.write_text(json.dumps(classic) + "\n")
    assert "keys of the classic engine" in warmer("apply", str(plan), "--tier", "l1")


FEW_TOKENS = 100
lengths = st.lists(st.integers(0, FEW_TOKENS + 1), min_size=1, max_size=60)


@given(lengths, st.data())
@settings(max_examples=50)
def test_batches_are_the_prompts_in_their_order(tmp_path_factory, sizes, data):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    models = [data.draw(st.sampled_from(["a", "b", None])) for _ in sizes]
    lines = [
        {"token_ids": [7] * size} | ({} if model is None else {"model": model})
        for size, model in zip(sizes, models, strict=True)
    ]
    path.write_text("\n\n".join(json.dumps(line) for line in lines))

    with mock.patch("warmer.node.prompts.BATCH_TOKENS", FEW_TOKENS):
        found = PromptFile(path, ["a"], 4)

    wanted = [
        (2 * place + 1, size) for place, (size, model) in enumerate(zip(sizes, models, strict=True)) if model != "b"
    ]
    batches = [found.batch(index) for index in range(found.batches)]
    assert [(one.line, len(one.token_ids)) for batch in batches for one in batch] == wanted
    assert all(0 < len(batch) <= BATCH_PROMPTS for batch in batches)
    assert all(len(batch) == 1 or sum(len(one.token_ids) for one in batch) <= FEW_TOKENS for batch in batches)
    assert (found.prompts.total(), found.chunks.total()) == (len(wanted), sum(size // 4 for _, size in wanted))
    assert found.sha256 == digest_of(path)
    if batches:
        assert [found.batch(index) for index in reversed(range(found.batches))] == batches[::-1]


@pytest.mark.parametrize("change", ["shorter", "other"])
def test_prompts_that_change_meanwhile_are_not_taken_for_those_that_were_read(tmp_path, change):
    path = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"token_ids": [number] * 4}) + "\n" for number in range(10, 30)]
    path.write_text("".join(lines))
    found = PromptFile(path, ["m"], 4)
    changed = {"shorter": lines[:-1], "other": [*lines[:-1], lines[0]]}[change]

    path.write_text("".join(changed))

    assert found.batches == 2
    assert len(found.batch(0)) == BATCH_PROMPTS
    with pytest.raises(RefusedError, match="was changed after it was checked"):
        found.batch(1)


@pytest.mark.parametrize("change", ["longer", "replaced", "removed"])
def test_prompts_are_those_that_were_read_whatever_takes_their_place(tmp_path, change):
    path = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"token_ids": [number] * 4}) + "\n" for number in range(10, 30)]
    path.write_text("".join(lines))
    found = PromptFile(path, ["m"], 4)

    if change == "longer":
        path.write_text("".join([*lines, lines[0]]))
    else:
        path.unlink()
    if change == "replaced":
        path.write_text("".join(reversed(lines)))

    assert [prompt.token_ids[0] for index in range(2) for prompt in found.batch(index)] == list(range(10, 30))


@pytest.mark.parametrize(
    ("said", "failed"),
    [
        (Loaded(2, 2, ()), set()),
        (Loaded(1, 2, ("m@1@0@1@half",)), {"m@1@0@1@half"}),
        (Loaded(0, 0, ()), {"m@1@0@1@half", "m@1@0@2@half"}),  # it looks into another directory of that name
        (Loaded(1, 2, ()), {"m@1@0@1@half", "m@1@0@2@half"}),
    ],
)
def test_only_what_the_engine_says_it_has_loaded_is_loaded(tmp_path, monkeypatch, said, failed):
    monkeypatch.setattr("warmer.node.engine_memory.load", lambda *_, **__: said)
    declaration = named_tier(engine(), f'{{"type": "local_cpu", "staging": "{tmp_path}"}}').staging_of(PLACE, 0)
    stage = StagingDirectory(
        declaration, EngineWorker(0, 1, frozenset({0}), {}, 1000), "http://engine:7000", keep=False
    )
    chunks = [ChunkRef(f"m@1@0@{number}@half", "path", "0" * 64, 4) for number in (1, 2)]
    for chunk in chunks:
        draft = stage.draft(chunk.key, chunk.size)
        draft.lease.write(0, b"four")
        draft.publish()

    assert stage.load(chunks, 1.0).keys() == failed

    stage.close()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_run_that_died_leaves_no_files_that_were_staged(tmp_path):
    died, lives = RunFiles(tmp_path), RunFiles(tmp_path)
    for run in (died, lives):
        run.directory().mkdir()
        (run.directory() / "batch-1").mkdir()
        (run.directory() / "batch-1" / "chunk.data").write_bytes(b"x")
    died._lock, descriptor = None, died._lock  # as the kernel does it

    os.close(descriptor)
    (tmp_path / "kept.data").write_bytes(b"x")

    RunFiles(tmp_path).close()

    assert not died.directory().exists()
    assert (lives.directory() / "batch-1" / "chunk.data").exists()
    lives.close()
    assert [path.name for path in tmp_path.iterdir()] == ["kept.data"]
