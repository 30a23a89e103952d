"""plan, apply, run --dry-run and check, as far as they go without Ray."""

import datetime as dt
import json
import os

import pytest
from typer.testing import CliRunner

from hfbucket_plugin.errors import RefusedError
from tests.support.buckets import INSTANCE, KEY_PREFIX, MODEL, SECRET, classic_key, content, mp_key
from warmer.cli.app import app
from warmer.plan.plan_file import WarmPlanFile
from warmer.run import planned_request


@pytest.fixture
def stocked(warehouse):
    warehouse.put({classic_key(n): content(n, 100) for n in range(5)})
    warehouse.put({mp_key(n): content(n, 50) for n in range(2)})
    return warehouse


@pytest.fixture
def warmer(monkeypatch):
    """Runs a command in this process; returns its record, or with a code other than 0 the one line on stderr."""
    monkeypatch.setenv("WARM_TEST_TOKEN", SECRET)
    for variable in ("RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
        monkeypatch.delenv(variable, raising=False)

    def run(*arguments, code=0):
        done = CliRunner().invoke(app, [str(one) for one in arguments])
        assert done.exit_code == code, done.stderr
        assert SECRET not in done.stderr + done.stdout
        if code:
            assert done.stdout == ""
            lines = [line for line in done.stderr.splitlines() if "LMCache" not in line.split(":")[0]]
            (line,) = [line for line in lines if "are skipped" not in line]
            return line
        (line,) = done.stdout.splitlines()
        return json.loads(line)

    return run


def source(warehouse, *more):
    return ["--lmcache-config", warehouse.config, "--tier", "fs.warm", *more]


def keys(path):
    return [chunk.key for chunk in WarmPlanFile.open(path).chunks_from(0)]


def test_a_plan_is_written_for_people_and_for_apply(stocked, warmer, tmp_path):
    out = tmp_path / "plan.jsonl"
    record = warmer("plan", *source(stocked), "--model", MODEL, "--newest", "3", "--out", out)
    assert (record["event"], record["plan"], record["exit_code"]) == ("plan", str(out), 0)
    assert (record["selected"], record["selected_bytes"]) == (3, 300)
    assert record["skipped"] == {"other_kind": 2, "over_budget": 2}
    assert record["instance"] == INSTANCE  # the only one that the file declares
    assert len(keys(out)) == 3
    header = json.loads(out.read_text().splitlines()[0])
    assert header["warmer_plan"] == 1
    assert header["warm_up"]["choose"] == {"model": [MODEL], "newest": 3}
    assert sorted(path.name for path in tmp_path.glob("*plan*")) == ["plan.jsonl"]
    # Applied, it is bound to the same bucket and tiers again.
    again = warmer("apply", out, "--dry-run")
    assert (again["selected"], again["tiers"], again["bucket"]) == (3, ["fs.warm"], record["bucket"])


def test_a_plan_may_be_edited(stocked, warmer, tmp_path):
    out = tmp_path / "plan.jsonl"
    warmer("plan", *source(stocked), "--all", "--out", out)
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join([lines[0], *lines[2:4]]))
    record = warmer("apply", out, "--dry-run")
    assert (record["selected"], record["selected_bytes"]) == (2, 200)


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o000])
def test_a_plan_can_be_applied_whatever_the_umask_was(stocked, warmer, tmp_path, umask):
    out = tmp_path / "plan.jsonl"
    before = os.umask(umask)
    try:
        warmer("plan", *source(stocked), "--all", "--out", out)
    finally:
        os.umask(before)
    assert WarmPlanFile.open(out, ours=True).chunks == 5


def test_a_plan_takes_the_place_of_files_only_and_goes_where_a_link_leads(stocked, warmer, tmp_path):
    target, link, fifo = tmp_path / "target", tmp_path / "link", tmp_path / "fifo"
    link.symlink_to(target)
    os.mkfifo(fifo)
    warmer("plan", *source(stocked), "--all", "--out", link)
    assert (link.is_symlink(), len(keys(target))) == (True, 5)
    for out in (fifo, tmp_path, "", tmp_path / "none" / "plan", target / "plan"):
        assert "--out '" in (said := warmer("plan", *source(stocked), "--all", "--out", out, code=2))
        assert "cannot be written: " in said
    assert fifo.is_fifo()


@pytest.mark.parametrize("command", ["apply", "check"])
def test_a_plan_that_others_may_write_to_is_refused(stocked, warmer, tmp_path, command):
    out = tmp_path / "plan.jsonl"
    warmer("plan", *source(stocked), "--all", "--out", out)
    out.chmod(0o666)
    assert "others may write to it" in warmer(command, out, code=4)
    assert warmer("apply", out, "--dry-run")["selected"] == 5


@pytest.mark.parametrize("command", ["apply", "check"])
def test_a_plan_whose_header_names_a_report_is_refused_and_the_file_left_alone(stocked, warmer, tmp_path, command):
    out, victim = tmp_path / "plan.jsonl", tmp_path / "victim"
    victim.write_text("precious")
    warmer("plan", *source(stocked), "--all", "--out", out)
    head, *rest = out.read_text().splitlines()
    head = json.loads(head)
    head["warm_up"]["report"] = str(victim)
    out.write_text("\n".join([json.dumps(head), *rest]) + "\n")
    assert "warm_up of the header has report" in warmer(command, out, code=4)
    assert victim.read_text() == "precious"


def test_a_plan_with_a_token_or_more_chunks_than_were_planned_is_refused(stocked, warmer, tmp_path):
    out = tmp_path / "plan.jsonl"
    tier = json.dumps({"type": "fs", "base_path": "/x"})
    warmer("plan", "--l2-adapter", adapter(stocked), "--tier", tier, "--all", "--out", out)
    head, *rest = out.read_text().splitlines()
    out.write_text("\n".join([head, *rest, rest[0]]) + "\n")
    assert "2 were planned" in warmer("apply", out, code=4)
    head = json.loads(head)
    head["warm_up"]["source"]["l2_adapter"] = adapter(stocked, token="hf_planted")
    out.write_text("\n".join([json.dumps(head), *rest]) + "\n")
    assert "the header was changed" in warmer("apply", out, code=4)
    plan = WarmPlanFile(out)
    plan.header = head
    with pytest.raises(RefusedError, match="holds a token"):
        planned_request(plan)


@pytest.mark.parametrize(
    "change",
    [{"tiers": ["/etc"]}, {"filling": {"chown": "root:root"}}, {"address": "elsewhere:1"}, {"nodes": {"names": ["x"]}}],
)
def test_a_plan_whose_header_was_edited_is_refused(stocked, warmer, tmp_path, change):
    out = tmp_path / "plan.jsonl"
    warmer("plan", *source(stocked), "--all", "--out", out)
    head, *rest = out.read_text().splitlines()
    head = json.loads(head)
    head["warm_up"] |= change
    out.write_text("\n".join([json.dumps(head), *rest]) + "\n")
    for command in ("apply", "check"):
        assert "the header was changed after the plan was written" in warmer(command, out, code=4)


def test_a_dry_run_refuses_what_apply_refuses(stocked, warmer, tmp_path):
    out, header = tmp_path / "plan.jsonl", "remote_storage_plugin."
    warmer("plan", *source(stocked), "--all", "--out", out)
    stocked.extra = {f"{header}{INSTANCE}.bucket_handle": "hf://buckets/org/another/kv"}
    for more in (["--dry-run"], []):
        line = warmer("apply", out, "--lmcache-config", stocked.config, *more, code=2)
        assert "is hf://buckets/org/another/kv: make a new plan" in line


def test_a_dry_run_writes_nothing(stocked, warmer, hub):
    hub.control.reset_counters()
    record = warmer("run", *source(stocked, "--instance", INSTANCE), "--prefix", KEY_PREFIX, "--dry-run")
    assert (record["event"], record["selected"], record["selected_bytes"]) == ("plan", 5, 500)
    assert not stocked.tier.exists()
    assert hub.control.counters().route("xet-read-token").requests == 0


def test_nothing_said_is_refused_with_advice(stocked, warmer):
    line = warmer("run", *source(stocked), "--newest", "3", code=2)
    assert "--prefix" in line
    assert "--all" in line


def test_a_budget_too_small_for_the_first_chunk(stocked, warmer):
    assert "larger than --max-bytes" in warmer("run", *source(stocked), "--all", "--max-bytes", "99", code=4)


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (["--all", "--max-bytes", "5 potatoes"], 2, "--max-bytes (choose.max_bytes)"),
        (["--all", "--since", "24"], 2, "24h"),
        (["--all", "--l2-adapter", '{"type": "hfbucket"}'], 2, "one"),
        (["--all", "--instance", "hfbucket.eu"], 2, "hfbucket.eu"),
        (["--all", "--keys-from", "/no/such/file"], 2, "--keys-from '/no/such/file'"),
        (["--prompts", "/no/such/file"], 2, "--prompts '/no/such/file'"),
        (["--model", "org/none"], 4, "'model': ['org/none']"),
        (["--all", "--exclude", "*"], 4, "7 that were listed"),
        (["--model", MODEL, "--world-size", "2"], 4, "holds no chunk"),
        (["--all", "--tier", '{"type": "fs", "base_path": "/x"}'], 2, "fill them apart"),
    ],
)
def test_what_is_refused(stocked, warmer, more, code, said):
    assert said in warmer("run", *source(stocked), *more, code=code)


def test_without_a_tier_or_a_source(stocked, warmer):
    assert "--tier" in warmer("run", "--lmcache-config", stocked.config, "--all", code=2)
    assert "--lmcache-config" in warmer("run", "--tier", "fs.warm", "--all", code=2)


def adapter(warehouse, **more):
    handle = f"hf://buckets/{warehouse.bucket_id}/{warehouse.prefix}"
    params = {"bucket_handle": handle, "endpoint": warehouse.endpoint, "token_env": "WARM_TEST_TOKEN", **more}
    return json.dumps({"type": "plugin", "module_path": "hfbucket_plugin.l2_adapter", "adapter_params": params})


def test_mp_mode_takes_the_json_of_the_server(stocked, warmer, tmp_path):
    out = tmp_path / "plan.jsonl"
    tier = json.dumps({"type": "fs", "base_path": str(tmp_path / "mp")})
    record = warmer("plan", "--l2-adapter", adapter(stocked, token=SECRET), "--tier", tier, "--all", "--out", out)
    assert (record["takes"], record["instance"], record["skipped"]) == ("mp", "hfbucket", {"other_kind": 5})
    assert keys(out) == [mp_key(0), mp_key(1)]
    assert SECRET not in out.read_text()
    assert warmer("apply", out, "--dry-run")["selected"] == 2
    stocked.delete(mp_key(0)), stocked.delete(mp_key(1))
    line = warmer("run", "--l2-adapter", adapter(stocked), "--tier", tier, "--model", MODEL, code=4)
    assert "what was found has keys of the classic engine" in line


def test_an_inline_token_in_the_json_never_leaves(stocked, warmer, monkeypatch):
    monkeypatch.delenv("WARM_TEST_TOKEN")
    tier = json.dumps({"type": "fs", "base_path": "/x"})
    line = warmer("run", "--l2-adapter", adapter(stocked, token=SECRET), "--tier", tier, "--all", code=2)
    assert "WARM_TEST_TOKEN" in line


def test_prompts_in_mp_mode_in_their_order(stocked, warmer, tmp_path):
    from lmcache.v1.multiprocess.token_hasher import TokenHasher

    tokens = list(range(100))
    hashes = [value.hex() for value in TokenHasher(32, "blake3").compute_chunk_hashes(tokens)]
    wanted = [f"{MODEL}@01000100@0@{value}" for value in hashes]
    stocked.put({wanted[2]: b"third", wanted[0]: b"first"})
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "plan.jsonl"
    prompts.write_text(json.dumps({"token_ids": tokens, "model": MODEL}))
    tier = json.dumps({"type": "fs", "base_path": "/x"})
    chosen = ["--l2-adapter", adapter(stocked), "--tier", tier, "--prompts", prompts]
    record = warmer("plan", *chosen, "--chunk-size", "32", "--out", out)
    assert keys(out) == [wanted[0], wanted[2]]
    assert record["prompts"] == {"prompts": 1, "chunks": 3}
    assert "PYTHONHASHSEED" in warmer("plan", *chosen, "--chunk-size", "16", "--out", out, code=4)


def test_a_plan_of_another_bucket_or_kind_is_refused(stocked, warmer, tmp_path):
    out = tmp_path / "plan.jsonl"
    warmer("plan", *source(stocked), "--all", "--out", out)
    tier = json.dumps({"type": "fs", "base_path": "/x"})
    assert "keys of the classic engine" in warmer("apply", out, "--tier", tier, code=2)
    stocked.prefix = "kv/eu"
    assert stocked.config  # rewritten
    assert "make a new plan" in warmer("apply", out, code=2)
    assert "make a new plan" in warmer("check", out, code=2)


def test_what_is_no_plan(stocked, warmer, tmp_path):
    out = tmp_path / "plan.jsonl"
    assert "cannot be read" in warmer("apply", out, code=2)
    out.write_text("{}\n")
    assert "line 1" in warmer("apply", out, code=2)
    out.write_text('{"warmer_plan": 1, "warm_up": {"choose": {"modle": 1}}}\n')
    assert "modle" in warmer("apply", out, code=2)
    out.write_text("")
    assert "holds no chunk" in warmer("apply", out, *source(stocked), code=4)


def test_check_refuses_what_it_does_not_know(stocked, warmer):
    assert "--verify" in warmer("check", *source(stocked), "--all", "--verify", "luck", code=2)
    assert "holds no chunk" in warmer("check", *source(stocked), "--model", "org/none", code=4)


def test_a_warm_yaml_says_it_all(stocked, warmer, tmp_path):
    path = tmp_path / "warm.yaml"
    document = {
        "source": {"lmcache_config": str(stocked.config)},
        "tiers": ["fs.warm"],
        "choose": {"prefix": KEY_PREFIX},
    }
    path.write_text(json.dumps(document))
    assert warmer("run", "--config", path, "--dry-run")["selected"] == 5
    assert warmer("run", "--config", path, "--dry-run", "--newest", "2")["selected"] == 2
    document["choose"]["prefixes"] = "x"
    path.write_text(json.dumps(document))
    assert "did you mean 'prefix'" in warmer("run", "--config", path, "--dry-run", code=2)


@pytest.mark.parametrize("command", ["run", "plan", "apply", "check"])
def test_help_names_the_exit_codes(command):
    done = CliRunner().invoke(app, [command, "--help"])
    assert done.exit_code == 0
    assert "Exits" in done.stdout


@pytest.mark.parametrize("option", ["--report", "--report-html"])
@pytest.mark.parametrize("read", ["--keys-from", "--config", "--lmcache-config", "--prompts"])
def test_a_report_that_is_an_input_is_refused_before_it_is_opened(stocked, warmer, tmp_path, option, read):
    given = tmp_path / "given"
    texts = {
        "--keys-from": classic_key(1) + "\n",
        "--prompts": '{"token_ids": [1]}\n',
        "--config": json.dumps({"choose": {"all": True}}),
        "--lmcache-config": stocked.config.read_text(),
    }
    given.write_text(texts[read])
    arguments = (
        source(stocked, read, given) if read != "--lmcache-config" else [read, given, "--tier", "fs.warm", "--all"]
    )
    line = warmer("run", *arguments, option, given, code=2)
    assert option in line
    assert read in line
    assert given.read_text() == texts[read]


def test_a_report_in_a_configuration_is_not_emptied_by_a_run_that_is_refused(stocked, warmer, tmp_path):
    report, config = tmp_path / "report.jsonl", tmp_path / "warm.yaml"
    report.write_text("last\n")
    source_of = {"lmcache_config": str(stocked.config), "instance": INSTANCE}
    config.write_text(json.dumps({"source": source_of, "tiers": ["fs.warm"], "report": str(report)}))
    assert "nothing selected" in warmer("run", "--config", config, "--model", "org/none", code=4)
    assert report.read_text() == "last\n"


def test_since_counts_back_from_the_clock_of_the_hub(stocked, warmer, tmp_path, monkeypatch):
    """The chunks were put seconds ago, and this machine's clock is three days ahead."""

    class Ahead(dt.datetime):
        @classmethod
        def now(cls, tz=None):
            return dt.datetime.now(tz) + dt.timedelta(days=3)

    monkeypatch.setattr("warmer.run.datetime", Ahead)
    assert warmer("plan", *source(stocked), "--all", "--since", "2h", "--out", tmp_path / "plan")["selected"] == 5
