"""The canary of a check. The engine here is a server that gives the answers that are to be forced. They are those of vLLM
0.30: one that is cold tells 0 cached tokens, and one that had a prompt before tells all its full chunks."""

import contextlib
import json
import socket
import threading

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from hfbucket_plugin.errors import ConfigError
from tests.support.buckets import INSTANCE, KEY_PREFIX, MODEL, SECRET, classic_key, command, content
from warmer.check.canary import Canary, ask_engines, full_chunk_tokens
from warmer.tiers import NodeInfo

CHUNK = 16
PLACES = [NodeInfo("node-a", "id-a", {"port": "1"}), NodeInfo("node-b", "id-b", {"port": "2"})]


class Never:
    requested = False


class Engine:
    """Answers as vLLM does: `cached` tells the cached tokens of a prompt's, None that it says nothing of them."""

    def __init__(self, cached, models=({"id": "served", "root": MODEL, "parent": None},), status=200):
        self.cached, self.models, self.status = cached, models, status
        self.asked, self.keys = [], []
        with contextlib.closing(socket.socket()) as one:
            one.bind(("127.0.0.1", 0))
            self.port = one.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        routes = [Route("/v1/models", self._models), Route("/v1/completions", self._complete, methods=["POST"])]
        config = uvicorn.Config(Starlette(routes=routes), port=self.port, log_level="error", lifespan="off")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    async def _models(self, _):
        return JSONResponse({"object": "list", "data": self.models})

    async def _complete(self, request):
        body = await request.json()
        self.asked.append(body)
        self.keys.append(request.headers.get("authorization"))
        if self.status != 200:
            return JSONResponse({"error": {"message": "the prompt is too long"}}, self.status)
        cached = self.cached(body["prompt"])
        details = {} if cached is None else {"prompt_tokens_details": {"cached_tokens": cached}}
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": 1, **details}
        return JSONResponse({"choices": [{"text": ""}], "usage": usage})

    def __enter__(self):
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()
            self._thread.join(0.01)
        return self

    def __exit__(self, *_):
        self._server.should_exit = True
        self._thread.join(20)


def all_chunks(prompt):
    return full_chunk_tokens(len(prompt), CHUNK)


@pytest.fixture
def prompts(tmp_path):
    """Two prompts with full chunks, and one without."""
    path = tmp_path / "prompts.jsonl"
    lengths = (40, 10, 33)
    path.write_text("".join(json.dumps({"token_ids": list(range(1, n + 1)), "model": MODEL}) + "\n" for n in lengths))
    return path


def ask(prompts, *engines, places=PLACES, **options):
    return ask_engines(Canary(prompts, tuple(engines), chunk_tokens=CHUNK, **options), places, Never)


@pytest.mark.parametrize(("length", "tokens"), [(0, 0), (1, 0), (16, 0), (17, 16), (32, 16), (33, 32), (48, 32)])
def test_the_last_token_is_always_computed(length, tokens):
    assert full_chunk_tokens(length, 16) == tokens


def test_engines_that_hit(prompts):
    with Engine(all_chunks) as one, Engine(lambda prompt: len(prompt) - 1) as other:
        found = ask(prompts, one.address, other.address)
        assert (found["exit_code"], found["share"], found["cold"]) == (0, 1.0, [])
        for engine, answered in zip((one, other), found["engines"], strict=True):
            assert answered == {
                "engine": engine.address, "prompts": 2, "too_short": 1, "tokens": 64, "cached_tokens": 64, "share": 1.0,
                "error": None,
            }  # fmt: skip
            # Each prompt once: asked a second time it would hit in the engine's own prefix cache.
            assert [body["prompt"][-1] for body in engine.asked] == [40, 33]
            assert {(body["model"], body["max_tokens"]) for body in engine.asked} == {("served", 1)}


def test_an_engine_that_answers_nonsense_is_told(prompts):
    with Engine(all_chunks, models=5) as engine:
        assert "tells no model" in ask(prompts, engine.address)["engines"][0]["error"]


def test_what_would_make_every_engine_warm_is_refused(prompts):
    with pytest.raises(ConfigError, match="is no share from 0 to 1"):
        Canary.read(prompts, ["http://engine:8000"], float("nan"), None)
    with pytest.raises(ConfigError, match="would stand in reports") as caught:
        Canary.read(prompts, [f"http://user:{SECRET}@engine:8000"], 0.9, None)
    assert SECRET not in str(caught.value)


def test_a_cold_prompt_is_named(prompts, caplog):
    with Engine(lambda prompt: 32 if len(prompt) == 40 else 16) as engine:
        found = ask(prompts, engine.address)
        assert (found["exit_code"], found["share"]) == (3, 0.5)
        assert found["cold"] == [{"engine": engine.address, "prompt": 3, "tokens": 32, "cached_tokens": 16}]
        assert f"engine {engine.address}: prompt 3: 16 of 32 tokens cached" in caplog.text
        assert ask(prompts, engine.address, require=0.5)["exit_code"] == 0


def test_an_older_engine_that_leaves_out_what_is_nothing_is_cold(prompts):
    with Engine(lambda prompt: 32 if len(prompt) == 40 else None) as engine:
        found = ask(prompts, engine.address)
    assert (found["exit_code"], [one["prompt"] for one in found["cold"]]) == (3, [3])


def test_an_engine_that_tells_no_cached_tokens_lacks_a_flag(prompts, caplog):
    with Engine(lambda _: None) as silent, Engine(all_chunks) as engine:
        alone = ask(prompts, silent.address)
        assert (alone["exit_code"], alone["cold"]) == (2, [])
        assert "start vLLM with --enable-prompt-tokens-details" in alone["engines"][0]["error"]
        assert "--enable-prompt-tokens-details" in caplog.text
        assert ask(prompts, silent.address, engine.address)["exit_code"] == 3


def test_an_engine_that_is_not_there(prompts):
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
        found = ask(prompts, address)
    assert (found["exit_code"], found["share"]) == (2, 0.0)
    assert found["engines"][0]["error"].startswith(f"GET {address}/v1/models: no answer: ")


def test_something_else_than_vllm(prompts):
    with Engine(all_chunks, models=()) as engine:
        assert "is this a vLLM server?" in ask(prompts, engine.address)["engines"][0]["error"]


@pytest.mark.parametrize("status", [400, 500, 503])
def test_a_prompt_that_is_not_answered_is_named(prompts, status):
    with Engine(all_chunks, status=status) as engine:
        error = ask(prompts, engine.address)["engines"][0]["error"]
    assert error.startswith(f"prompt 1: POST {engine.address}/v1/completions: {status} ")
    assert "too long" in error


def test_which_model_is_asked(prompts, tmp_path):
    unnamed = tmp_path / "unnamed.jsonl"
    unnamed.write_text(json.dumps({"token_ids": [1] * 40, "cache_salt": "tenant-7"}))
    base = {"id": "base", "root": "other/model", "parent": None}
    adapter = {"id": "adapter", "root": "adapters/x", "parent": "base"}
    with Engine(all_chunks, models=(base, adapter)) as engine:
        error = ask(prompts, engine.address)["engines"][0]["error"]
        assert f"does not serve '{MODEL}', the model of a prompt; it serves base, adapter" in error
        assert ask(unnamed, engine.address)["exit_code"] == 0
        assert (engine.asked[-1]["model"], engine.asked[-1]["cache_salt"]) == ("base", "tenant-7")
        engine.models = (base, base | {"id": "second"})
        assert "serves base, second: say in --canary which" in ask(unnamed, engine.address)["engines"][0]["error"]


def test_one_engine_a_node_and_each_once(prompts):
    with Engine(all_chunks) as engine:
        places = [NodeInfo("127.0.0.1", "id-a"), NodeInfo("localhost", "id-b"), NodeInfo("127.0.0.1", "id-c")]
        found = ask(prompts, f"http://{{node_name}}:{engine.port}", places=places)
        assert [one["engine"] for one in found["engines"]] == [
            f"http://127.0.0.1:{engine.port}",
            f"http://localhost:{engine.port}",
        ]
    with pytest.raises(ConfigError, match=r"has no value for \{label:rack\}"):
        ask(prompts, "http://{label:rack}:1")


def test_a_key_is_sent_and_never_told(prompts, monkeypatch, caplog):
    monkeypatch.setenv("ENGINE_KEY", SECRET)
    with Engine(all_chunks, status=500) as engine:
        found = ask(prompts, engine.address, key_env="ENGINE_KEY")
        assert engine.keys == [f"Bearer {SECRET}"]
    assert SECRET not in json.dumps(found) + caplog.text


def test_prompts_without_a_full_chunk_prove_nothing(prompts):
    with Engine(all_chunks) as engine:
        found = ask_engines(Canary(prompts, (engine.address,), chunk_tokens=64), PLACES, Never)
        assert engine.asked == []
    assert found["exit_code"] == 2
    assert "no prompt has a full chunk of 64 tokens" in found["engines"][0]["error"]


def test_a_canary_that_is_told_to_stop(prompts):
    class Now:
        requested = True

    with Engine(all_chunks) as engine:
        found = ask_engines(Canary(prompts, (engine.address,), chunk_tokens=CHUNK), PLACES, Now)
    assert found["exit_code"] == 5


def test_what_flags_must_say(prompts, tmp_path):
    assert Canary.read(None, [], 0.9, None) is None
    for one in ((prompts, []), (None, ["http://x:1"])):
        with pytest.raises(ConfigError, match="--canary and --engine go together"):
            Canary.read(*one, 0.9, None)
    with pytest.raises(ConfigError, match="is no placeholder"):
        Canary.read(prompts, ["http://{nod}:1"], 0.9, None)
    with pytest.raises(ConfigError, match="ENGINE_KEY is not set"):
        Canary.read(prompts, ["http://x:1"], 0.9, "ENGINE_KEY")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    with pytest.raises(ConfigError, match="holds no prompt"):
        Canary.read(empty, ["http://x:1"], 0.9, None)
    empty.write_text("{}")
    with pytest.raises(ConfigError, match=r"^--canary .* line 1: token_ids must be"):
        Canary.read(empty, ["http://x:1"], 0.9, None)


def test_a_check_asks_engines_only_where_the_tiers_are_warm(cluster, warehouse, prompts, tmp_path):
    warehouse.put({classic_key(n): content(n, 1000) for n in range(3)})
    document = json.loads(warehouse.config.read_text())
    config = tmp_path / "engine.yaml"
    config.write_text(json.dumps(document | {"chunk_size": CHUNK}))
    chosen = ["--lmcache-config", config, "--instance", INSTANCE, "--prefix", KEY_PREFIX, "--tier", "fs.warm"]

    def warmer(name, *more):
        arguments = [name, *map(str, chosen), "--address", cluster.address, *more]
        return command(*arguments, WARM_TEST_TOKEN=SECRET)

    page = tmp_path / "check.html"
    with Engine(all_chunks) as engine:
        asking = ("--canary", str(prompts), "--engine", engine.address)
        cold = warmer("check", *asking, "--report-html", str(page))
        assert (cold.code, cold.summary["canary"], engine.asked) == (3, None, [])
        assert "engines are not asked" in cold.stderr
        assert "The nodes are cold." in page.read_text()
        assert warmer("run").code == 0
        warm = warmer("check", *asking)
        assert (warm.code, warm.summary["result"]) == (0, "warm"), warm.stderr
        assert warm.summary["canary"]["engines"][0]["cached_tokens"] == 64
        engine.cached = lambda _: 0
        computed = warmer("check", *asking, "--verify", "length", "--report-html", str(page))
    assert (computed.code, computed.summary["result"], computed.summary["share"]) == (3, "cold", 1.0)
    assert [one["prompt"] for one in computed.summary["canary"]["cold"]] == [1, 3]
    assert f"engine {engine.address}: prompt 1: 0 of 32 tokens cached" in computed.stderr
    assert engine.address in page.read_text()
